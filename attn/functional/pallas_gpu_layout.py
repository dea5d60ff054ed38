"""How arrays reach the kernels of `pallas_gpu`: the lists of tiles, operands and results, and the parts of a tile.

A grid has two axes: the heads of all examples, and the blocks of queries or of keys. A program visits the tiles in the
list of its block, those first in which all pairs are visible. It reads everything by pointers, so that a part of any
kind is one load, and tiles that are not in a list are not even fetched.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.ref import addupdate
from jaxtyping import Array

from attn.functional.fused import Plan
from attn.functional.sharding import shape_like
from attn.functional.taken_apart import Kind

_MEMORY_OF_COPIES = 1 << 28  # bytes, for the gradients of one part of kind DISTANCE


class Result(NamedTuple):
    """An output of a kernel, `[B N ...]`.

    Attributes:
      shape: its shape without these axes.
      block: shape of a program's block; None for all, where programs add up or write tiles, and zeros elsewhere.
      dtype: its dtype.
    """

    shape: tuple[int, ...]
    block: tuple[int, ...] | None
    dtype: object


def count(length: int, block: int) -> int:
    """Return the number of blocks that hold so many positions."""
    return -(-length // block)


# The lists of tiles


class Lists(NamedTuple):
    """The tiles of each block of queries or of keys.

    Attributes:
      numbers: `[b n blocks width]` of the other block of each tile: first those of whole tiles, then the other needed.
      counts: `[b n blocks 2]` of whole tiles, and of needed ones.
      has_whole, has_others: whether there may be whole tiles, and others.
    """

    numbers: Array
    counts: Array
    has_whole: bool
    has_others: bool


def lists(plan: Plan, flags: Sequence[Array], order: str) -> Lists:
    """List the tiles of each block.

    Args:
      plan: the plan.
      flags: as in `fused.Kernels`.
      order: "rows" for the tiles of each block of queries, "columns" for those of each block of keys.
    """
    tiles, is_known = plan.tiles, plan.tiles.needed is not None
    needed, whole = (tiles.needed[None, None], tiles.whole[None, None]) if is_known else flags[:2]
    shape = count(plan.T, plan.blocks.rows), count(plan.S, plan.blocks.columns)
    rank = np.where(whole, 0, np.where(needed, 1, 2)) if is_known else jnp.where(whole, 0, jnp.where(needed, 1, 2))
    if is_known:
        ranks = np.full((1, 1, *shape), 2)
        ranks[..., tiles.rows, tiles.columns] = rank
    else:
        ranks = jnp.full((*rank.shape[:2], *shape), 2).at[..., tiles.rows, tiles.columns].set(rank)
    ranks = ranks if order == "rows" else ranks.swapaxes(2, 3)
    is_listed = np.zeros(shape, bool)
    is_listed[tiles.rows, tiles.columns] = True if tiles.needed is None else tiles.needed
    width = max(1, is_listed.sum(axis=1 if order == "rows" else 0).max())
    numbers = (np if is_known else jnp).argsort(ranks, axis=-1, stable=True)[..., :width]
    counts = (np if is_known else jnp).stack([(ranks < 1).sum(axis=-1), (ranks < 2).sum(axis=-1)], axis=-1)
    has_whole, has_others = True, True
    if is_known:
        has_whole, has_others = bool(counts[..., 0].any()), bool((counts[..., 0] < counts[..., 1]).any())
    return Lists(jnp.asarray(numbers, jnp.int32), jnp.asarray(counts, jnp.int32), has_whole, has_others)


# Operands and results


def padded(x: Array, axis: int, block: int) -> Array:
    """Pad an axis to a multiple of a block by its last entry, since a score may not be defined for other numbers."""
    missing = -x.shape[axis] % block
    return jnp.pad(x, [(0, missing * (n == axis)) for n in range(x.ndim)], mode="edge") if missing else x


def read_rows(ref, rows) -> Array:
    """Read a slice of rows, with zeros up to the width that arrays have inside of a kernel."""
    width, inside = ref.shape[1], width_inside(ref.shape[1])
    if width == inside:
        return ref[rows, :]
    shape = rows.size, inside
    i, column = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in range(2))
    return plgpu.load(ref.at[rows.start + i, column], mask=column < width, other=0)


def width_inside(width: int) -> int:
    """Return the width of a head inside of a kernel: a power of two, and no less than what tensor cores multiply."""
    return max(16, pl.next_power_of_2(width))


def of_parts(plan: Plan, parts: Sequence[Array]) -> list[Array]:
    """Return the operands of the parts."""

    def operand(kind: Kind, x: Array) -> Array:
        if kind == Kind.CONSTANT:
            return x[..., None]
        if kind in (Kind.QUERY, Kind.KEY):
            return padded(x, 2, plan.blocks.rows if kind == Kind.QUERY else plan.blocks.columns)
        return x

    return [operand(part.kind, x) for part, x in zip(plan.parts, parts, strict=True)]


def result_of_part(plan: Plan, kind: Kind, heads: int) -> Result:
    """Return the result that holds the gradient of a part.

    Args:
      plan: the plan.
      kind: of the part.
      heads: number of heads of all examples.
    """
    bq, bk, _ = plan.blocks
    rows, columns = count(plan.T, bq), count(plan.S, bk)
    if kind == Kind.DISTANCE:
        return _distances_result(plan, heads)
    return {
        Kind.CONSTANT: Result((rows,), (1,), plan.wide),
        Kind.QUERY: Result((rows * bq,), (bq,), plan.wide),
        Kind.KEY: Result((columns * bk,), (bk,), plan.wide),
        Kind.PAIR: Result((rows * bq, columns * bk), None, plan.wide),
    }[kind]


def gradient_of_part(plan: Plan, kind: Kind, x: Array) -> Array:
    """Make the gradient of a part from its result: `[B N ...]`."""
    return {
        Kind.CONSTANT: lambda: x.sum(axis=2),
        Kind.DISTANCE: lambda: _gradient_of_distances(plan, x),
        Kind.QUERY: lambda: x[:, :, : plan.T],
        Kind.KEY: lambda: x[:, :, : plan.S],
        Kind.PAIR: lambda: x[:, :, : plan.T, : plan.S],
    }[kind]()


# Running a kernel


class Program(NamedTuple):
    """One program of a kernel: the number of its block, and the list of its tiles."""

    number: Array
    numbers: object
    counts: object
    has_whole: bool
    has_others: bool

    def loop(self, update: Callable, carry):
        """Run `carry = update(is_whole, number of the other block, carry)` for each tile."""

        def of(is_whole, step, carry):
            return update(is_whole, self.numbers[self.number, step], carry)

        whole, needed = (self.counts[self.number, n] for n in range(2))
        if self.has_whole:
            carry = lax.fori_loop(0, whole, functools.partial(of, True), carry)
        if self.has_others:
            carry = lax.fori_loop(whole, needed, functools.partial(of, False), carry)
        return carry


def run(
    kernel: Callable,
    name: str,
    plan: Plan,
    listed: Lists,
    operands: Sequence[Array],
    results: Sequence[Result],
    warps: int,
    interpret: bool,
) -> Sequence[Array]:
    """Run `kernel(plan, program, operands, results)` for every head and block: results `[B N ...]`."""
    inputs = [listed.numbers, listed.counts, *operands]
    batch, blocks = max(map(len, inputs)), listed.counts.shape[2]
    shapes = [shape_like(operands[0], (batch, plan.N, *result.shape), result.dtype) for result in results]
    zeroed = [n for n, result in enumerate(results) if result.block is None]
    zeros = [jnp.zeros_like(operands[0], shape=shapes[n].shape, dtype=shapes[n].dtype) for n in zeroed]

    def number():
        # The last block of queries has the longest list under a causal mask, the first block of keys has.
        return pl.program_id(1) if name.endswith("columns") else blocks - 1 - pl.program_id(1)

    def body(numbers, counts, *refs):
        program = Program(number(), numbers, counts, listed.has_whole, listed.has_others)
        kernel(plan, program, refs[: len(operands)], refs[len(operands) + len(zeros) :])

    def spec(shape, block=None):
        def index(head, step):
            at = (blocks - 1 - step if not name.endswith("columns") else step) if block else 0
            return (*_of_head(plan, shape, head), at, *[0] * (len(shape) - 3))

        return pl.BlockSpec((None, None, *(block or shape[2:])), index)

    body.__name__ = name
    return pl.pallas_call(
        body,
        grid=(batch * plan.N, blocks),
        in_specs=[spec(x.shape) for x in (*inputs, *zeros)],
        out_specs=[spec(shape.shape, result.block) for shape, result in zip(shapes, results)],
        out_shape=shapes,
        input_output_aliases={len(inputs) + n: at for n, at in enumerate(zeroed)},
        compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=2),
        interpret=interpret,
        name=name,
    )(*inputs, *zeros)


def _of_head(plan: Plan, shape: Sequence[int], head):
    """Return the example and the head of an array `[b n ...]` that belong to a query head of all examples."""
    examples, heads = shape[:2]
    number = lax.rem(head, np.int32(plan.N))
    of_heads = 0 if heads == 1 else number if heads == plan.N else lax.div(number, np.int32(plan.group))
    return 0 if examples == 1 else lax.div(head, np.int32(plan.N)), of_heads


# One tile


class Tile:
    """The functions of positions on one tile. Parts are read when they are needed."""

    def __init__(self, plan: Plan, row: Array | int, column: Array | int, parts: Sequence):
        bq, bk, _ = plan.blocks
        self.plan, self.row, self.column = plan, row, column
        self.corner = row * bq, column * bk
        self.parts = plan.split(parts)
        i = self.corner[0] + lax.broadcasted_iota(jnp.int32, (bq, 1), 0)
        self.key_positions = self.corner[1] + lax.broadcasted_iota(jnp.int32, (1, bk), 1)
        # Positions of padding are clipped, since a function may not be defined for others.
        self.i = jnp.minimum(i, plan.T - 1) if plan.T % bq else i
        self.j = jnp.minimum(self.key_positions, plan.S - 1) if plan.S % bk else self.key_positions

    @property
    def rows(self):
        """Return the slice of the tile's queries."""
        return pl.ds(self.row * self.plan.blocks.rows, self.plan.blocks.rows)

    @property
    def columns(self):
        """Return the slice of the tile's keys."""
        return pl.ds(self.column * self.plan.blocks.columns, self.plan.blocks.columns)

    @property
    def distances(self) -> Array:
        """Return where the distance of each pair is in a vector of distances."""
        return self.j - self.i + (self.plan.T - 1)

    def _read(self, function, refs: Sequence) -> list[Array]:
        """Return the parts of a function, in shapes that broadcast to the tile."""
        load = {
            Kind.CONSTANT: lambda ref: ref[0],
            Kind.QUERY: lambda ref: ref[self.rows][:, None],
            Kind.KEY: lambda ref: ref[self.columns][None, :],
            Kind.DISTANCE: lambda ref: ref[self.distances],
            Kind.PAIR: lambda ref: ref[self.i, self.j],
        }
        return [load[part.kind](ref) for part, ref in zip(function.parts, refs, strict=True)]

    def score(self, raw: Array) -> Array:
        """Return the scores of the products q . k."""
        return self.plan.score(self._read(self.plan.score, self.parts[0]), raw, self.i, self.j, corner=self.corner)

    def score_and_pullback(self, raw: Array, wanted: Sequence[int]) -> tuple[Array, Callable]:
        """Return the scores, and the map from their cotangents to those of the products and of the wanted parts."""
        parts = self._read(self.plan.score, self.parts[0])

        def of(raw, *moving):
            replaced = dict(zip(wanted, moving))
            return self.plan.score(
                [replaced.get(n, x) for n, x in enumerate(parts)], raw, self.i, self.j, corner=self.corner
            )

        return jax.vjp(of, raw, *(parts[n] for n in wanted))

    def only_visible(self, x: Array, hidden) -> Array:
        """Return x with another number for pairs that the mask hides, and in padding of the keys."""
        plan, conditions = self.plan, []
        if plan.mask is not None:
            conditions.append(plan.mask(self._read(plan.mask, self.parts[1]), self.i, self.j, corner=self.corner))
        if plan.S % plan.blocks.columns:
            conditions.append(self.key_positions < plan.S)
        if not conditions:
            return x
        return jnp.where(jnp.broadcast_to(functools.reduce(jnp.logical_and, conditions), x.shape), x, hidden)

    def drop(self, p: Array) -> Array:
        """Set dropped weights to 0; the others are not rescaled here."""
        keep = self.plan.keep
        return (
            p
            if keep is None
            else jnp.where(keep(self._read(keep, self.parts[2]), self.i, self.j, corner=self.corner), p, 0.0)
        )


