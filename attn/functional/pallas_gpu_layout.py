"""Arrays on their way to the kernels of `pallas_gpu`: lists of tiles, operands and results, and functions on a tile.

A grid has two axes: the heads of all examples, and the blocks of queries or of keys. A program visits the tiles in the
list of its block, those first in which all pairs are visible. It reads everything by pointers, so that a part of any
kind is one load, and tiles that are not in a list are not even fetched.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array

from attn.functional import tiles
from attn.functional.plans import Plan
from attn.functional.sharding import shape_like
from attn.functional.taken_apart import Kind
from attn.functional.tiles import count, of_head, padded


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


# The lists of tiles


class Lists(NamedTuple):
    """The tiles of each block of queries or of keys.

    Attributes:
      numbers: `[b n blocks width]` of the other block of each tile: first those of whole tiles, then the other needed.
      counts: `[b n blocks 2]` of whole tiles, and of needed ones.
      has_whole, has_others: whether there may be whole tiles, and others.
      is_by_row: whether blocks are those of queries.
    """

    numbers: Array
    counts: Array
    has_whole: bool
    has_others: bool
    is_by_row: bool

    def block(self, step):
        """Return the block of a program. Under a causal mask, the longest lists come first: they take the longest."""
        return self.counts.shape[2] - 1 - step if self.is_by_row else step


def lists(plan: Plan, flags: Sequence[Array], order: str) -> Lists:
    """List the tiles of each block.

    Args:
      plan: the plan.
      flags: as in `fused.Kernels`.
      order: "rows" for the tiles of each block of queries, "columns" for those of each block of keys.
    """
    known, is_known = plan.tiles, plan.tiles.needed is not None
    needed, whole = (known.needed[None, None], known.whole[None, None]) if is_known else flags[:2]
    shape = count(plan.T, plan.blocks.rows), count(plan.S, plan.blocks.columns)
    rank = np.where(whole, 0, np.where(needed, 1, 2)) if is_known else jnp.where(whole, 0, jnp.where(needed, 1, 2))
    if is_known:
        ranks = np.full((1, 1, *shape), 2)
        ranks[..., known.rows, known.columns] = rank
    else:
        ranks = jnp.full((*rank.shape[:2], *shape), 2).at[..., known.rows, known.columns].set(rank)
    ranks = ranks if order == "rows" else ranks.swapaxes(2, 3)
    is_listed = np.zeros(shape, bool)
    is_listed[known.rows, known.columns] = True if known.needed is None else known.needed
    width = max(1, is_listed.sum(axis=1 if order == "rows" else 0).max())
    numbers = (np if is_known else jnp).argsort(ranks, axis=-1, stable=True)[..., :width]
    counts = (np if is_known else jnp).stack([(ranks < 1).sum(axis=-1), (ranks < 2).sum(axis=-1)], axis=-1)
    has_whole, has_others = True, True
    if is_known:
        has_whole, has_others = bool(counts[..., 0].any()), bool((counts[..., 0] < counts[..., 1]).any())
    numbers, counts = (jnp.asarray(x, jnp.int32) for x in (numbers, counts))
    return Lists(numbers, counts, has_whole, has_others, order == "rows")


# Operands and results


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

    def body(numbers, counts, *refs):
        number = listed.block(pl.program_id(1))
        program = Program(number, numbers, counts, listed.has_whole, listed.has_others)
        kernel(plan, program, refs[: len(operands)], refs[len(operands) + len(zeros) :])

    def spec(shape, block=None):
        def index(head, step):
            return (*of_head(plan, shape, head), listed.block(step) if block else 0, *[0] * (len(shape) - 3))

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


# One tile


class Tile(tiles.Tile):
    """The functions of positions on one tile. Parts are read when they are needed."""

    def __init__(self, plan: Plan, row: Array | int, column: Array | int, parts: Sequence):
        super().__init__(plan, row, column)
        self.row, self.column = row, column
        self._refs = dict(zip(("score", "mask", "keep"), plan.split(parts)))

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

    def read(self, name: str) -> list[Array]:
        load = {
            Kind.CONSTANT: lambda ref: ref[0],
            Kind.QUERY: lambda ref: ref[self.rows][:, None],
            Kind.KEY: lambda ref: ref[self.columns][None, :],
            Kind.DISTANCE: lambda ref: ref[self.distances],
            Kind.PAIR: lambda ref: ref[self.i, self.j],
        }
        parts = getattr(self.plan, name).parts
        return [load[part.kind](ref) for part, ref in zip(parts, self._refs[name], strict=True)]
