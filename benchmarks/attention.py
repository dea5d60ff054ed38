"""Time attention at growing lengths: attn beside jax.nn, Flax and torch, in one run.

    pip install -e ".[bench]"
    python benchmarks/attention.py                                            # everything; about an hour on two cores
    python benchmarks/attention.py --only speed --setups one_process --lengths 4096
    python benchmarks/attention.py --quick                                    # a try of everything, nothing written

Sections:

    speed      forward, and forward+backward (gradients to query, key and value); causal and full; every length
    freedom    what ALiBi as a function of one's own costs, against no score
    skipping   what masks save, against none
    memory     temporary memory of forward+backward for one head; compiled, not run

Set-ups, each a process of its own in which all contestants take turns:

    one_thread       one core, one thread
    one_process      all cores as threads of one plain call
    whole_machine    attn, jax.nn and Flax with the heads shared out over one CPU device a core; torch with threads
    gpu              one GPU, if JAX finds one; it is then the only set-up

Medians are compared. A contestant whose program would need more than --memory_gib of temporary memory is left out of
that length, which the results say. Output and gradients of all are checked against the formula in float64. The results
are a table here, a JSON file, and a plot beside it.
"""

import argparse
import contextlib
import itertools
import json
import math
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
import time
from importlib import metadata

import psutil
from attention_peers import CONTESTANTS, DIFFERENCES, LARGEST_DIFFERENCE, MASKS, SECTIONS, Job, say
from copy_task import busy_share, positive
from machine import describe as describe_machine
from rich.console import Console
from rich.table import Table

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
OTHERS_AT_MOST = 0.05  # share of the cores
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
# For each section its own lengths and heads, and what --quick makes of the lengths.
SHAPES = {
    "freedom": ({"lengths": (4096,)}, (512,)),
    "skipping": ({"lengths": (8192,), "heads": 1}, (1024,)),
    "memory": ({"lengths": tuple(2**n for n in range(11, 17)), "heads": 1}, (2048,)),
}


def jobs(args: argparse.Namespace, kind: str) -> list[Job]:
    """One for each child process; `kind` is "cpu" or "gpu"."""
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
    """Do a job in a process of its own; its rows, and how it failed if it did."""
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    if job.setup in SETUPS["cpu"]:
        environment |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}  # the set-up alone says how many devices
    with tempfile.TemporaryDirectory() as folder, affinity(job.setup):
        file = pathlib.Path(folder) / "rows"
        command = [sys.executable, str(CHILD), json.dumps(job._asdict()), str(file)]
        status = subprocess.run(command, env=environment, stdout=sys.stderr).returncode
        rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return rows, f"{job.section} {job.setup} ended with status {status}" if status else None


@contextlib.contextmanager
def affinity(setup: str):
    """Pin this process to one core while it starts a child that inherits that, for one_thread."""
    if setup not in PINNED:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def ratios(rows: list[dict]) -> list[dict]:
    """How many times as fast ours are as each peer, case by case."""
    found = []
    for case, times in by_case(rows).items():
        for one, other in itertools.product(times, times):
            if one.startswith("attn") and not other.startswith("attn"):
                named = dict(zip(("setup", "T", "mask", "mode"), case))
                found.append(named | {"ours": one, "peer": other, "times_as_fast": round(times[other] / times[one], 3)})
    return found


def by_case(rows: list[dict]) -> dict[tuple, dict[str, float]]:
    """Medians by contestant, by (set-up, T, mask, mode)."""
    cases = {}
    for row in rows:
        times = cases.setdefault((row["setup"], row["T"], row["mask"], row["mode"]), {})
        if "median_ms" in row:
            times[row["contestant"]] = row["median_ms"]
    return cases


