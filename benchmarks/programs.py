"""Compile the programs of training and decoding for TPUs and GPUs that this machine does not have.

    python benchmarks/programs.py --configs reverse lstm --devices v5e-4 h100-8
    python benchmarks/programs.py                     # every config for every device: hours
    python benchmarks/programs.py --configs reverse --devices v5e-4 v5e-16 v5e-64 v5e-256 v4-4 tpu7x-4 a100-8 b200-8

Prints one line per program: seconds to compile, by the clock and of all threads; the memory on one device; the
communication between devices. Nothing is run. Needs requirements-accelerators.txt. Adds the results to
benchmarks/results/programs.json.
"""

import argparse
import importlib.metadata
import json
import pathlib
import sys
import tempfile
import time
from typing import Any

import devices
import jax
import spelling
from jax.sharding import Mesh
from machine import describe

from attn.tasks.generated import Generated
from attn.tasks.stored import Stored
from attn.training import data as training_data
from attn.training.config import Config
from attn.training.evaluation import batch_sizes, build_programs
from attn.training.flags import load_config
from attn.training.meshes import tokens_like
from attn.training.state import initial_state, model_structure
from attn.training.steps import arguments_of, build_step_programs

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "programs.json"
CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.py") if "def get_config" in path.read_text())
TARGETS = ("v5e-1", "v5e-4", "v5e-8", "v5e-16", "v5p-4", "v6e-4", "h100-1", "h100-8")
_PAIRS = 2_000  # pairs of the file for configs/pairs.py; only their lengths and letters matter


def load(config: str, changes: dict[str, str] | None = None) -> tuple[Config, Generated | Stored]:
    """Load a config of the folder `configs`, with changes as on the command line, and its data."""
    with tempfile.TemporaryDirectory() as folder:
        changes = dict(changes or {})
        if config == "pairs":
            changes["data.path"] = f"{folder}/pairs.tsv"
            spelling.write(pathlib.Path(changes["data.path"]), _PAIRS, seed=0)
        loaded = load_config(str(ROOT / f"configs/{config}.py"), changes)
        return loaded, training_data.load(loaded)


def programs_of(config: Config, data: Generated | Stored, mesh: Mesh) -> dict[str, tuple[Any, tuple]]:
    """Return the jitted programs of a run with the shapes of their arguments, by name.

    They are the four of a training step, and decoding of the longest sources: greedily, and with a beam if the config
    has one.
    """
    state = jax.eval_shape(lambda: initial_state(config, data.vocabulary))
    steps = build_step_programs(config, data, mesh)
    arguments = arguments_of(steps, config, data, mesh, state)
    programs = {name: (getattr(steps, name), shapes) for name, shapes in arguments.items()}
    params, _ = arguments["pack"]  # with their sharding
    graphdef, _ = model_structure(config, data.vocabulary)
    for width in sorted({1, config.evaluation.beam_width}):
        most = data.longest_question, config.evaluation.batch_size
        longest, size = max(batch_sizes(config, data.vocabulary, *most, mesh, width).items())
        decode, _ = build_programs(data.vocabulary, graphdef, mesh, width)
        name = "decode" if width == 1 else f"decode_beam_{width}"
        programs[name] = (decode, (params, tokens_like(size, longest, mesh)))
    return programs


def measure(function, arguments: tuple, mesh: Mesh) -> dict:
    """Compile a program; return seconds, bytes and communication, or the compiler's error."""
    start, cpu_start = time.perf_counter(), time.process_time()
    try:
        program = devices.compiled(function, *arguments, mesh=mesh)
    except jax.errors.JaxRuntimeError as error:
        return {"error": str(error).splitlines()[0]}
    return {
        "seconds": round(time.perf_counter() - start, 1),
        "cpu_seconds": round(time.process_time() - cpu_start, 1),  # of all threads; other programs change it less
        **devices.memory(program),
        "collectives": {kind: vars(each) for kind, each in devices.collectives(program.as_text()).items()},
    }


def line(config: str, device: str, program: str, row: dict) -> str:
    """Return a row of the table."""
    words = f"{config:<15} {device:<8} {program:<14}"
    if "error" in row:
        return f"{words} {row['error']}"
    mib = " ".join(f"{row[name] / 2**20:>9.1f}" for name in ("code", "temporaries", "peak"))
    sent = ", ".join(f"{c['count']} {kind} {c['bytes']:,} bytes" for kind, c in row["collectives"].items())
    return f"{words} {row['seconds']:>7.1f} {row['cpu_seconds']:>7.1f} {mib}  {sent or 'none'}"


def versions() -> dict[str, str]:
    """Return the versions of the compilers."""
    packages = ("jax", "jaxlib", "libtpu", "jax-cuda13-plugin", "nvidia-cuda-nvcc")
    installed = {distribution.metadata["Name"] for distribution in importlib.metadata.distributions()}
    return {package: importlib.metadata.version(package) for package in packages if package in installed}


def main() -> int:
    """Compile, print a line per program, and add the results to the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--configs", nargs="+", default=CONFIGS, choices=CONFIGS, help="Configs to compile.")
    parser.add_argument(
        "--devices", nargs="+", default=TARGETS, choices=devices.DEVICES, help="Devices to compile for."
    )
    parser.add_argument("--programs", nargs="+", help="Names of programs, such as advance. Default: all.")
    parser.add_argument("--output", type=pathlib.Path, default=RESULTS, help="JSON file to add the results to.")
    arguments = parser.parse_args()
    if absent := devices.absent(arguments.devices):
        print(*absent, sep="\n", file=sys.stderr)
        return 2
    devices.for_no_device()
    results = json.loads(arguments.output.read_text()) if arguments.output.exists() else {"programs": {}}
    columns = " ".join(f"{name:>9}" for name in ("code", "temp", "peak"))
    print(f"{'config':<15} {'devices':<8} {'program':<14} {'seconds':>7} {'CPU':>7} {columns} MiB")
    for config in arguments.configs:
        loaded = load(config)
        for device in arguments.devices:
            mesh = devices.mesh_of(device)
            for name, (function, shapes) in programs_of(*loaded, mesh).items():
                if arguments.programs is not None and name not in arguments.programs:
                    continue
                row = measure(function, shapes, mesh)
                print(line(config, device, name, row), flush=True)
                results["programs"].setdefault(config, {}).setdefault(device, {})[name] = row
            results |= {"machine": describe(), "versions": versions()}
            arguments.output.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
