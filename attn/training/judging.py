"""Evaluation: decode autoregressively and compare with the accepted answers."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Int
from rapidfuzz.distance import Levenshtein

from attn.tasks.examples import PAD, Questions
from attn.tasks.vocabulary import Vocabulary, before
from attn.training.config import Config
from attn.training.decoding import decode
from attn.training.meshes import DATA, share
from attn.training.metrics import Mean

_SCORES_IN_MEMORY = 1 << 24  # attention scores of one layer that a batch may hold at once
_NARROW = 32  # tokens of a source, below which another width is not worth a program


class Scores(NamedTuple):
    """Metrics of answers, each a `Mean` of arrays `[max length + 1]` by length of the source.

    Where several answers count as right, the nearest to what was written is taken, by edit distance.

    Attributes:
      exact_match: share of the answers that are right token for token and then end.
      token_accuracy: share of the right answers' tokens, end tokens included, that stand at their place.
      error_rate: edit distance from the right answers in tokens, divided by their tokens; it may exceed 1.
    """

    exact_match: Mean
    token_accuracy: Mean
    error_rate: Mean

    def overall(self) -> "Scores":
        """Over all lengths together."""
        return jax.tree.map(lambda x: float(np.sum(x)), self)

    def by_length(self) -> Iterator[tuple[int, "Scores"]]:
        """(length, scores) for each length that has questions."""
        for length in np.flatnonzero(self.exact_match.count):
            yield int(length), jax.tree.map(lambda x, at=length: float(x[at]), self)

    def values(self) -> dict[str, float]:
        """The means by name."""
        return {name: mean.value() for name, mean in self._asdict().items()}


class Judgement(NamedTuple):
    """The result of an evaluation: the metrics, and the answers `[B T]` as tokens."""

    scores: Scores
    answers: Int[np.ndarray, "B T"]


def judging_batches(
    config: Config, vocabulary: Vocabulary, longest: int, most: int, mesh: Mesh, beam_width: int = 1
) -> dict[int, int]:
    """Widths that sources of up to `longest` tokens are padded to, and how many of each are answered at a time.

    The longest, a quarter of it, a quarter of that: short questions do not wait for long answers. `most` at a time,
    or as many as memory allows.
    """
    widths = [longest]
    while widths[0] > 4 * _NARROW:
        widths.insert(0, -(-widths[0] // 4))
    batches = {}
    for width in widths:
        scores = getattr(config.model, "num_heads", 1) * max(width, vocabulary.capacity(width - 1)) ** 2 * beam_width
        fitting = min(most, max(1, _SCORES_IN_MEMORY // scores))
        batches[width] = -(-fitting // mesh.size) * mesh.size
    return batches


def build_answer(
    vocabulary: Vocabulary, graphdef: nnx.GraphDef, mesh: Mesh, beam_width: int = 1
) -> Callable[[nnx.State, Int[np.ndarray, "B S"]], Int[np.ndarray, "B T"]]:
    """Make `(params, sources) -> answers`: a batch answered freely, greedily or with a beam."""
    return share_out(lambda model, sources: decode(model, vocabulary, sources, beam_width), graphdef, mesh)


def share_out(program: Callable, graphdef: nnx.GraphDef, mesh: Mesh) -> Callable:
    """Make `(params, batch) -> results` of `(model, batch) -> results`, each device having its share of the batch."""

    def shared(params, batch):
        return jax.lax.all_gather(program(nnx.merge(graphdef, params), batch), DATA, tiled=True)

    specs = (PartitionSpec(), PartitionSpec(DATA))
    # Decoding starts from constants that the loop makes differ by device, which the check of axes rejects.
    return jax.jit(jax.shard_map(shared, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=False))


def answer_all(
    answer: Callable,
    params: nnx.State,
    sources: Int[np.ndarray, "B S"],
    lengths: Int[np.ndarray, "B"],
    batches: Mapping[int, int],
    mesh: Mesh,
    *,
    track: Callable[[Sequence], Iterable] = iter,
) -> Int[np.ndarray, "B T"]:
    """Answer any number of sources in batches of few shapes; those are filled up with empty sources.

    Args:
      answer: from `build_answer`.
      params: of the model.
      sources, lengths: tokens with their ends, and how many without.
      batches: from `judging_batches`, for sources as long.
      mesh: the one that `answer` was built for.
      track: wraps the sequence of batches, to show progress.
    """
    # Sources of like lengths together: their answers end at like times.
    order = np.argsort(lengths, kind="stable")
    width_of = np.array([*batches])[np.searchsorted([*batches], lengths[order] + 1)]
    asked = []
    for width, size in batches.items():
        rows = order[width_of == width]
        asked += [(width, rows[at : at + size]) for at in range(0, len(rows), size)]
    answers = []
    for width, rows in track(asked):
        batch = widened(sources[rows, :width], width, batches[width])
        answers.append(jax.device_get(answer(params, share(batch, mesh)))[: len(rows)])
    room = max(answer.shape[1] for answer in answers)
    return np.concatenate([widened(answer, room) for answer in answers])[np.argsort(order, kind="stable")]


def judge(
    answer: Callable,
    params: nnx.State,
    questions: Questions,
    vocabulary: Vocabulary,
    batches: Mapping[int, int],
    mesh: Mesh,
    *,
    track: Callable[[Sequence], Iterable] = iter,
) -> Judgement:
    """Ask any number of questions, and hold the answers against those that are right; see `answer_all`."""
    answers = answer_all(answer, params, questions.sources, questions.lengths, batches, mesh, track=track)
    return Judgement(score(questions, answers, vocabulary), answers)


def score(questions: Questions, answers: Int[np.ndarray, "B T"], vocabulary: Vocabulary) -> Scores:
    """Hold each answer against the nearest of those that count as right."""
    asked, width = questions.source_rows, max(answers.shape[1], questions.targets.shape[1])
    answers, targets = widened(answers, width), widened(questions.targets, width)
    written, right = ([before(vocabulary.end, row) for row in rows.tolist()] for rows in (answers, targets))
    distance = np.array([Levenshtein.distance(written[number], tokens) for number, tokens in zip(asked, right)])

    # Of each question's right answers the nearest: the first of its rows, once they are sorted by distance.
    nearest = np.lexsort((distance, asked))
    nearest = nearest[np.unique(asked[nearest], return_index=True)[1]]
    targets, distance = targets[nearest], distance[nearest]
    real = targets != PAD

    def mean(values, counts) -> Mean:
        shape = int(questions.lengths.max(initial=0)) + 1
        return Mean(*(np.bincount(questions.lengths, weights, shape) for weights in (values, counts)))

    return Scores(
        exact_match=mean((answers == targets).all(1), np.ones(len(answers))),
        token_accuracy=mean(((answers == targets) & real).sum(1), real.sum(1)),
        error_rate=mean(distance, [len(right[row]) for row in nearest]),
    )


def widened(tokens: Int[np.ndarray, "B T"], width: int, height: int | None = None) -> np.ndarray:
    """Return the tokens with more padding, and with empty rows up to `height`."""
    missing = 0 if height is None else height - len(tokens)
    return np.pad(tokens, ((0, missing), (0, width - tokens.shape[1])))
