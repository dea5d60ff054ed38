"""The child processes of gpu.py, which starts them one after the other.

    python benchmarks/gpu_peers.py ORDER FILE

ORDER is an `Order` as a JSON object. Results are appended to FILE as they come, one JSON object per line; progress goes
to stderr. A kernel that reads where it must not breaks all later work of its process on a GPU, so then the process ends
with status 3, and names the contestant in its last line.
"""

import dataclasses
import functools
import importlib.util
import json
import pathlib
import re
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import gpu_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
from attention_contestants import JaxProgram, TorchProgram
from attention_job import Job, LeftOut, draw, error_line, say
from attention_timing import take_turns, warm_up

from attn import checking
from attn.functional import pallas_gpu
from attn.functional.cpu import cores
from attn.functional.implementations import IMPLEMENTATIONS

MODES = ("forward", "forward+backward")
PRODUCTS = {"forward": 2, "forward+backward": 7}  # matrix products of a pair of a query and a key
SEMANTICS = "hidden keys"  # the name of a check
TILES = (32, 128)  # queries, and keys, beside the 64 that these sizes have by themselves
TORCH = {"torch-flash": "FLASH_ATTENTION", "torch-cudnn": "CUDNN_ATTENTION"}
# torch comes first, since it compiles while other threads compile the programs of JAX.
CONTESTANTS = ("torch-flex", *TORCH, "jax.nn-cudnn", "attn-pallas_gpu", "attn-blockwise")
_BREAKS = re.compile("illegal|launch.?fail|misaligned|device-side assert|launch.?timeout", re.IGNORECASE)


class Order(NamedTuple):
    """What a child process does.

    Attributes:
      section: a key of `SECTIONS`.
      interpreted: run our kernels in the interpreter of Pallas, on a CPU.
      stop: the time, as of `time.time()`, to be done by.
      checks: (implementation, case, dtype) of `attn.checking`.
      jobs: the cells to measure: a length, a mask that is a case of `gpu_cases`, contestants.
      right: (case, width, contestant) whose values were found right before.
    """

    section: str
    interpreted: bool
    stop: float = 0.0
    checks: tuple = ()
    jobs: tuple = ()
    right: tuple = ()


class Broken(Exception):
    """A contestant has broken the process: its name, and the error in one line."""


class FlexProgram(TorchProgram):
    """FlexAttention, which the first call compiles."""

    def prepare(self) -> dict:
        """Compile, and measure memory in a call; return the seconds and the memory."""
        started = time.perf_counter()
        self()
        return super().prepare() | {"compile_seconds": round(time.perf_counter() - started, 3)}


def set_up(interpreted: bool):
    """Register our kernels with other tiles, and in the interpreter of Pallas where there is no GPU."""
    kernel = IMPLEMENTATIONS["pallas_gpu"]
    if interpreted:
        kernel = dataclasses.replace(kernel, backends=None)
    for name, size in (("pallas_gpu", None), *((f"pallas_gpu-{size}", size) for size in TILES)):
        attend = functools.partial(pallas_gpu.attend, interpret=interpreted, block_size=size)
        IMPLEMENTATIONS[name] = dataclasses.replace(kernel, attend=attend)


# Sections


def probe(order: Order, write: Callable):
    """Write the platform and the device that JAX chooses by default and, of a GPU, whether torch finds it."""
    found = {"platform": jax.default_backend(), "device": jax.devices()[0].device_kind}
    if found["platform"] == "gpu" and importlib.util.find_spec("torch") is not None:
        import torch  # imported here, since it may not be installed

        found["torch_finds_cuda"] = torch.cuda.is_available()
    write(found)


def check(order: Order, write: Callable):
    """Check the cases of `attn check`, several at a time, and write each outcome."""

    def outcome(each):
        if time.time() > order.stop:
            return None
        return checking.semantics_outcome(each[0]) if each[1] == SEMANTICS else checking.outcome(*each)

    with ThreadPoolExecutor(cores()) as pool:
        for each, found in zip(order.checks, pool.map(outcome, order.checks)):
            if found is not None:
                say(f"{', '.join(each)}: {'right' if found['right'] else 'WRONG'}")
                write({"implementation": each[0], "case": each[1], "dtype": each[2], **found})