def add_part(tile: Tile, kind: Kind, out, gradient: Array):
    """Write the gradient of a part on a tile, or return what to add to the sum of its program."""
    if kind == Kind.PAIR:
        out[tile.rows, tile.columns] = gradient
    elif kind == Kind.DISTANCE:
        _add_distances(tile, out, gradient)
    elif kind == Kind.CONSTANT:
        return gradient
    else:
        return gradient.sum(axis=1 if kind == Kind.QUERY else 0)


# Gradients of numbers per distance


class _Distances(NamedTuple):
    """How the diagonals of a tile are added up: in two steps, within small squares and over them.

    With i = f a + b and j = f m + n, the distance is j - i = f (m - a) + (n - b). A tile, arranged as `[(a m) (b n)]`,
    is multiplied from the left by a matrix that adds up rows of the same m - a, and from the right by one that adds up
    columns of the same n - b. This costs few products, where an atomic addition per pair would wait for memory.

    Attributes:
      f: side of a square.
      a, m: number of squares over each other, and side by side.
      sums: number of the sums over squares, a power of two.
    """

    f: int
    a: int
    m: int
    sums: int

    @classmethod
    def of(cls, plan: Plan) -> "_Distances":
        """Choose squares such that no product is smaller than what tensor cores multiply."""
        bq, bk, _ = plan.blocks
        f = 8 if bq * bk >= 1024 else 4
        return cls(f, bq // f, bk // f, max(16, pl.next_power_of_2((bq + bk) // f)))

    def length(self, plan: Plan) -> int:
        """Return the number of sums over squares of all tiles."""
        return count(plan.T, plan.blocks.rows) * self.a + count(plan.S, plan.blocks.columns) * self.m + self.sums


def _distances_result(plan: Plan, heads: int) -> Result:
    """Return the result for a part of kind DISTANCE: one copy for each block of queries.

    In a copy, no more than two tiles add to a number, so the sum does not depend on their order. If there are so many
    heads and blocks that copies take too much memory, blocks share them, and results differ in rounding between runs.
    """
    distances = _Distances.of(plan)
    shape = distances.length(plan), max(16, 2 * distances.f)
    copies = min(count(plan.T, plan.blocks.rows), _MEMORY_OF_COPIES // (4 * heads * shape[0] * shape[1]))
    return Result((max(1, copies), *shape), None, plan.wide)


def _add_distances(tile: Tile, out, gradient: Array):
    f, a, m, sums = _Distances.of(tile.plan)
    iota = functools.partial(lax.broadcasted_iota, jnp.int32)

    def one_hot(shape, axis, offset, long):
        """Return a matrix whose axis `axis` is a pair (x, y), y up to `long`, and the other one is y - x + offset."""
        pair = iota(shape, axis)
        return (lax.rem(pair, np.int32(long)) - lax.div(pair, np.int32(long)) + offset == iota(shape, 1 - axis)).astype(
            tile.plan.wide
        )

    x = gradient.reshape(a, f, m, f).transpose(0, 2, 1, 3).reshape(a * m, f * f)
    dot = functools.partial(lax.dot, precision=tile.plan.precision, preferred_element_type=tile.plan.wide)
    x = dot(x, one_hot((f * f, out.shape[2]), 0, f, f))
    x = dot(one_hot((sums, a * m), 1, a, m), x)
    # The first sum is that of m - a = -a.
    first = tile.column * m - tile.row * a + (count(tile.plan.T, tile.plan.blocks.rows) - 1) * a
    addupdate(out, (lax.rem(tile.row, np.int32(out.shape[0])), first + iota(x.shape, 0), iota(x.shape, 1)), x)


def _gradient_of_distances(plan: Plan, x: Array) -> Array:
    distances = _Distances.of(plan)
    f, start = distances.f, count(plan.T, plan.blocks.rows) * plan.blocks.rows - (plan.T - 1)
    x = x.sum(axis=2)[..., : 2 * f]
    # Columns are n - b from -f: the first half belongs to the square before.
    x = x[:, :, :-1, f:] + x[:, :, 1:, :f]
    x = x.reshape(*x.shape[:2], -1)
    return x[:, :, start : start + plan.T + plan.S - 1]
