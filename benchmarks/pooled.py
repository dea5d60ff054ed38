"""Measure time and memory of pooled attention weights, beside pooling whole rows of weights.

    python benchmarks/pooled.py

Causal attention of random float32 queries and keys, pooled to 256 x 256. The peer is what one writes without
`attn.pooled_attention_weights`: head by head, `attn.attention_weights` of some rows at a time by `rows=`, pooled. Each
runs in a process of its own, compiled beforehand, and the results are compared. Memory is that of the compiled program,
without queries and keys. The seconds of all cores together depend less on other load of the machine than those of the
clock. Writes benchmarks/results/pooled.json.
"""

import argparse
import json
import math
import multiprocessing
import pathlib
import statistics
import time

import jax
import jax.numpy as jnp
import machine
import numpy as np
from command_line import Parser, output_file, positive

import attn
from attn import masks

ROOT = pathlib.Path(__file__).parent.parent
SHAPE = (256, 256)


def main():
    """Measure both, print and write the results."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=positive, default=32_768, help="Number of queries and keys (%(default)s).")
    parser.add_argument("--heads", type=positive, default=8, help="Number of heads (%(default)s).")
    parser.add_argument("--width", type=positive, default=64, help="Width of a head (%(default)s).")
    parser.add_argument("--rows", type=positive, default=1_024, help="Rows that the peer has at a time (%(default)s).")
    parser.add_argument("--reduce", choices=("mass", "max"), default="mass", help="How to pool (%(default)s).")
    parser.add_argument("--repeats", type=positive, default=3, help="Calls of each, of which the median counts.")
    output = ROOT / "benchmarks/results/pooled.json"
    parser.add_argument("--output", type=output_file, default=output, help="JSON file of the results.")
    arguments = parser.parse_args()
    block = math.ceil(arguments.length / SHAPE[0])
    if arguments.length % arguments.rows or arguments.rows % block or arguments.length % SHAPE[1]:
        parser.error(f"--rows must divide --length and hold whole blocks of {block}; --length whole blocks of keys")
    settings = vars(arguments) | {"shape": SHAPE}
    del settings["output"]
    context, found, results = multiprocessing.get_context("spawn"), {}, {}
    for name in CALLS:
        with context.Pool(1) as pool:  # a new process, so that its memory is that of one program
            found[name], results[name] = pool.apply(measure, (name, settings))
        row = "{seconds:8.2f} s {core_seconds:8.2f} s of cores {memory_MiB:8,.0f} MiB".format_map(found[name])
        print(f"{name:<6} {row}", flush=True)
    ours, peer = found.values()
    ratios = {each: round(peer[each] / ours[each], 2) for each in ours}
    difference = float(np.abs(np.subtract(*results.values())).max())
    print(f"rows, relative to pooled: {ratios}")
    written = {"machine": machine.describe(), "jax": jax.__version__, "settings": settings, "results": found}
    written |= {"ratios": ratios, "largest_difference": difference}
    arguments.output.write_text(json.dumps(written, indent=2) + "\n")
    print(f"wrote {arguments.output}")


def measure(name: str, settings: dict) -> tuple[dict, np.ndarray]:
    """Compile one program and run it: (median seconds and memory, the pooled weights)."""
    size = settings["length"], settings["heads"], settings["width"]
    query, key = (jax.random.normal(jax.random.key(n), size) for n in range(2))
    call = jax.jit(lambda query, key: CALLS[name](query, key, settings)).lower(query, key).compile()
    seconds, of_cores = [], []
    for _ in range(settings["repeats"]):
        began, cores_began = time.perf_counter(), time.process_time()
        result = jax.block_until_ready(call(query, key))
        seconds.append(time.perf_counter() - began)
        of_cores.append(time.process_time() - cores_began)
    found = {"seconds": statistics.median(seconds), "core_seconds": statistics.median(of_cores)}
    memory = call.memory_analysis()
    found["memory_MiB"] = (memory.temp_size_in_bytes + memory.output_size_in_bytes) / 2**20
    return {each: round(number, 2) for each, number in found.items()}, np.asarray(result)


def pooled(query, key, settings: dict):
    """Pool by the function of the library."""
    return attn.pooled_attention_weights(query, key, mask=masks.causal(), shape=SHAPE, reduce=settings["reduce"])


def pooled_rows(query, key, settings: dict):
    """Pool rows of whole weights, head by head."""
    rows, (T, N, _) = settings["rows"], query.shape
    t, s = SHAPE[0] * rows // T, SHAPE[1]

    def of_rows(head_and_first):
        head, first = head_and_first
        chosen = first + jnp.arange(rows)
        weights = attn.attention_weights(query[:, head], key[:, head], mask=masks.causal(), rows=chosen)
        blocks = weights.reshape(t, rows // t, s, T // s)
        return blocks.max(axis=(1, 3)) if settings["reduce"] == "max" else blocks.sum(axis=3).mean(axis=1)

    heads, firsts = (x.ravel() for x in jnp.meshgrid(jnp.arange(N), jnp.arange(0, T, rows), indexing="ij"))
    return jax.lax.map(of_rows, (heads, firsts)).reshape(N, *SHAPE)


CALLS = {"pooled": pooled, "rows": pooled_rows}

if __name__ == "__main__":
    main()
