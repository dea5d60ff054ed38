"""A real data set: 130,000 pairs of spelling and sound are read, trained on, and judged.

    python benchmarks/pairs.py               # seconds to read, tokens a second beside the synthetic task, memory
    python benchmarks/pairs.py --train       # also the whole run of configs/pairs.py, with its scores

Tokens a second are compared with examples that the device draws itself, with the same model and batch, in interleaved
blocks of one process:
- `same shapes`: examples as wide as each bucket of the pairs and full of tokens, so that every step computes just what
  a step on pairs computes. Compared are padded tokens a second, the blocks weighted by the share of each bucket.
- `copy`: the task copy with sources of 1 to 30 symbols. Compared are real tokens a second, padding not counted, as
  `train.py` shows them.

Writes benchmarks/results/pairs.json.
"""

import argparse
import dataclasses
import json
import os
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
STEPS = 20  # of a block
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
        """Random symbols; nothing is learnt from them."""
        keys, widths = jax.random.split(key), (self.source_width, self.target_width)
        return Example(*(jax.random.randint(k, (w,), 1, self.task.symbols + 1) for k, w in zip(keys, widths)))


class Contestant:
    """Training on some data, block by block."""

    def __init__(self, config: Config, data, mesh):
        self.state = meshes.replicate(jax.jit(lambda: initial_state(config, data.vocabulary))(), mesh)
        self.advance = compile_steps(config, data, mesh, self.state)
        self.step, self.seconds, self.tokens = 0, [], []
        self.block()  # the first block warms up
        self.seconds, self.tokens = [], []

    def block(self):
        """Train for one block, and keep its seconds and its tokens."""
        start = time.perf_counter()
        self.state, report = self.advance(self.state, self.step, self.step + STEPS)
        self.seconds.append(time.perf_counter() - start)
        self.tokens.append(float(report.tokens))
        self.step += STEPS


def main():
    """Run, print, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=130_000, help="pairs in the file (%(default)s)")
    parser.add_argument("--blocks", type=int, default=30, help=f"of {STEPS} steps each (%(default)s)")
    parser.add_argument("--train", action="store_true", help="also train by configs/pairs.py to its end")
    parser.add_argument("--output", type=pathlib.Path, default=ROOT / "benchmarks/results/pairs.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        path = pathlib.Path(scratch) / "spelling.tsv"
        write(path, args.pairs, seed=0)
        results = {"machine": {"cores": len(os.sched_getaffinity(0)), "python": platform.python_version()}}
        results |= {"jax": jax.__version__, "pairs": args.pairs, "read": read(path)}
        if args.train:
            results["run"] = train(path, pathlib.Path(scratch) / "run")
        results["speed"] = compare(path, args.blocks)
    args.output.write_text(json.dumps(results, indent=2) + "\n")
    print(f"wrote {args.output}")


def read(path: pathlib.Path) -> dict:
    """Seconds to read the file and memory afterwards, in three processes of their own."""
    runs = [subprocess.run([sys.executable, "-c", READ, path], capture_output=True, check=True) for _ in range(3)]
    seconds, peaks = zip(*(map(float, run.stdout.split()) for run in runs))
    row = {"seconds": [round(value, 2) for value in seconds], "peak_mib": round(max(peaks) / 1024)}
    print(
        f"read        {statistics.median(seconds):.2f} s (median of 3), peak memory {row['peak_mib']:,} MiB", flush=True
    )
    return row


def compare(path: pathlib.Path, blocks: int) -> dict:
    """Tokens a second on pairs and on examples that the device draws, in interleaved blocks."""
    overrides = {"data.path": str(path), "training.steps_per_call": str(STEPS)}
    config = load_config(str(ROOT / "configs/pairs.py"), overrides)
    meshes.use_cores(config.training.batch_size)
    mesh = meshes.data_mesh(config.training.batch_size)
    data = training_data.load(config)
    task = Task("copy", symbols=data.vocabulary.size - 3, max_length=LONGEST_SPELLING)  # as many tokens as the pairs
    widths = [(bucket.source.shape[1], bucket.target.shape[1]) for bucket in data.training]
    rivals = {"pairs": Contestant(config, data, mesh), "copy": Contestant(config, Generated(task), mesh)}
    rivals |= {width: Contestant(config, Full(task, *width), mesh) for width in widths}
    for _ in range(blocks):
        for rival in rivals.values():
            rival.block()

    median = {name: statistics.median(rival.seconds) / STEPS for name, rival in rivals.items()}
    real = {name: sum(rivals[name].tokens) / sum(rivals[name].seconds) for name in ("pairs", "copy")}
    shares = bucket_shares(rivals["pairs"], data.batches(config.training.batch_size, config.training.seed))
    alike = sum(share * median[width] for share, width in zip(shares, widths))
    mean = sum(rivals["pairs"].seconds) / len(rivals["pairs"].seconds) / STEPS
    row = {
        "padding": round(data.padding, 4),
        "buckets": widths,
        "ms_a_step": {str(name): round(1e3 * seconds, 2) for name, seconds in median.items()},
        "ms_a_step_on_pairs_mean": round(1e3 * mean, 2),
        "ms_a_step_same_shapes": round(1e3 * alike, 2),
        "padded_tokens_a_second_to_same_shapes": round(alike / mean, 3),
        "real_tokens_a_second": {name: round(value) for name, value in real.items()},
        "real_tokens_a_second_to_copy": round(real["pairs"] / real["copy"], 3),
    }
    print(f"padding     {data.padding:.1%} of tokens in {len(widths)} buckets")
    print(f"same shapes {1e3 * mean:.1f} ms a step on pairs, {1e3 * alike:.1f} drawn by the device: {alike / mean:.2f}")
    ratio = real["pairs"] / real["copy"]
    print(f"copy        {real['pairs']:,.0f} tokens/s on pairs, {real['copy']:,.0f} on copy: {ratio:.2f}")
    return row


def bucket_shares(rival: Contestant, batches) -> np.ndarray:
    """The share of each bucket in the steps that were timed."""
    numbers = [batches.batch(step)[0] for step in range(STEPS, rival.step)]
    return np.bincount(numbers, minlength=len(batches.buckets)) / len(numbers)


def train(path: pathlib.Path, folder: pathlib.Path) -> dict:
    """The whole run of configs/pairs.py, in a process of its own."""
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
