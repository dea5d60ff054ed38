"""Evaluate a trained model on random strings of many lengths, many strings of a few lengths, and structured strings.

Sources are padded to a few widths, so that lengths share compiled programs. All seeds of a row share them as well.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int

from attn.nn.model import Model
from attn.runs import Run
from attn.studies.lengths.strings import structured
from attn.studies.lengths.study import Grid
from attn.tasks.examples import PAD, Questions
from attn.tasks.generated import Generated
from attn.training import meshes
from attn.training.decoding import confirmed, greedy
from attn.training.evaluation import data_parallel, in_batches
from attn.training.groups import Config, Training
from attn.training.state import model_structure

_WIDTHS = (64, 256, 512, 1_024)  # sources are padded to these; longer ones keep their length
_DECODED_AT_ONCE = 1 << 14  # source symbols per batch
_CONFIRMED_AT_ONCE = 1 << 12  # fewer, so that the scores of a layer fit into the processor's cache
_SEED = 0  # of the evaluated strings
FIRST = 50  # number of strings that must all be exact before more are evaluated


@functools.lru_cache(maxsize=8)
def _programs(config: Config, end: str) -> tuple[Callable, Callable]:
    """Return the programs `(params, batch) -> answers` and `(params, batch) -> confirmed` of a model."""
    vocabulary = config.task.vocabulary
    graphdef, _ = model_structure(config, vocabulary)
    mesh = _mesh()

    def with_end(model: Model) -> Model:
        return EndGiven(model, vocabulary.end) if end == "given" else model

    decode = data_parallel(lambda model, batch: greedy(with_end(model), vocabulary, batch[0]), graphdef, mesh)
    confirm = data_parallel(lambda model, batch: confirmed(with_end(model), vocabulary, *batch), graphdef, mesh)
    return decode, confirm


def _mesh() -> jax.sharding.Mesh:
    """Return a mesh of all devices of this host."""
    return meshes.data_mesh(jax.local_device_count())


class EndGiven(Model):
    """A model that is given the end of the answer: it predicts the end token there and nowhere else.

    Args:
      model: predicts all other tokens.
      end: the end token.
    """

    def __init__(self, model: Model, end: int):
        self.model, self.end = model, end

    def start(self, source, capacity, **options):
        """Start the wrapped model."""
        return self.model.start(source, capacity, **options)

    def extend(self, tokens, cache, **options):
        """Extend the wrapped model; only the logits of the end token differ."""
        number = cache.index + 1 + jnp.arange(len(tokens))  # number of the predicted token, from 1
        logits, cache, weights = self.model.extend(tokens, cache, **options)
        is_last = number >= cache.example.answer_length
        return logits.at[:, self.end].set(jnp.where(is_last, jnp.inf, -jnp.inf)), cache, weights


class Evaluator:
    """Evaluates one trained model.

    Args:
      run: the trained model.
      end: a key of `attn.studies.lengths.study.ENDS`.
    """

    def __init__(self, run: Run, end: str):
        # Default settings of training, so that the configs of all seeds are equal and share the cached programs.
        self.decode, self.confirm = _programs(dataclasses.replace(run.config, training=Training()), end)
        self.task, self.params, self.end = run.config.task, meshes.replicate(run.params, _mesh()), end

    def decoded(self, questions: Questions) -> Int[np.ndarray, "B T"]:
        """Decode the answers token by token."""
        return self._in_batches(lambda batch: self.decode(self.params, batch[:1]), questions, _DECODED_AT_ONCE)

    def confirmed(self, questions: Questions) -> Bool[np.ndarray, "B"]:
        """Return whether each correct answer would be decoded; see `attn.training.decoding.confirmed`."""
        return self._in_batches(lambda batch: self.confirm(self.params, batch), questions, _CONFIRMED_AT_ONCE)

    def _in_batches(self, program: Callable, questions: Questions, symbols: int) -> np.ndarray:
        """Run a program on questions, in batches of equal shape with about `symbols` source symbols."""
        mesh, longest = _mesh(), int(questions.lengths.max())
        width = next((width for width in _WIDTHS if width >= longest), longest)
        capacity = self.task.vocabulary.capacity(width)
        size = mesh.size * max(1, symbols // width // mesh.size)
        arrays = questions.sources, questions.targets
        return in_batches(program, arrays, (width + 1, capacity), size, mesh)

    def tokens(self, length: int, each: int) -> dict[str, int]:
        """Count correct tokens, by position, and exact strings.

        If the end is given, end tokens do not count. `confirmed_alike` counts strings for which decoding and one
        pass over the correct answer agree.
        """
        questions = self._questions(length, each)
        targets, answers = questions.targets, self.decoded(questions)[:, : questions.targets.shape[1]]
        counts = targets != PAD
        exact = (answers == targets).all(1)
        if self.end == "given":
            counts &= targets != self.task.vocabulary.end
        return {
            "strings": len(targets),
            "exact": int(exact.sum()),
            "tokens": int(counts.sum()),
            "right": int(((answers == targets) & counts).sum()),
            "confirmed_alike": int((exact == self.confirmed(questions)).sum()),
        }

    def exact(self, length: int, strings: int) -> dict[str, int]:
        """Count the exact answers to distinct random strings of a length."""
        return self._count(self._questions(length, strings))

    def structured(self, length: int) -> dict[str, dict[str, int]]:
        """Count the exact answers to structured strings, by kind."""
        return {
            kind: self._count(self.task.questions(strings, np.full(len(strings), length)))
            for kind, strings in structured(length, self.task.symbols).items()
        }

    def _questions(self, length: int, strings: int) -> Questions:
        return Generated(self.task).questions_of_each_length("test", [length], strings, _SEED)

    def _count(self, questions: Questions) -> dict[str, int]:
        """Count exact answers; if one of the first `FIRST` is wrong, only among those."""
        right = self.confirmed(questions.chosen(np.arange(min(FIRST, len(questions.sources)))))
        if right.all() and len(questions.sources) > FIRST:
            right = self.confirmed(questions)
        return {"strings": len(right), "exact": int(right.sum())}


def evaluate(
    run: Run, end: str, grid: Grid, *, far: bool, track: Callable[[Sequence], Iterable] = iter
) -> dict[str, Any]:
    """Evaluate a model on a grid, including the farthest length if `far`, and return plain values.

    `track` wraps the sequence of lengths to show progress.
    """
    evaluator = Evaluator(run, end)
    parts = [("tokens", length, grid.each, evaluator.tokens) for length in (*grid.within, *grid.beyond)]
    parts += [("exact", length, grid.strings, evaluator.exact) for length in grid.exact]
    parts += [("exact", grid.far, grid.far_strings, evaluator.exact)] * far
    counts = {"tokens": {}, "exact": {}}
    for part, length, strings, count in track(parts):
        counts[part][str(length)] = count(length, strings)
    return counts | {"structured": evaluator.structured(grid.structured)}


def is_exact(run: Run, end: str, length: int) -> bool:
    """Return whether a model answers 1,000 held-out strings of a length exactly, or all of them if there are fewer."""
    counts = Evaluator(run, end).exact(length, 1_000)
    return counts["exact"] == counts["strings"]
