"""Gradients of the parts of a score in the kernels of `pallas_gpu`, by what a part depends on.

QUERY, KEY    the sum of a program, which has all tiles of its queries or keys
CONSTANT      one sum per program; they are added up outside
PAIR          each tile writes its own
DISTANCE      sums along the diagonals of each tile, added to a copy of the vector by atomic operations
"""

import functools
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.ref import addupdate
from jaxtyping import Array

from attn.functional.pallas_gpu_layout import Result, Tile
from attn.functional.plans import Plan
from attn.functional.taken_apart import Kind
from attn.functional.tiles import count

_MEMORY_OF_COPIES = 1 << 28  # bytes, for the gradients of one part of kind DISTANCE


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
    """The sums along the diagonals of a tile, in two steps: within small squares and over them.

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

    In a copy, no more than two square tiles add to a number, so the sum does not depend on their order. With tiles that
    are not square, or so many heads and blocks that blocks share a copy to save memory, more do, and results may differ
    in rounding between runs.
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
