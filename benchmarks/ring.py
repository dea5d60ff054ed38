"""Measure the memory of ring attention from its compiled program, beside a loop that JAX differentiates.

    python benchmarks/ring.py
    python benchmarks/ring.py --topology v5e:2x2 v5e:4x4 v5e:8x8 --output benchmarks/results/ring.json

Compiles causal attention of a bfloat16 sequence, 8 heads of 128, and its gradient: without --topology for 8 devices of
this machine's CPU, otherwise for the TPUs of each topology, which needs libtpu and no TPU. Nothing is run. The loop
combines the parts, in consecutive order, from `multi_head_attention` by logsumexps, and is checkpointed.

Prints, and writes to the file of --output, per program: the temporary memory per device, and where the
communication stands: a loop between the start and the end of a message is computed while the message is on its way.
"""

import argparse
import importlib.util
import json
import os
import pathlib
import re
import time
from unittest import mock

from command_line import output_file, positive

ROOT = pathlib.Path(__file__).parent.parent
AXIS, HEADS, WIDTH = "sequence", 8, 128
PROGRAMS = [f"{name}{of}" for of in ("", ", gradient") for name in ("balanced", "consecutive", "loop")]
# A topology is described without a TPU or its metadata; other processes may do the same.
OFFLINE = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_STDERR_LOG_LEVEL": "3",
}


def main():
    """Compile, print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", nargs="+", default=[None], help="Names of TPU topologies, such as v5e:4x4.")
    parser.add_argument("--rows", type=positive, default=4_096, help="Rows of the sequence per device (%(default)s).")
    parser.add_argument(
        "--only", nargs="+", choices=PROGRAMS, metavar="PROGRAM", help=f"Only some of: {'; '.join(PROGRAMS)}."
    )
    parser.add_argument("--output", type=output_file, help="JSON file of the results; none is written unless given.")
    arguments = parser.parse_args()
    if arguments.topology != [None] and importlib.util.find_spec("libtpu") is None:
        parser.error("compiling for TPUs needs libtpu: see requirements-accelerators.txt")
    os.environ.update(OFFLINE)  # before JAX starts
    rows = [row for each in arguments.topology for row in measure(each, arguments.rows, arguments.only)]
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(rows, indent=2) + "\n")
        print(f"wrote {arguments.output}")


def measure(topology: str | None, rows_per_device: int, only: list[str] | None) -> list[dict]:
    """Compile each program; return one row per program."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

    if topology is None:
        jax.config.update("jax_num_cpu_devices", 8)
        devices = jax.devices()
    else:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = Mesh(np.array(devices), (AXIS,), axis_types=(AxisType.Auto,))
    sharded = NamedSharding(mesh, PartitionSpec(AXIS))
    length = rows_per_device * len(devices)
    array = jax.ShapeDtypeStruct((length, HEADS, WIDTH), jnp.bfloat16, sharding=sharded)
    rows = []
    for name, (attend, is_gradient) in programs().items():
        if only and name not in only:
            continue
        local = jax.shard_map(attend, mesh=mesh, in_specs=sharded.spec, out_specs=sharded.spec)
        call = jax.grad(lambda *a, f=local: jnp.sum(f(*a).astype(jnp.float32)), (0, 1, 2)) if is_gradient else local
        began = time.process_time()
        with mock.patch("jax.default_backend", lambda: "tpu" if topology else "cpu"):
            compiled = jax.jit(call).lower(array, array, array).compile()
        memory = compiled.memory_analysis()
        rows.append(
            {
                "program": name,
                "topology": topology or "cpu",
                "devices": len(devices),
                "length": length,
                "temporary_MiB": round(memory.temp_size_in_bytes / 2**20, 1),
                "arguments_MiB": round(memory.argument_size_in_bytes / 2**20, 1),
                "compilation_cpu_s": round(time.process_time() - began, 1),
                **communication(compiled.as_text()),
            }
        )
        print(rows[-1], flush=True)
    return rows


def programs() -> dict:
    """Return each program as (function of this device's query, key and value; whether to compile its gradient)."""
    import functools

    from attn import masks
    from attn.functional.ring import ring_attention

    options = {"axis_name": AXIS, "mask": masks.causal()}
    kinds = {order: functools.partial(ring_attention, order=order, **options) for order in ("balanced", "consecutive")}
    kinds["loop"] = loop
    gradients = {f"{name}, gradient": (call, True) for name, call in kinds.items()}
    return {name: (call, False) for name, call in kinds.items()} | gradients


def loop(query, key, value):
    """Ring attention as a loop with the derivative that JAX gives it."""
    import jax
    import jax.numpy as jnp

    import attn
    from attn import masks

    devices, device = jax.lax.axis_size(AXIS), jax.lax.axis_index(AXIS)
    to_next = [(source, (source + 1) % devices) for source in range(devices)]

    def step(carry, t):
        out, logsumexp, key, value = carry
        arriving = jax.lax.ppermute((key, value), AXIS, to_next)
        offset = (device - (device - t) % devices) * len(query)
        options = {"mask": masks.causal(offset), "return_logsumexp": True, "implementation": "blockwise"}
        part, of_part = attn.multi_head_attention(query, key, value, **options)
        both = jnp.logaddexp(logsumexp, of_part)
        finite = jnp.where(both == -jnp.inf, 0, both)
        shares = [jnp.exp(x - finite)[..., None] for x in (logsumexp, of_part)]
        return (out * shares[0] + part.astype(out.dtype) * shares[1], both, *arriving), None

    start = jnp.zeros(query.shape, jnp.float32), jnp.full(query.shape[:2], -jnp.inf)
    start = jax.lax.pcast(start, AXIS, to="varying")
    (out, *_), _ = jax.lax.scan(jax.checkpoint(step), (*start, key, value), jnp.arange(devices))
    return out.astype(query.dtype)


def communication(text: str) -> dict:
    """Count the messages in a compiled program, and those of them that a loop or a conditional is computed under."""
    started, found = {}, {"messages": 0, "overlapped": 0}
    for line in text.splitlines():
        if line.startswith(("%", "ENTRY", "}")):  # another computation
            started = {}
        if re.search(r" = .* collective-permute(-start)?\(", line):
            found["messages"] += 1
        if match := re.search(r"(\S+) = .* collective-permute-start\(", line):
            started[match.group(1)] = False
        elif match := re.search(r" collective-permute-done\(([^)]*)\)", line):
            found["overlapped"] += started.pop(match.group(1).split()[-1], False)
        elif re.search(r" = .* (while|conditional)\(", line):
            started = dict.fromkeys(started, True)
    return found


if __name__ == "__main__":
    main()
