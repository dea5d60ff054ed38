"""Time attention at growing lengths: attn, jax.nn, Flax and torch in one run.

    pip install -e ".[bench]"
    python benchmarks/attention.py                                            # everything; about an hour on two cores
    python benchmarks/attention.py --only speed --setups one_process --lengths 4096
    python benchmarks/attention.py --quick                                    # everything in short, nothing written

Sections:

    speed      forward, and forward+backward (gradients to query, key and value); causal and full; every length
    freedom    the cost of a score function, ALiBi, relative to no score
    skipping   the time that masks save, relative to no mask
    memory     temporary memory of forward+backward for one head; programs are compiled, not run

Set-ups, each a separate process in which all contestants take turns:

    one_thread       one core, one thread
    one_process      all cores as threads of one call on one device
    whole_machine    attn, jax.nn and Flax with the heads divided among one CPU device per core; torch with threads
    gpu              one GPU, if JAX finds one; then it is the only set-up

Medians are compared. A contestant whose program needs more than --memory_gib of temporary memory is left out at that
length; the results then say so. Output and gradients of all contestants are compared with the formula in float64. The
results are tables on the terminal, a JSON file, and a plot beside it.
"""

import argparse
import contextlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import psutil
from attention_checks import LARGEST_DIFFERENCE
from attention_contestants import CONTESTANTS, DIFFERENCES
from attention_figures import figures, ratios
from attention_job import MASKS, Job, say
from attention_peers import SECTIONS
from attention_report import as_json, plot, print_tables
from command_line import Parser, output_file, positive, positive_number
from copy_task import busy_share
from machine import describe as describe_machine
from machine import versions

from attn.functional.implementations import IMPLEMENTATIONS

CHILD = pathlib.Path(__file__).with_name("attention_peers.py")
RESULTS = pathlib.Path(__file__).parent / "results"

PINNED = ("one_thread",) if hasattr(os, "sched_setaffinity") else ()  # macOS cannot keep a process on one core
SETUPS = {"cpu": (*PINNED, "one_process", "whole_machine"), "gpu": ("gpu",)}
PARTS = tuple(name for name in SECTIONS if name != "probe")
DEFAULT_CONTESTANTS = {
    "cpu": ("attn-blockwise", "attn-auto", "jax.nn", "flax", "torch"),
    "gpu": ("attn-blockwise", "attn-auto", "attn-fastest", "jax.nn", "jax.nn-cudnn", "torch"),
}
OTHERS_AT_MOST = 0.05  # fraction of the cores that other programs may keep busy
DTYPES = {"cpu": "float32", "gpu": "bfloat16"}
PACKAGES = ("attn", "jax", "jaxlib", "flax", "numpy", "torch")

DEFAULTS = {
    "lengths": tuple(2**n for n in range(7, 15)),
    "rounds": 30,
    "seconds": 4.0,
    "checked_length": 1024,
    "masks": MASKS,
}
QUICK = {"lengths": (128, 512), "rounds": 3, "seconds": 0.2, "checked_length": 512, "masks": ("causal",)}
# Per section: its lengths and heads, and its lengths with --quick.
SHAPES = {
    "freedom": ({"lengths": (4096,)}, (512,)),
    "skipping": ({"lengths": (8192,), "heads": 1}, (1024,)),
    "memory": ({"lengths": tuple(2**n for n in range(11, 17)), "heads": 1}, (2048,)),
}


def jobs(args: argparse.Namespace, kind: str) -> list[Job]:
    """Return one job per child process; `kind` is "cpu" or "gpu"."""
    names = ("implementation", "batch", "heads", "width", "memory_gib", "seed")
    common = {name: getattr(args, name) for name in names}
    for name, value in (QUICK if args.quick else DEFAULTS).items():
        common[name] = getattr(args, name, None) or value
    common["dtype"] = args.dtype or DTYPES[kind]
    found = []
    if "speed" in args.only:
        contestants = tuple(args.contestants or DEFAULT_CONTESTANTS[kind])
        found = [Job("speed", setup, contestants, **common) for setup in args.setups or SETUPS[kind]]
    for section, (shape, quick_lengths) in SHAPES.items():
        shape = shape | ({"lengths": quick_lengths} if args.quick else {})
        setups = SETUPS["gpu"] if kind == "gpu" else (*(PINNED if section == "skipping" else ()), "one_process")
        found += [Job(section, setup, **(common | shape)) for setup in setups if section in args.only]
    return found


def run(job: Job) -> tuple[list[dict], str | None]:
    """Do a job in a child process; return its rows, and an error message if it failed."""
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    if job.setup in SETUPS["cpu"]:
        environment |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}  # only the set-up determines the number of devices
    with tempfile.TemporaryDirectory() as folder, affinity(job.setup):
        file = pathlib.Path(folder) / "rows"
        command = [sys.executable, str(CHILD), json.dumps(job._asdict()), str(file)]
        status = subprocess.run(command, env=environment, stdout=sys.stderr).returncode
        rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return rows, f"{job.section} {job.setup} ended with status {status}" if status else None


