"""Attention in memory O(T): one block of keys after another, with every derivative.

For a block of queries, let m be the largest score so far, l the sum of exp(s - m) and a that of exp(s - m) v.
The next block of keys, with scores s and values v, makes of them

    m' = max(m, max s),    l' = l exp(m - m') + sum exp(s - m'),    a' = a exp(m - m') + exp(s - m') v,

and after the last one out = a / l and logsumexp = m + log l. The derivative goes over the blocks once more, with
p = exp(s - logsumexp) computed anew:

    a = sum (p ds) v + p dv,    r = sum p ds,    d out = a - r out,    d logsumexp = r.

It is linear in the tangents, and JAX transposes it into FlashAttention's backward pass; differentiating it again
gives the second order. Blocks without a visible pair are passed over. docs/attention.md derives all of it.

Source: Milakov & Gimelshein 2018 (online softmax); Rabe & Staats 2021 (memory); Dao et al. 2022, appendix B
(recomputation from the logsumexp).
"""

import functools
import math
import os
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_batching import custom_vmap
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Bool, Float, Int, Num

from attn.functional import masks, mods, scores, tiles
from attn.functional.dropout import Dropout

BLOCK = 512  # at most so many queries, and so many keys, make a tile: 1 MiB of float32, which a core's cache holds
WORTHWHILE = 600 * 600  # pairs of query and key; all at once is faster at 576 x 576, at 640 x 640 not always (on a CPU)
_BAND = 4  # at most so many blocks of keys make a narrow band


class Positions(NamedTuple):
    """Positions of queries or of keys in blocks, the last one filled up, and what a tile must know of each."""

    index: Int[Array, "*blocks n"]  # in range: what fills up repeats the last
    tainted: Bool[Array, "*blocks n"]
    real: Bool[Array, "*blocks n"] | None  # None where nothing was filled up


class Fixed(NamedTuple):
    """What a derivative never reaches."""

    i: Positions
    j: Positions
    needed: Bool[Array | np.ndarray, "row_blocks column_blocks"] | None  # None for all of them
    captured_by_mask: list[Array]
    captured_by_dropout: list[Array]
    headroom: Float[Array, ""]  # a power of two, by which any sum of weighted values stays in range


def attend(
    query: Float[Array, "T H"],
    key: Float[Array, "S H"],
    value: Float[Array, "S Hv"],
    *,
    mask: masks.Mask | None,
    score: scores.Score | None,
    scale: float | Num[Array, ""],
    dropout: Dropout | None,
) -> tuple[Float[Array, "T Hv"], Float[Array, "T"]]:
    """Weigh the values as `reference.attend` does, without its T x S scores."""
    # Outside of any jit, equal shapes and structure compile once. Not with a function of the user's: the cache would
    # not notice that what it reads has changed, and would keep that alive, the values of a finished trace among it.
    run = _attend if mods.holds_function(mask) or mods.holds_function(score) else _attend_compiled
    return run(query, key, value, mask=mask, score=score, scale=scale, dropout=dropout)