def figures(sections: dict[str, list[dict]]) -> list[dict]:
    """The few figures by which the project judges itself, of those that were measured."""
    cases, found = by_case(sections["speed"]), []

    def add(figure: str, value: float | None, target: str):
        if value is not None:
            found.append({"figure": figure, "value": round(value, 3), "target": target})

    for setup, peer, target in (
        ("one_process", "jax.nn", ">= 7"),
        ("whole_machine", "jax.nn", ">= 8"),
        ("whole_machine", "torch", ">= 1"),
    ):
        times = cases.get((setup, 4096, "causal", "forward+backward"), {})
        for ours in ("attn-auto", "attn-blockwise"):
            value = times[peer] / times[ours] if {ours, peer} <= times.keys() else None
            add(f"times as fast as {peer}: {ours}, {setup}, T 4,096, causal, forward+backward", value, target)
    slowest = slowest_when_short(cases)
    if slowest:
        add(f"attn-auto's time over jax.nn's at most, T <= 512: {slowest[1]}", slowest[0], "<= 1.05")
    for row in sections["memory"]:
        if row["T"] == 16384 and not row["contestant"].startswith(("jax", "attn-reference")):
            mib = row["temporary_bytes"] / 2**20 if "temporary_bytes" in row else None
            add(f"MiB of {row['contestant']}, one head, T 16,384, {row['mask']}, forward+backward", mib, "< 64")
    for row in sections["freedom"]:
        if row["variant"] != "no score":
            add(f"time over no score's: {row['variant']}, T {row['T']:,}, {row['mask']}", row["ratio"], "<= 1.15")
    for row in sections["skipping"]:
        limit = {"window": "<= 0.167", "causal": "<= 0.6"}.get(row["variant"].split(",")[0].split()[0])
        if limit and "prefix" not in row["variant"] and "plain" not in row["variant"] and row["T"] >= 8192:
            where = f"{row['setup']}, T {row['T']:,}, one head"
            add(f"time over full attention's: {row['variant']}, {where}", row["ratio"], limit)
    return found


def slowest_when_short(cases: dict[tuple, dict[str, float]]) -> tuple[float, str] | None:
    """The largest ratio of attn-auto to jax.nn up to T = 512, and where that is."""
    found = []
    for (setup, T, mask, mode), times in cases.items():
        if T <= 512 and {"attn-auto", "jax.nn"} <= times.keys():
            where = f"{setup}, T {T:,}, {mask}, {mode}"
            found.append((times["attn-auto"] / times["jax.nn"], where))
    return max(found, default=None)


def print_tables(summary: dict):
    """Everything that was found, on the terminal."""
    console = Console(width=None if sys.stdout.isatty() else 140)
    speed = summary["speed"]
    for setup in dict.fromkeys(row["setup"] for row in speed):
        rows = [row for row in speed if row["setup"] == setup]
        console.print(speed_table(rows, f"{setup}: median milliseconds", milliseconds, modes(rows)))
        console.print(speed_table(rows, f"{setup}: temporary MiB, seconds to compile", needs, modes(rows)[-1:]))
    if summary["checks"]:
        console.print(check_table(summary["checks"]))
    for section in ("freedom", "skipping"):
        if summary[section]:
            console.print(variant_table(section, summary[section]))
    if summary["memory"]:
        console.print(speed_table(summary["memory"], "memory: temporary MiB, seconds to compile", needs, [None]))
    if summary["figures"]:
        rows = [(row["figure"], f"{row['value']:,.3f}", row["target"]) for row in summary["figures"]]
        console.print(grid("figures", ["", "value", "target"], rows))


def modes(rows: list[dict]) -> list[str]:
    """Forward and forward+backward, in the order measured."""
    return list(dict.fromkeys(row["mode"] for row in rows))


def speed_table(rows: list[dict], title: str, cell, shown_modes: list) -> Table:
    """A line for each length, mask and mode; a column for each contestant."""
    names = list(dict.fromkeys(row["contestant"] for row in rows))
    lines = {}
    for row in rows:
        if row.get("mode") in shown_modes:
            line = lines.setdefault((f"{row['T']:,}", row["mask"], row.get("mode") or ""), dict.fromkeys(names, ""))
            line[row["contestant"]] = cell(row)
    return grid(title, ["T", "mask", "", *names], [(*key, *line.values()) for key, line in lines.items()])


