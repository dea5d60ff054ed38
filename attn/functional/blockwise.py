"""Attention in memory O(T): a loop over blocks of keys, with every derivative.

For a block of queries, let m be the largest score so far, l the sum of exp(s - m) and a that of exp(s - m) v.
The next block of keys, with scores s and values v, updates them to

    m' = max(m, max s),    l' = l exp(m - m') + sum exp(s - m'),    a' = a exp(m - m') + exp(s - m') v,

and after the last one out = a / l and logsumexp = m + log l. The derivative iterates over the blocks again and
recomputes p = exp(s - m) / l:

    a = sum (p ds) v + p dv,    r = sum p ds,    d out = a - r out,    d logsumexp = d log l = r.

It is linear in the tangents, and JAX transposes it into FlashAttention's backward pass; differentiating it again
gives the second order. Blocks without a visible pair are skipped. docs/attention.md derives all of it.

Source: Milakov & Gimelshein 2018 (online softmax); Rabe & Staats 2021 (memory); Dao et al. 2022, appendix B
(recomputation; there from the logsumexp, which rounds log l away where m is large).
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Bool, Float

from attn.functional import closures, cpu, loops, mods, survey
from attn.functional.blocks import BlockedAxis, in_blocks, positions_in_blocks
from attn.functional.contract import Call, Normalizer, prepare, zero_hidden_values
from attn.functional.sharding import device_count, gathered, platform, sharded_along, vary_alike

BLOCK_SIZE = 512  # a tile of 512 x 512 is 1 MiB of float32, which fits into the cache of one core
# Pairs of query and key. On a CPU the reference is faster at 576 x 576, but not always at 640 x 640.
WORTHWHILE_PAIRS = 600 * 600


class Fixed(NamedTuple):
    """The arguments without a derivative."""

    i: BlockedAxis
    j: BlockedAxis
    needed: Bool[Array | np.ndarray, "row_blocks column_blocks"] | None  # None for all
    captured_by_mask: list[Array]
    captured_by_dropout: list[Array]


class Tile(NamedTuple):
    """Functions of one tile, closure-converted: the first argument is the list of captured arrays."""

    scores: Callable  # (captured, query, key, i, j) -> s
    masked: Callable  # (captured, s, i, j) -> (s, -inf where hidden; keys that any query sees, None for all)
    dropped: Callable  # (captured, p, i, j) -> p


def attend(
    call: Call, *, block_size: int = BLOCK_SIZE, is_apart: bool = False
) -> tuple[Float[Array, "T Hv"], Normalizer]:
    """Compute the equation of `reference.attend` without its T x S scores.

    Args:
      call: of one head.
      block_size: largest number of queries, and of keys, in a tile.
      is_apart: mask and score are taken apart already, so that no distance is left in them.
    """
    # Outside of any jit, calls of equal shapes and structure share one compiled program. Calls with a user's function
    # do not, since it may read a variable that has changed. Each compiles its own program, which is then dropped.
    if mods.holds_function(call.mask) or mods.holds_function(call.score):

        def attend_once(query, key, value):
            return attend_part(call._replace(query=query, key=key, value=value), block_size, is_apart=is_apart)

        return jax.jit(attend_once)(call.query, call.key, call.value)
    return _attend_compiled(call, block_size, is_apart=is_apart)


def attend_part(
    call: Call, block_size: int, needed=None, known=None, *, is_apart: bool = False
) -> tuple[Float[Array, "T Hv"], Normalizer]:
    """Compute the attention of one head to a part of its keys, or its derivative alone.

    Args:
      call: of one head, with the keys and values of the part.
      block_size: largest number of queries, and of keys, in a tile.
      needed: the tiles to compute, `[row_blocks column_blocks]`, from the mask unless given. It must have no batch
        axis, and under `shard_map` be the same on devices that share a float with a derivative.
      known: (out, normaliser) over all parts. These are returned, and nothing is computed; the derivative is this
        part's summand of theirs. So the pullback of one part needs no results of the others.
      is_apart: as in `attend`.
    """
    (axes, *_) = jax.typeof(call.query).sharding.spec
    # Blocks cannot be cut from rows that are distributed over devices.
    head = vary_alike(prepare(call._replace(query=gathered(call.query))))
    wide = head.scale.dtype
    i, j = (BlockedAxis.cut(x, block_size, wide) for x in (head.nonfinite_queries, head.nonfinite_keys))
    # Key positions are the last axis of keys and values: every matrix product, also transposed, has a fast layout.
    queries = in_blocks(head.query.astype(wide), block_size)  # [row_blocks r H]
    keys = in_blocks(head.key.astype(wide), block_size).swapaxes(1, 2)  # [column_blocks H c]
    values = in_blocks(head.value, block_size).swapaxes(1, 2)  # [column_blocks Hv c]

    if not is_apart:
        head = loops.take_out_distances(head, call.T, call.S, i.marks.shape[-1], j.marks.shape[-1])
    scores_of, masked, dropped = loops.tile_functions(head, call.T, call.S)
    query, key, first_i, first_j = jax.tree.map(lambda x: x[0], (queries, keys, i, j))
    scores_of, captured = closures.convert(scores_of, query, key, first_i, first_j)
    s = scores_of(captured, query, key, first_i, first_j)  # an example of shape and dtype; its values are not used
    masked, captured_by_mask = closures.convert(masked, s, first_i, first_j)
    dropped, captured_by_dropout = closures.convert(dropped, s, first_i, first_j)

    indices = (positions_in_blocks(length, block_size) for length in (call.T, call.S))
    if head.mask is not None and needed is None:
        floats = queries, keys, values, captured
        needed, (keys, values, j) = survey.needed_by_loop(head.mask, *indices, (keys, values, j), floats)
    fixed = Fixed(i, j, needed, captured_by_mask, captured_by_dropout)

    # Each weight is at most 1, but they are summed before the division, so their sum times a value may overflow.
    # So values are scaled down by a power of two, which is exact.
    rate = 0 if head.dropout is None else head.dropout.rate
    largest_sum_of_weights = math.prod(j.marks.shape[-2:]) / (1 - rate)
    headroom = 2.0 ** -math.ceil(math.log2(largest_sum_of_weights))
    tile, arrays = Tile(scores_of, masked, dropped), (queries, keys, values, captured, fixed)
    if known is None:
        results = _online(tile, headroom, *arrays)
    else:
        results = _known(tile, *arrays, jax.tree.map(lambda x: in_blocks(x, block_size), known))
    return jax.tree.map(lambda x: sharded_along(x.reshape(-1, *x.shape[2:])[: call.T], axes), results)


_attend_compiled = jax.jit(attend_part, static_argnames=("block_size", "is_apart"))


def unsupported_reason(call: Call) -> str | None:
    """Return the part of a call that this implementation cannot serve, or None."""
    is_known = isinstance(call.T, int) and isinstance(call.S, int)
    return None if is_known else f"lengths that are symbols, here T = {call.T} and S = {call.S}"


def is_worthwhile(call: Call) -> bool:
    """Return True if a call is long enough for blocks to be faster than all pairs at once."""
    return call.T * call.S > WORTHWHILE_PAIRS


def heads_at_once(heads: int) -> int:
    """Return the number of heads to run together, a divisor of `heads`.

    On a CPU device at most one head per core, so that the tiles stay in the caches. All heads on other backends and on
    several devices: the heads may be sharded, and a loop over them would not run in parallel. But under `shard_map`
    with every axis of the mesh manual, the code is that of one device.
    """
    mesh = jax.sharding.get_abstract_mesh()
    is_one_device = device_count() == 1 or (not mesh.empty and mesh.are_all_axes_manual)
    if platform() != "cpu" or not is_one_device:
        return heads
    cores = cpu.cores() // jax.local_device_count()
    return max(n for n in range(1, heads + 1) if heads % n == 0 and n <= max(cores, 1))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _online(tile: Tile, headroom: float, queries, keys, values, captured, fixed: Fixed):
    """Compute output and normaliser of every block of queries: the first recurrence above.

    Args:
      tile: the functions of one tile.
      headroom: a power of two by which values are multiplied, so that their weighted sums do not overflow.
      queries, keys, values: `[row_blocks r H]`, `[column_blocks H c]`, `[column_blocks Hv c]`; keys and values of a
        band have one more leading axis, row_blocks.
      captured: the arrays of the score and the scale; may be differentiated.
      fixed: the other arguments, not differentiated.
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
            return new, total, weighted * shrink[:, None] + _weighted_sum(p, value, seen)

        zeros = jnp.zeros(len(query), query.dtype)
        start = zeros - jnp.inf, zeros, jnp.zeros((len(query), values.shape[-2]), values.dtype)
        largest, total, weighted = loops.scan_key_blocks(step, start, blocks, needed)
        normalizer = Normalizer(jnp.where(total == 0, 0, largest), total)
        return weighted * (normalizer.inverse() / headroom)[:, None], normalizer

    return loops.map_query_blocks(row, (queries, fixed.i, fixed.needed), (keys, values * headroom, fixed.j))


