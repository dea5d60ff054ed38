"""Masks: functions `(i, j) -> bool` of query and key positions; True means that query i may attend to key j.

Any callable will do. Those here are pytrees besides (see `mods`), know how to place queries among keys
(`offset`), show themselves as a small matrix, and combine with each other and with plain functions:

    causal() & padding(length)        sliding_window(4, 0) | (lambda i, j: j == 0)        ~causal()

They are classes used as functions, hence their lower-case names.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int
from jaxtyping import Integer as Integers

from attn.functional import dtypes, mods
from attn.functional.dtypes import Integer
from attn.functional.mods import Mod, PerHead, register

Positions = Int[Array, "..."] | Int[np.ndarray, "..."] | int
Bounds = Bool[Array, "..."] | bool | np.bool_ | Bool[np.ndarray, "..."]
_PICTURE = 8  # rows and columns of the matrix in a repr


class Mask(Mod):
    """Base of the masks: combination with `&`, `|`, `~`, bounds of blocks, and a picture as `repr`."""

    # NumPy would otherwise take `array & mask` apart element by element.
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

    def bounds(self, rows: Int[np.ndarray, "q r"], columns: Int[np.ndarray, "k c"]) -> tuple[Bounds, Bounds]:
        """What a mask shows of each block of queries by each block of keys, without looking at every pair if it can.

        Args:
          rows: `[q r]`, the positions in each of q blocks of queries, ascending.
          columns: `[k c]`, those in each of k blocks of keys.

        Returns:
          (some, every): bools that broadcast to `[q k]`. Whether some pair of the block is visible, True where that is
          not known; and whether every pair is, False where that is not known.
        """

        def block(row, column):
            visible = evaluate(self, row[:, None], column[None, :])
            return visible.any(), visible.all()

        rows, columns = jnp.asarray(rows), jnp.asarray(columns)
        return jax.lax.map(lambda row: jax.lax.map(lambda column: block(row, column), columns), rows)

    def __repr__(self) -> str:
        """The expression, and below it rows of queries by columns of keys: ■ may attend, · may not."""
        if any(isinstance(leaf, (jax.core.Tracer, PerHead)) for leaf in mods.parts(self)):
            return self.expression()
        try:
            T, S = self._picture_shape()
            i, j = jnp.arange(min(T, _PICTURE))[:, None], jnp.arange(min(S, _PICTURE))[None, :]
            visible = np.broadcast_to(self.at(T, S)(i, j), (i.shape[0], j.shape[1]))
        except Exception:  # a repr must not fail: a user's function may, on positions it was not made for
            return self.expression()
        return "\n".join([self.expression(), *(" ".join("■" if v else "·" for v in row) for row in visible)])

    def _picture_shape(self) -> tuple[int, int]:
        """The (T, S) that this mask was made for, where its arrays say so."""
        for field in dataclasses.fields(self):
            if isinstance(value := getattr(self, field.name), Mask):
                shape = value._picture_shape()
                if shape != (_PICTURE, _PICTURE):
                    return shape
        return _PICTURE, _PICTURE


def as_mask(mask) -> Mask | None:
    """Take what was given for `mask=`: None, one of ours, or any callable.

    Raises:
      TypeError: anything else; an array is pointed to `masks.dense`, a score to `score=`.
    """
    if mask is None or isinstance(mask, Mask):
        return mask
    if isinstance(mask, Mod):
        raise TypeError(f"{mods.describe(mask)} is a score: give it as score=, not as mask=")
    mods.check_function("mask", "(i, j) -> bool", mask)
    return function(mask)


def evaluate(mask: Mask, i: Int[Array, "T 1"], j: Int[Array, "1 S"]) -> Bool[Array, "_ _"]:
    """The mask on a tile, as an array of two axes that broadcasts to the tile.

    Raises:
      TypeError: the mask returns anything but bools.
      ValueError: what it returns does not broadcast to the tile.
    """
    return mods.as_tile("mask", mask, _bools(mask, i, j), i, j)


def over_blocks(reduce: Callable, array: Bool[Array, "T_or_1 S_or_1"], rows, columns) -> Bool[Array, "q_or_1 k_or_1"]:
    """`jnp.any` or `jnp.all` over each block of queries by each block of keys; an axis of length 1 stays."""
    if array.shape[0] > 1:
        array = reduce(array[rows], axis=1)
    return reduce(array[:, columns], axis=2) if array.shape[1] > 1 else array


def _bounds(mask, rows, columns):
    return as_mask(mask).bounds(rows, columns)


def _ends(rows, columns):
    """First and last position of each block, to be broadcast: those of queries `[q 1]`, those of keys `[1 k]`."""
    return rows[:, :1], rows[:, -1:], columns[None, :, 0], columns[None, :, -1]


def _bools(mask, i, j):
    """What a mask returns, which must be bool.

    Raises:
      TypeError: it is not.
    """
    visible = mods.returned("mask", mask, i, j)
    if jnp.result_type(visible) != jnp.bool_:
        raise TypeError(
            f"mask {mods.describe(mask)} must return bool (True = may attend), got {jnp.result_type(visible)}: "
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
        return mods.describe(self.call)


@register
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class both(Mask):
    """Where both masks allow; written `left & right`."""

    left: Callable
    right: Callable

    def __call__(self, i: Positions, j: Positions):
        return _bools(self.left, i, j) & _bools(self.right, i, j)

    def bounds(self, rows, columns):
        (some, every), (also_some, also_every) = _bounds(self.left, rows, columns), _bounds(self.right, rows, columns)
        return some & also_some, every & also_every

    def expression(self) -> str:
        return f"({mods.describe(self.left)} & {mods.describe(self.right)})"


@register
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class either(Mask):
    """Where one of the masks allows; written `left | right`."""

    left: Callable
    right: Callable

    def __call__(self, i: Positions, j: Positions):
        return _bools(self.left, i, j) | _bools(self.right, i, j)

    def bounds(self, rows, columns):
        (some, every), (also_some, also_every) = _bounds(self.left, rows, columns), _bounds(self.right, rows, columns)
        return some | also_some, every | also_every

    def expression(self) -> str:
        return f"({mods.describe(self.left)} | {mods.describe(self.right)})"


@register
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class negation(Mask):
    """Where the mask forbids; written `~mask`."""

    mask: Callable

    def __call__(self, i: Positions, j: Positions):
        return jnp.logical_not(_bools(self.mask, i, j))

    def bounds(self, rows, columns):
        some, every = _bounds(self.mask, rows, columns)
        return every ^ True, some ^ True  # Python's ~True is -2

    def expression(self) -> str:
        return f"~{mods.describe(self.mask)}"


@register
class PerHeadMask(PerHead, Mask):
    """A mask marked by `attn.per_head`."""


@register
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class causal(Mask):
    """No query looks ahead: j <= i + offset.

    Args:
      offset: position of query 0 among the keys; integer, may be traced. Unset: 0 where T = S, else an error.

    Source: Vaswani et al. 2017, section 3.2.3.
    """

    offset: Integer | None = None

    def __post_init__(self):
        mods.check_integer_or_none("causal: offset", self.offset)
        dtypes.clamp_known(self, "offset")

    def _at(self, T, S):
        return causal(mods.resolve_offset("causal", self.offset, T, S))

    def __call__(self, i: Positions, j: Positions):
        return j - i <= (0 if self.offset is None else dtypes.clamped(self.offset))

    def bounds(self, rows, columns):
        first_i, last_i, first_j, last_j = _ends(rows, columns)
        return self(last_i, first_j), self(first_i, last_j)


@register
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class padding(Mask):
    """Only the first `length` keys hold something: j < length.

    Args:
      length: number of real keys; integer, may be traced.
    """

    length: Integer

    def __post_init__(self):
        mods.check_integer(f"{type(self).__name__}: length", self.length)
        dtypes.clamp_known(self, "length")

    def _at(self, T, S):
        mods.check_scalar(f"{type(self).__name__}: length", self.length)
        return self

    def __call__(self, i: Positions, j: Positions):
        return j < dtypes.clamped(self.length)

    def bounds(self, rows, columns):
        _, _, first_j, last_j = _ends(rows, columns)
        return self(0, first_j), self(0, last_j)


@register
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class prefix(padding):
    """Every query sees the first `length` keys: j < length. `causal() | prefix(n)` is a prefix-LM's mask.

    Args:
      length: number of keys in the prefix; integer, may be traced.

    Source: Raffel et al. 2020, section 3.2.1.
    """


@register
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class sliding_window(Mask):
    """Keys near the query: -left <= j - (i + offset) <= right.

    Args:
      left, right: how many keys before and after the query's own place; integers, may be traced.
      offset: position of query 0 among the keys. Unset: 0 where T = S, else an error.

    Source: Beltagy et al. 2020 (Longformer), section 3.1.
    """

    left: Integer
    right: Integer
    offset: Integer | None = None

    def __post_init__(self):
        for name in ("left", "right"):
            mods.check_integer(f"sliding_window: {name}", getattr(self, name))
        mods.check_integer_or_none("sliding_window: offset", self.offset)
        dtypes.clamp_known(self, "left", "right", "offset")

    def _at(self, T, S):
        for name in ("left", "right"):
            mods.check_scalar(f"sliding_window: {name}", getattr(self, name))
        return dataclasses.replace(self, offset=mods.resolve_offset("sliding_window", self.offset, T, S))

    def __call__(self, i: Positions, j: Positions):
        distance = j - mods.place(i, self.offset)
        return self._holds(distance, distance)

    def bounds(self, rows, columns):
        first_i, last_i, first_j, last_j = _ends(rows, columns)
        nearest, farthest = first_j - mods.place(last_i, self.offset), last_j - mods.place(first_i, self.offset)
        return self._holds(farthest, nearest), self._holds(nearest, farthest)

    def _holds(self, to_the_left, to_the_right):
        """Whether the one distance j - (i + offset) is at least -left, and the other at most right."""
        left, right = dtypes.clamped(self.left), dtypes.clamped(self.right)
        in_reach_left = (to_the_left >= -left) | (left >= dtypes.FAR)  # the clamp itself stands for any width
        return in_reach_left & ((to_the_right <= right) | (right >= dtypes.FAR))


@register
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class segments(Mask):
    """Packed documents: query i sees key j where query_ids[i] == key_ids[j].

    Args:
      query_ids: `[T]` integers.
      key_ids: `[S]` integers.

    Source: Raffel et al. 2020, section 2.1 (packing); Krell et al. 2021.
    """

    query_ids: Integers[Array | np.ndarray, "*heads T"]
    key_ids: Integers[Array | np.ndarray, "*heads S"]

    def __post_init__(self):
        for name in ("query_ids", "key_ids"):
            mods.check_array(f"segments: {name}", getattr(self, name), jnp.integer)
        for name, ids in zip(("query_ids", "key_ids"), dtypes.in_32_bits(self.query_ids, self.key_ids)):
            object.__setattr__(self, name, ids)

    def _at(self, T, S):
        mods.check_shape("segments: query_ids", self.query_ids, (T,))
        mods.check_shape("segments: key_ids", self.key_ids, (S,))
        return self

    def __call__(self, i: Positions, j: Positions):
        query_ids, key_ids = dtypes.comparable(self.query_ids, self.key_ids)
        return query_ids[i] == key_ids[j]

    def bounds(self, rows, columns):
        query_ids, key_ids = dtypes.comparable(self.query_ids, self.key_ids)
        queries, keys = query_ids[rows], key_ids[columns]
        low, high = queries.min(axis=1)[:, None], queries.max(axis=1)[:, None]
        least, most = keys.min(axis=1)[None, :], keys.max(axis=1)[None, :]
        return (low <= most) & (least <= high), (low == most) & (least == high)

    def _picture_shape(self):
        return self.query_ids.shape[0], self.key_ids.shape[0]


@register
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class dense(Mask):
    """A given array: query i sees key j where array[i, j].

    Args:
      array: `[T S]` bools.

    Raises:
      TypeError: not an array of bools.
    """

    array: Bool[Array | np.ndarray, "*heads T S"]

    def __post_init__(self):
        mods.check_array("masks.dense", self.array, jnp.bool_)

    def _at(self, T, S):
        mods.check_shape("masks.dense", self.array, (T, S))
        return self

    def __call__(self, i: Positions, j: Positions):
        return jnp.asarray(self.array)[i, j]

    def bounds(self, rows, columns):
        return tuple(over_blocks(reduce, jnp.asarray(self.array), rows, columns) for reduce in (jnp.any, jnp.all))

    def _picture_shape(self):
        return self.array.shape
