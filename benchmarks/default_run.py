"""What `make train` reaches: the default config for several seeds, and the same with the task set to copy.

    python benchmarks/default_run.py

Each run is a process of its own, timed from its start to its final line, imports, compilation and evaluation
included. Writes benchmarks/results/default_run.json; the picture of the first run goes to docs/attention.png.
"""

import argparse
import json
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parent.parent


def main():
    """Run, print a table, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds to run (%(default)s)")
    parser.add_argument("--tasks", nargs="+", default=["reverse", "copy"], help="tasks to run (%(default)s)")
    parser.add_argument("--output", type=pathlib.Path, default=ROOT / "benchmarks/results/default_run.json")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for task in arguments.tasks:
            for seed in arguments.seeds:
                folder = pathlib.Path(scratch) / f"{task}-{seed}"
                rows.append(run(task, seed, folder))
                print_row(rows[-1])
                if len(rows) == 1:
                    shutil.copy(folder / "attention.png", ROOT / "docs/attention.png")
    machine = {"cores": len(os.sched_getaffinity(0)), "python": platform.python_version()}
    arguments.output.write_text(json.dumps({"machine": machine, "runs": rows}, indent=2) + "\n")
    print(f"wrote {arguments.output}")


def run(task: str, seed: int, folder: pathlib.Path) -> dict:
    """Train once; the summary of the run, and the seconds that the whole process took."""
    words = [f"--config.task.name={task}", f"--config.training.seed={seed}", f"--workdir={folder}"]
    start = time.time()
    subprocess.run([sys.executable, "train.py", *words], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    wall = time.time() - start
    summary = json.loads((folder / "summary.json").read_text())
    kept = ("exact_match", "token_accuracy", "examples_evaluated", "steps", "parameters", "seed", "seconds", "jax")
    lengths = summary["lengths_evaluated"]
    span = {"lengths": [min(lengths), max(lengths)], "every_length": len(lengths) == max(lengths) - min(lengths) + 1}
    return {"task": task, "process_seconds": round(wall, 2), **span, **{key: summary[key] for key in kept}}


def print_row(row: dict):
    """One line of the table."""
    seconds = "  ".join(f"{name} {row['seconds'][name]:5.1f}" for name in ("import", "compile", "train", "evaluate"))
    wrong = round((1 - row["exact_match"]) * row["examples_evaluated"])
    print(
        f"{row['task']:>9} seed {row['seed']}  process {row['process_seconds']:5.1f} s  ({seconds})  "
        f"exact match {100 * row['exact_match']:.2f} % of {row['examples_evaluated']:,} ({wrong} wrong)",
        flush=True,
    )


if __name__ == "__main__":
    main()
