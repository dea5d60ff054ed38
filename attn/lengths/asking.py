"""What a trained model is asked: random strings of a grid of lengths, many of a few lengths, and structured ones.

Lengths are rounded up to a few widths, so that no length compiles a program of its own, and programs are shared by all
seeds of a row.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Int

from attn.lengths.strings import structured
from attn.lengths.table import Asked
from attn.runs import Run
from attn.tasks.examples import PAD, Questions
from attn.tasks.generated import Generated, ask
from attn.training import meshes
from attn.training.decoding import confirmed, greedy
from attn.training.groups import Config, Training
from attn.training.judging import share_out, widened
from attn.training.state import model_structure

_WIDTHS = (64, 256, 512, 1_024)  # that sources are padded to; a longer one keeps its length
_WRITTEN_AT_ONCE = 1 << 14  # symbols of the sources of a batch
_CONFIRMED_AT_ONCE = 1 << 12  # few, so that a layer's scores stay in the processor's cache
_SEED = 0  # of the strings that are asked
FIRST = 50  # whole strings that are counted before it is worth while to count all


@functools.lru_cache(maxsize=8)
def _programs(config: Config, end: str) -> tuple[Callable, Callable]:
    """`(params, batch) -> answers` and `(params, batch) -> confirmed`, however the model was trained."""
    vocabulary = config.task.vocabulary
    graphdef, _ = model_structure(config, vocabulary)
    mesh, given = _mesh(), {"length_given": end == "given"}
    write = share_out(lambda model, batch: greedy(model, vocabulary, batch[0], **given), graphdef, mesh)
    check = share_out(lambda model, batch: confirmed(model, vocabulary, *batch, **given), graphdef, mesh)
    return write, check


def _mesh() -> jax.sharding.Mesh:
    """All devices of this host."""
    return meshes.data_mesh(jax.local_device_count())


class Examiner:
    """Asks one trained model.

    Args:
      run: the trained model.
      end: a key of `attn.lengths.table.ENDS`.
    """

    def __init__(self, run: Run, end: str):
        self.write, self.check = _programs(dataclasses.replace(run.config, training=Training()), end)
        self.task, self.params, self.end = run.config.task, meshes.replicate(run.params, _mesh()), end

    def written(self, questions: Questions) -> Int[np.ndarray, "B T"]:
        """Answers, written token by token."""
        return self._in_batches(
            lambda sources, targets: self.write(self.params, (sources,)), questions, _WRITTEN_AT_ONCE
        )

    def confirmed(self, questions: Questions) -> Bool[np.ndarray, "B"]:
        """Which of the answers that are right would be written; see `attn.training.decoding.confirmed`."""
        return self._in_batches(lambda *batch: self.check(self.params, batch), questions, _CONFIRMED_AT_ONCE)

    def _in_batches(self, program: Callable, questions: Questions, symbols: int) -> np.ndarray:
        """What a program says of questions of one length, in batches of one shape with about so many symbols."""
        mesh, longest = _mesh(), int(questions.lengths.max())
        width = next((width for width in _WIDTHS if width >= longest), longest)
        room = self.task.vocabulary.room(width)
        size = mesh.size * max(1, symbols // width // mesh.size)
        results = []
        for at in range(0, len(questions.sources), size):
            rows = [questions.sources[at : at + size], questions.targets[at : at + size]]
            wide = [widened(tokens, wanted, size) for tokens, wanted in zip(rows, (width + 1, room))]
            results.append(jax.device_get(program(*meshes.share(wide, mesh)))[: len(rows[0])])
        return np.concatenate(results)

    def tokens(self, length: int, each: int) -> dict[str, int]:
        """How many of the right tokens stand at their places, and how many strings are right as a whole.

        Where the length is given, end tokens do not count. Whole strings are counted twice: as they are written, and
        as one pass confirms them.
        """
        questions = Generated(self.task).questions_of_each_length("test", [length], each, _SEED)
        targets, answers = questions.targets, self.written(questions)[:, : questions.targets.shape[1]]
        counts = targets != PAD
        whole = (answers == targets).all(1)
        if self.end == "given":
            counts &= targets != self.task.vocabulary.end
        agreed = whole == self.confirmed(questions)
        return {
            "strings": len(targets),
            "exact": int(whole.sum()),
            "tokens": int(counts.sum()),
            "right": int(((answers == targets) & counts).sum()),
            "confirmed_alike": int(agreed.sum()),
        }

    def exact(self, length: int, strings: int) -> dict[str, int]:
        """How many distinct random strings of a length are right as a whole."""
        return self._count(Generated(self.task).questions_of_each_length("test", [length], strings, _SEED))

    def structured(self, length: int) -> dict[str, dict[str, int]]:
        """How many structured strings are right as a whole, by kind."""
        return {
            kind: self._count(ask(self.task, strings, np.full(len(strings), length)))
            for kind, strings in structured(length, self.task.symbols).items()
        }

    def _count(self, questions: Questions) -> dict[str, int]:
        """How many questions are right as a whole; where one of the first is wrong, of the first alone."""
        right = self.confirmed(questions.chosen(np.arange(min(FIRST, len(questions.sources)))))
        if right.all() and len(questions.sources) > FIRST:
            right = self.confirmed(questions)
        return {"strings": len(right), "exact": int(right.sum())}


def examine(
    run: Run, end: str, asked: Asked, *, far: bool, track: Callable[[Sequence], Iterable] = iter
) -> dict[str, Any]:
    """All that a model is asked, with answers that end in one way; plain values, as JSON keeps them.

    Args:
      run: the trained model.
      end: a key of `attn.lengths.table.ENDS`.
      asked: what to ask.
      far: whether to ask the farthest length, too.
      track: wraps the sequence of what is asked, to show progress.
    """
    examiner = Examiner(run, end)
    steps = [("tokens", length, asked.each, examiner.tokens) for length in (*asked.within, *asked.beyond)]
    steps += [("exact", length, asked.strings, examiner.exact) for length in asked.exact]
    steps += [("exact", asked.far, asked.far_strings, examiner.exact)] * far
    found = {"tokens": {}, "exact": {}}
    for part, length, strings, ask_for in track(steps):
        found[part][str(length)] = ask_for(length, strings)
    return found | {"structured": examiner.structured(asked.structured)}


def exact_at(run: Run, end: str, length: int) -> bool:
    """Whether a model answers 1,000 held-out strings of a length exactly, or all there are if they are fewer."""
    counts = Examiner(run, end).exact(length, 1_000)
    return counts["exact"] == counts["strings"]
