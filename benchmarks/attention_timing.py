"""Timing of programs that take turns, for attention.py."""

import gc
import math
import statistics
import time
from collections.abc import Callable

from attention_job import Job, LeftOut, error_line

FEWEST_ROUNDS = 3
SAMPLE_SECONDS = 0.02  # shortest sample; it consists of several calls where one call is shorter
WARM_SECONDS = 0.1
PAUSE_SECONDS = 0.005  # between turns: idle threads of a framework poll for work for a while before they sleep


def compete(programs: dict[str, Callable], job: Job) -> dict[str, dict]:
    """Build, compile and time programs that take turns; return one row per program, with `left_out` if it failed."""
    rows, ready, texts = {}, {}, {}
    for name, make in programs.items():
        try:
            program = make()
            if program.text in texts:
                rows[name] = {"same_program_as": texts[program.text]}
                continue
            rows[name] = program.prepare()
            if program.text is not None:
                texts[program.text] = name
            gib = (rows[name]["temporary_bytes"] or 0) / 2**30
            if gib > job.memory_gib:
                raise LeftOut(f"would need {gib:.1f} GiB of temporary memory, more than {job.memory_gib:g}")
            ready[name] = program, warm_up(program)
        except Exception as error:
            rows[name] = rows.get(name, {}) | {"left_out": error_line(error)}
    for name, found in take_turns(ready, job).items():
        rows[name] |= found
    return {name: rows.get(row.get("same_program_as"), {}) | row for name, row in rows.items()}


def warm_up(program: Callable) -> float:
    """Call a few times, or once if a call is long; return the seconds of the fastest call."""
    seconds = [timed(program, 1)]
    while sum(seconds) < WARM_SECONDS or (len(seconds) < 2 and seconds[0] < 1):
        seconds.append(timed(program, 1))
    return min(seconds)


def take_turns(ready: dict[str, tuple[Callable, float]], job: Job) -> dict[str, dict]:
    """Time programs in rounds whose order alternates; slow programs skip some rounds, evenly spread.

    Args:
      ready: programs, and the approximate seconds per call of each.
    """
    calls = {name: max(1, math.ceil(SAMPLE_SECONDS / seconds)) for name, (_, seconds) in ready.items()}
    turns, samples = {}, {name: [] for name in ready}
    for name, (_, seconds) in ready.items():
        affordable = int(job.seconds / (calls[name] * seconds))
        turns[name] = min(job.rounds, max(FEWEST_ROUNDS, affordable))
    rounds = max(turns.values(), default=0)
    gc.collect()
    for number in range(rounds):
        for name in list(ready)[:: 1 if number % 2 == 0 else -1]:
            if (number + 1) * turns[name] // rounds > number * turns[name] // rounds:
                time.sleep(PAUSE_SECONDS)
                if calls[name] > 1:
                    ready[name][0]()  # refills the caches, which the others have overwritten
                samples[name].append(timed(ready[name][0], calls[name]) * 1e3)
    return {name: summary(values, calls[name]) for name, values in samples.items()}


def timed(program: Callable, calls: int) -> float:
    """Return the seconds per call."""
    started = time.perf_counter()
    program(calls)
    return (time.perf_counter() - started) / calls


def summary(samples: list[float], calls: int) -> dict:
    """Return the median and all samples in milliseconds per call."""
    found = {"median_ms": round(statistics.median(samples), 4), "fastest_ms": round(min(samples), 4)}
    return found | {"calls_a_sample": calls, "samples_ms": [round(x, 4) for x in samples]}


def describe(rows: dict[str, dict]) -> str:
    """Return the medians of all rows in one line."""
    shown = []
    for name, row in rows.items():
        if "same_program_as" in row:
            shown.append(f"{name} as {row['same_program_as']}")
        else:
            shown.append(f"{name} {row['median_ms']:,.4g} ms" if "median_ms" in row else f"{name} -")
    return ", ".join(shown)