def _attend(query, key, value, *, mask, score, scale, dropout):
    T, S = len(query), len(key)
    wide = jnp.promote_types(query.dtype, jnp.float32)
    scale = jnp.asarray(scale, wide)
    query, key, value, scale, mask, score = _varying_alike((query, key, value, scale, mask, score))
    (query, bad_queries), (key, bad_keys), (value, bad_values) = map(tiles.set_aside, (query, key, value))
    i, j = _positions(T, bad_queries), _positions(S, bad_keys | bad_values)
    # Positions of keys and values come last, so that every product of a tile, transposed too, has a fast layout.
    queries = _in_blocks(query.astype(wide))
    keys = _in_blocks(key.astype(wide)).swapaxes(1, 2)
    values = _in_blocks(value.astype(jnp.promote_types(value.dtype, wide))).swapaxes(1, 2)

    def scores_of(query, key, i: Positions, j: Positions):
        s = scale * jnp.matmul(query, key)
        return s if score is None else scores.evaluate(score, s, i.index[:, None], j.index[None, :])

    def masked(s, i: Positions, j: Positions):
        tainted = i.tainted[:, None] | j.tainted[None, :]
        real = None if j.real is None else j.real[None, :]
        return tiles.masked(s, i.index[:, None], j.index[None, :], tainted, mask, real)

    def dropped(p, i: Positions, j: Positions):
        return p if dropout is None else dropout(p, i.index[:, None], j.index[None, :])

    query, key, first_i, first_j = jax.tree.map(lambda x: x[0], (queries, keys, i, j))
    scores_of, captured = _explicit(scores_of, query, key, first_i, first_j)
    s = scores_of(captured, query, key, first_i, first_j)
    masked, captured_by_mask = _explicit(masked, s, first_i, first_j)
    s = masked(captured_by_mask, s, first_i, first_j)
    dropped, captured_by_dropout = _explicit(dropped, s, first_i, first_j)
    needed = None if mask is None else survey(mask, T, S)
    if isinstance(needed, np.ndarray) and needed.all():
        needed = None
    elif isinstance(needed, np.ndarray):
        needed, (keys, values, j) = _banded(needed, (keys, values, j))
    elif needed is not None:
        needed = _any_of_batch(_any_of_devices(needed, (queries, keys, values, captured)))
    sum_of_weights = math.prod(j.index.shape[-2:]) / (1 - (0 if dropout is None else dropout.rate))  # at most
    headroom = jnp.asarray(2.0 ** -math.ceil(math.log2(sum_of_weights)), values.dtype)
    fixed = Fixed(i, j, needed, captured_by_mask, captured_by_dropout, headroom)
    out, logsumexp = _online(scores_of, masked, dropped, queries, keys, values, captured, fixed)
    return out.reshape(-1, out.shape[-1])[:T], logsumexp.reshape(-1)[:T]


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


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def _online(scores_of, masked, dropped, queries, keys, values, captured, fixed):
    """Output and logsumexp of every block of queries: the first recurrence above.

    Args:
      scores_of, masked, dropped: `(captured, query, key, i, j) -> s`, `(captured, s, i, j) -> s` and
        `(captured, p, i, j) -> p` of one tile.
      queries, keys, values: `[row_blocks r H]`, `[column_blocks H c]`, `[column_blocks Hv c]`; keys and values with
        another leading axis, row_blocks, where they are banded.
      captured: the arrays of the score, and the scale, which may be differentiated.
    """
    # a / l may be in range where a is not: then all values are made smaller, by a power of two, which is exact.
    is_large = jnp.abs(values).max() > jnp.finfo(values.dtype).max * fixed.headroom
    small = jnp.where(is_large, fixed.headroom, 1)

    def row(queries, blocks):
        query, i, needed = queries

        def step(carry, block):
            largest, total, weighted = carry
            key, value, j = block
            s = masked(fixed.captured_by_mask, scores_of(captured, query, key, i, j), i, j)
            new = jnp.maximum(largest, s.max(axis=1))
            finite = jnp.where(new == -jnp.inf, 0, new)  # -inf - -inf would be NaN
            p, shrink = jnp.exp(s - finite[:, None]), jnp.exp(largest - finite)
            total = total * shrink + p.sum(axis=1)
            p = dropped(fixed.captured_by_dropout, p, i, j)
            return new, total, weighted * shrink[:, None] + _times(p, value)

        zeros = jnp.zeros(len(query), query.dtype)
        start = zeros - jnp.inf, zeros, jnp.zeros((len(query), values.shape[-2]), values.dtype)
        largest, total, weighted = _fold(step, start, blocks, needed)
        empty = total == 0
        total = jnp.where(empty, 1, total)
        return weighted / (total * small)[:, None], jnp.where(empty, -jnp.inf, largest + jnp.log(total))

    return _over_rows(row, (queries, fixed.i, fixed.needed), (keys, values * small, fixed.j))


