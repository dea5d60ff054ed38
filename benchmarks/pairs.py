"""Measure reading, training and evaluation of a data set: 130,000 pairs of spelling and sound.

    python benchmarks/pairs.py               # seconds to read, memory, and tokens per second
    python benchmarks/pairs.py --train       # also the whole run of configs/pairs.py, with its metrics

Tokens per second are compared with examples that the device draws itself, with the same model and batch size, in
interleaved blocks of one process:
- `same shapes`: examples as wide as each bucket of the pairs and full of tokens, so that a step computes the same as a
  step on pairs. Padded tokens per second are compared, the blocks weighted by the fraction of steps per bucket.
- `copy`: the task copy with sources of 1 to 30 symbols. Real tokens per second, without padding, are compared, as
  `train.py` shows them.

Writes benchmarks/results/pairs.json.
"""

import argparse
import dataclasses
import json
import pathlib
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np
from spelling import LONGEST_SPELLING, write

from attn.tasks.examples import Example
from attn.tasks.generated import Generated
from attn.tasks.sequences import Task
from attn.training import data as training_data
from attn.training import meshes
from attn.training.config import Config
from attn.training.flags import load_config
from attn.training.loop import compile_steps
from attn.training.state import initial_state

ROOT = pathlib.Path(__file__).parent.parent
STEPS = 20  # per block
READ = (
    "import resource, sys, time; from attn import tasks; start = time.perf_counter();"
    "tasks.load('pairs', path=sys.argv[1]);"
    "print(time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
)


@dataclasses.dataclass(frozen=True)
class Full(Generated):
    """Random examples of one shape, full of tokens."""

    source_width: int = 0
    target_width: int = 0

    def sample(self, key: jax.Array) -> Example:
        """Draw random symbols; nothing can be learned from them."""
        keys, widths = jax.random.split(key), (self.source_width, self.target_width)
        return Example(*(jax.random.randint(k, (w,), 1, self.task.symbols + 1) for k, w in zip(keys, widths)))


class Contestant:
    """Training on one kind of data, block by block."""

    def __init__(self, config: Config, data, mesh):
        self.state = meshes.replicate(jax.jit(lambda: initial_state(config, data.vocabulary))(), mesh)
        self.advance = compile_steps(config, data, mesh, self.state)
        self.step, self.seconds, self.tokens = 0, [], []
        self.block()  # the first block warms up
        self.seconds, self.tokens = [], []

    def block(self):
        """Train for one block; record its seconds and its number of tokens."""
        start = time.perf_counter()
        self.state, report = self.advance(self.state, self.step, self.step + STEPS)
        self.seconds.append(time.perf_counter() - start)
        self.tokens.append(float(report.tokens))
        self.step += STEPS