def cells(order: Order, write: Callable):
    """Check and time the contestants of each job, and write one row per job."""
    right, longest = set(map(tuple, order.right)), 0.0
    with ThreadPoolExecutor(cores()) as pool:
        for given in order.jobs:
            job, started = Job(*given), time.time()
            if started + longest > order.stop:
                return
            case, width = job.masks[0], job.width
            row = measure(job, {name for c, w, name in right if (c, w) == (case, width)}, pool, write)
            right |= {(case, width, name) for name, each in row["contestants"].items() if each.get("right")}
            longest = max(longest, time.time() - started)
            write(row)


SECTIONS = {"probe": probe, "check": check, "cells": cells}


# A cell


def measure(job: Job, right: set[str], pool: ThreadPoolExecutor, write: Callable) -> dict:
    """Return one row: the errors and times of all contestants of a case.

    Args:
      right: contestants that were right for this case and width; of a long sequence only these are timed.

    Raises:
      Broken: a contestant has broken the process.
    """
    (T,), (case,) = job.lengths, job.masks
    found = {name: {} for name in job.contestants}
    if job.checked_length < T:
        found |= {name: {"left_out": "was not found right at a shorter length"} for name in found if name not in right}
    names = [name for name in found if "left_out" not in found[name]]
    arrays = _drawn(job.batch, T, job.heads, job.width, job.dtype)
    where = f"{case}, T {T:,}, width {job.width}"
    write({"at": f"{where}: compiling", "contestant": None})
    truth = pool.submit(_truth, case, job.heads, arrays) if job.checked_length >= T else None
    programs = {key: program for key, program in _prepared(names, job, arrays, pool, found)}
    if truth is not None:
        for name in names:
            write({"at": f"{where}: values of {name}", "contestant": name})
            _check(name, programs, truth.result(), job.heads, found[name])
    for mode in MODES:
        ready = {}
        for name in names:
            if found[name].get("right", job.checked_length < T) and (name, mode) in programs:
                write({"at": f"{where}: times of {name}", "contestant": name})
                program = programs[name, mode]
                seconds, reason = _tried(name, functools.partial(warm_up, program))
                if reason is None:
                    ready[name] = program, seconds
                else:
                    found[name][mode]["left_out"] = reason
        for name, times in take_turns(ready, job).items():
            operations = 2 * PRODUCTS[mode] * job.batch * job.heads * job.width * cases.pairs(case, T)
            times["tflops"] = round(operations / times["median_ms"] / 1e9, 2)
            found[name][mode] |= times
        shown = (f"{name} {found[name][mode]['median_ms']:,.4g}" for name in ready)
        say(f"{where}, {mode}, ms: {', '.join(shown)}")
    return {
        "case": case, "T": T, "width": job.width, "heads": job.heads, "batch": job.batch,
        "pairs": cases.pairs(case, T), "contestants": found,
    }  # fmt: skip


@functools.lru_cache(maxsize=2)
def _drawn(batch: int, T: int, heads: int, width: int, dtype: str) -> list[np.ndarray]:
    """Draw query, key, value and cotangent, `[B T N H]`."""
    return draw(Job("cells", batch=batch, heads=heads, width=width, dtype=dtype), T)


def _part(heads: int) -> tuple:
    """Return the index, in `[B T N H]`, of what is checked: the first sequence, and the first and the last head."""
    return np.s_[:1, :, :: max(1, heads - 1)]


def _truth(case: str, heads: int, arrays: list[np.ndarray]) -> list[np.ndarray]:
    """Compute the part of the results that is checked."""
    part = _part(heads)
    return cases.expected(case, [x[part] for x in arrays], cases.slopes(heads)[part[2]])