def milliseconds(row: dict) -> str:
    """A cell of the table of times."""
    return f"{row['median_ms']:,.3f}" if "median_ms" in row else "-"


def needs(row: dict) -> str:
    """A cell of the table of what a program needs, known also where it was too much to run."""
    if "compile_seconds" not in row:
        return "-"
    mib = "-" if row["temporary_bytes"] is None else f"{row['temporary_bytes'] / 2**20:,.1f}"
    return f"{mib}, {row['compile_seconds']:.2f} s"


def check_table(checks: list[dict]) -> Table:
    """How far each contestant is from the formula, causal or full."""
    worst = {}
    for row in checks:
        line = worst.setdefault((row["setup"], row["contestant"]), [])
        line.append(row.get("largest_difference", math.inf))
    shown = [(*key, "-" if math.inf in line else f"{max(line):.2g}") for key, line in worst.items()]
    title = f"largest difference from the formula in float64, T {checks[0]['T']:,}"
    return grid(title, ["set-up", "contestant", ""], shown)


def variant_table(section: str, rows: list[dict]) -> Table:
    """Our own programs beside each other."""
    lines = []
    for row in rows:
        ratio = "-" if row["ratio"] is None else f"{row['ratio']:.3f}"
        extra = row["mask"] if "mask" in row else f"{row['setup']}, {row['visible']:.1%} visible"
        lines.append((f"{row['T']:,}", row["variant"], extra, milliseconds(row), ratio))
    return grid(f"{section}: forward+backward", ["T", "", "", "ms", "ratio"], lines)


def grid(title: str, columns: list[str], rows: list[tuple]) -> Table:
    """A table whose numbers stand to the right."""
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        words = any(not row[number][:1].isdigit() and row[number] != "-" for row in rows)
        table.add_column(column, justify="left" if words else "right")
    for row in rows:
        table.add_row(*row)
    return table


def plot(rows: list[dict], file: pathlib.Path):
    """Time and temporary memory against the length, forward+backward, a column for each set-up."""
    import matplotlib  # here, since --help should not wait for it

    matplotlib.use("Agg")
    from matplotlib import pyplot

    setups = list(dict.fromkeys(row["setup"] for row in rows))
    names = list(dict.fromkeys(row["contestant"] for row in rows))
    figure, axes = pyplot.subplots(2, len(setups), figsize=(1 + 4.2 * len(setups), 8), sharey="row", squeeze=False)
    quantities = (("median_ms", 1, "ms, forward+backward"), ("temporary_bytes", 2**20, "temporary MiB"))
    for (key, unit, label), line in zip(quantities, axes):
        line[0].set_ylabel(label)
        for setup, ax in zip(setups, line):
            ax.set(title=setup, xlabel="T", yscale="log")
            ax.set_xscale("log", base=2)
            ax.grid(alpha=0.3)
            for (number, name), mask in itertools.product(enumerate(names), MASKS):
                where = (setup, name, mask, "forward+backward")
                here = [row for row in rows if (row["setup"], row["contestant"], row["mask"], row["mode"]) == where]
                points = [(row["T"], row[key] / unit) for row in here if row.get(key)]
                if points:
                    # Thinner and thinner: some lie on each other.
                    style = {"color": f"C{number}", "marker": "osv^Dx*P"[number], "linewidth": max(1, 4 - number)}
                    ax.plot(*zip(*points), "-" if mask == "causal" else ":", label=f"{name}, {mask}", **style)
    axes[0][0].legend(fontsize="x-small")
    figure.tight_layout()
    figure.savefig(file, dpi=120)


