"""Measure what `make train` reaches: the default config for several seeds, also with the task set to copy.

    python benchmarks/default_run.py
    python benchmarks/default_run.py --seeds 0 1 2 3 4 5 6 7 8 9 --roundings usual one_device
    python benchmarks/default_run.py --seeds --against ../attn-before        # only seconds, of two checkouts

Each run is a separate process, timed from its start to its final line, imports, compilation and evaluation
included. "one_device" computes on one CPU device instead of one per core: sums are rounded differently, as on another
processor. With --against, the runs of two checkouts alternate, with the default config and one seed after another. This
checkout runs twice per seed: "first" without compiled programs, as the first time on a machine, and "again" with those
of the first.

Writes benchmarks/results/default_run.json after every run; runs that it has of the same code and machine are not
repeated. The attention maps of the first run are saved as docs/attention.png.
"""

import argparse
import hashlib
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

from machine import describe as describe_machine

ROOT = pathlib.Path(__file__).parent.parent
ROUNDINGS = {"usual": {}, "one_device": {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"}}
KEPT = ("exact_match", "token_accuracy", "examples_evaluated", "steps", "stopped_when_exact", "parameters", "seed")


def main():
    """Do the missing runs, print a table, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--seeds", type=int, nargs="*", default=[0, 1, 2], help="Seeds to run (%(default)s).")
    add("--tasks", nargs="+", default=["reverse", "copy"], help="Tasks to run (%(default)s).")
    add("--roundings", nargs="+", default=["usual"], choices=ROUNDINGS, help="Ways to round (%(default)s).")
    add("--against", type=pathlib.Path, help="Another checkout: compare the seconds of whole runs.")
    add("--pairs", type=int, default=5, help="Number of seeds to compare seconds with (%(default)s).")
    add(
        "--output", type=pathlib.Path, default=ROOT / "benchmarks/results/default_run.json", help="File of the results."
    )
    arguments = parser.parse_args()
    results = previous(arguments.output)
    done = {(row["task"], row["rounding"], row["seed"]) for row in results["runs"]}
    for task in arguments.tasks:
        for rounding in arguments.roundings:
            for seed in arguments.seeds:
                if (task, rounding, seed) not in done:
                    picture = ROOT / "docs/attention.png" if not results["runs"] else None
                    results["runs"].append(run(task, seed, rounding, picture))
                    write(results, arguments.output)
    for row in results["runs"]:
        print_row(row)
    if arguments.against:
        results["against"] = compare(arguments.against, arguments.pairs)
        write(results, arguments.output)


def previous(output: pathlib.Path) -> dict:
    """Return the results of a file if they are of this code and machine; else empty ones."""
    files = [*sorted(ROOT.glob("attn/**/*.py")), *sorted(ROOT.glob("configs/*.py")), ROOT / "train.py"]
    code = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
    fresh = {"machine": describe_machine(), "code": code, "runs": []}
    saved = json.loads(output.read_text()) if output.exists() else {}
    same = all(saved.get(name) == fresh[name] for name in ("machine", "code"))
    return saved if same else fresh


def write(results: dict, output: pathlib.Path):
    """Write all results so far."""
    output.write_text(json.dumps(results, indent=2) + "\n")


def run(task: str, seed: int, rounding: str, picture: pathlib.Path | None) -> dict:
    """Train once, without compiled programs; return the summary of the run and the seconds that it took."""
    words = f"--config.task.name={task}", f"--config.training.seed={seed}"
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch) / "run"
        seconds = timed(ROOT, folder, pathlib.Path(scratch) / "programs", ROUNDINGS[rounding], *words)
        summary = json.loads((folder / "summary.json").read_text())
        if picture:
            shutil.copy(folder / "attention.png", picture)
    lengths = summary["lengths_evaluated"]
    span = {"lengths": [min(lengths), max(lengths)], "every_length": len(lengths) == max(lengths) - min(lengths) + 1}
    kept = {key: summary[key] for key in (*KEPT, "seconds", "jax")}
    row = {"task": task, "rounding": rounding, "process_seconds": seconds, **span, **kept}
    print_row(row)
    return row


def timed(
    checkout: pathlib.Path, folder: pathlib.Path, programs: pathlib.Path, environment: dict[str, str], *words: str
) -> float:
    """Return the seconds of a training process, from its start to its final line.

    Args:
      checkout: the repository whose train.py runs.
      folder: folder of the run.
      programs: folder for compiled programs.
      environment: variables to set.
      words: further arguments.
    """
    variables = {"PYTHONPATH": str(checkout.resolve()), "XDG_CACHE_HOME": str(programs)} | environment
    command = [sys.executable, "train.py", *words, f"--workdir={folder}"]
    start = last = time.perf_counter()
    # JAX_ variables of the caller would change what is measured.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    with subprocess.Popen(command, cwd=checkout, env=inherited | variables, stdout=subprocess.PIPE) as process:
        for _ in process.stdout:
            last = time.perf_counter()
    if process.returncode:
        sys.exit(f"error: {' '.join(command)} in {checkout} ended with status {process.returncode}")
    return round(last - start, 2)


def compare(other: pathlib.Path, pairs: int) -> dict:
    """Return the seconds of whole runs of two checkouts in alternation, and the ratios of their medians."""
    seconds = {"other": [], "first": [], "again": []}
    with tempfile.TemporaryDirectory() as scratch:
        for seed in range(pairs):
            programs = pathlib.Path(scratch) / f"programs-{seed}"
            turns = ["other", "first", "again"] if seed % 2 == 0 else ["first", "again", "other"]
            for turn in turns:
                checkout = other if turn == "other" else ROOT
                folder = pathlib.Path(scratch) / f"{turn}-{seed}"
                seconds[turn].append(timed(checkout, folder, programs, {}, f"--config.training.seed={seed}"))
            print(f"seed {seed}: " + ", ".join(f"{turn} {seconds[turn][-1]:.1f} s" for turn in turns), flush=True)
    medians = {turn: statistics.median(values) for turn, values in seconds.items()}
    ratios = {turn: round(medians[turn] / medians["other"], 3) for turn in ("first", "again")}
    print(f"medians: {medians}; relative to the other's: {ratios}")
    return {"seconds": seconds, "medians": medians, "ratios": ratios}


def print_row(row: dict):
    """Print one line of the table."""
    seconds = "  ".join(f"{name} {row['seconds'][name]:5.1f}" for name in ("import", "compile", "train", "evaluate"))
    wrong = round((1 - row["exact_match"]) * row["examples_evaluated"])
    print(
        f"{row['task']:>9} seed {row['seed']} {row['rounding']:>10}  {row['steps']:5,} steps  "
        f"process {row['process_seconds']:5.1f} s  ({seconds})  "
        f"exact match {100 * row['exact_match']:.2f} % of {row['examples_evaluated']:,} ({wrong} wrong)",
        flush=True,
    )


if __name__ == "__main__":
    main()
