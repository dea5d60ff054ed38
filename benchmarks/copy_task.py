"""Train the copy task of x-transformers with x-transformers and with attn, side by side in one run.

The task: 16 symbols, sources of 32 symbols, the target is the source twice. The model: width 128, 3 + 3 layers,
8 heads of width 64, feed-forward 512. Batches of 32, Adam at 3e-4, in float32 on the CPU's cores.

    pip install -e ".[bench]"
    python benchmarks/copy_task.py                # milliseconds per step
    python benchmarks/copy_task.py --to_exact     # also seconds of training to 100 % exact match

A step draws a batch, computes the loss and its gradients, and updates the parameters. Blocks of steps alternate
between the two, so that other load on the machine affects both; the medians are compared. Exact match is evaluated
every `--evaluate_every` steps, by greedy autoregressive decoding of strings that are never trained on; its time is not
counted.
"""

import argparse
import importlib.util
import json
import pathlib
import platform
import statistics
import sys
import time
from importlib import metadata
from typing import NamedTuple, Protocol

import jax
import numpy as np
import psutil
from command_line import positive
from jax.sharding import NamedSharding, PartitionSpec
from machine import describe as describe_machine

from attn.tasks.generated import Generated, distinct_strings
from attn.tasks.sequences import is_held_out
from attn.training import meshes
from attn.training.config import Config, from_mapping
from attn.training.loop import compile_evaluate, compile_steps
from attn.training.state import State, initial_state

SYMBOLS, LENGTH, BATCH = 16, 32, 32
WIDTH, HEADS, HEAD_WIDTH, LAYERS, FEED_FORWARD = 128, 8, 64, 3, 512
LEARNING_RATE = 3e-4
EVALUATED, EVALUATION_BATCH = 1_000, 250  # strings

# Differences between the two set-ups, written to the results.
DIFFERENCES = {
    "attention": "softmax attention in both; newer versions of x-transformers' example turn its cog_signed variant on",
    "tokens": "x-transformers reads 32 source and 64 target tokens, attn 33 and 65: both end with an end token, "
    "which the model must learn to write",
    "vocabulary": "x-transformers 18: begin token, an unused one, symbols; attn 19: symbols, padding, begin, end",
    "positions": "x-transformers learned tables for source and target; attn sinusoids",
    "embeddings": "x-transformers ties source and target and has its own output matrix; attn ties all three",
    "norms": "both before each block and after each stack; x-transformers without biases, attn with",
    "activation": "x-transformers GELU; attn ReLU",
    "cross-attention memory": "the encoder's output after its last norm, in both",
    "source mask": "x-transformers a mask of ones; attn the source's length, computed per batch",
    "batches": "attn draws strings of the tenth that it holds out again; x-transformers draws any (the chance of "
    "drawing one of the evaluated strings among 16^32 is negligible)",
    "parallel": "x-transformers all cores as threads of one process; attn one device per core, the batch divided "
    "evenly, gradients all-reduced at once",
    "optimiser": "x-transformers Adam, fused; attn AdamW without decay on one flat vector, with gradients "
    "clipped at norm 1e9, which is never reached",
}


class Contestant(Protocol):
    """A framework with the set-up: its model, its training step and its evaluation."""

    name: str
    compile_seconds: float
    parameters: int

    def train(self, steps: int) -> float:
        """Take steps, wait for them, and return the loss in nats per token."""

    def exact_match(self, strings: np.ndarray) -> float:
        """Return the fraction of strings `[B n]` of symbols 1..V whose greedy answer is right."""


