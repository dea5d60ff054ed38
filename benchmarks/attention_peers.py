"""The child processes of attention.py, which starts them one after the other: each measures one section.

    python benchmarks/attention_peers.py JOB FILE

JOB is a `Job` as a JSON object. Results are appended to FILE as they come, one JSON object per line; progress goes to
stderr.
"""

import functools
import itertools
import json
import pathlib
import sys
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from attention_checks import checks
from attention_contestants import JAX_CONTESTANTS, JaxProgram, build, our_mask, ours, ours_by_mask
from attention_job import Job, draw, error_line, say
from attention_timing import compete, describe
from jax.sharding import AxisType, Mesh

import attn
from attn.training import meshes


def set_up(job: Job) -> Mesh | None:
    """Set the number of JAX's devices, before it computes anything; return the mesh for the heads, if there is one.

    The parent process sets the cores of this process.
    """
    jax.config.update("jax_enable_compilation_cache", False)
    if job.setup == "gpu":
        return None
    whole = job.setup == "whole_machine"
    jax.config.update("jax_num_cpu_devices", meshes.largest_divisor(job.heads, meshes.cores()) if whole else 1)
    return Mesh(np.array(jax.devices()), ("heads",), axis_types=(AxisType.Auto,)) if whole else None


def probe(job: Job) -> Iterator[dict]:
    """Yield the platform and the device that JAX chooses by default."""
    yield {"platform": jax.default_backend(), "device": jax.devices()[0].device_kind}


def speed(job: Job) -> Iterator[dict]:
    """Check and time all contestants at every length, with every mask, forward and forward+backward."""
    mesh = set_up(job)
    yield from checks(job, mesh)
    cases = list(itertools.product(job.lengths, job.masks, ("forward", "forward+backward")))
    for number, (T, mask, mode) in enumerate(cases):
        arrays = draw(job, T)[: 3 if mode == "forward" else 4]
        programs = {}
        for name in job.contestants:
            programs[name] = functools.partial(build, name, job, arrays, mask, mesh)
        rows = compete(programs, job)
        say(f"{job.setup} {number + 1}/{len(cases)}, T {T:,}, {mask}, {mode}: {describe(rows)}")
        for name, row in rows.items():
            yield {"setup": job.setup, "T": T, "mask": mask, "mode": mode, "contestant": name, **row}


def freedom(job: Job) -> Iterator[dict]:
    """Time score functions against no score, forward and backward."""
    set_up(job)
    scores = {
        "no score": lambda slopes: None,
        "ALiBi, a plain function": lambda slopes: lambda s, i, j: s - slopes[job.heads // 2] * jnp.abs(i - j),
        "attn.scores.alibi": lambda slopes: attn.scores.alibi(slopes[job.heads // 2]),
        "attn.scores.alibi, a slope a head": lambda slopes: attn.per_head(attn.scores.alibi(slopes)),
    }
    slopes = jnp.asarray(attn.positions.alibi_slopes(job.heads))
    for T, mask in itertools.product(job.lengths, job.masks):
        programs = {}
        for name, score in scores.items():
            programs[name] = variant(
                job, T, lambda slopes, m=mask, s=score: {"mask": our_mask(m), "score": s(slopes)}, slopes
            )
        for row in compare(job, f"T {T:,}, {mask}", programs, "no score"):
            yield {"T": T, "heads": job.heads, "mask": mask, **row}


def skipping(job: Job) -> Iterator[dict]:
    """Time masks against no mask, forward and backward."""
    set_up(job)
    masks = attn.masks
    for T in job.lengths:
        part = T // 8
        chosen = {
            "full": (lambda _: None, ()),
            "causal": (lambda _: masks.causal(), ()),
            "causal, a plain function": (lambda _: lambda i, j: j <= i, ()),
            "window of 256": (lambda _: masks.sliding_window(255, 0), ()),
            "window of 256, a plain function": (lambda _: lambda i, j: (j <= i) & (i - j < 256), ()),
            "padding to half": (masks.padding, jnp.int32(T // 2)),
            f"segments of {part:,}": (lambda ids: masks.segments(ids, ids), jnp.arange(T) // part),
            f"causal or prefix of {part:,}": (lambda length: masks.causal() | masks.prefix(length), jnp.int32(part)),
        }
        programs = {}
        for name, (mask, operand) in chosen.items():
            programs[name] = variant(job, T, lambda operand, mask=mask: {"mask": mask(operand)}, operand)
        for row in compare(job, f"T {T:,}", programs, "full"):
            mask, operand = chosen[row["variant"]]
            visible = visible_share(mask(operand), T)
            yield {"setup": job.setup, "T": T, "heads": job.heads, "visible": visible, **row}


def variant(job: Job, T: int, mods: Callable, operand) -> Callable:
    """Return a function that builds attn's program, forward and backward; `mods(operand)` gives mask and score.

    The operand is traced.
    """

    def attend(query, key, value, operand):
        return ours(job.implementation, **mods(operand))(query, key, value)

    return lambda: JaxProgram(attend, [jnp.asarray(x, job.dtype) for x in draw(job, T)], (operand,))


def compare(job: Job, title: str, programs: dict[str, Callable], baseline: str) -> Iterator[dict]:
    """Time programs, and yield one row per program with its ratio to `baseline`."""
    rows = compete(programs, job)
    say(f"{job.section}, {title}: {describe(rows)}")
    for name, row in rows.items():
        times = [r.get("median_ms") for r in (row, rows[baseline])]
        yield {"variant": name, "ratio": round(times[0] / times[1], 4) if all(times) else None, **row}


def visible_share(mask, T: int) -> float:
    """Return the fraction of all query-key pairs that the mask allows."""
    if mask is None:
        return 1.0
    return round(float(jax.jit(lambda i: mask(i[:, None], i[None, :]).mean())(jnp.arange(T))), 6)


def memory(job: Job) -> Iterator[dict]:
    """Yield the temporary memory of forward and backward as compiled; nothing is run."""
    set_up(job)
    contestants = {f"attn-{name}": ours_by_mask(name) for name in (job.implementation, "reference")}
    contestants["jax.nn"] = JAX_CONTESTANTS["jax.nn"]
    for T, mask, name in itertools.product(job.lengths, job.masks, contestants):
        row = {"T": T, "heads": job.heads, "mask": mask, "contestant": name}
        shape = jax.ShapeDtypeStruct((job.batch, T, job.heads, job.width), job.dtype)
        try:
            found = JaxProgram(contestants[name](mask), [shape] * 4).prepare()
        except Exception as error:
            yield row | {"left_out": error_line(error)}
            continue
        say(f"memory, T {T:,}, {mask}: {name} {found['temporary_bytes'] / 2**20:,.1f} MiB")
        yield row | found | {"bytes_a_token": round(found["temporary_bytes"] / (job.batch * T), 1)}


SECTIONS = {"probe": probe, "speed": speed, "freedom": freedom, "skipping": skipping, "memory": memory}


def main():
    """Do the job on the command line."""
    job = Job(**json.loads(sys.argv[1]))
    with pathlib.Path(sys.argv[2]).open("a") as file:
        for row in SECTIONS[job.section](job):
            file.write(json.dumps({"section": job.section} | row) + "\n")
            file.flush()


if __name__ == "__main__":
    main()
