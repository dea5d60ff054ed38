"""Evaluation: decode autoregressively and compare with the accepted answers."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int
from rapidfuzz.distance import Levenshtein

from attn.nn.model import Model
from attn.tasks.examples import PAD, Example, Questions, as_one_text, decoder_input
from attn.tasks.vocabulary import Vocabulary, before
from attn.training.config import Config
from attn.training.decoding import decode
from attn.training.meshes import shard
from attn.training.metrics import Mean
from attn.training.steps import example_loss

_SCORES_IN_MEMORY = 1 << 24  # largest number of attention scores of a batch in one layer
_NARROW = 32  # source tokens; a further width below this does not justify compiling a program

Track = Callable[[Sequence], Iterable]  # wraps a sequence of batches, to show progress


class Metrics(NamedTuple):
    """Metrics of answers, each a `Mean` of arrays `[max length + 1]` by length of the source.

    Where several answers are accepted, the nearest to the model's is taken, by edit distance.

    Attributes:
      exact_match: fraction of the answers that are right token for token and then end.
      token_accuracy: fraction of the right answers' tokens, end tokens included, that are right at their position.
      error_rate: edit distance from the right answers in tokens, divided by their tokens; it may exceed 1.
      held_out_loss: of strings without a source, the negative log-likelihood in nats per token; None for others.
    """

    exact_match: Mean
    token_accuracy: Mean
    error_rate: Mean
    held_out_loss: Mean | None = None

    def overall(self) -> "Metrics":
        """Return the metrics over all lengths together."""
        return jax.tree.map(lambda x: float(np.sum(x)), self)

    def by_length(self) -> Iterator[tuple[int, "Metrics"]]:
        """Yield (length, metrics) for each length that has questions."""
        for length in np.flatnonzero(self.exact_match.count):
            yield int(length), jax.tree.map(lambda x, length=length: float(x[length]), self)

    def values(self) -> dict[str, float]:
        """Return the means by name."""
        return {name: mean.value() for name, mean in self._asdict().items() if mean is not None}


class Evaluated(NamedTuple):
    """The result of an evaluation: the metrics, and the answers `[B T]` as tokens."""

    metrics: Metrics
    answers: Int[np.ndarray, "B T"]


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """Decodes sources in batches of few shapes, and compares the answers with the accepted ones.

    Attributes:
      vocabulary: of the task.
      mesh: the one over which batches are sharded.
      sizes: from `batch_sizes`, for the longest source.
      decode: `(params, sources) -> answers`; this and `loss` are from `build_programs`.
      loss: `(params, (sources, targets)) -> [B 2]`, of strings without a source: loss in nats, number of tokens.
    """

    vocabulary: Vocabulary
    mesh: Mesh
    sizes: Mapping[int, int]
    decode: Callable
    loss: Callable | None = None

    def answers(
        self,
        params: nnx.State,
        sources: Int[np.ndarray, "B S"],
        lengths: Int[np.ndarray, "B"],
        track: Track = iter,
    ) -> Int[np.ndarray, "B T"]:
        """Decode the answers to any number of sources; batches are filled up with empty sources.

        Args:
          params: of the model.
          sources: tokens, with their end tokens.
          lengths: numbers of tokens, without their end tokens.
          track: wraps the sequence of batches.
        """
        # Sources of similar lengths share a batch, since their answers end at similar steps.
        order, widths = np.argsort(lengths, kind="stable"), np.array([*self.sizes])
        width_of = widths[np.searchsorted(widths, lengths[order] + 1)]
        batches = []
        for width, size in self.sizes.items():
            rows = order[width_of == width]
            batches += [(width, rows[first : first + size]) for first in range(0, len(rows), size)]
        answers = []
        for width, rows in track(batches):
            batch = widened(sources[rows, :width], width, self.sizes[width])
            answers.append(jax.device_get(self.decode(params, shard(batch, self.mesh)))[: len(rows)])
        longest = max(answer.shape[1] for answer in answers)
        return np.concatenate([widened(answer, longest) for answer in answers])[np.argsort(order, kind="stable")]

    def evaluate(self, params: nnx.State, questions: Questions, track: Track = iter) -> Evaluated:
        """Decode the answers to questions and compute their metrics."""
        answers = self.answers(params, questions.sources, questions.lengths, track)
        metrics = compare(questions, answers, self.vocabulary)
        if self.loss is not None:
            metrics = metrics._replace(held_out_loss=self._losses(params, questions))
        return Evaluated(metrics, answers)

    def _losses(self, params: nnx.State, questions: Questions) -> Mean:
        """Return the loss by length of strings without a source, each of which has one accepted answer."""
        (width, size), arrays = max(self.sizes.items()), (questions.sources, questions.targets)
        widths = width, self.vocabulary.capacity(width - 1)
        sums, counts = in_batches(lambda batch: self.loss(params, batch), arrays, widths, size, self.mesh).T
        return _by_length(questions, sums, counts)


def batch_sizes(
    config: Config, vocabulary: Vocabulary, longest: int, most: int, mesh: Mesh, beam_width: int = 1
) -> dict[int, int]:
    """Return the widths that sources of up to `longest` tokens are padded to, with the batch size of each.

    The widths are the longest, a quarter of it, a quarter of that, and so on, so that short questions do not wait for
    long answers. A batch has `most` rows, or as many as memory allows.
    """
    widths = [longest]
    while widths[0] > 4 * _NARROW:
        widths.insert(0, -(-widths[0] // 4))
    sizes = {}
    for width in widths:
        scores = getattr(config.model, "num_heads", 1) * max(width, vocabulary.capacity(width - 1)) ** 2 * beam_width
        fitting = min(most, max(1, _SCORES_IN_MEMORY // scores))
        sizes[width] = -(-fitting // mesh.size) * mesh.size
    return sizes


def build_programs(
    vocabulary: Vocabulary, graphdef: nnx.GraphDef, mesh: Mesh, beam_width: int = 1
) -> tuple[Callable, Callable | None]:
    """Make `decode` and `loss` of an `Evaluator`, jitted; decoding is greedy or with a beam."""
    loss = _batch_loss(vocabulary) if vocabulary.continues else None
    return (
        data_parallel(lambda model, sources: decode(model, vocabulary, sources, beam_width), graphdef, mesh),
        loss and data_parallel(loss, graphdef, mesh),
    )


def _batch_loss(vocabulary: Vocabulary) -> Callable:
    """Make `(model, (sources, targets)) -> [B 2]`: for each string its loss in nats and its number of tokens."""

    def loss(model: Model, source: Int[Array, "S"], target: Int[Array, "T"]) -> Float[Array, "2"]:
        string = as_one_text(Example(source, target))
        inputs = decoder_input(string.target, vocabulary.begin)
        return jnp.stack(example_loss(model, string, inputs, None, knows_length=False).loss)

    return lambda model, batch: jax.vmap(functools.partial(loss, model))(*batch)


def data_parallel(program: Callable, graphdef: nnx.GraphDef, mesh: Mesh) -> Callable:
    """Make `(params, batch) -> results` of `(model, batch) -> results`; each device computes its rows of the batch.

    All devices of the mesh have rows, and for these the whole model, also where they share one in training.
    """

    def per_device(params, batch):
        return jax.lax.all_gather(program(nnx.merge(graphdef, params), batch), mesh.axis_names, tiled=True)

    specs = (PartitionSpec(), PartitionSpec(mesh.axis_names))
    # Decoding starts from constants that the loop makes differ by device, which the check of axes rejects.
    return jax.jit(jax.shard_map(per_device, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=False))


def in_batches(
    program: Callable, arrays: Sequence[Int[np.ndarray, "B _"]], widths: Sequence[int], size: int, mesh: Mesh
) -> np.ndarray:
    """Run a program on arrays of tokens, in batches of one shape, the last one filled up with empty rows.

    Args:
      program: `(arrays of a batch) -> results`, an array with a leading axis for the rows.
      arrays: arrays with the same number of rows.
      widths: the widths that they are padded to.
      size: number of rows of a batch.
      mesh: over which batches are sharded.
    """
    results = []
    for first in range(0, len(arrays[0]), size):
        batch = tuple(widened(tokens[first : first + size], width, size) for tokens, width in zip(arrays, widths))
        results.append(jax.device_get(program(shard(batch, mesh)))[: len(arrays[0]) - first])
    return np.concatenate(results)


def compare(questions: Questions, answers: Int[np.ndarray, "B T"], vocabulary: Vocabulary) -> Metrics:
    """Compare each answer with the nearest of its accepted answers."""
    source_rows, width = questions.source_rows, max(answers.shape[1], questions.targets.shape[1])
    answers, targets = widened(answers, width), widened(questions.targets, width)
    written, accepted = ([before(vocabulary.end, row) for row in rows.tolist()] for rows in (answers, targets))
    # One distance per accepted answer.
    distance = np.array([Levenshtein.distance(written[row], tokens) for row, tokens in zip(source_rows, accepted)])

    # Choose the nearest accepted answer per question: the first of its rows after sorting by distance.
    nearest = np.lexsort((distance, source_rows))
    nearest = nearest[np.unique(source_rows[nearest], return_index=True)[1]]
    targets, distance = targets[nearest], distance[nearest]
    real = targets != PAD
    return Metrics(
        exact_match=_by_length(questions, (answers == targets).all(1), np.ones(len(answers))),
        token_accuracy=_by_length(questions, ((answers == targets) & real).sum(1), real.sum(1)),
        error_rate=_by_length(questions, distance, np.array([len(accepted[row]) for row in nearest])),
    )


def _by_length(questions: Questions, sums: np.ndarray, counts: np.ndarray) -> Mean:
    """Return the means by length of the source, from one sum and one count per question."""
    shape = int(questions.lengths.max(initial=0)) + 1
    return Mean(*(np.bincount(questions.lengths, weights, shape) for weights in (sums, counts)))


def widened(tokens: Int[np.ndarray, "B T"], width: int, height: int | None = None) -> np.ndarray:
    """Return the tokens padded to `width` columns and, if `height` is given, to `height` rows."""
    missing = 0 if height is None else height - len(tokens)
    return np.pad(tokens, ((0, missing), (0, width - tokens.shape[1])))
