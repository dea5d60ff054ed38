"""Count the instruction bundles of attention kernels on TPUs that need not be there, beside those of JAX's own kernels.

    python benchmarks/bundles.py --devices v5e-1 v6e-1 --output benchmarks/results/bundles.json

libtpu writes the final schedule of every kernel to a file, one very long instruction word (a bundle) per line, and
marks where the regions of the program begin and end. A bundle takes one cycle, unless the processor waits for memory.
So the bundles of the region that computes one tile compare kernels that are bound by arithmetic; they are not seconds.

A tile is 512 x 512, heads are 128 wide, in bfloat16; T = S = 4,096, causal, 8 heads. Per kernel:

    vmem      bytes of VMEM that the kernel takes; where the compiler does not say so, it is left out
    whole     bundles of the region for a tile whose pairs are all visible
    partial   those for a tile that the mask crosses; for kernels with one region for both, the same
    call      of all heads: tiles x their bundles, and the other regions: those of 60 bundles and more once per row
              of tiles, which is more often than some of them run, and shorter ones at each step

Nothing is run. Needs libtpu: requirements-accelerators.txt.
"""

import argparse
import collections
import functools
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

import devices

T, HEADS, WIDTH, BLOCK = 4096, 8, 128, 512
ROWS = T // BLOCK
WHOLE, PARTIAL = ROWS * (ROWS - 1) // 2, ROWS  # tiles of a causal mask
RESULTS = pathlib.Path(__file__).parent / "results/bundles.json"
_EVENT = re.compile(r"(Start/End empty|Start|End) region (\d+)")
# A kernel, its configuration, and how much of memory space 1, VMEM, it uses.
_MEMORY = re.compile(
    r'%(\w+)[.\d]* = [^\n]*custom_call_target="tpu_custom_call"(?:(?! = ).)*?'
    r'"used_scoped_memory_configs":\[\{"memory_space":"1","offset":"0","size":"(\d+)"',
    re.DOTALL,
)
_BUNDLE = re.compile(r"\s*(0x[0-9a-f]+|\d+)\s.*:.*\{")


def regions(text: str) -> list[int]:
    """Return the bundles of each region of a schedule, without those of regions inside it, in order of addresses."""
    inside, counts = [], collections.Counter()
    for line in text.splitlines():
        events = _EVENT.findall(line)
        inside += [region for event, region in events if event == "Start"]
        if _BUNDLE.match(line):
            counts[inside[-1] if inside else ""] += 1
        for event, region in events:
            if event == "End" and region in inside:
                inside.remove(region)
    return list(counts.values())


def vmem(text: str) -> dict[str, int]:
    """Return the bytes of VMEM that kernels take, by name, from the text of a compiled program."""
    return {name: int(size) for name, size in _MEMORY.findall(text)}


def summary(counts: list[int]) -> dict[str, int]:
    """Return the bundles of a kernel's tiles and of a whole call, from those of its regions in order of addresses."""
    largest = max(counts)
    tiles = [n for n, count in enumerate(counts) if count > largest / 2]
    partial, whole = counts[tiles[0]], counts[tiles[-1]]
    others = [count for n, count in enumerate(counts) if n not in tiles]
    # Those that begin and end a row or column of tiles are long, those of each step are short.
    per_row = sum(count for count in others if count >= 60)
    per_step = sum(others) - per_row
    call = WHOLE * whole + PARTIAL * partial + ROWS * per_row + (WHOLE + PARTIAL) * per_step
    return {"whole": whole, "partial": partial, "call": HEADS * call}


# The programs, which are made in a process whose libtpu writes its schedules


def _programs() -> dict:
    """Return functions of query, key and value by name: the gradient of each kernel's output."""
    import jax
    import jax.numpy as jnp

    import attn
    from attn import masks, positions, scores
    from attn.functional import pallas_tpu

    slope, table = jnp.float32(0.1), jnp.zeros(32)
    document = jnp.arange(T) // 600
    own = {
        "causal": (masks.causal(), None),
        "none": (None, None),
        "traced causal": (lambda: masks.causal(jnp.int32(0)), None),
        "window": (masks.sliding_window(1000, 0), None),
        "documents": (masks.segments(document, document) & masks.causal(), None),
        "own mask": (masks.causal() & (lambda i, j: (i - j) % 3 != 1), None),
        "ALiBi": (masks.causal(), lambda slope, table: lambda s, i, j: s - slope * jnp.abs(i - j)),
        "soft cap": (masks.causal(), lambda slope, table: scores.softcap(slope)),
        "T5's buckets": (
            masks.causal(),
            lambda slope, table: lambda s, i, j: s + table[positions.relative_buckets(j - i)],
        ),
    }

    def gradient(mask, score, captured, separate, query, key, value):
        def total(query, key, value, captured):
            given = mask() if callable(mask) and not isinstance(mask, attn.functional.masks.Mask) else mask
            out = attn.multi_head_attention(
                *(jnp.moveaxis(x, 0, 1) for x in (query, key, value)),
                mask=given,
                score=score and score(*captured),
                implementation="pallas_tpu",
            )
            return jnp.sum(out.astype(jnp.float32))

        memory = pallas_tpu._MEMORY_OF_BOTH
        try:
            pallas_tpu._MEMORY_OF_BOTH = 0 if separate else memory
            return jax.grad(total, (0, 1, 2, 3) if score else (0, 1, 2))(query, key, value, captured)
        finally:
            pallas_tpu._MEMORY_OF_BOTH = memory

    programs = {}
    for name, (mask, score) in own.items():
        programs[name] = functools.partial(gradient, mask, score, (slope, table), False)
    programs["causal, separate"] = functools.partial(gradient, masks.causal(), None, (slope, table), True)
    return programs | {"splash": _splash(False), "splash, fused": _splash(True), "flash": _flash()}


