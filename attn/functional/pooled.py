"""Attention weights pooled over blocks of queries by blocks of keys, in memory O(T): a picture of a long sequence.

Two passes. The first one is attention without values: each row's normaliser, its peak m and its total l. The second one
computes the scores again, tile by tile, and pools the weights p = exp(s - m) / l at once. Tiles that the mask hides are
skipped in both.

A tile of the second pass holds whole blocks, several of them where blocks are short. A block longer than a tile takes
several tiles, of which the last one may have padding.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Shaped

from attn.functional import blockwise, checks, contract, heads, loops, mods, reference, survey
from attn.functional.attention import call_of_heads, call_of_one_head
from attn.functional.blocks import BlockedAxis
from attn.functional.contract import Call, Normalizer, Unsupported
from attn.functional.implementations import choose, name_of
from attn.functional.sharding import gathered, vary_alike

REDUCTIONS = ("mass", "max")


def pooled_attention_weights(
    query: Float[Array, "T N H"] | Float[Array, "T H"],
    key: Float[Array, "S K H"] | Float[Array, "S H"],
    *,
    mask=None,
    score=None,
    scale=None,
    shape: tuple[int, int] = (256, 256),
    reduce: str = "mass",
    implementation: str = "auto",
) -> Float[Array, "N t s"] | Float[Array, "t s"]:
    """Compute the weights of `attention_weights`, pooled over blocks of queries by blocks of keys, in memory O(T).

    With a = ceil(T / shape[0]) and b = ceil(S / shape[1]), block m of the queries has the positions from a m to
    min(a m + a, T) - 1, and block n of the keys those from b n to min(b n + b, S) - 1. So the last block may be
    shorter, there are t = ceil(T / a) blocks of queries and s = ceil(S / b) blocks of keys, t <= shape[0] and
    s <= shape[1], and where T <= shape[0] each query is a block.

        "mass"    the mean, over the queries of a block, of the sum over the keys of a block
        "max"     the largest weight of a block

    Args:
      query, key: `[T N H]` and `[S K H]`, or `[T H]` and `[S H]` for one head.
      mask, score, scale: as for `multi_head_attention_weights`; for one head as for `attention_weights`.
      shape: the largest numbers of blocks of queries and of keys.
      reduce: "mass" or "max".
      implementation: of the first pass, which computes the normaliser of each row: "auto", "fastest", or a name in the
        registry. The second pass, which pools, is that of "blockwise" for all of them, so also after a kernel it is
        ordinary JAX. "reference" pools the whole weights instead, in memory O(T S); "auto" chooses it for short
        sequences.

    Returns:
      `[N t s]`, or `[t s]` for one head, in float32 or wider. With "mass", a row sums to the share of the block's
      queries that see a key; it is 1 where all of them do. A query without a visible key counts as 0. A query that
      sees a NaN makes the whole row of its block NaN.

    Raises:
      TypeError, ValueError, attn.Unsupported: as `multi_head_attention`; also for a shape that is not two whole
        numbers of at least 1, and for an unknown reduction.

    Source: Vaswani et al. 2017, equation 1; recomputed weights: Dao et al. 2022, appendix B.
    """
    is_one = checks.is_array(query) and len(query.shape) == 2
    axes = ("T H", "S H") if is_one else ("T N H", "S K H")
    query, key = checks.check_arrays(*zip(axes, (query, key)))
    blocks = _check_blocks(shape, reduce)
    # Kernels have no blocks of width 0, so the values have one column.
    make = call_of_one_head if is_one else call_of_heads
    call = make(query, key, jnp.zeros_like(key[..., :1]), mask, score, scale)
    chosen = choose(implementation, call, return_logsumexp=True)
    if reason := blockwise.unsupported_reason(call):
        raise Unsupported(f"pooled_attention_weights does not support {reason}")
    if is_one:
        call = call._replace(**{name: getattr(call, name)[:, None] for name in ("query", "key", "value")})
    grid = Grid.of(call.T, call.S, blocks, reduce)
    if mods.holds_function(call.mask) or mods.holds_function(call.score):  # see `blockwise.attend`

        def pool_once(*arrays):
            return _pool_heads(call._replace(**dict(zip(("query", "key", "value"), arrays))), chosen, grid)

        pooled = jax.jit(pool_once)(call.query, call.key, call.value)
    else:
        pooled = _pool_heads_compiled(call, chosen, grid)
    return pooled[0] if is_one else pooled


def _check_blocks(shape, reduce) -> tuple[int, int]:
    """Check the largest numbers of blocks and the reduction; return the numbers.

    Raises:
      TypeError: a shape that is not a tuple of integers.
      ValueError: not two numbers, a number below 1, an unknown reduction.
    """
    is_integers = isinstance(shape, (tuple, list)) and all(
        isinstance(n, (int, np.integer)) and not isinstance(n, bool) for n in shape
    )
    if not is_integers:
        raise TypeError(f"shape must be a tuple of two whole numbers, got {shape!r}")
    if len(shape) != 2 or min(shape) < 1:
        raise ValueError(f"shape must be two whole numbers of at least 1, got {tuple(shape)}")
    if not isinstance(reduce, str) or reduce not in REDUCTIONS:
        raise ValueError(f"reduce must be one of {', '.join(map(repr, REDUCTIONS))}, got {reduce!r}")
    return int(shape[0]), int(shape[1])


@dataclasses.dataclass(frozen=True)
class Cut:
    """An axis cut into blocks, and these into tiles: several whole blocks per tile, or several tiles per block.

    Attributes:
      length: of the axis.
      block: positions of a block; the last one may have fewer.
      tile: blocks of a tile; 1 where a block takes several tiles.
      parts: tiles of a block; 1 where a tile holds several blocks.
    """

    length: int
    block: int
    tile: int
    parts: int

    @classmethod
    def of(cls, length: int, most_blocks: int, most_positions: int) -> "Cut":
        """Cut an axis into at most so many blocks, and these into tiles of at most so many positions."""
        block = math.ceil(length / most_blocks)
        count = math.ceil(length / block)
        tiles = math.ceil(count / max(1, most_positions // block))
        return cls(length, block, math.ceil(count / tiles), math.ceil(block / most_positions))

    @property
    def count(self) -> int:
        """Return the number of blocks."""
        return math.ceil(self.length / self.block)

    @property
    def positions(self) -> int:
        """Return the number of positions of a tile."""
        return self.tile * math.ceil(self.block / self.parts)

    @property
    def groups(self) -> int:
        """Return the number of tiles, or of blocks where they take several tiles."""
        return math.ceil(self.count / self.tile)

    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the first position of each tile, and the one after the last that it holds: `[tiles]`."""
        blocks = self.tile * self.block * np.arange(self.groups)[:, None]
        inside = self.positions * np.arange(self.parts)
        ends = blocks + np.minimum(inside + self.positions, self.tile * self.block)
        first, end = blocks + inside, np.minimum(ends, self.length)
        return first.ravel().astype(np.int32), end.ravel().astype(np.int32)

    def axis(self, nonfinite, dtype) -> BlockedAxis:
        """Return the axis in tiles; see `BlockedAxis.cut`."""
        first, end = self.bounds()
        marks = jnp.where(nonfinite, jnp.nan, jnp.zeros((), dtype))
        is_full = (end - first == self.positions).all()
        return BlockedAxis(jnp.asarray(first), self.in_tiles(marks), None if is_full else jnp.asarray(end))

    def in_tiles(self, x: Shaped[Array, "length *rest"]) -> Shaped[Array, "tiles n *rest"]:
        """Cut the leading axis of an array into tiles; padding repeats the entry before it."""
        shape, rest = (self.groups, self.tile * self.block), x.shape[1:]
        x = _padded(x, 0, math.prod(shape)).reshape(*shape, *rest)
        x = _padded(x, 1, self.parts * self.positions)
        return x.reshape(self.groups * self.parts, self.positions, *rest)

    def indices(self) -> np.ndarray:
        """Return the positions of each tile, in range: `[tiles n]`."""
        first, end = (x[:, None] for x in self.bounds())
        return np.minimum(first + np.arange(self.positions, dtype=np.int32), end - 1)


