"""Loops over the tiles of one head in ordinary JAX: the functions of a tile, and which tiles are visited.

`blockwise` computes attention by them, and `pooled` the pooled weights.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from attn.functional import dtypes, masks, scores, taken_apart
from attn.functional.blocks import BlockedAxis, spread
from attn.functional.contract import Head

# Primitives that cost more per pair than reading a number from memory.
_COSTLY = frozenset(("gather", "log", "log1p", "exp", "exp2", "expm1", "pow", "tanh", "sin", "cos", "erf", "logistic"))


def take_out_distances(head: Head, T: int, S: int, r: int, c: int) -> Head:
    """Let the mask and the score compute what depends on j - i alone once per distance, not once per pair.

    A table that is read at a distance, as T5's, would otherwise be gathered T x S times, and scattered as often by the
    backward pass.

    Args:
      head: the head.
      T, S: the numbers of queries and keys.
      r, c: the shape of a tile.
    """
    mask = _without_distances(masks.evaluate, head.mask, T, S, (r, c), None)
    example = head.query[0, 0].astype(head.scale.dtype)
    score = _without_distances(scores.evaluate, head.score, T, S, (r, c), example)
    return head._replace(mask=masks.as_mask(mask), score=scores.as_score(score))


def _without_distances(evaluate: Callable, mod, T: int, S: int, tile: tuple[int, int], example):
    if mod is None or min(tile) < 2:  # in a tile of one row or column, every pair has another distance
        return mod
    apart = taken_apart.take_apart(functools.partial(evaluate, mod), *tile, example, _is_once_per_distance)
    vectors = apart.values(T, S) if apart.parts else None
    if vectors is None:
        return mod

    def function(*arguments):
        *_, i, j = arguments
        return apart([spread(vector, i, j, T) for vector in dtypes.widened(vectors)], *arguments)

    return function


def _is_once_per_distance(value: taken_apart.Value) -> bool:
    """Return True for what is computed once per distance: what costs more per pair than a number from memory."""
    return value.kind == taken_apart.Kind.DISTANCE and bool(_COSTLY & value.primitives)


def tile_functions(head: Head, T: int, S: int) -> tuple[Callable, Callable, Callable]:
    """Return the scores, the mask and the dropout of a tile as functions of one block of queries and one of keys."""

    def scores_of(query, key, i: BlockedAxis, j: BlockedAxis):
        s = head.scale * jnp.matmul(query, key)
        return head.apply_score(s, i.index(T)[:, None], j.index(S)[None, :])

    def masked(s, i: BlockedAxis, j: BlockedAxis):
        is_key = None if (real := j.is_position(S)) is None else real[None, :]
        visible = head.visible(s, i.index(T)[:, None], j.index(S)[None, :], is_key)
        s = s + i.marks[:, None] + j.marks[None, :]
        if visible is None:
            return s, None
        hides = head.mask is not None or head.score is not None
        # The seen keys come from the mask: finding them from s would read the tile's memory once more.
        return jnp.where(visible, s, -jnp.inf), visible.any(axis=0) if hides else None

    def dropped(p, i: BlockedAxis, j: BlockedAxis):
        return head.apply_dropout(p, i.index(T)[:, None], j.index(S)[None, :])

    return scores_of, masked, dropped


def map_query_blocks(row, queries, blocks):
    """Map `row(queries, blocks)` over the blocks of queries, with all blocks of keys or only its band."""
    # Without it, reverse over reverse would store the carry of every row after every block.
    row = jax.checkpoint(row, prevent_cse=False)
    *_, j = blocks
    if j.first.ndim == 1:  # one list of key blocks for all queries, not a band per block of queries
        return lax.map(lambda queries: row(queries, blocks), queries)
    return lax.map(lambda both: row(*both), (queries, blocks))


def scan_key_blocks(step, start, blocks, needed):
    """Scan `step(carry, block)` over the blocks of keys that are needed.

    Every step is checkpointed: otherwise the derivative would store T x S numbers in total.
    """
    # Under `shard_map` the initial carry must have the same varying axes as the result. Adding zeros derived from one
    # traced step gives it them; XLA removes the step.
    after = step(start, jax.tree.map(lambda x: x[0], blocks))
    start = jax.tree.map(lambda x, like: x + jnp.zeros_like(like), start, after)

    def body(carry, x):
        block, is_needed = x
        if is_needed is None:
            return step(carry, block), None
        return lax.cond(is_needed, jax.checkpoint(step, prevent_cse=False), lambda carry, _: carry, carry, block), None

    # Two steps per body: single-threaded work of the second, such as copies, can overlap with the first.
    return lax.scan(jax.checkpoint(body, prevent_cse=False), start, (blocks, needed), unroll=2)[0]
