"""Attention in memory O(T): one block of keys after another, with every derivative.

For a block of queries, let m be the largest score so far, l the sum of exp(s - m) and a that of exp(s - m) v.
The next block of keys, with scores s and values v, makes of them

    m' = max(m, max s),    l' = l exp(m - m') + sum exp(s - m'),    a' = a exp(m - m') + exp(s - m') v,

and after the last one out = a / l and logsumexp = m + log l. The derivative goes over the blocks once more, with
p = exp(s - m) / l computed again:

    a = sum (p ds) v + p dv,    r = sum p ds,    d out = a - r out,    d logsumexp = d log l = r.

It is linear in the tangents, and JAX transposes it into FlashAttention's backward pass; differentiating it again
gives the second order. Blocks without a visible pair are passed over. docs/attention.md derives all of it.

Source: Milakov & Gimelshein 2018 (online softmax); Rabe & Staats 2021 (memory); Dao et al. 2022, appendix B
(recomputation; there from the logsumexp, which rounds log l away where m is large).
"""

import functools
import math
import os
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_batching import custom_vmap
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Bool, Float, Int, Num

from attn.functional import closures, dtypes, masks, mods, scores, tiles
from attn.functional.dropout import Dropout
from attn.functional.tiles import Normalizer

BLOCK = 512  # at most so many queries, and so many keys, make a tile: 1 MiB of float32, which a core's cache holds
WORTHWHILE = 600 * 600  # pairs of query and key; all at once is faster at 576 x 576, at 640 x 640 not always (on a CPU)
_BAND = 4  # at most so many blocks of keys make a narrow band


class Positions(NamedTuple):
    """Positions of queries or of keys in blocks, the last one filled up, and what a tile must know of each."""

    first: Int[Array, "*blocks"]
    marks: Float[Array, "*blocks n"]  # to add to scores: NaN where a query or key was not finite, else 0

    def index(self, length: int) -> Int[Array, "n"]:
        """The positions of one block, in range: what fills up the last one repeats the last."""
        return jnp.minimum(self._counted(), length - 1)

    def real(self, length: int) -> Bool[Array, "n"] | None:
        """Which positions of one block are not filling; None where there is none in any block."""
        return None if length % self.marks.shape[-1] == 0 else self._counted() < length

    def _counted(self) -> Int[Array, "n"]:
        return self.first + jnp.arange(self.marks.shape[-1], dtype=self.first.dtype)


class Fixed(NamedTuple):
    """What a derivative never reaches."""

    i: Positions
    j: Positions
    needed: Bool[Array | np.ndarray, "row_blocks column_blocks"] | None  # None for all of them
    captured_by_mask: list[Array]
    captured_by_dropout: list[Array]


class Tile(NamedTuple):
    """Functions of one tile; the first argument of each is what the function captures."""

    scores: Callable  # (captured, query, key, i, j) -> s
    masked: Callable  # (captured, s, i, j) -> s, -inf where hidden; and which keys any query sees, None for all
    dropped: Callable  # (captured, p, i, j) -> p


def attend(
    query: Float[Array, "T H"],
    key: Float[Array, "S H"],
    value: Float[Array, "S Hv"],
    *,
    mask: masks.Mask | None,
    score: scores.Score | None,
    scale: float | Num[Array, ""],
    dropout: Dropout | None,
) -> tuple[Float[Array, "T Hv"], Normalizer]:
    """Weigh the values as `reference.attend` does, without its T x S scores."""
    # Outside of any jit, equal shapes and structure compile once. Not with a function of the user's: the cache would
    # not notice that what it reads has changed. Its program is thrown away after the call, with what it has captured.
    changes = dict(mask=mask, score=score, scale=scale, dropout=dropout)
    if mods.holds_function(mask) or mods.holds_function(score):
        return jax.jit(lambda *arrays: _attend(*arrays, **changes))(query, key, value)
    return _attend_compiled(query, key, value, **changes)