def _splash(fused: bool):
    """Return the gradient of JAX's splash attention, whose backward pass is one kernel or two."""
    import jax
    import jax.numpy as jnp
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    def gradient(query, key, value):
        names = ("block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute")
        names += () if fused else ("block_q_dq", "block_kv_dq")
        sizes = kernels.BlockSizes(**dict.fromkeys(names, BLOCK), use_fused_bwd_kernel=fused)
        mask = masks.MultiHeadMask([masks.CausalMask((T, T))] * HEADS)
        attend = kernels.make_splash_mha(mask=mask, block_sizes=sizes, head_shards=1, q_seq_shards=1)
        return jax.grad(lambda *x: jnp.sum(attend(*x).astype(jnp.float32)), (0, 1, 2))(query, key, value)

    return gradient


def _flash():
    """Return the gradient of JAX's flash attention."""
    import dataclasses

    import jax
    import jax.numpy as jnp
    from jax.experimental.pallas.ops.tpu import flash_attention as flash

    names = [field.name for field in dataclasses.fields(flash.BlockSizes) if field.name != "block_b"]
    sizes = flash.BlockSizes(**dict.fromkeys(names, BLOCK), block_b=1)

    def gradient(query, key, value):
        def total(*arrays):
            out = flash.flash_attention(*(x[None] for x in arrays), causal=True, block_sizes=sizes)
            return jnp.sum(out.astype(jnp.float32))

        return jax.grad(total, (0, 1, 2))(query, key, value)

    return gradient


# Names of our kernels and of JAX's, and what they compute.
_KERNELS = {
    "attn_forward": "forward",
    "attn_backward_rows": "dq",
    "attn_backward_columns": "dk, dv",
    "attn_backward_both": "backward",
    "splash_mha_fwd_residuals": "forward",
    "splash_mha_dq_no_residuals": "dq",
    "splash_mha_dkv_no_residuals": "dk, dv",
    "jvp_jit_flash_attention": "forward",
    "flash_mha_bwd_dq": "dq",
    "flash_mha_bwd_dkv": "dk, dv",
}


def _count_in_this_process(device: str, folder: pathlib.Path, only: list[str] | None) -> dict:
    """Compile the programs, and count what libtpu writes into the folder."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    devices.for_no_device()
    mesh = devices.mesh_of(device)
    sharding = NamedSharding(mesh, PartitionSpec())
    x = jax.ShapeDtypeStruct((HEADS, T, WIDTH), jnp.bfloat16, sharding=sharding)
    found, before = {}, set()
    for name, function in _programs().items():
        if only and name not in only:
            continue
        program = devices.compiled(jax.jit(function), x, x, x, mesh=mesh)
        files = {path for path in folder.glob("*-final_bundles.txt") if "schedule" not in path.name}
        kernels, memory = {}, vmem(program.as_text())
        for path in sorted(files - before):
            start = next((start for start in _KERNELS if f"-{start}" in path.name), None)
            if start is not None:
                kind = "backward" if start.endswith("dkv_no_residuals") and name == "splash, fused" else _KERNELS[start]
                kernels[kind] = summary(regions(path.read_text()))
                kernels[kind] |= next(({"vmem": size} for each, size in memory.items() if each.startswith(start)), {})
        found[name] = {"kernels": kernels, "temporaries": devices.memory(program)["temporaries"]}
        before |= files
        print(f"{device} {name}: {kernels}", file=sys.stderr, flush=True)
    return found


def count(device: str, only: list[str] | None = None) -> dict:
    """Return the bundles of every program on a device: {program: {"kernels": {kernel: summary}, ...}}.

    It takes a process of its own, since libtpu reads its flags once.
    """
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        flags += " --xla_jf_dump_llo_pass_label_regex=.*final_bundles.*"
        command = [sys.executable, __file__, "--child", folder, "--devices", device]
        command += ["--only", *only] if only else []
        here = pathlib.Path(__file__).resolve().parent
        paths = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
        environment = os.environ | {"LIBTPU_INIT_ARGS": flags, "PYTHONPATH": paths, "JAX_PLATFORMS": "cpu"}
        done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def main():
    """Count on every device, print a table, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    chips = [name for name, target in devices.DEVICES.items() if target.platform == "tpu" and name.endswith("-1")]
    names = list(_programs())
    parser.add_argument("--devices", nargs="+", default=["v5e-1", "v6e-1"], choices=chips, help="TPUs to count for.")
    parser.add_argument(
        "--only", nargs="+", choices=names, metavar="PROGRAM", help=f"Count only some of: {', '.join(names)}."
    )
    parser.add_argument("--output", type=pathlib.Path, default=RESULTS, help="Write the counts to this JSON file.")
    parser.add_argument("--child", type=pathlib.Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        print(json.dumps(_count_in_this_process(arguments.devices[0], arguments.child, arguments.only)))
        return
    if absent := devices.absent(arguments.devices):
        parser.error("; ".join(absent))
    found = {device: count(device, arguments.only) for device in arguments.devices}
    for device, programs in found.items():
        for name, program in programs.items():
            for kernel, each in program["kernels"].items():
                print(
                    f"{device:6} {name:18} {kernel:9} whole {each['whole']:5} partial {each['partial']:5} "
                    f"call {each['call']:9,}"
                )
    arguments.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
