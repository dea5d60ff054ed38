"""Heads and blocks of arrays, and the functions of positions on a tile, as the kernels of all processors have them."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from attn.functional import on_tiles
from attn.functional.plans import Plan


def count(length: int, block: int) -> int:
    """Return the number of blocks that hold so many positions."""
    return -(-length // block)


def padded(x: Array, axis: int, block: int, mode: str = "edge") -> Array:
    """Pad an axis to whole blocks; with real entries ("edge"), since a function may not be defined for others."""
    missing = -x.shape[axis] % block
    return jnp.pad(x, [(0, missing if n == axis else 0) for n in range(x.ndim)], mode=mode) if missing else x


def of_head(plan: Plan, shape: Sequence[int], head):
    """Return the example and the head of an array `[b n ...]` that belong to a query head of all examples."""
    examples, heads = shape[:2]
    number = lax.rem(head, np.int32(plan.N))
    of_heads = 0 if heads == 1 else number if heads == plan.N else lax.div(number, np.int32(plan.group))
    return 0 if examples == 1 else lax.div(head, np.int32(plan.N)), of_heads


def add_up(plan: Plan, gradient: Array, x: Array) -> Array:
    """Return the gradient `[B N ...]` of an input in the shape of the input: heads and examples may share it."""
    if 1 < x.shape[1] < plan.N:
        gradient = gradient.reshape(len(gradient), plan.K, plan.group, *gradient.shape[2:]).sum(axis=2)
    axes = tuple(axis for axis in range(2) if x.shape[axis] < gradient.shape[axis])
    return gradient.sum(axis=axes, keepdims=True).astype(x.dtype)


class Tile:
    """The functions of positions on one tile; a processor's own class reads their parts.

    Attributes:
      plan: the plan.
      corner: the first positions of rows and of columns, which are queries and keys unless the plan is transposed.
      i, j: positions of rows `[r 1]` and of columns `[1 c]`. Those of padding are clipped: a function may not be
        defined for others.
      is_key: which rows or columns hold keys, where there is padding; else None.
      side: of the squares on which distances are evaluated (see `on_tiles`), or None.
    """

    side: int | None = None

    def __init__(self, plan: Plan, row, column):
        bq, bk, _ = plan.blocks
        self.plan, self.corner = plan, (row * bq, column * bk)
        rows = self.corner[0] + lax.broadcasted_iota(jnp.int32, (bq, 1), 0)
        columns = self.corner[1] + lax.broadcasted_iota(jnp.int32, (1, bk), 1)
        self.i = jnp.minimum(rows, plan.T - 1) if plan.T % bq else rows
        self.j = jnp.minimum(columns, plan.S - 1) if plan.S % bk else columns
        keys, S, block = (rows, plan.T, bq) if plan.is_transposed else (columns, plan.S, bk)
        self.is_key = keys < S if S % block else None

    def read(self, name: str) -> Sequence:
        """Return the parts of one of the plan's functions, "score", "mask" or "keep", as `on_tiles` takes them."""
        raise NotImplementedError

    def _evaluate(self, name: str, *arguments: Array) -> Array:
        return self._evaluate_with(self.read(name), name, *arguments)

    def _evaluate_with(self, parts: Sequence, name: str, *arguments: Array) -> Array:
        apart, positions = getattr(self.plan, name), (self.i, self.j)
        return on_tiles.evaluate(apart, parts, *arguments, *positions, corner=self.corner, side=self.side)

    def score(self, raw: Array) -> Array:
        """Return the scores of the products q . k."""
        return jnp.broadcast_to(self._evaluate("score", raw), raw.shape)

    def score_and_pullback(self, raw: Array, wanted: Sequence[int]) -> tuple[Array, Callable]:
        """Return the scores, and the map from their cotangents to those of the products and of the wanted parts."""
        parts = self.read("score")

        def of(raw, *moving):
            replaced = dict(zip(wanted, moving))
            used = [replaced.get(n, x) for n, x in enumerate(parts)]
            return jnp.broadcast_to(self._evaluate_with(used, "score", raw), raw.shape)

        return jax.vjp(of, raw, *(parts[n] for n in wanted))

    def only_visible(self, x: Array, hidden: float) -> Array:
        """Return x with another number in pairs that the mask hides, and in padding of the keys."""
        plan = self.plan
        found = [] if plan.mask is None else [self._evaluate("mask")]
        found += [] if self.is_key is None else [self.is_key]
        if not found:
            return x
        return jnp.where(jnp.broadcast_to(functools.reduce(jnp.logical_and, found), x.shape), x, hidden)

    def drop(self, p: Array) -> Array:
        """Set dropped weights to 0; the others are not rescaled here."""
        return p if self.plan.keep is None else jnp.where(self._evaluate("keep"), p, 0.0)
