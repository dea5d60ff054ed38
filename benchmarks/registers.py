"""Count what the kernels for NVIDIA GPUs take of a processor: registers, spills and shared memory, without a GPU.

    python benchmarks/registers.py --devices h100-1 a100-1 b200-1

XLA writes the kernels as PTX, and NVIDIA's assembler reports what they need. Per kernel:

    registers   per thread, of at most 255
    spills      bytes per thread of registers that did not fit and are in memory: 0 is the aim
    shared      bytes of shared memory per program
    threads     of a program

Nothing is run. Needs requirements-accelerators.txt; another version of the assembler counts otherwise.
"""

import argparse
import functools
import importlib.util
import json
import pathlib
import re
import subprocess
import sys
import tempfile

import devices
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.tree_util import Partial

import attn
from attn import masks, scores
from attn.functional import pallas_gpu
from attn.functional.contract import Call

T, N = 2048, 4
GPUS, WIDTHS, DTYPES = ("h100-1", "a100-1", "b200-1"), (64, 128), ("bfloat16", "float32")
RESULTS = pathlib.Path(__file__).parent / "results/registers.json"
KERNELS = {"attn_forward_rows": "forward", "attn_backward_rows": "dq", "attn_backward_columns": "dk, dv"}


def _t5(table, s, i, j):
    return s + table[attn.positions.relative_buckets(j - i)]


# Mask and score from arrays that a program gets, some of which are differentiated.
CASES = {
    "none": lambda floats, ids: (None, None),
    "causal": lambda floats, ids: (masks.causal(), None),
    "window": lambda floats, ids: (masks.sliding_window(256, 0), None),
    "documents": lambda floats, ids: (masks.segments(ids, ids) & masks.causal(), None),
    "ALiBi": lambda floats, ids: (masks.causal(), attn.per_head(scores.alibi(floats["slopes"]))),
    "soft cap": lambda floats, ids: (masks.causal(), scores.softcap(floats["cap"])),
    "T5's buckets": lambda floats, ids: (masks.causal(), scores.function(Partial(_t5, floats["table"]))),
}
_ENTRY = re.compile(r"\.entry (attn_\w+)\(")
_TARGET = re.compile(r"^\.target (\w+)", re.MULTILINE)
_REPORT = re.compile(r"(\d+) bytes spill stores.*?Used (\d+) registers", re.DOTALL)
_LAUNCH = re.compile(r"(attn_\w+) grid: \[[\d, ]+\] threads: \[(\d+), 1, 1\]\s+shared_memory: (\d+) bytes")


def measure(case: str, width: int, dtype: str, mesh: Mesh) -> dict[str, dict[str, int]]:
    """Compile the gradient of a case, and count what each of its kernels takes: {kernel: {"registers": ..., ...}}."""

    def shape(*sizes, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=NamedSharding(mesh, PartitionSpec()))

    def loss(floats, query, key, value, ids):
        mask, score = CASES[case](floats, ids)
        out, _ = pallas_gpu.attend(Call(query, key, value, mask, score, 0.1))
        return jnp.sum(out.astype(jnp.float32))

    floats = {"slopes": shape(N), "cap": shape(), "table": shape(32)}
    arrays = [shape(T, N, width, dtype=dtype)] * 3
    with jax.set_mesh(mesh), tempfile.TemporaryDirectory() as folder:
        lowered = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3))).lower(floats, *arrays, shape(T, dtype=jnp.int32))
        lowered.compile({"xla_dump_to": folder})
        return _read(pathlib.Path(folder))


def _read(folder: pathlib.Path) -> dict[str, dict[str, int]]:
    """Read what XLA has written about the kernels of one program."""
    found = {}
    for path in folder.glob("*.ptx"):
        text = path.read_text()
        if (entry := _ENTRY.search(text)) is not None:
            command = [_assembler(), "-v", f"-arch={_TARGET.search(text)[1]}", str(path), "-o", "/dev/null"]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            spills, registers = map(int, _REPORT.search(done.stderr).groups())
            found[KERNELS[entry[1]]] = {"registers": registers, "spills": spills}
    (launches,) = folder.glob("*.thunk_sequence.txt")
    for name, threads, shared in _LAUNCH.findall(launches.read_text()):
        found[KERNELS[name]] |= {"threads": int(threads), "shared": int(shared)}
    return {kernel: found[kernel] for kernel in KERNELS.values()}


@functools.cache
def _assembler() -> str:
    """Return the path of NVIDIA's assembler, the one that XLA takes."""
    (package,) = importlib.util.find_spec("nvidia.cu13").submodule_search_locations
    return str(pathlib.Path(package) / "bin/ptxas")


def main() -> int:
    """Count, print a line per kernel, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", nargs="+", default=GPUS, choices=GPUS, help="GPUs to compile for.")
    parser.add_argument("--output", type=pathlib.Path, default=RESULTS, help="Add the counts to this JSON file.")
    arguments = parser.parse_args()
    if absent := devices.absent(arguments.devices):
        print(*absent, sep="\n", file=sys.stderr)
        return 2
    devices.for_no_device()
    found = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
    print(f"{'device':<7} {'dtype':<8} {'width':>5} {'case':<12} {'kernel':<7} registers spills shared threads")
    for device in arguments.devices:
        mesh = devices.mesh_of(device)
        for dtype in DTYPES:
            for width in WIDTHS:
                for case in CASES:
                    kernels = measure(case, width, dtype, mesh)
                    found.setdefault(device, {}).setdefault(dtype, {}).setdefault(str(width), {})[case] = kernels
                    for kernel, each in kernels.items():
                        numbers = f"{each['registers']:9} {each['spills']:6} {each['shared']:6} {each['threads']:7}"
                        print(f"{device:<7} {dtype:<8} {width:5} {case:<12} {kernel:<7} {numbers}", flush=True)
        arguments.output.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