def main():
    """Measure, print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=130_000, help="Number of pairs in the file (%(default)s).")
    parser.add_argument("--blocks", type=int, default=30, help=f"Number of blocks of {STEPS} steps (%(default)s).")
    parser.add_argument("--train", action="store_true", help="Also do the whole run of configs/pairs.py.")
    output = ROOT / "benchmarks/results/pairs.json"
    parser.add_argument("--output", type=pathlib.Path, default=output, help="File of the results.")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        path = pathlib.Path(scratch) / "spelling.tsv"
        write(path, args.pairs, seed=0)
        results = {"machine": {"cores": meshes.cores(), "python": platform.python_version()}}
        results |= {"jax": jax.__version__, "pairs": args.pairs, "read": read(path)}
        if args.train:
            results["run"] = train(path, pathlib.Path(scratch) / "run")
        results["speed"] = compare(path, args.blocks)
    args.output.write_text(json.dumps(results, indent=2) + "\n")
    print(f"wrote {args.output}")


def read(path: pathlib.Path) -> dict:
    """Return seconds to read the file and peak memory, measured in three separate processes."""
    runs = [subprocess.run([sys.executable, "-c", READ, path], capture_output=True, check=True) for _ in range(3)]
    seconds, peaks = zip(*(map(float, run.stdout.split()) for run in runs))
    row = {"seconds": [round(value, 2) for value in seconds], "peak_mib": round(max(peaks) / 1024)}
    print(
        f"read        {statistics.median(seconds):.2f} s (median of 3), peak memory {row['peak_mib']:,} MiB", flush=True
    )
    return row


def compare(path: pathlib.Path, blocks: int) -> dict:
    """Compare tokens per second on pairs and on examples that the device draws, in interleaved blocks."""
    overrides = {"data.path": str(path), "training.steps_per_call": str(STEPS)}
    config = load_config(str(ROOT / "configs/pairs.py"), overrides)
    meshes.use_cores(config.training.batch_size)
    mesh = meshes.data_mesh(config.training.batch_size)
    data = training_data.load(config)
    # The vocabulary of the task is as large as that of the pairs.
    task = Task("copy", symbols=data.vocabulary.size - 3, max_length=LONGEST_SPELLING)
    widths = [(bucket.source.shape[1], bucket.target.shape[1]) for bucket in data.training]
    rivals = {"pairs": Contestant(config, data, mesh), "copy": Contestant(config, Generated(task), mesh)}
    rivals |= {width: Contestant(config, Full(task, *width), mesh) for width in widths}
    for _ in range(blocks):
        for rival in rivals.values():
            rival.block()

    median = {name: statistics.median(rival.seconds) / STEPS for name, rival in rivals.items()}
    real = {name: sum(rivals[name].tokens) / sum(rivals[name].seconds) for name in ("pairs", "copy")}
    fractions = bucket_shares(rivals["pairs"], data.batches(config.training.batch_size, config.training.seed))
    same_shapes = sum(fraction * median[width] for fraction, width in zip(fractions, widths))
    mean = sum(rivals["pairs"].seconds) / len(rivals["pairs"].seconds) / STEPS
    row = {
        "padding": round(data.padding, 4),
        "buckets": widths,
        "ms_a_step": {str(name): round(1e3 * seconds, 2) for name, seconds in median.items()},
        "ms_a_step_on_pairs_mean": round(1e3 * mean, 2),
        "ms_a_step_same_shapes": round(1e3 * same_shapes, 2),
        "padded_tokens_a_second_to_same_shapes": round(same_shapes / mean, 3),
        "real_tokens_a_second": {name: round(value) for name, value in real.items()},
        "real_tokens_a_second_to_copy": round(real["pairs"] / real["copy"], 3),
    }
    print(f"padding     {data.padding:.1%} of tokens in {len(widths)} buckets")
    drawn = f"{1e3 * same_shapes:.1f} drawn by the device: {same_shapes / mean:.2f}"
    print(f"same shapes {1e3 * mean:.1f} ms per step on pairs, {drawn}")
    ratio = real["pairs"] / real["copy"]
    print(f"copy        {real['pairs']:,.0f} tokens/s on pairs, {real['copy']:,.0f} on copy: {ratio:.2f}")
    return row


def bucket_shares(rival: Contestant, batches) -> np.ndarray:
    """Return the fraction of timed steps per bucket."""
    numbers = [batches.batch(step)[0] for step in range(STEPS, rival.step)]  # of buckets, without the warm-up
    return np.bincount(numbers, minlength=len(batches.buckets)) / len(numbers)


def train(path: pathlib.Path, folder: pathlib.Path) -> dict:
    """Do the whole run of configs/pairs.py in a separate process; return its metrics, seconds and peak memory."""
    words = ["--config=configs/pairs.py", f"--config.data.path={path}", f"--workdir={folder}"]
    subprocess.run([sys.executable, "train.py", *words], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    summary = json.loads((folder / "summary.json").read_text())
    kept = (
        "exact_match",
        "token_accuracy",
        "error_rate",
        "beam",
        "examples_evaluated",
        "steps",
        "parameters",
        "seconds",
    )
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rate = statistics.median(row["tokens_per_second"] for row in rows)
    about = json.loads((folder / "data.json").read_text())["about"]
    row = {key: summary[key] for key in kept} | {"tokens_per_second": round(rate), "peak_mib": round(peak)}
    print(
        f"trained     exact match {summary['exact_match']:.4f}, error rate {summary['error_rate']:.4f}, "
        f"{summary['seconds']['total']:.0f} s, peak memory {peak:,.0f} MiB",
        flush=True,
    )
    return row | {"about": [line.replace(str(path), path.name) for line in about]}


if __name__ == "__main__":
    main()