class Attn:
    """The trainer's own step and evaluation, with one CPU device per core.

    Args:
      seed: of parameters and batches.
      steps_per_call: number of steps per call of the compiled program.
      evaluates: compile the evaluation too.
    """

    name = "attn"

    def __init__(self, seed: int, steps_per_call: int, evaluates: bool):
        started = time.perf_counter()
        self.config = our_config(seed, steps_per_call)
        self._data = Generated(self.config.task)
        mesh = meshes.data_mesh(BATCH)
        initial = jax.jit(
            lambda: initial_state(self.config, self._data.vocabulary),
            out_shardings=NamedSharding(mesh, PartitionSpec()),
        )
        self.state: State = initial()
        self._step = 0
        self._advance = compile_steps(self.config, self._data, mesh, self.state)
        jax.block_until_ready(self.state)
        self.compile_seconds = time.perf_counter() - started
        self.parameters = sum(x.size for x in jax.tree.leaves(self.state.params))
        self._evaluate = compile_evaluate(self.config, self._data, mesh, self.state.params, 1) if evaluates else None

    def train(self, steps: int) -> float:
        """Take further steps; return their mean loss."""
        until = self._step + steps
        self.state, report = self._advance(self.state, self._step, until)
        self._step = until
        jax.block_until_ready(self.state)
        return float(report.loss.value())

    def exact_match(self, strings: np.ndarray) -> float:
        """Evaluate by `attn.training.evaluation`, which decodes with a key/value cache."""
        questions = self.config.task.questions(strings, np.full(len(strings), LENGTH))
        return self._evaluate(self.state.params, questions).metrics.overall().exact_match.value()


class XTransformers:
    """x-transformers' XTransformer with its example's settings, on all cores.

    Tokens: 1 begins a target, symbol s is token s + 1, and 0 is unused.

    Args:
      seed: of parameters and batches.
      optimiser: implementation of torch's Adam, "fused" or "default".
    """

    name = "x-transformers"

    def __init__(self, seed: int, optimiser: str):
        # Imported here because JAX must count its devices first, and --help should not wait for torch.
        import torch
        from x_transformers import XTransformer

        started = time.perf_counter()
        self._torch = torch
        torch.manual_seed(seed)
        torch.set_num_threads(meshes.cores())
        sizes = {"num_tokens": SYMBOLS + 2, "depth": LAYERS, "heads": HEADS, "attn_dim_head": HEAD_WIDTH}
        sizes["ff_mult"] = FEED_FORWARD // WIDTH
        encoder = {f"enc_{key}": value for key, value in (sizes | {"max_seq_len": LENGTH}).items()}
        decoder = {f"dec_{key}": value for key, value in (sizes | {"max_seq_len": 2 * LENGTH + 1}).items()}
        self.model = XTransformer(dim=WIDTH, tie_token_emb=True, return_tgt_loss=True, **encoder, **decoder)
        self.optimiser = torch.optim.Adam(self.model.parameters(), lr=LEARNING_RATE, fused=optimiser == "fused")
        self._begin = torch.ones((BATCH, 1), dtype=torch.long)
        self._mask = torch.ones((BATCH, LENGTH), dtype=torch.bool)
        self.compile_seconds = time.perf_counter() - started
        self.parameters = sum(p.numel() for p in self.model.parameters())

    def train(self, steps: int) -> float:
        """Take further steps; return the loss of the last one."""
        self.model.train()
        for _ in range(steps):
            source = self._torch.randint(2, SYMBOLS + 2, (BATCH, LENGTH))
            loss = self.model(source, self._torch.cat((self._begin, source, source), 1), mask=self._mask)
            loss.backward()
            self.optimiser.step()
            self.optimiser.zero_grad()
        return loss.item()

    def exact_match(self, strings: np.ndarray) -> float:
        """Evaluate by its own `generate` at temperature 0, with its key/value cache."""
        self.model.eval()
        right = 0
        for source in self._torch.as_tensor(strings + 1).split(EVALUATION_BATCH):
            begin = self._torch.ones((len(source), 1), dtype=self._torch.long)
            mask = self._torch.ones_like(source, dtype=self._torch.bool)
            answer = self.model.generate(source, begin, 2 * LENGTH, mask=mask, temperature=0.0)
            right += int((answer == self._torch.cat((source, source), 1)).all(1).sum())
        return right / len(strings)


