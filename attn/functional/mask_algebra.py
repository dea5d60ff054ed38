"""The base class of masks, and combinations with masks or plain functions: `left & right`, `left | right`, `~mask`."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from attn.functional import checks, mods
from attn.functional.mods import Mod, PerHead, register

Index = Int[Array, "..."] | Int[np.ndarray, "..."] | int
Bounds = Bool[Array, "..."] | bool | np.bool_ | Bool[np.ndarray, "..."]
_PICTURE = 8  # rows and columns of the matrix in a repr


class Mask(Mod):
    """Base class of masks: combination with `&`, `|`, `~`, bounds of blocks, and a picture as `repr`."""

    # Otherwise NumPy would evaluate `array & mask` per element.
    __array_ufunc__ = None

    def __and__(self, other):
        return NotImplemented if other is None else both(self, as_mask(other))

    def __rand__(self, other):
        return NotImplemented if other is None else both(as_mask(other), self)

    def __or__(self, other):
        return NotImplemented if other is None else either(self, as_mask(other))

    def __ror__(self, other):
        return NotImplemented if other is None else either(as_mask(other), self)

    def __invert__(self):
        return negation(self)

    def bounds(
        self, rows: Int[Array | np.ndarray, "q r"], columns: Int[Array | np.ndarray, "k c"]
    ) -> tuple[Bounds, Bounds]:
        """Return for each block of queries by each block of keys if some pair, and if every pair, is visible.

        A plain function is evaluated at every pair, block by block; our masks compute the bounds directly.

        Args:
          rows: `[q r]`, the positions in each of q blocks of queries, ascending.
          columns: `[k c]`, those in each of k blocks of keys.

        Returns:
          (some, every): bools that broadcast to `[q k]`. `some`: some pair of the block is visible; True if unknown.
          `every`: every pair is visible; False if unknown. NumPy arrays if nothing is traced.
        """

        def block(row, column):
            visible = evaluate(self, row[:, None], column[None, :])
            return visible.any(), visible.all()

        rows, columns = jnp.asarray(rows), jnp.asarray(columns)
        return jax.lax.map(lambda row: jax.lax.map(lambda column: block(row, column), columns), rows)

    def __repr__(self) -> str:
        """Return the expression and below it a matrix, queries by keys: ■ may attend, · may not."""
        if any(isinstance(leaf, (jax.core.Tracer, PerHead)) for leaf in mods.parts(self)):
            return self.expression()
        try:
            T, S = self._picture_shape()
            i, j = jnp.arange(min(T, _PICTURE))[:, None], jnp.arange(min(S, _PICTURE))[None, :]
            visible = np.broadcast_to(self.resolve(T, S)(i, j), (i.shape[0], j.shape[1]))
        except Exception:  # a user's function may fail at these positions, and a repr must not
            return self.expression()
        return "\n".join([self.expression(), *(" ".join("■" if v else "·" for v in row) for row in visible)])

    def _picture_shape(self) -> tuple[int, int]:
        """Return the (T, S) that the shapes of this mask's arrays imply, else a default."""
        for field in dataclasses.fields(self):
            if isinstance(value := getattr(self, field.name), Mask):
                shape = value._picture_shape()
                if shape != (_PICTURE, _PICTURE):
                    return shape
        return _PICTURE, _PICTURE


def as_mask(mask) -> Mask | None:
    """Convert the argument `mask=` (None, one of our masks, or any callable) to a mask or None.

    Raises:
      TypeError: anything else; the message offers `masks.dense` for an array and `score=` for a score.
    """
    if mask is None or isinstance(mask, Mask):
        return mask
    if isinstance(mask, Mod):
        raise TypeError(f"{checks.describe(mask)} is a score: give it as score=, not as mask=")
    checks.check_function("mask", "(i, j) -> bool", mask)
    return function(mask)


def evaluate(mask: Mask, i: Int[Array, "T 1"], j: Int[Array, "1 S"]) -> Bool[Array, "_ _"]:
    """Evaluate a mask on a tile, as an array of two axes that broadcasts to the tile.

    Raises:
      TypeError: the mask returns anything but bools.
      ValueError: the result does not broadcast to the tile.
    """
    return mods.as_tile("mask", mask, evaluate_bools(mask, i, j), i, j)


def _bounds(mask, rows, columns):
    return as_mask(mask).bounds(rows, columns)  # after `unwrap_per_head` a user's callable is not a Mask


def evaluate_bools(mask, i, j):
    """Evaluate a mask and check that it returns bools.

    Raises:
      TypeError: it returns anything else.
    """
    visible = mods.returned("mask", mask, i, j)
    if jnp.result_type(visible) != jnp.bool_:
        raise TypeError(
            f"mask {checks.describe(mask)} must return bool (True = may attend), got {jnp.result_type(visible)}: "
            "additive values belong in score="
        )
    return visible


@register
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class function(Mask):
    """A plain function or another callable pytree as a mask."""

    call: Callable

    def __call__(self, i, j):
        return self.call(i, j)

    def expression(self) -> str:
        return checks.describe(self.call)


@register
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class both(Mask):
    """Allows a pair if both masks allow it; written `left & right`."""

    left: Callable
    right: Callable

    def __call__(self, i: Index, j: Index):
        return evaluate_bools(self.left, i, j) & evaluate_bools(self.right, i, j)

    def bounds(self, rows, columns):
        (some, every), (also_some, also_every) = _bounds(self.left, rows, columns), _bounds(self.right, rows, columns)
        return some & also_some, every & also_every

    def expression(self) -> str:
        return f"({checks.describe(self.left)} & {checks.describe(self.right)})"


@register
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class either(Mask):
    """Allows a pair if at least one of the masks allows it; written `left | right`."""

    left: Callable
    right: Callable

    def __call__(self, i: Index, j: Index):
        return evaluate_bools(self.left, i, j) | evaluate_bools(self.right, i, j)

    def bounds(self, rows, columns):
        (some, every), (also_some, also_every) = _bounds(self.left, rows, columns), _bounds(self.right, rows, columns)
        return some | also_some, every | also_every

    def expression(self) -> str:
        return f"({checks.describe(self.left)} | {checks.describe(self.right)})"


@register
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class negation(Mask):
    """Allows a pair if the mask forbids it; written `~mask`."""

    mask: Callable

    def __call__(self, i: Index, j: Index):
        return jnp.logical_not(evaluate_bools(self.mask, i, j))

    def bounds(self, rows, columns):
        some, every = _bounds(self.mask, rows, columns)
        return every ^ True, some ^ True  # Python's ~True is -2

    def expression(self) -> str:
        return f"~{checks.describe(self.mask)}"


@register
class PerHeadMask(PerHead, Mask):
    """A mask marked by `attn.per_head`."""
