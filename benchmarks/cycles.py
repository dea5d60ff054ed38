"""Count what the compilers of a TPU and a GPU estimate for a training step of an LSTM and of a Transformer.

    python benchmarks/cycles.py
    python benchmarks/cycles.py --devices v5e-1 --lengths 64 512 --output /tmp/counts.json

The models are those of the walkthrough's claim "parallel", with about as many parameters, on batches of as many tokens:
2,048 as the claim times them, so that the longest batch is one string, and 16,384, which fill a device better. The
program is `advance` of attn/training/steps.py with one step: gradient and optimizer. "Transformer in blocks" is the
same model as attn runs it where T is long: its attention goes block by block, in a loop, which saves memory.

Prints one line per program:

    operations   that run one after another: kernels of a GPU
    cycles       the compiler's estimate of them, see benchmarks/estimates.py
    inside       the same without what it adds for starting an operation, as it does for a TPU

These are counts: nothing is run, and no memory waits, stalls or launches of kernels are in them. The GPU's compiler
chooses its products without measuring them. Needs requirements-accelerators.txt; all programs take half an hour of a
core. The results are written after each program, and those that are there already are not counted again. By default
they are the package's data, which `attn walkthrough` shows.
"""

import argparse
import json
import pathlib
import sys
import time

import devices
import estimates
import jax
import jax.numpy as jnp
import programs
from command_line import Parser, output_file
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from attn.functional import blockwise
from attn.studies.jobs import Settings
from attn.studies.walkthrough import parallel
from attn.tasks.generated import Generated
from attn.training.folders import write_whole
from attn.training.state import initial_state
from attn.training.steps import arguments_of, build_step_programs

LENGTHS = (64, 128, 256, 512, 1_024, 2_048)
TOKENS = (parallel.TOKENS, 16_384)
BLOCKS = "Transformer in blocks"


def models() -> dict[str, Settings]:
    """Return the settings of the models of the claim, and of the Transformer as attn runs it at long lengths."""
    transformer = {"model": {"name": "transformer", "implementation": "blockwise"}}
    return {**parallel.models(), BLOCKS: transformer}


def count(settings: Settings, length: int, batch: int, mesh: Mesh, start: float) -> estimates.Estimate:
    """Compile a training step, and return the compiler's estimate."""
    config = parallel.step_config(settings, length, batch)
    data = Generated(config.task)
    state = jax.eval_shape(lambda: initial_state(config, data.vocabulary))
    steps = build_step_programs(config, data, mesh)
    shapes = arguments_of(steps, config, data, mesh, state)["advance"]
    return estimates.estimate(text_of(steps.advance, shapes, mesh), start)


def text_of(function, shapes: tuple, mesh: Mesh) -> str:
    """Compile a jitted function for a device, and return the program's text with the estimates."""
    options = estimates.GPU if mesh.devices.flat[0].platform != "tpu" else None
    with jax.set_mesh(mesh):
        return function.lower(*shapes).compile(options).as_text()


def start_of(mesh: Mesh) -> float:
    """Return the cycles that the compiler adds for starting an operation: its estimate of adding 1 to 128 numbers.

    For a GPU it adds nothing.
    """
    if mesh.devices.flat[0].platform != "tpu":
        return 0.0
    x = jax.ShapeDtypeStruct((128,), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))
    return estimates.estimate(text_of(jax.jit(lambda x: x + 1), (x,), mesh)).cycles


def load(path: pathlib.Path) -> dict:
    """Return the results in a file, to be continued; new ones if there is no file.

    Raises:
      ValueError: the file is of other compilers or models, or is not a file of counts.
    """
    new = {
        "versions": programs.versions(),
        "models": {name: parallel.described(settings) for name, settings in models().items()},
        "start": {},
        "rows": [],
    }
    if not path.exists():
        return new
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: is not JSON ({error}); delete it or choose another --output") from None
    for what in ("versions", "models"):
        if not isinstance(found, dict) or found.get(what) != new[what]:
            raise ValueError(f"{path}: was counted with other {what}; delete it or choose another --output")
    return found


def main() -> int:
    """Count, print a line per program, and write the results."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = list(parallel.DEVICES)
    parser.add_argument("--devices", nargs="+", default=names, choices=names, help="Devices to compile for.")
    parser.add_argument(
        "--lengths", nargs="+", type=int, default=LENGTHS, choices=LENGTHS, help="Symbols of source and target."
    )
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS, choices=TOKENS, help="Symbols of a batch.")
    parser.add_argument("--output", type=output_file, default=parallel.COUNTS, help="JSON file to add the counts to.")
    arguments = parser.parse_args()
    if absent := devices.absent(arguments.devices):
        print(*absent, sep="\n", file=sys.stderr)
        return 2
    try:
        results = load(arguments.output)
    except ValueError as error:
        parser.error(str(error))
    devices.for_no_device()
    print(
        f"{'device':<7} {'model':<21} {'T':>5} {'batch':>5} {'operations':>10} {'cycles':>13} {'inside':>13} {'s':>4}"
    )
    for row in rows_of(arguments):
        if not any(row.items() <= each.items() for each in results["rows"]):
            add(results, row)
            write_whole(arguments.output, as_text(results))
    return 0


def rows_of(arguments: argparse.Namespace) -> list[dict]:
    """Return what to count. Blocks are counted only where attn would choose them."""
    return [
        {"device": device, "model": model, "length": length, "tokens": tokens, "batch": max(1, tokens // length)}
        for tokens in arguments.tokens
        for length in arguments.lengths
        for device in arguments.devices
        for model in models()
        if model != BLOCKS or length**2 > blockwise.WORTHWHILE_PAIRS
    ]


def add(results: dict, row: dict):
    """Count one program, print its line and add it to the results."""
    began = time.perf_counter()
    mesh = devices.mesh_of(row["device"])
    start = results["start"].setdefault(row["device"], start_of(mesh))
    found = count(models()[row["model"]], row["length"], row["batch"], mesh, start)
    results["rows"].append({**row, **found._asdict(), "cycles": round(found.cycles), "inside": round(found.inside)})
    print(
        f"{row['device']:<7} {row['model']:<21} {row['length']:>5} {row['batch']:>5} {found.operations:>10,} "
        f"{found.cycles:>13,.0f} {found.inside:>13,.0f} {time.perf_counter() - began:>4.0f}",
        flush=True,
    )


def as_text(results: dict) -> str:
    """Return the results as JSON, one line per program."""
    head = json.dumps({name: value for name, value in results.items() if name != "rows"}, indent=1)
    rows = ",\n  ".join(map(json.dumps, results["rows"]))
    return f'{head.removesuffix("}").rstrip()},\n "rows": [\n  {rows}\n ]\n}}\n'


if __name__ == "__main__":
    sys.exit(main())