@functools.partial(_online.defjvp, symbolic_zeros=True)
def _online_jvp(scores_of, masked, dropped, primals, tangents):
    """The second recurrence above. A tangent is None where it is known to be zero."""
    queries, keys, values, captured, fixed = primals
    tangents = jax.tree.map(lambda t: None if isinstance(t, SymbolicZero) else t, tangents[:4], is_leaf=_is_symbolic)
    dqueries, dkeys, dvalues, dcaptured = tangents
    outs, logsumexps = _online(scores_of, masked, dropped, *primals)

    def row(queries, blocks):
        query, dquery, out, logsumexp, i, needed = queries
        finite = jnp.where(logsumexp == -jnp.inf, 0, logsumexp)

        def step(carry, block):
            a, r = carry
            key, dkey, value, dvalue, j = block

            def of_tile(captured, query, key):
                return scores_of(captured, query, key, i, j)

            s, ds = _jvp(of_tile, (captured, query, key), (dcaptured, dquery, dkey))
            # Where hidden, p is 0 whatever ds is: the mask need not be differentiated.
            p = jnp.exp(masked(fixed.captured_by_mask, s, i, j) - finite[:, None])
            kept = dropped(fixed.captured_by_dropout, p, i, j)
            if ds is not None:
                a, r = a + _times(kept * ds, value), r + (p * ds).sum(axis=1)
            return (a if dvalue is None else a + _times(kept, dvalue)), r

        start = jnp.zeros_like(out), jnp.zeros_like(logsumexp)
        a, r = _fold(step, start, blocks, needed)
        return a - r[:, None] * out, r

    rows = queries, dqueries, outs, logsumexps, fixed.i, fixed.needed
    return (outs, logsumexps), _over_rows(row, rows, (keys, dkeys, values, dvalues, fixed.j))


def _over_rows(row, queries, blocks):
    """`row(queries, blocks)` for each block of queries, with all blocks of keys or, banded, with its own."""
    # Reverse over reverse would otherwise keep what every row carries from block to block.
    row = jax.checkpoint(row, prevent_cse=False)
    *_, j = blocks
    if j.index.ndim == 2:
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


def _times(p: Float[Array, "r c"], value: Float[Array, "Hv c"]) -> Float[Array, "r Hv"]:
    return lax.dot_general(p.astype(value.dtype), value, (((1,), (1,)), ((), ())))


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
        is_float = mods.is_array(x) and jnp.issubdtype(x.dtype, jnp.floating)
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
    return frozenset().union(*(jax.typeof(x).mat.varying for x in jax.tree.leaves(tree) if mods.is_array(x)))


def _explicit(function, *examples):
    """`function` with everything that it captures as an argument of its own: custom derivatives need it so.

    `jax.closure_convert` would leave captured integers and bools where they are.

    Returns:
      (function of (captured, *arguments), captured).
    """
    closed = jax.make_jaxpr(function)(*examples)
    jaxpr, captured = closed.jaxpr, closed.consts

    def explicit(captured, *arguments):
        [result] = jax.core.eval_jaxpr(jaxpr, captured, *jax.tree.leaves(arguments))
        return result

    return explicit, captured


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


def _positions(length: int, tainted: Bool[Array, "n"]) -> Positions:
    index = _indices(length)
    real = np.arange(index.size).reshape(index.shape) < length
    return Positions(jnp.asarray(index), _in_blocks(tainted), None if real.all() else jnp.asarray(real))


def _in_blocks(x: Array) -> Array:
    """Split the leading axis into blocks, filled up with its last entry: a score is sure to have seen the like."""
    count, size = _indices(len(x)).shape
    missing = count * size - len(x)
    filled = jnp.concatenate([x, jnp.broadcast_to(x[-1:], (missing, *x.shape[1:]))]) if missing else x
    return filled.reshape(count, size, *x.shape[1:])