def _attend(query, key, value, *, mask, score, scale, dropout):
    (axes, *_) = jax.typeof(query).sharding.spec
    query = tiles.gathered(query)  # blocks cannot be cut out of rows that lie on several devices
    T, S = len(query), len(key)
    wide = dtypes.wide_dtype(query.dtype)
    scale = jnp.asarray(scale, wide)
    query, key, value, scale, mask, score = _varying_alike((query, key, value, scale, mask, score))
    hides = mask is not None or score is not None
    (query, bad_queries), (key, bad_keys) = tiles.zero_nonfinite_rows(query), tiles.zero_nonfinite_rows(key)
    i, j = _positions(bad_queries, wide), _positions(bad_keys, wide)
    # Positions of keys and values come last, so that every product of a tile, transposed too, has a fast layout.
    queries = _in_blocks(query.astype(wide))
    keys = _in_blocks(key.astype(wide)).swapaxes(1, 2)
    values = _in_blocks(value.astype(dtypes.wide_dtype(value.dtype, wide))).swapaxes(1, 2)

    def scores_of(query, key, i: Positions, j: Positions):
        s = scale * jnp.matmul(query, key)
        return s if score is None else scores.evaluate(score, s, i.index(T)[:, None], j.index(S)[None, :])

    def masked(s, i: Positions, j: Positions):
        visible = None if j.real(S) is None else j.real(S)[None, :]
        if hides:
            seen = None if score is None else s
            visible = tiles.visible_pairs(seen, i.index(T)[:, None], j.index(S)[None, :], mask, visible)
        s = s + i.marks[:, None] + j.marks[None, :]
        s = s if visible is None else jnp.where(visible, s, -jnp.inf)
        # From the mask, not from s, which would be one more pass over the tile's memory.
        return s, visible.any(axis=0) if hides else None

    def dropped(p, i: Positions, j: Positions):
        return p if dropout is None else dropout(p, i.index(T)[:, None], j.index(S)[None, :])

    query, key, first_i, first_j = jax.tree.map(lambda x: x[0], (queries, keys, i, j))
    scores_of, captured = closures.convert(scores_of, query, key, first_i, first_j)
    s = scores_of(captured, query, key, first_i, first_j)  # an example, which nothing reads
    masked, captured_by_mask = closures.convert(masked, s, first_i, first_j)
    dropped, captured_by_dropout = closures.convert(dropped, s, first_i, first_j)
    needed = None if mask is None else survey(mask, T, S)
    if isinstance(needed, np.ndarray) and needed.all():
        needed = None
    elif isinstance(needed, np.ndarray):
        needed, (keys, values, j) = _banded(needed, (keys, values, j))
    elif needed is not None:
        needed = _any_of_batch(_any_of_devices(needed, (queries, keys, values, captured)))
    fixed = Fixed(i, j, needed, captured_by_mask, captured_by_dropout)
    tile = Tile(scores_of, masked, dropped)
    # Weights, each at most 1, are summed before they are divided, so that their sum times a value may leave the range.
    # So values are made smaller by a power of two, which is exact.
    sum_of_weights = math.prod(j.marks.shape[-2:]) / (1 - (0 if dropout is None else dropout.rate))  # at most
    headroom = 2.0 ** -math.ceil(math.log2(sum_of_weights))
    out, normalizer = _online(tile, headroom, queries, keys, values, captured, fixed)
    return jax.tree.map(lambda x: tiles.sharded_along(x.reshape(-1, *x.shape[2:])[:T], axes), (out, normalizer))


_attend_compiled = jax.jit(_attend)


def refuses(call) -> str | None:
    """What of a call (`implementations.Call`) this implementation cannot do."""
    known = isinstance(call.T, int) and isinstance(call.S, int)
    return None if known else f"lengths that are symbols, here T = {call.T} and S = {call.S}"


def pays(call) -> bool:
    """Whether a call (`implementations.Call`) is long enough for blocks to be faster than all at once."""
    return call.T * call.S > WORTHWHILE


def heads_at_once(heads: int) -> int:
    """How many heads should run together; it divides their number.

    As many as there are cores on one CPU device: with one head a core, the tiles stay in the caches. On several devices
    the heads may be sharded, and turns would then cost the parallelism; under `shard_map` with every axis of the mesh
    manual, the code is one device's own.
    """
    mesh = jax.sharding.get_abstract_mesh()
    is_alone = jax.device_count() == 1 or (not mesh.empty and mesh.are_all_axes_manual)
    if jax.default_backend() != "cpu" or not is_alone:
        return heads
    cores = _cores() // jax.local_device_count()
    return max(n for n in range(1, heads + 1) if heads % n == 0 and n <= max(cores, 1))


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _online(tile: Tile, headroom: float, queries, keys, values, captured, fixed: Fixed):
    """Output and normaliser of every block of queries: the first recurrence above.

    Args:
      tile: the functions of one tile.
      headroom: a power of two, by which any sum of weighted values stays in range.
      queries, keys, values: `[row_blocks r H]`, `[column_blocks H c]`, `[column_blocks Hv c]`; keys and values with
        another leading axis, row_blocks, where they are banded.
      captured: the arrays of the score, and the scale, which may be differentiated.
      fixed: the rest.
    """

    def row(queries, blocks):
        query, i, needed = queries

        def step(carry, block):
            largest, total, weighted = carry
            key, value, j = block
            s, seen = tile.masked(fixed.captured_by_mask, tile.scores(captured, query, key, i, j), i, j)
            new = jnp.maximum(largest, s.max(axis=1))
            finite = jnp.where(new == -jnp.inf, 0, new)  # -inf - -inf would be NaN
            p, shrink = jnp.exp(s - finite[:, None]), jnp.exp(largest - finite)
            total = total * shrink + p.sum(axis=1)
            p = tile.dropped(fixed.captured_by_dropout, p, i, j)
            return new, total, weighted * shrink[:, None] + _weighted_sum(p, _where_seen(seen, value))

        zeros = jnp.zeros(len(query), query.dtype)
        start = zeros - jnp.inf, zeros, jnp.zeros((len(query), values.shape[-2]), values.dtype)
        largest, total, weighted = _fold(step, start, blocks, needed)
        normalizer = Normalizer(jnp.where(total == 0, 0, largest), total)
        return weighted * (normalizer.inverse() / headroom)[:, None], normalizer

    return _over_rows(row, (queries, fixed.i, fixed.needed), (keys, values * headroom, fixed.j))