def _padded(x: Array, axis: int, length: int) -> Array:
    missing = length - x.shape[axis]
    return jnp.pad(x, [(0, missing if n == axis else 0) for n in range(x.ndim)], mode="edge") if missing else x


@dataclasses.dataclass(frozen=True)
class Grid:
    """The blocks of queries and of keys, and the reduction over a block."""

    rows: Cut
    columns: Cut
    reduce: str

    @classmethod
    def of(cls, T: int, S: int, blocks: tuple[int, int], reduce: str) -> "Grid":
        """Make the grid of at most so many blocks, in tiles as large as those of `blockwise`."""
        return cls(*(Cut.of(n, most, blockwise.BLOCK_SIZE) for n, most in zip((T, S), blocks)), reduce)

    def pool_whole(self, p: Float[Array, "T S"]) -> Float[Array, "t s"]:
        """Pool the whole weights of a head."""
        reduce = jnp.max if self.reduce == "max" else jnp.sum
        t, a, s, b = self.rows.count, self.rows.block, self.columns.count, self.columns.block
        x = jnp.pad(p, [(0, t * a - self.rows.length), (0, s * b - self.columns.length)])
        # One axis at a time: on an explicit mesh no more can be split at once.
        x = reduce(x.reshape(t, a, s * b), axis=1)
        return self.finish(reduce(x.reshape(t, s, b), axis=2), jnp.isnan(p).any(axis=1))

    def pool_tile(self, logarithms: Float[Array, "r c"]) -> Float[Array, "rows columns"]:
        """Pool the weights of a tile, from their logarithms, before `finish`."""
        x = logarithms.reshape(self.rows.tile, -1, self.columns.tile, self.columns.positions // self.columns.tile)
        # Of the maximum alone, exp is needed once per block.
        return jnp.exp(x.max(axis=(1, 3))) if self.reduce == "max" else jnp.exp(x).sum(axis=(1, 3))

    def combine(self, x: Array, y: Array) -> Array:
        """Combine the results of two tiles of the same blocks."""
        return jnp.maximum(x, y) if self.reduce == "max" else x + y

    def combine_parts(self, tiles: Float[Array, "tiles rows columns"]) -> Float[Array, "t s"]:
        """Combine the results of all tiles, each of which holds a row of tiles."""
        rows, columns = self.rows, self.columns
        tiles = tiles.reshape(rows.groups, rows.parts, rows.tile, -1)
        pooled = tiles.max(axis=1) if self.reduce == "max" else tiles.sum(axis=1)
        return pooled.reshape(rows.groups * rows.tile, -1)[: rows.count, : columns.count]

    def finish(self, pooled: Float[Array, "t s"], is_nan: Bool[Array, "T"]) -> Float[Array, "t s"]:
        """Divide the sums over the queries of each block by their number, and put in the NaN of rows that have one."""
        rows = self.rows
        missing = rows.count * rows.block - rows.length
        if self.reduce == "mass":
            sizes = np.full((rows.count, 1), rows.block)
            sizes[-1] -= missing
            pooled = pooled / jnp.asarray(sizes, pooled.dtype)
        # XLA's maximum over an axis may be a number where one of the entries is NaN.
        has_nan = jnp.pad(is_nan, (0, missing)).reshape(rows.count, rows.block).any(axis=1, keepdims=True)
        return jnp.where(has_nan, jnp.nan, pooled)


def _pool_heads(call: Call, chosen, grid: Grid) -> Float[Array, "N t s"]:
    """Compute the pooled weights of all heads."""
    is_whole, of_queries = name_of(chosen) == "reference", ()
    if chosen.all_heads:
        _, of_queries = heads.attend_heads(chosen, call, return_normalizer=True)

    def one_head(query, mask, score, dropout, key, value, *normalizer):
        head = contract.resolve(Call(gathered(query), key, value, mask, score, call.scale))
        if is_whole:
            return grid.pool_whole(reference.weights(head, jnp.arange(head.T, dtype=jnp.int32)))
        if not normalizer:
            _, normalizer = heads.attend_one(chosen, head)
        return _pool(head, Normalizer(*map(gathered, normalizer)), grid)

    at_once = blockwise.heads_at_once(call.query.shape[1])
    return heads.map_heads(one_head, call, (call.key, call.value), axis=0, at_once=at_once, of_queries=of_queries)


_pool_heads_compiled = jax.jit(_pool_heads, static_argnums=(1, 2))


def _pool(call: Call, normalizer: Normalizer, grid: Grid) -> Float[Array, "t s"]:
    """Pool the weights of one head whose normaliser is known: the second pass."""
    head, (peak, total) = vary_alike((contract.prepare(call), normalizer))
    wide, rows, columns = head.scale.dtype, grid.rows, grid.columns
    i, j = rows.axis(head.nonfinite_queries, wide), columns.axis(head.nonfinite_keys, wide)
    queries = rows.in_tiles(head.query.astype(wide))  # [row_tiles r H]
    keys = columns.in_tiles(head.key.astype(wide)).swapaxes(1, 2)  # [column_tiles H c]
    statistics = [rows.in_tiles(x) for x in (peak, jnp.log(jnp.where(total == 0, 1, total)))]
    # The first block of each tile, in the row of results.
    firsts = jnp.repeat(jnp.arange(columns.groups, dtype=jnp.int32) * columns.tile, columns.parts)

    head = loops.take_out_distances(head, call.T, call.S, rows.positions, columns.positions)
    scores_of, masked, _ = loops.tile_functions(head, call.T, call.S)
    needed, blocks = None, (keys, firsts, j)
    if head.mask is not None:
        positions, floats = (rows.indices(), columns.indices()), (queries, keys, head)
        needed, blocks = survey.needed_by_loop(head.mask, *positions, blocks, floats)

    def row(queries, blocks):
        query, (peak, log_total), i, needed = queries
        is_row = i.is_position(call.T)

        def step(pooled, block):
            key, first, j = block
            s, _ = masked(scores_of(query, key, i, j), i, j)
            # Not s - logsumexp, which would round log(total) away where the peak is large.
            logarithms = s - peak[:, None] - log_total[:, None]
            if is_row is not None:
                logarithms = jnp.where(is_row[:, None], logarithms, -jnp.inf)
            tile = grid.pool_tile(logarithms)
            before = lax.dynamic_slice_in_dim(pooled, first, columns.tile, axis=1)
            return lax.dynamic_update_slice_in_dim(pooled, grid.combine(before, tile), first, axis=1)

        start = jnp.zeros((rows.tile, columns.groups * columns.tile), wide)
        return loops.scan_key_blocks(step, start, blocks, needed)

    tiles = loops.map_query_blocks(row, (queries, statistics, i, needed), blocks)
    return grid.finish(grid.combine_parts(tiles), jnp.isnan(total))
