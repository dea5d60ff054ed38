"""Check attention on an NVIDIA GPU, and time it beside cuDNN and torch's FlexAttention, in one run of a few minutes.

    benchmarks/gpu.sh                                  # everything that fits into eight minutes
    benchmarks/gpu.sh --small --output small.json      # without a GPU: the same steps at small sizes, interpreted
    benchmarks/gpu.sh --cases softcap --lengths 2048 16384 --widths 128

1. Values and gradients of the kernels "pallas_gpu" and "cudnn", for the cases of `attn check`, and what is guaranteed
   of hidden keys.
2. Cells, each a case, a length T and a width of the heads: up to T = 4,096 the output and gradients of each contestant,
   compared with the formula in float64; then the times of those that are right, in turns. The most important cells
   come first.

Bfloat16, 16 heads; 16,384 tokens in a batch, or one sequence where T is longer. Results are saved after every cell,
with a list of what was not reached in time.
"""

import argparse
import contextlib
import importlib.util
import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable

from attention_job import Job, say
from attention_report import as_json
from command_line import Parser, output_file, positive, positive_number
from gpu_cases import CASES
from gpu_peers import CONTESTANTS, MODES, SEMANTICS, TILES, Order
from gpu_report import DIFFERENCES, OURS, figures, print_tables, ratios, tiles
from machine import describe as describe_machine
from machine import versions

from attn import checking

