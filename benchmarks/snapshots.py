"""Measure what snapshots cost: trainings by the default config with and without them, in turn.

    python benchmarks/snapshots.py

Each training is a separate process. "train" is the time of the training steps, as the run's summary has it, and
"record" the part of it that fetches, digests and writes parameters. CPU seconds are those of all threads of the
process, and depend less than seconds on what else the machine does.

Whole trainings differ by more than snapshots cost. So the first call, of 100 steps, is also repeated with and without
its snapshots, from the same state: the difference per snapshot includes that a call is divided. Times the number of
snapshots of a run it is a share of the CPU seconds of "train".

Writes benchmarks/results/snapshots.json.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile

from command_line import Parser, output_file, positive
from machine import describe as describe_machine

ROOT = pathlib.Path(__file__).parent.parent

# Trains in a process of its own, and prints the seconds and CPU seconds of each part.
PROGRAM = """
import contextlib, json, pathlib, sys, time
from attn import experiment
from attn.training import snapshots
from attn.training.progress import Clock

folder, snapshot_count, seed = sys.argv[1:]
measured = dict.fromkeys(("train", "train_cpu", "record", "record_cpu"), 0.0)

@contextlib.contextmanager
def measuring(name):
    start = time.perf_counter(), time.process_time()
    yield
    measured[name] += time.perf_counter() - start[0]
    measured[name + "_cpu"] += time.process_time() - start[1]

phase, record = Clock.phase, snapshots.Recorder.record

@contextlib.contextmanager
def measured_phase(clock, name):
    with phase(clock, name), measuring("train") if name == "train" else contextlib.nullcontext():
        yield

def measured_record(recorder, step, params):
    with measuring("record"):
        record(recorder, step, params)

Clock.phase, snapshots.Recorder.record = measured_phase, measured_record
settings = {"training.snapshots": snapshot_count, "training.seed": seed}
status = experiment.run(experiment.Request("configs/reverse.py", settings, folder, False, "off"))
assert status == 0
summary = json.loads((pathlib.Path(folder) / "summary.json").read_text())
paths = [*(pathlib.Path(folder) / "snapshots").glob("*")]
files = {"snapshots": len(paths), "bytes": sum(path.stat().st_size for path in paths), "steps": summary["steps"]}
whole = {"whole": summary["seconds"]["total"], "whole_cpu": time.process_time()}
print(json.dumps(measured | whole | files))
"""

# Repeats the first call of a training, and prints the CPU seconds of each with and without snapshots.
FIRST_CALL = """
import json, pathlib, sys, time
import jax
import jax.numpy as jnp
from attn.training import data, meshes, snapshots
from attn.training.flags import load_config
from attn.training.loop import compile_programs

folder, snapshot_count, repeats = sys.argv[1:]
config = load_config("configs/reverse.py", {})
meshes.use_cores(config.training.batch_size)
mesh = meshes.model_mesh(config.training.batch_size, config.mesh)
programs = compile_programs(config, data.load(config), mesh)
until = config.training.steps_per_call
steps = [step for step in snapshots.schedule(int(snapshot_count), config.training.steps) if 0 < step <= until]
recorder = snapshots.Recorder(pathlib.Path(folder), steps, "digest", print)
seconds = {"with": [], "without": []}
for number in range(int(repeats) + 1):
    for name in ("with", "without") if number % 2 else ("without", "with"):
        state = jax.block_until_ready(jax.tree.map(jnp.copy, programs.state))  # a call takes the state's memory
        start = time.process_time()
        jax.block_until_ready(programs.advance(state, 0, until, recorder if name == "with" else None))
        seconds[name].append(time.process_time() - start)
print(json.dumps({name: each[1:] for name, each in seconds.items()} | {"snapshots": len(steps)}))
"""


def main():
    """Train in turn, print a table, write the results."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=positive, default=5, help="Number of pairs (%(default)s).")
    parser.add_argument("--repeats", type=positive, default=20, help="Of the first call (%(default)s).")
    parser.add_argument("--snapshots", type=positive, default=16, help="Number of snapshots (%(default)s).")
    parser.add_argument(
        "--output",
        type=output_file,
        default=ROOT / "benchmarks/results/snapshots.json",
        help="File of the results (%(default)s).",
    )
    arguments = parser.parse_args()
    runs = {"with": [], "without": []}
    for pair in range(arguments.pairs):
        for name in ("with", "without") if pair % 2 == 0 else ("without", "with"):
            runs[name].append(process(PROGRAM, arguments.snapshots if name == "with" else 0, pair))
            shown = "  ".join(f"{part} {runs[name][-1][part]:.2f}" for part in ("train", "train_cpu", "record_cpu"))
            print(f"pair {pair} {name:<8} {shown}", flush=True)
    first_call = process(FIRST_CALL, arguments.snapshots, arguments.repeats)
    found = compared(runs, first_call)
    print(json.dumps(found, indent=1))
    results = {"machine": describe_machine(), "setting": arguments.snapshots, **found}
    results |= {"runs": runs, "first_call": first_call}
    arguments.output.write_text(json.dumps(results, indent=1) + "\n")


def process(program: str, *numbers: int) -> dict:
    """Run one of the programs with a new folder and these numbers; return what it prints last."""
    with tempfile.TemporaryDirectory() as scratch:
        words = [sys.executable, "-c", program, f"{scratch}/run", *map(str, numbers)]
        done = subprocess.run(words, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"error: a measurement ended with status {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def compared(runs: dict[str, list[dict]], first_call: dict) -> dict:
    """Return the median ratios of trainings with snapshots to those without, and the shares of snapshots in training.

    The share "of all" is computed from the first call; those of writing are measured in each training.
    """
    times = ("train", "train_cpu", "whole", "whole_cpu")
    pairs = [*zip(runs["with"], runs["without"])]
    ratios = {name: round(statistics.median(a[name] / b[name] for a, b in pairs), 4) for name in times}
    shares = {
        f"share_of_{name}": round(statistics.median(run[part] / run[name] for run in runs["with"]), 4)
        for part, name in (("record", "train"), ("record_cpu", "train_cpu"))
    }
    difference = statistics.median(first_call["with"]) - statistics.median(first_call["without"])
    each = difference / first_call["snapshots"]
    shares["share_of_all"] = round(
        statistics.median(each * run["snapshots"] / run["train_cpu"] for run in runs["with"]), 4
    )
    return {"ratios": ratios, "record": shares, "cpu_seconds_per_snapshot": round(each, 5)}


if __name__ == "__main__":
    main()