@functools.partial(_online.defjvp, symbolic_zeros=True)
def _online_jvp(tile: Tile, headroom: float, primals, tangents):
    results = _online(tile, headroom, *primals)
    return results, _tangents(tile, primals, tangents, results)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _known(tile: Tile, queries, keys, values, captured, fixed: Fixed, results):
    """Return `results`, whose derivative is that of these keys' part in them; the arguments are those of `_online`."""
    return results


@functools.partial(_known.defjvp, symbolic_zeros=True)
def _known_jvp(tile: Tile, primals, tangents):
    *arrays, results = primals
    return results, _tangents(tile, arrays, tangents, results)


def _tangents(tile: Tile, primals, tangents, results):
    """Compute the second recurrence above.

    Args:
      tile: the functions of one tile.
      primals, tangents: the arguments of `_online`, and their tangents.
      results: output and normaliser of every block of queries.
    """
    queries, keys, values, captured, fixed = primals
    # A tangent is None where it is known to be zero.
    tangents = jax.tree.map(lambda t: None if isinstance(t, SymbolicZero) else t, tangents[:4], is_leaf=_is_symbolic)
    dqueries, dkeys, dvalues, dcaptured = tangents
    outs, normalizers = results

    def row(queries, blocks):
        query, dquery, out, normalizer, i, needed = queries
        inverse = normalizer.inverse()

        def step(carry, block):
            a, r = carry
            key, dkey, value, dvalue, j = block

            def scores_of(captured, query, key):
                return tile.scores(captured, query, key, i, j)

            s, ds = _jvp(scores_of, (captured, query, key), (dcaptured, dquery, dkey))
            # Where hidden, p is 0, so ds does not matter: the mask is not differentiated.
            s, seen = tile.masked(fixed.captured_by_mask, s, i, j)
            p = jnp.exp(s - normalizer.peak[:, None]) * inverse[:, None]
            kept = tile.dropped(fixed.captured_by_dropout, p, i, j)
            if ds is not None:
                a, r = a + _weighted_sum(kept * ds, value, seen), r + (p * ds).sum(axis=1)
            return (a if dvalue is None else a + _weighted_sum(kept, dvalue, seen)), r

        start = jnp.zeros_like(out), jnp.zeros_like(inverse)
        a, r = loops.scan_key_blocks(step, start, blocks, needed)
        # The peak is treated as constant: only total * exp(peak) has a meaning, and d log of it = r.
        return a - r[:, None] * out, Normalizer(jnp.zeros_like(r), normalizer.total * r)

    rows = queries, dqueries, outs, normalizers, fixed.i, fixed.needed
    return loops.map_query_blocks(row, rows, (keys, dkeys, values, dvalues, fixed.j))


def _weighted_sum(
    p: Float[Array, "r c"], value: Float[Array, "Hv c"], seen: Bool[Array, "c"] | None
) -> Float[Array, "r Hv"]:
    """Sum the values that any query of the tile sees, weighted by p."""
    value = zero_hidden_values(value, seen, keys_axis=1)
    return lax.dot_general(p.astype(value.dtype), value, (((1,), (1,)), ((), ())))


def _is_symbolic(tangent) -> bool:
    return isinstance(tangent, SymbolicZero)


def _jvp(function, primals, tangents):
    """Compute `jax.jvp` where None is a tangent of zero; if all tangents are None, so is the result's."""
    leaves, structure = jax.tree.flatten(primals)
    tangents = jax.tree.leaves(tangents, is_leaf=lambda t: t is None)
    nonzero = [n for n, tangent in enumerate(tangents) if tangent is not None]
    if not nonzero:
        return function(*primals), None

    def of_nonzero(*values):
        replaced = leaves.copy()
        for n, value in zip(nonzero, values):
            replaced[n] = value
        return function(*structure.unflatten(replaced))

    return jax.jvp(of_nonzero, [leaves[n] for n in nonzero], [tangents[n] for n in nonzero])