CHILD = pathlib.Path(__file__).with_name("gpu_peers.py")
RESULTS = pathlib.Path(__file__).parent / "results"
PACKAGES = ("attn", "jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "nvidia-cudnn-cu13", "torch", "triton")
SETTINGS = {"heads": 16, "dtype": "bfloat16", "rounds": 20, "seconds": 0.2, "memory_gib": 40.0, "checked_length": 4096}
SMALL = {"heads": 2, "dtype": "bfloat16", "rounds": 3, "seconds": 0.01, "checked_length": 64}
TOKENS, SMALL_TOKENS = 16384, 128  # of a batch
BLOCKWISE_LENGTH = 4096  # XLA's program is slow: it is timed up to here
PLAIN = ("causal", "full")
CHECKS_SHARE = 0.25  # of the time
MARGIN = 10  # seconds that are left for the report
STARTING = "starting"
PATIENCE = 150  # seconds without a line from a process, after which it is ended


def jobs(args: argparse.Namespace) -> list[Job]:
    """Return the cells in the order in which they are measured, the most important first."""
    settings, tokens = (SMALL, SMALL_TOKENS) if args.small else (SETTINGS, TOKENS)

    def cell(T: int, case: str, width: int, contestants: tuple[str, ...] = CONTESTANTS) -> Job:
        names = tuple(name for name in contestants if name != "attn-blockwise" or T <= BLOCKWISE_LENGTH)
        setup, batch = "one_process" if args.small else "gpu", max(1, tokens // T)
        return Job("cells", setup, names, lengths=(T,), masks=(case,), width=width, batch=batch, **settings)

    def cells(lengths: Iterable[int], some: Iterable[str]) -> list[Job]:
        return [cell(*each) for each in itertools.product(lengths, some, args.widths)]

    # Values are checked at the first length; the second, the next longer one, fills a GPU.
    first = max(T for T in args.lengths if settings["checked_length"] >= T)
    early = [first, *sorted(T for T in args.lengths if first < T)[:1]]
    late = sorted(set(args.lengths).difference(early))
    plain = [case for case in args.cases if case in PLAIN]
    others = [case for case in args.cases if case not in PLAIN]
    with_tiles = (OURS, *(f"{OURS}-{size}" for size in TILES))
    tiles = [cell(first, "causal", width, with_tiles) for width in args.widths]
    if args.small:
        return cells([first], args.cases) + tiles[:1] + cells(early[1:], args.cases[:1])
    return cells(early, plain) + cells(early, others) + tiles + cells(late, args.cases)


def checks(args: argparse.Namespace) -> list[tuple[str, str, str]]:
    """Return (implementation, case, dtype) of `attn.checking`, in the order in which they are checked."""
    if args.small:
        return [("pallas_gpu", title, "bfloat16") for title in ("causal", "ALiBi")]
    found = [("pallas_gpu", SEMANTICS, "bfloat16"), ("cudnn", SEMANTICS, "bfloat16")]
    for name in ("pallas_gpu", "cudnn"):
        dtypes = reversed(checking.TOLERANCES) if name == "pallas_gpu" else ("bfloat16",)  # bfloat16 first
        found += [(name, title, dtype) for dtype in dtypes for title in checking.CASES]
    return found


# Child processes


def follow(order: Order, until: float, on_row: Callable[[dict], None]) -> tuple[str | None, dict]:
    """Do an order in a child process, and call `on_row` with each row.

    Returns:
      Why the process did not do it to the end, or None; and the last line that says what it is about to do.
    """
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    if order.interpreted:
        environment |= {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    elif platforms := environment.get("JAX_PLATFORMS"):
        environment["JAX_PLATFORMS"] = ",".join(dict.fromkeys([*platforms.split(","), "cpu"]))  # for exact values
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "rows"
        file.touch()
        command = [sys.executable, str(CHILD), json.dumps(order._asdict()), str(file)]
        with subprocess.Popen(command, env=environment, stdout=sys.stderr) as process:
            try:
                return _rows_of(process, file, until, on_row)
            finally:
                process.kill()


def _rows_of(process: subprocess.Popen, file: pathlib.Path, until: float, on_row: Callable[[dict], None]) -> tuple:
    """Call `on_row` with the rows that a process writes, until it ends or for too long says nothing; see `follow`."""
    at, text, heard = {"at": STARTING, "contestant": None}, "", time.time()
    with file.open() as rows:
        while True:
            status = process.poll()  # before reading, so that nothing is missed
            *lines, text = (text + rows.read()).split("\n")
            for row in map(json.loads, lines):
                heard = time.time()
                if "at" in row:
                    at = row
                else:
                    on_row(row)
            if status is not None:
                return (f"the process ended with status {status}" if status else None), at
            if time.time() > until:
                return "the time was up", at
            if time.time() - heard > PATIENCE:
                return f"nothing happened for {PATIENCE} seconds", at
            time.sleep(0.1)


def find_device(small: bool) -> dict:
    """Return the platform and the device that JAX finds and, of a GPU, whether torch finds it.

    Raises:
      ValueError: JAX finds no GPU, and the run is not small.
    """
    rows = []
    failure, _ = follow(Order("probe", small), time.time() + PATIENCE, rows.append)
    if failure:
        raise ValueError(f"JAX does not start: {failure}")
    if rows[0]["platform"] != "gpu" and not small:
        raise ValueError(
            f"JAX finds no GPU, its backend is {rows[0]['platform']!r}; "
            "without a GPU run benchmarks/gpu.sh --small --output small.json"
        )
    return rows[0]


# The run


class Run:
    """A run: what is still to do, and the results, which are saved after every row.

    Args:
      args: of the command line.
      device: as of `find_device`.
      started: the time, as of `time.time()`, from which the minutes count.
    """

    def __init__(self, args: argparse.Namespace, device: dict, started: float):
        self._args, self._started = args, started
        self._checks, self._jobs = checks(args), jobs(args)
        self._end = self._started + 60 * args.minutes - MARGIN
        machine = describe_machine() | device
        if missing := missing_packages(device):
            say(f"warning: {missing}")
        self.results = {"small": args.small, "minutes": args.minutes, "machine": machine, "missing": missing}
        self.results |= {"versions": versions(PACKAGES), "differences": DIFFERENCES}
        self.results |= {"checks": [], "cells": [], "failures": []}

    def check(self):
        """Do the checks of `attn.checking`, in a part of the time."""
        stop = self._started + CHECKS_SHARE * (self._end - self._started)
        order = Order("check", self._args.small, stop, checks=tuple(self._checks))

        def on_row(row: dict):
            self.results["checks"].append(row)
            self._checks.remove((row["implementation"], row["case"], row["dtype"]))
            self.save()

        self._note(*follow(order, stop + PATIENCE, on_row))

    def measure(self):
        """Measure the cells; after a process that has ended early, go on without the contestant that ended it."""
        right = []

        def on_row(row: dict):
            self.results["cells"].append(row)
            right.extend((row["case"], row["width"], name) for name, x in row["contestants"].items() if x.get("right"))
            self._jobs.pop(0)
            self.save()

        while self._jobs and time.time() < self._end:
            order = Order("cells", self._args.small, self._end, jobs=tuple(self._jobs), right=tuple(right))
            failure, at = follow(order, self._end + MARGIN / 2, on_row)
            self._note(failure, at)
            if failure is None or at["at"] == STARTING or time.time() >= self._end:
                break
            if (name := at["contestant"]) is None:
                self._jobs.pop(0)
                continue
            case = self._jobs[0].masks
            self._jobs = [without(job, name) if job.masks == case else job for job in self._jobs]

    def _note(self, failure: str | None, at: dict):
        """Add a failure to the results, and save them."""
        if failure:
            say(f"warning: {failure}; {at['at']}")
            self.results["failures"].append({"failure": failure, **at})
        self.save()

    def save(self):
        """Write the results as they are so far, with what has not been reached."""
        self.results |= {"seconds": round(time.time() - self._started), "not_reached": self._not_reached()}
        cells = self.results["cells"]
        self.results |= {"ratios": ratios(cells), "figures": figures(ratios(cells)), "tiles": tiles(cells)}
        if self._args.output:
            whole = self._args.output.with_suffix(".part")  # a file that is cut off in the middle is not JSON
            whole.write_text(as_json(self.results))
            whole.replace(self._args.output)

    def _not_reached(self) -> list[dict]:
        checks = [{"implementation": name, "check": title, "dtype": dtype} for name, title, dtype in self._checks]
        return checks + [dict(zip(("case", "T", "width", "contestants"), _cell(job))) for job in self._jobs]

    def wrong(self) -> list[str]:
        """Return what was not right."""
        found = [f"{x['implementation']}, {x['case']}, {x['dtype']}" for x in self.results["checks"] if not x["right"]]
        for cell in self.results["cells"]:
            where = f"{cell['case']}, T {cell['T']:,}, width {cell['width']}"
            found += [f"{name}, {where}" for name, x in cell["contestants"].items() if x.get("right") is False]
        return found

    def failed(self) -> list[str]:
        """Return what of ours did not compile or run, and why."""
        found = []
        for cell in self.results["cells"]:
            for mode in MODES:
                if reason := cell["contestants"].get(OURS, {}).get(mode, {}).get("left_out"):
                    found.append(f"{cell['case']}, T {cell['T']:,}, width {cell['width']}, {mode}: {reason}")
        return found


def _cell(job: Job) -> tuple:
    """Return case, length, width and contestants of a cell."""
    return *job.masks, *job.lengths, job.width, job.contestants


def without(job: Job, name: str) -> Job:
    """Return a cell without a contestant."""
    return job._replace(contestants=tuple(each for each in job.contestants if each != name))


def missing_packages(device: dict) -> str | None:
    """Return what is not installed, and the contestants that are left out for that; None if nothing is missing."""
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed: torch-flex, torch-flash and torch-cudnn are left out"
    if not device.get("torch_finds_cuda", True):
        return "this torch finds no CUDA device: torch-flex, torch-flash and torch-cudnn are left out"
    return None


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser(prog="benchmarks/gpu.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    text = "Run small sizes on a CPU, our kernels in the interpreter of Pallas; write only if --output is given."
    add("--small", action="store_true", help=text)
    text = "Write the results here (default: benchmarks/results/gpu.json)."
    add("--output", type=output_file, metavar="FILE", help=text)
    add("--minutes", type=positive_number, default=8.0, metavar="M", help="Take at most this long (default: 8).")
    text = f"Measure these cases (default: all): {', '.join(CASES)}."
    add("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE", help=text)
    text = "Measure these lengths, at least one of them up to 4,096 (default: 1024 2048 4096 8192 16384 32768)."
    add("--lengths", nargs="+", type=positive, metavar="T", help=text)
    add("--widths", nargs="+", type=positive, metavar="H", help="Measure heads of these widths (default: 64 128).")
    args = parser.parse_args(words)
    args.lengths = args.lengths or ([64, 128] if args.small else [2**n for n in range(10, 16)])
    args.widths = args.widths or ([64] if args.small else [64, 128])
    longest = (SMALL if args.small else SETTINGS)["checked_length"]
    if min(args.lengths) > longest:
        parser.error(f"--lengths: values are checked up to T = {longest:,}, so one must not be longer")
    if args.output is None and not args.small:
        args.output = RESULTS / "gpu.json"
    return args


def main() -> int:
    """Run the benchmark, and return the exit status: 1 if a value is wrong, or something of ours did not run."""
    args, started = arguments(), time.time()
    try:
        device = find_device(args.small)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    run = Run(args, device, started)
    with contextlib.suppress(KeyboardInterrupt):  # what is finished is reported
        run.check()
        run.measure()
    print_tables(run.results)
    wrong, failed = run.wrong(), run.failed()
    for line in failed:
        print(f"FAILED: {line}")
    print(f"WRONG: {'; '.join(wrong)}" if wrong else "every value that was checked is right")
    if args.output:
        print(f"written: {args.output}")
    return 1 if wrong or failed or run.results["failures"] else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    sys.exit(main())
