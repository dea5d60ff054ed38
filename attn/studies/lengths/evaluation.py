"""Evaluate a trained model on random strings of many lengths, many strings of a few lengths, and structured strings.

Sources are padded to a few widths, so that a length does not need a program of its own. All seeds of a row share
programs.
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

_WIDTHS = (64, 256, 512, 1_024)  # that sources are padded to; a longer one keeps its length
_DECODED_AT_ONCE = 1 << 14  # symbols of the sources of a batch
_CONFIRMED_AT_ONCE = 1 << 12  # few, so that a layer's scores stay in the processor's cache
_SEED = 0  # of the evaluated strings
FIRST = 50  # whole strings that must all be right before more are counted


@functools.lru_cache(maxsize=8)
def _programs(config: Config, end: str) -> tuple[Callable, Callable]:
    """Return `(params, batch) -> answers` and `(params, batch) -> confirmed` of a model, however it was trained."""
    vocabulary = config.task.vocabulary
    graphdef, _ = model_structure(config, vocabulary)
    mesh = _mesh()

    def ending(model: Model) -> Model:
        return EndGiven(model, vocabulary.end) if end == "given" else model

    decode = data_parallel(lambda model, batch: greedy(ending(model), vocabulary, batch[0]), graphdef, mesh)
    confirm = data_parallel(lambda model, batch: confirmed(ending(model), vocabulary, *batch), graphdef, mesh)
    return decode, confirm


def _mesh() -> jax.sharding.Mesh:
    """Return a mesh of all devices of this host."""
    return meshes.data_mesh(jax.local_device_count())


class EndGiven(Model):
    """A model of which the end of the answer is given: it predicts the end token there and nowhere else.

    Args:
      model: predicts all other tokens.
      end: the end token.
    """

    def __init__(self, model: Model, end: int):
        self.model, self.end = model, end

    def start(self, source, capacity, **options):
        """Start as the model does."""
        return self.model.start(source, capacity, **options)

    def extend(self, tokens, cache, **options):
        """Extend as the model does, but for the logits of the end token."""
        number = cache.index + 1 + jnp.arange(len(tokens))  # of the token that is predicted, from 1
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
        # Without the settings of training, so that all seeds find the same programs.
        self.decode, self.confirm = _programs(dataclasses.replace(run.config, training=Training()), end)
        self.task, self.params, self.end = run.config.task, meshes.replicate(run.params, _mesh()), end

    def decoded(self, questions: Questions) -> Int[np.ndarray, "B T"]:
        """Return the answers, decoded token by token."""
        return self._in_batches(lambda sources, _: self.decode(self.params, (sources,)), questions, _DECODED_AT_ONCE)

    def confirmed(self, questions: Questions) -> Bool[np.ndarray, "B"]:
        """Return for which questions the correct answer would be decoded; see `attn.training.decoding.confirmed`."""
        return self._in_batches(lambda *batch: self.confirm(self.params, batch), questions, _CONFIRMED_AT_ONCE)

    def _in_batches(self, program: Callable, questions: Questions, symbols: int) -> np.ndarray:
        """Run a program on questions, in batches of one shape with about `symbols` symbols."""
        mesh, longest = _mesh(), int(questions.lengths.max())
        width = next((width for width in _WIDTHS if width >= longest), longest)
        capacity = self.task.vocabulary.capacity(width)
        size = mesh.size * max(1, symbols // width // mesh.size)
        arrays = questions.sources, questions.targets
        return in_batches(lambda batch: program(*batch), arrays, (width + 1, capacity), size, mesh)

    def tokens(self, length: int, each: int) -> dict[str, int]:
        """Count correct tokens, at their positions, and strings that are exact as a whole.

        Where the length is given, end tokens do not count. `confirmed_alike` counts the strings for which decoding and
        one pass over the correct answer agree.
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
        """Count exact answers; if one of the first is wrong, of the first alone."""
        right = self.confirmed(questions.chosen(np.arange(min(FIRST, len(questions.sources)))))
        if right.all() and len(questions.sources) > FIRST:
            right = self.confirmed(questions)
        return {"strings": len(right), "exact": int(right.sum())}


def evaluate(
    run: Run, end: str, grid: Grid, *, far: bool, track: Callable[[Sequence], Iterable] = iter
) -> dict[str, Any]:
    """Evaluate a model on a grid, with its farthest length if `far`; returns plain values.

    `track` wraps the sequence of lengths, to show progress.
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
    """Return whether a model answers 1,000 held-out strings of a length exactly, or all there are if fewer."""
    counts = Evaluator(run, end).exact(length, 1_000)
    return counts["exact"] == counts["strings"]