class Race(NamedTuple):
    """The training that one contestant needed to answer all evaluated strings, or its training until it was stopped."""

    exact_match: float
    steps: int
    seconds: float  # of training alone
    seconds_with_compile: float


def our_config(seed: int, steps_per_call: int) -> Config:
    """Return the set-up as a config of attn."""
    return from_mapping(
        {
            "task": {"name": "duplicate", "symbols": SYMBOLS, "min_length": LENGTH, "max_length": LENGTH},
            "model": {
                "width": WIDTH,
                "num_heads": HEADS,
                "head_width": HEAD_WIDTH,
                "num_encoder_layers": LAYERS,
                "num_decoder_layers": LAYERS,
                "feed_forward_width": FEED_FORWARD,
                "tied_embeddings": True,
                "norm": "pre",
            },
            "optimizer": {
                "learning_rate": LEARNING_RATE,
                "warmup_fraction": 0.0,
                "decay": "none",
                "beta1": 0.9,
                "beta2": 0.999,  # torch's
                "weight_decay": 0.0,
                "clip_norm": 1e9,
            },
            "training": {"seed": seed, "batch_size": BATCH, "steps_per_call": steps_per_call},
            "evaluation": {"batch_size": EVALUATION_BATCH},
        }
    )


def time_steps(contestants: list[Contestant], blocks: int, steps: int) -> dict[str, list[float]]:
    """Return milliseconds per step of each block; the contestants alternate, and so does their order."""
    for contestant in contestants:
        for _ in range(2):  # warm-up: the second call is still slower than later ones
            contestant.train(steps)
    times = {contestant.name: [] for contestant in contestants}
    for block in range(blocks):
        for contestant in contestants[:: 1 if block % 2 == 0 else -1]:
            started = time.perf_counter()
            contestant.train(steps)
            times[contestant.name].append((time.perf_counter() - started) / steps * 1e3)
        shown = ", ".join(f"{name} {values[-1]:.0f} ms" for name, values in times.items())
        say(f"block {block + 1}/{blocks}: {shown} per step")
    return times


def race(contestant: Contestant, strings: np.ndarray, every: int, at_most: int) -> Race:
    """Train a fresh contestant until it answers every string, or for `at_most` steps."""
    seconds, steps, exact_match = 0.0, 0, 0.0
    while exact_match < 1 and steps < at_most:
        taken = min(every, at_most - steps)
        started = time.perf_counter()
        loss = contestant.train(taken)
        seconds += time.perf_counter() - started
        steps += taken
        exact_match = contestant.exact_match(strings)
        say(f"{contestant.name}: step {steps:,}, {seconds:.0f} s, loss {loss:.4f}, exact match {exact_match:.1%}")
    return Race(exact_match, steps, seconds, seconds + contestant.compile_seconds)


def summarise(
    times: dict[str, list[float]], races: dict[str, Race], contestants: list[Contestant], busy: float
) -> dict:
    """Return all results for JSON; `busy` is the fraction of the cores that other programs used before."""
    results = {}
    for contestant in contestants:
        values = times[contestant.name]
        results[contestant.name] = {
            "parameters": contestant.parameters,
            "compile_seconds": round(contestant.compile_seconds, 3),
            "milliseconds_a_step": round(statistics.median(values), 3),
            "fastest_block": round(min(values), 3),
            "blocks": [round(value, 3) for value in values],
            "to_exact": races[contestant.name]._asdict() if races else None,
        }
    ours, theirs = (results[name]["milliseconds_a_step"] for name in (Attn.name, XTransformers.name))
    packages = ("jax", "jaxlib", "flax", "optax", "numpy", "torch", "x-transformers")
    return {
        "task": {"symbols": SYMBOLS, "length": LENGTH, "batch_size": BATCH, "judged_strings": EVALUATED},
        "ratio": round(theirs / ours, 3),
        "results": results,
        "differences": DIFFERENCES,
        "machine": describe_machine() | {"busy_before": busy},
        "versions": {"python": platform.python_version()} | {name: metadata.version(name) for name in packages},
    }