@functools.partial(_online.defjvp, symbolic_zeros=True)
def _online_jvp(tile: Tile, headroom: float, primals, tangents):
    """The second recurrence above. A tangent is None where it is known to be zero."""
    queries, keys, values, captured, fixed = primals
    tangents = jax.tree.map(lambda t: None if isinstance(t, SymbolicZero) else t, tangents[:4], is_leaf=_is_symbolic)
    dqueries, dkeys, dvalues, dcaptured = tangents
    outs, normalizers = _online(tile, headroom, *primals)

    def row(queries, blocks):
        query, dquery, out, normalizer, i, needed = queries
        inverse = normalizer.inverse()

        def step(carry, block):
            a, r = carry
            key, dkey, value, dvalue, j = block

            def scores_of(captured, query, key):
                return tile.scores(captured, query, key, i, j)

            s, ds = _jvp(scores_of, (captured, query, key), (dcaptured, dquery, dkey))
            # Where hidden, p is 0 whatever ds is: the mask need not be differentiated.
            s, seen = tile.masked(fixed.captured_by_mask, s, i, j)
            p = jnp.exp(s - normalizer.peak[:, None]) * inverse[:, None]
            kept = tile.dropped(fixed.captured_by_dropout, p, i, j)
            if ds is not None:
                a, r = a + _weighted_sum(kept * ds, _where_seen(seen, value)), r + (p * ds).sum(axis=1)
            return (a if dvalue is None else a + _weighted_sum(kept, _where_seen(seen, dvalue))), r

        start = jnp.zeros_like(out), jnp.zeros_like(inverse)
        a, r = _fold(step, start, blocks, needed)
        # The peak stands still: only the product total * exp(peak) has a meaning, and it moves by r.
        return a - r[:, None] * out, Normalizer(jnp.zeros_like(r), normalizer.total * r)

    rows = queries, dqueries, outs, normalizers, fixed.i, fixed.needed
    return (outs, normalizers), _over_rows(row, rows, (keys, dkeys, values, dvalues, fixed.j))


def _over_rows(row, queries, blocks):
    """`row(queries, blocks)` for each block of queries, with all blocks of keys or, banded, with its own."""
    # Reverse over reverse would otherwise keep what every row carries from block to block.
    row = jax.checkpoint(row, prevent_cse=False)
    *_, j = blocks
    if j.first.ndim == 1:
        return lax.map(lambda queries: row(queries, blocks), queries)
    return lax.map(lambda both: row(*both), (queries, blocks))


def _fold(step, start, blocks, needed):
    """`step(carry, block)` over the blocks that are needed.

    Nothing inside a step is kept for the derivative: it would be T x S in all. Under `shard_map` a carry must vary
    over the mesh from the start as it will after a step: hence the zeros of a step whose values nobody asks for.
    """
    after = step(start, jax.tree.map(lambda x: x[0], blocks))
    start = jax.tree.map(lambda x, like: x + jnp.zeros_like(like), start, after)

    def body(carry, x):
        block, is_needed = x
        if is_needed is None:
            return step(carry, block), None
        return lax.cond(is_needed, jax.checkpoint(step, prevent_cse=False), lambda carry, _: carry, carry, block), None

    # Two steps in one body: the second's work on one thread, such as copies, can run beside the first's.
    return lax.scan(jax.checkpoint(body, prevent_cse=False), start, (blocks, needed), unroll=2)[0]


def _weighted_sum(p: Float[Array, "r c"], value: Float[Array, "Hv c"]) -> Float[Array, "r Hv"]:
    return lax.dot_general(p.astype(value.dtype), value, (((1,), (1,)), ((), ())))


def _where_seen(seen: Bool[Array, "c"] | None, value: Float[Array, "Hv c"]) -> Float[Array, "Hv c"]:
    """The values, 0 in place of those that no query of the tile sees; see `tiles.zero_hidden_values`."""
    return value if seen is None else jnp.where(seen[None, :], value, 0)