def _prepared(names, job: Job, arrays, pool: ThreadPoolExecutor, found: dict) -> Iterator[tuple]:
    """Compile the programs of the contestants, JAX's in threads; yield ((name, mode), program) of those that compile.

    `found` gets seconds and memory of each program, or the reason why it is left out.
    """
    if importlib.util.find_spec("torch") is not None:
        import torch

        torch._dynamo.reset()  # else it stops compiling after a few shapes
    on_device = [jnp.asarray(x, job.dtype) for x in arrays]
    keys = [(name, mode) for name in names for mode in MODES]
    later = {key: pool.submit(_prepare, *key, job, on_device) for key in keys if not key[0].startswith("torch")}
    for key in keys:
        name, mode = key
        program, found[name][mode] = later[key].result() if key in later else _prepare(*key, job, arrays)
        if program is not None:
            yield key, program


def _prepare(name: str, mode: str, job: Job, arrays: list) -> tuple:
    """Build and compile a program: (program, its seconds and memory), or (None, the reason)."""

    def prepared():
        program = _build(name, job, arrays if mode == "forward+backward" else arrays[:3])
        needs = program.prepare()
        gib = (needs["temporary_bytes"] or 0) / 2**30
        if gib > job.memory_gib:
            raise LeftOut(f"would need {gib:.1f} GiB of temporary memory, more than {job.memory_gib:g}")
        return program, needs

    made, reason = _tried(name, prepared)
    return made if reason is None else (None, {"left_out": reason})


def _build(name: str, job: Job, arrays: list):
    """Return a contestant's program, not yet compiled."""
    (T,), (case,) = job.lengths, job.masks
    if name.startswith("attn-"):
        attend, operands = cases.of_attn(name.removeprefix("attn-"), case, T, job.heads)
        return JaxProgram(attend, arrays, operands)
    if name == "jax.nn-cudnn":
        return JaxProgram(cases.of_cudnn(case, T), arrays)
    if importlib.util.find_spec("torch") is None:
        raise LeftOut("torch is not installed")
    if name in TORCH:
        return TorchProgram(job, arrays, cases.of_torch(TORCH[name], case))
    return FlexProgram(job, arrays, cases.of_flex(case, T, job.heads))


def _check(name: str, programs: dict, truth: list[np.ndarray], heads: int, found: dict):
    """Compare a contestant's values with the formula; `found` gets its errors, and whether it is right."""
    mode = next((mode for mode in reversed(MODES) if (name, mode) in programs), None)
    if mode is None:
        return
    results, reason = _tried(name, lambda: programs[name, mode].results(_part(heads)))
    if reason is not None:
        for each in MODES:
            found[each].setdefault("left_out", reason)
        return
    names = ("out", "dquery", "dkey", "dvalue")
    found["errors"] = {key: checking.relative_error(x, exact) for key, x, exact in zip(names, results, truth)}
    found["right"] = max(found["errors"].values()) <= checking.TOLERANCES["bfloat16"]
    if not found["right"]:
        say(f"warning: {name} is WRONG, and not timed: {found['errors']}")


def _tried(name: str, function: Callable) -> tuple:
    """Call a function that runs a contestant; return (its result, None), or (None, the reason why it failed).

    Raises:
      Broken: it has broken the process.
    """
    try:
        return function(), None
    except Exception as error:
        if _BREAKS.search(str(error)):
            raise Broken(name, error_line(error)) from error
        return None, error_line(error)


def main():
    """Do the order on the command line."""
    order = Order(**json.loads(sys.argv[1]))
    set_up(order.interpreted)
    with pathlib.Path(sys.argv[2]).open("a") as file:

        def write(row: dict):
            file.write(json.dumps(row) + "\n")
            file.flush()

        try:
            SECTIONS[order.section](order, write)
        except Broken as error:
            name, reason = error.args
            write({"at": reason, "contestant": name})
            sys.exit(3)


if __name__ == "__main__":
    main()