@contextlib.contextmanager
def affinity(setup: str):
    """Pin this process to one core for one_thread, so that a child started meanwhile inherits that."""
    if setup not in PINNED:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, setups = parser.add_argument, (*SETUPS["cpu"], *SETUPS["gpu"])

    def one_or_more(flag: str, names: tuple[str, ...], metavar: str, text: str, **more):
        add(flag, nargs="+", choices=names, metavar=metavar, help=f"{text}: {', '.join(names)}.", **more)

    def number(flag: str, parse, metavar: str, default: float, text: str):
        add(flag, type=parse, metavar=metavar, default=default, help=f"{text} (default: %(default)s).")

    one_or_more("--only", PARTS, "SECTION", "Run these sections (default: all)", default=PARTS)
    one_or_more("--setups", setups, "SETUP", "Time speed in these set-ups (default: gpu, if found, or all others)")
    one_or_more("--contestants", CONTESTANTS, "NAME", "Compare these contestants in speed (default: by platform)")
    one_or_more("--masks", MASKS, "MASK", "Use these masks in all sections but skipping (default: both)")
    known, text = ("auto", "fastest", *IMPLEMENTATIONS), "Use this implementation of attn in all sections but speed"
    add("--implementation", choices=known, default="blockwise", metavar="NAME", help=f"{text} (default: %(default)s).")
    text = "Time speed at these lengths (default: 128 256 512 ... 16384)."
    add("--lengths", nargs="+", type=positive, metavar="T", help=text)
    number("--heads", positive, "N", 8, "Use this many heads in speed and freedom; the other sections have 1")
    number("--width", positive, "H", 64, "Use heads of this width")
    number("--batch", positive, "B", 1, "Use this many sequences per batch")
    add("--dtype", choices=LARGEST_DIFFERENCE, help="Use arrays of this dtype (default: float32; on a GPU bfloat16).")
    text = "Take at most this many samples per contestant and case (default: 30)."
    add("--rounds", type=positive, metavar="N", help=text)
    text = "Take samples for this many seconds, but at least 3 samples (default: 4)."
    add("--seconds", type=positive_number, metavar="S", help=text)
    number("--memory_gib", positive_number, "GIB", 6.0, "Leave out programs that need more temporary memory than this")
    number("--seed", positive, "N", 1, "Draw the arrays with this seed")
    text = "Use short lengths, causal masks and few rounds; write results only if --output is given."
    add("--quick", action="store_true", help=text)
    text = "Write the results here, and a plot beside it (default: benchmarks/results/attention_PLATFORM.json)."
    add("--output", type=output_file, metavar="FILE", help=text)
    args = parser.parse_args(words)
    if args.setups and "gpu" in args.setups and len(args.setups) > 1:
        parser.error("--setups: gpu cannot be combined with other set-ups")
    return args


def settle_kind(args: argparse.Namespace) -> tuple[str, dict]:
    """Return the kind of this run, "cpu" or "gpu", and the platform and device that JAX chooses by default.

    Raises:
      ValueError: --setups names gpu and JAX finds no GPU, or JAX's accelerator has no set-up here.
    """
    rows, failure = run(Job("probe"))
    if failure:
        raise ValueError(f"JAX does not start: {failure}")
    backend = rows[0]["platform"]
    if args.setups:
        if "gpu" in args.setups and backend != "gpu":
            raise ValueError(f"--setups gpu: JAX finds no GPU, its backend is {backend!r}")
        return ("gpu" if "gpu" in args.setups else "cpu"), rows[0]
    if backend not in SETUPS:
        raise ValueError(f"there is no set-up for the backend {backend!r}: choose set-ups of the CPU with --setups")
    return backend, rows[0]


def measure(todo: list[Job]) -> dict:
    """Do the jobs, one after the other; return the rows per section, and the outcome of each job."""
    found = {name: [] for name in ("jobs", "checks", "speed", *SHAPES)}
    for number, job in enumerate(todo):
        say(f"process {number + 1} of {len(todo)}: {job.section}, {job.setup}")
        started, others = time.time(), others_seconds()
        rows, failure = run(job)
        seconds = time.time() - started
        others = max(0.0, others_seconds() - others) / seconds / (os.cpu_count() or 1)
        for row in rows:
            found[row.pop("section")].append(row)
        found["jobs"].append(
            job._asdict() | {"took_seconds": round(seconds), "others": round(others, 3), "failure": failure}
        )
        if failure:
            say(f"warning: {failure}; its results up to that point are kept")
        if others > OTHERS_AT_MOST and job.section != "memory":
            # Threads that wait for each other in a loop, as torch's do, can then take 40 times as long.
            say(f"warning: other programs kept {others:.0%} of the cores busy: do not rely on these comparisons")
    return found


def others_seconds() -> float:
    """Return the processor seconds so far of all programs except this process and its finished children."""
    spent, own = psutil.cpu_times(), os.times()
    kinds = ("user", "nice", "system", "irq", "softirq", "steal")
    return sum(getattr(spent, kind, 0.0) for kind in kinds) - sum(own[:4])


def main() -> int:
    """Run the benchmark, and return the exit status."""
    args, started = arguments(), time.time()
    try:
        kind, found = settle_kind(args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    busy = None if args.quick else busy_share()
    measured = measure(jobs(args, kind))
    machine = describe_machine() | {"device": found["device"], "busy_before": busy}
    summary = {
        "figures": figures(measured),
        "platform": kind,
        "differences": DIFFERENCES,
        "machine": machine,
        "versions": versions(PACKAGES),
        "seconds": round(time.time() - started),
        **measured,
        "ratios": ratios(measured["speed"]),
    }
    print_tables(summary)
    output = args.output or (None if args.quick else RESULTS / f"attention_{kind}.json")
    if output:
        output.write_text(as_json(summary))
        say(f"written: {output}")
        if summary["speed"]:
            plot(summary["speed"], output.with_suffix(".png"))
            say(f"written: {output.with_suffix('.png')}")
    return 1 if any(job["failure"] for job in measured["jobs"]) else 0


if __name__ == "__main__":
    sys.exit(main())