def table(summary: dict) -> str:
    """Return the results as a table to print."""
    rows = [f"{'':16}{'parameters':>12}{'ms per step':>12}{'compile s':>12}{'to exact s':>12}{'steps':>9}"]
    for name, result in summary["results"].items():
        to_exact = result["to_exact"]
        reached = to_exact and to_exact["exact_match"] == 1
        raced = f"{to_exact['seconds']:12.0f}{to_exact['steps']:9,}" if reached else f"{'-':>12}{'-':>9}"
        rows.append(
            f"{name:16}{result['parameters']:12,}{result['milliseconds_a_step']:12.1f}"
            f"{result['compile_seconds']:12.1f}{raced}"
        )
    rows.append(f"steps of attn are {summary['ratio']:.2f} times as fast")
    return "\n".join(rows)


def busy_share() -> float:
    """Return the fraction of the cores that other programs use, over two seconds; warn if it disturbs the timings."""
    busy = psutil.cpu_percent(interval=2.0) / 100
    if busy > 0.05:
        # With another busy program, steps of x-transformers have taken ten times as long.
        say(f"warning: other programs use {busy:.0%} of the cores: the comparison will not be fair")
    return round(busy, 3)


def say(line: str):
    """Print progress to stderr; the results go to stdout."""
    print(line, file=sys.stderr, flush=True)


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--blocks", type=positive, default=10, metavar="N", help="Number of timed blocks of each (%(default)s).")
    add("--steps_per_block", type=positive, default=20, metavar="N", help="Number of steps per block (%(default)s).")
    add("--to_exact", action="store_true", help=f"Also train until {EVALUATED:,} unseen strings are exact.")
    add("--evaluate_every", type=positive, default=100, metavar="N", help="Steps between evaluations (%(default)s).")
    add("--max_steps", type=positive, default=10_000, metavar="N", help="Stop after this many steps (%(default)s).")
    add("--seed", type=int, default=0, metavar="N", help="Seed of parameters, batches and test strings (%(default)s).")
    add("--adam", choices=("fused", "default"), default="fused", help="Implementation of Adam in torch (%(default)s).")
    add(
        "--output",
        type=pathlib.Path,
        default=pathlib.Path(__file__).parent / "results" / "copy_task.json",
        metavar="FILE",
        help="File to write the results to (benchmarks/results/copy_task.json).",
    )
    return parser.parse_args()


def main() -> int:
    """Run the benchmark; return the exit status."""
    args = arguments()
    missing = [name for name in ("torch", "x_transformers") if importlib.util.find_spec(name) is None]
    if missing:
        print(f"error: {' and '.join(missing)} missing: install them with pip install -e '.[bench]'", file=sys.stderr)
        return 2
    busy = busy_share()
    meshes.use_cores(BATCH)
    say("compiling")
    contestants = [Attn(args.seed, args.steps_per_block, evaluates=False), XTransformers(args.seed, args.adam)]
    times = time_steps(contestants, args.blocks, args.steps_per_block)
    races = {}
    if args.to_exact:
        strings, _ = distinct_strings(contestants[0].config.task, [LENGTH], EVALUATED, args.seed)
        assert is_held_out(strings, SYMBOLS).all()
        # Fresh contestants, one after the other, so that each training has the machine to itself.
        every = args.evaluate_every
        fresh = [lambda: Attn(args.seed, every, evaluates=True), lambda: XTransformers(args.seed, args.adam)]
        for contestant in (make() for make in fresh):
            races[contestant.name] = race(contestant, strings, every, args.max_steps)
    summary = summarise(times, races, contestants, busy)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(summary, indent=2) + "\n")
    print(table(summary))
    say(f"written: {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