def as_json(summary: dict) -> str:
    """JSON with a line for each row."""
    parts = []
    for key, value in summary.items():
        if isinstance(value, list) and value:
            text = "[\n" + ",\n".join(f"    {json.dumps(row)}" for row in value) + "\n  ]"
        else:
            text = json.dumps(value, indent=2).replace("\n", "\n  ")
        parts.append(f"  {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def versions() -> dict[str, str | None]:
    """Of Python and of the packages that take part."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def positive_number(text: str) -> float:
    """A finite number above 0."""
    with contextlib.suppress(ValueError):
        if 0 < float(text) < math.inf:
            return float(text)
    raise argparse.ArgumentTypeError(f"got {text!r}, must be a number above 0")


def output_file(text: str) -> pathlib.Path:
    """A file that can be written, found out before an hour is spent."""
    file = pathlib.Path(text)
    if file.suffix != ".json":
        raise argparse.ArgumentTypeError(f"got {text!r}, must end in .json")
    if file.is_dir() or not os.access(file if file.exists() else file.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"cannot write {text!r}")
    return file


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong."""

    def error(self, message: str):
        self.exit(2, f"error: {message} (--help shows what there is)\n")


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, setups = parser.add_argument, (*SETUPS["cpu"], *SETUPS["gpu"])
    known = ("auto", "fastest", *IMPLEMENTATIONS)
    add("--only", nargs="+", choices=PARTS, default=PARTS, metavar="SECTION", help=", ".join(PARTS))
    add("--setups", nargs="+", choices=setups, metavar="SETUP", help="of speed (gpu if there is one, else the others)")
    add("--contestants", nargs="+", choices=CONTESTANTS, metavar="NAME", help=f"of speed: {', '.join(CONTESTANTS)}")
    add("--implementation", choices=known, default="blockwise", metavar="NAME", help="attn's elsewhere (%(default)s)")
    add("--lengths", nargs="+", type=positive, metavar="T", help="of speed (128 256 512 ... 16384)")
    add("--masks", nargs="+", choices=MASKS, metavar="MASK", help="of all but skipping: causal, full (both)")
    add("--heads", type=positive, default=8, metavar="N", help="of speed and freedom; the others have 1 (%(default)s)")
    add("--width", type=positive, default=64, metavar="H", help="of a head (%(default)s)")
    add("--batch", type=positive, default=1, metavar="B", help="sequences (%(default)s)")
    add("--dtype", choices=LARGEST_DIFFERENCE, help="(float32; on a GPU bfloat16)")
    add("--rounds", type=positive, metavar="N", help="samples of each contestant in a case, at most (30)")
    add("--seconds", type=positive_number, metavar="S", help="for those samples, but at least 3 are taken (4)")
    add("--memory_gib", type=positive_number, default=6.0, metavar="GIB", help="a program's limit (%(default)s)")
    add("--seed", type=positive, default=1, metavar="N", help="of the random arrays (%(default)s)")
    add("--quick", action="store_true", help="short lengths, causal, few rounds; written only if --output is given")
    add("--output", type=output_file, metavar="FILE", help="benchmarks/results/attention_PLATFORM.json; plot beside it")
    args = parser.parse_args(words)
    if args.setups and "gpu" in args.setups and len(args.setups) > 1:
        parser.error("--setups: gpu is compared alone")
    return args


def settle_kind(args: argparse.Namespace) -> tuple[str, dict]:
    """Whether this run is of the "cpu" or the "gpu", and what JAX computes on by itself.

    Raises:
      ValueError: no GPU where one is asked for, or an accelerator without a set-up here.
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
        raise ValueError(f"no set-up for the backend {backend!r}: name the CPU's with --setups")
    return backend, rows[0]


def measure(todo: list[Job]) -> dict:
    """Do the jobs, one after the other; the rows of each section, and of each job how it went."""
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
            say(f"warning: {failure}; its results up to there are kept")
        if others > OTHERS_AT_MOST and job.section != "memory":
            # Threads that wait for each other in a loop, as torch's do, have been seen to take 40 times as long.
            say(f"warning: other programs kept {others:.0%} of the cores busy: these comparisons are not fair")
    return found


def others_seconds() -> float:
    """Processor seconds, so far, of everything but this process and its children that have ended."""
    spent, own = psutil.cpu_times(), os.times()
    kinds = ("user", "nice", "system", "irq", "softirq", "steal")
    return sum(getattr(spent, kind, 0.0) for kind in kinds) - sum(own[:4])


def main() -> int:
    """Run the benchmark; returns the exit status."""
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
        "versions": versions(),
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
