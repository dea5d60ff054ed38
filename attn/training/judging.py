"""How good a model is: exact match and token accuracy by length, on strings it has never seen."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from attn.tasks.sequences import PAD, Task
from attn.training.decoding import greedy
from attn.training.meshes import DATA, share
from attn.training.metrics import Mean, exact_match, token_accuracy


class Scores(NamedTuple):
    """Exact match and token accuracy, each a `Mean` of arrays `[max length + 1]` by length of the source."""

    exact_match: Mean
    token_accuracy: Mean

    def overall(self) -> "Scores":
        """Over all lengths together."""
        return jax.tree.map(lambda x: float(np.sum(x)), self)

    def by_length(self) -> Iterator[tuple[int, "Scores"]]:
        """(length, scores) for each length that has strings."""
        for length in np.flatnonzero(self.exact_match.count):
            yield int(length), jax.tree.map(lambda x, at=length: float(x[at]), self)


class Strings(NamedTuple):
    """Strings to answer: symbols `[B n]`, padded with 0, and lengths `[B]`; length 0 counts for nothing."""

    symbols: Int[Array, "B n"]
    lengths: Int[Array, "B"]


class Judgement(NamedTuple):
    """What came of a batch of strings: the scores, and the answers `[B T]` as tokens."""

    scores: Scores
    answers: Int[Array, "B T"]


def strings_like(batch_size: int, max_length: int, mesh: Mesh) -> Strings:
    """The shapes of a batch of strings, shared out over the mesh."""
    shared = NamedSharding(mesh, PartitionSpec(DATA))
    symbols = jax.ShapeDtypeStruct((batch_size, max_length), jnp.int32, sharding=shared)
    return Strings(symbols, jax.ShapeDtypeStruct((batch_size,), jnp.int32, sharding=shared))


def build_judge(
    task: Task, graphdef: nnx.GraphDef, mesh: Mesh, max_length: int
) -> Callable[[nnx.State, Strings], Judgement]:
    """Make `(params, strings) -> judgement`: answer a batch of strings freely, and compare."""
    room = task.kind.times * max_length + 1

    def judge_one(params, symbols, length) -> Judgement:
        model = nnx.merge(graphdef, params)
        answer = greedy(model, task, task.source(symbols, length, max_length + 1), room)
        target = task.answer(symbols, length, room)
        real = (length > 0).astype(jnp.float32)
        scores = Scores(exact_match(answer, target), token_accuracy(answer, target, PAD))
        return Judgement(jax.tree.map(lambda x: x * real, scores), answer)

    def judge(params, strings: Strings) -> Judgement:
        scores, answers = jax.vmap(lambda symbols, length: judge_one(params, symbols, length))(*strings)
        by_length = jax.tree.map(lambda x: jax.ops.segment_sum(x, strings.lengths, max_length + 1), scores)
        return Judgement(jax.lax.psum(by_length, DATA), jax.lax.all_gather(answers, DATA, tiled=True))

    specs = (PartitionSpec(), PartitionSpec(DATA))
    # Decoding starts from constants that the loop makes differ by device, which the check of axes rejects.
    return jax.jit(jax.shard_map(judge, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=False))


def judge_all(
    judge: Callable,
    params: nnx.State,
    strings: Strings,
    batch_size: int,
    mesh: Mesh,
    *,
    track: Callable[[Sequence], Iterable] = iter,
) -> Judgement:
    """Judge any number of strings in batches of one size; the last is filled up with strings of length 0.

    Args:
      judge: from `build_judge`.
      params: of the model.
      strings: as many as there are.
      batch_size: a multiple of the mesh's size.
      mesh: the one that `judge` was built for.
      track: wraps the sequence of batches, to show progress.
    """
    total = len(strings.lengths)
    missing = -total % batch_size
    symbols = np.pad(strings.symbols, ((0, missing), (0, 0))).astype(np.int32)
    lengths = np.pad(strings.lengths, (0, missing)).astype(np.int32)
    parts = []
    for start in track(range(0, len(lengths), batch_size)):
        batch = slice(start, start + batch_size)
        parts.append(jax.device_get(judge(params, share(Strings(symbols[batch], lengths[batch]), mesh))))
    scores = jax.tree.map(lambda *x: np.sum(x, axis=0, dtype=np.float64), *(part.scores for part in parts))
    return Judgement(scores, np.concatenate([part.answers for part in parts])[:total])