def survey(mask: masks.Mask, T: int, S: int) -> Bool[Array | np.ndarray, "row_blocks column_blocks"]:
    """Which blocks of keys each block of queries needs: all that may hold a visible pair. In NumPy where known."""
    rows, columns = _indices(T), _indices(S)
    some, _ = mask.bounds(rows, columns)
    known = isinstance(some, (np.ndarray, np.bool_, bool))
    return (np if known else jnp).broadcast_to(some, (len(rows), len(columns)))


def _banded(needed: Bool[np.ndarray, "row_blocks column_blocks"], blocks):
    """For each block of queries those blocks of keys that it needs, if these are few: a window passes over nothing.

    Even a block that is passed over is read, and written to by the backward pass. The price is memory: a block of
    keys is there once for each block of queries that needs it.

    Returns:
      (needed, blocks) as given, or with `[row_blocks width]` in the place of `[row_blocks column_blocks]`.
    """
    width = max(1, needed.sum(axis=1).max())
    if width > min(_BAND, needed.shape[1] // 2):
        return needed, blocks
    band = np.argsort(~needed, axis=1, kind="stable")[:, :width]
    return np.take_along_axis(needed, band, axis=1), jax.tree.map(lambda x: x[band], blocks)


@custom_vmap
def _any_of_batch(needed):
    """What any example of a batch needs: a predicate without a batch axis, so that `lax.cond` still skips."""
    return needed


@_any_of_batch.def_vmap
def _any_of_batch_vmap(axis_size, is_batched, needed):
    return _any_of_batch(needed.any(axis=0)), False


def _varying_alike(tree):
    """Under `shard_map`, make every float vary over the mesh as any array of the tree does.

    The gradient of what all devices share is a sum over devices: thus taken here once, and not in every tile.
    """
    axes = _varying_over(tree)

    def vary(x):
        missing = tuple(axes - _varying_over(x))
        is_float = dtypes.is_array(x) and jnp.issubdtype(x.dtype, jnp.floating)
        return lax.pcast(x, missing, to="varying") if missing and is_float else x

    return jax.tree.map(vary, tree) if axes else tree


def _any_of_devices(needed, floats):
    """What any of the devices needs that share one of these floats (a function may still capture such).

    Its gradient is summed over them in every tile: were one of them to skip a tile, the others would wait forever.
    """
    own = [_varying_over(x) for x in jax.tree.leaves(floats)]
    shared = _varying_over(needed) - own[0].intersection(*own)
    return lax.pmax(needed, tuple(shared)) if shared else needed


def _varying_over(tree) -> frozenset[str]:
    """The axes of the mesh over which, inside `shard_map`, any of these arrays differs by device."""
    return frozenset().union(*(jax.typeof(x).mat.varying for x in jax.tree.leaves(tree) if dtypes.is_array(x)))


def _is_symbolic(tangent) -> bool:
    return isinstance(tangent, SymbolicZero)


def _jvp(function, primals, tangents):
    """`jax.jvp` in which a tangent may be None for zero, and the result's is where all are."""
    leaves, structure = jax.tree.flatten(primals)
    tangents = jax.tree.leaves(tangents, is_leaf=lambda t: t is None)
    moving = [n for n, tangent in enumerate(tangents) if tangent is not None]
    if not moving:
        return function(*primals), None

    def of_moving(*values):
        replaced = leaves.copy()
        for n, value in zip(moving, values):
            replaced[n] = value
        return function(*structure.unflatten(replaced))

    return jax.jvp(of_moving, [leaves[n] for n in moving], [tangents[n] for n in moving])


def _indices(length: int) -> Int[np.ndarray, "blocks n"]:
    """Positions in blocks of equal size, the last one repeated where they do not come out even."""
    count = -(-length // BLOCK)
    size = -(-length // count)
    return np.minimum(np.arange(count * size, dtype=np.int32), length - 1).reshape(count, size)


def _positions(nonfinite: Bool[Array, "n"], dtype) -> Positions:
    first = jnp.asarray(_indices(len(nonfinite))[:, 0])
    return Positions(first, _in_blocks(jnp.where(nonfinite, jnp.nan, jnp.zeros((), dtype))))


def _in_blocks(x: Array) -> Array:
    """Split the leading axis into blocks, filled up with its last entry: a score is sure to have seen the like."""
    count, size = _indices(len(x)).shape
    missing = count * size - len(x)
    filled = jnp.concatenate([x, jnp.broadcast_to(x[-1:], (missing, *x.shape[1:]))]) if missing else x
    return filled.reshape(count, size, *x.shape[1:])
