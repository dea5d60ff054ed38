"""Masks: functions `(i, j) -> bool` of query and key positions; True means that query i may attend to key j.

Any callable works. The masks here are also pytrees (see `mods`). Those that depend on distance have an `offset`, the
position of query 0 among the keys. They print as a small matrix, and combine with each other and with plain functions
(see `mask_algebra`):

    causal() & padding(length)        sliding_window(4, 0) | (lambda i, j: j == 0)        ~causal()

They are classes used as functions, so their names are lower-case.
"""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool
from jaxtyping import Integer as Integers

from attn.functional import checks, dtypes, mods
from attn.functional.dtypes import Integer
from attn.functional.mask_algebra import Index, Mask, as_mask, evaluate_bools
from attn.functional.mask_algebra import PerHeadMask as PerHeadMask
from attn.functional.mask_algebra import both as both
from attn.functional.mask_algebra import either as either
from attn.functional.mask_algebra import evaluate as evaluate
from attn.functional.mask_algebra import function as function
from attn.functional.mask_algebra import negation as negation
from attn.functional.mods import Placed, register


def over_blocks(reduce: Callable, array: Bool[Array, "T_or_1 S_or_1"], rows, columns) -> Bool[Array, "q_or_1 k_or_1"]:
    """Reduce by `jnp.any` or `jnp.all` over each block of queries by keys; an axis of length 1 stays."""
    if array.shape[0] > 1:
        array = reduce(array[rows], axis=1)
    return reduce(array[:, columns], axis=2) if array.shape[1] > 1 else array


def _first_and_last(rows, columns):
    """Return the first and last position of each block of queries, `[q 1]`, and of each block of keys, `[1 k]`."""
    return rows[:, :1], rows[:, -1:], columns[None, :, 0], columns[None, :, -1]


@register
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class causal(Mask):
    """Allows each query the keys up to its own position: j <= i + offset.

    Args:
      offset: position of query 0 among the keys; integer, may be traced. Unset: 0 where T = S, else an error.

    Source: Vaswani et al. 2017, section 3.2.3.
    """

    offset: Integer | None = None

    def __post_init__(self):
        checks.check_integer_or_none("causal: offset", self.offset)
        dtypes.clamp_known(self, "offset")

    def _resolve(self, T, S):
        return causal(mods.resolve_offset("causal", self.offset, T, S))

    def __call__(self, i: Index, j: Index):
        return j - i <= (0 if self.offset is None else dtypes.clamped(self.offset))

    def bounds(self, rows, columns):
        first_i, last_i, first_j, last_j = _first_and_last(rows, columns)
        return self(last_i, first_j), self(first_i, last_j)


@register
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class padding(Mask):
    """Allows the first `length` keys; the others are padding: j < length.

    Args:
      length: number of real keys; integer, may be traced.
    """

    length: Integer

    def __post_init__(self):
        checks.check_integer(f"{type(self).__name__}: length", self.length)
        dtypes.clamp_known(self, "length")

    def _resolve(self, T, S):
        checks.check_scalar(f"{type(self).__name__}: length", self.length)
        return self

    def __call__(self, i: Index, j: Index):
        return j < dtypes.clamped(self.length)

    def bounds(self, rows, columns):
        _, _, first_j, last_j = _first_and_last(rows, columns)
        return self(0, first_j), self(0, last_j)


@register
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class prefix(padding):
    """Allows every query the first `length` keys: j < length. `causal() | prefix(n)` is a prefix-LM's mask.

    Args:
      length: number of keys in the prefix; integer, may be traced.

    Source: Raffel et al. 2020, section 3.2.1.
    """


@register
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class sliding_window(Mask):
    """Allows keys near the query: -left <= j - (i + offset) <= right.

    Args:
      left, right: number of keys before and after the query's position; integers, may be traced.
      offset: position of query 0 among the keys. Unset: 0 where T = S, else an error.

    Source: Beltagy et al. 2020 (Longformer), section 3.1.
    """

    left: Integer
    right: Integer
    offset: Integer | None = None

    def __post_init__(self):
        for name in ("left", "right"):
            checks.check_integer(f"sliding_window: {name}", getattr(self, name))
        checks.check_integer_or_none("sliding_window: offset", self.offset)
        dtypes.clamp_known(self, "left", "right", "offset")

    def _resolve(self, T, S):
        for name in ("left", "right"):
            checks.check_scalar(f"sliding_window: {name}", getattr(self, name))
        return dataclasses.replace(self, offset=mods.resolve_offset("sliding_window", self.offset, T, S))

    def __call__(self, i: Index, j: Index):
        distance = j - mods.shift(i, self.offset)
        return self._is_within(distance, distance)

    def bounds(self, rows, columns):
        first_i, last_i, first_j, last_j = _first_and_last(rows, columns)
        nearest, farthest = first_j - mods.shift(last_i, self.offset), last_j - mods.shift(first_i, self.offset)
        return self._is_within(farthest, nearest), self._is_within(nearest, farthest)

    def _is_within(self, distance_left, distance_right):
        """Return True if the first distance j - (i + offset) is at least -left and the second at most right."""
        left, right = dtypes.clamped(self.left), dtypes.clamped(self.right)
        is_within_left = (distance_left >= -left) | (left >= dtypes.FAR)  # a width of FAR is unlimited
        return is_within_left & ((distance_right <= right) | (right >= dtypes.FAR))


@register
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class segments(Mask):
    """Allows keys of the same document, where several are packed into one row: query_ids[i] == key_ids[j].

    Args:
      query_ids: `[T]` integers.
      key_ids: `[S]` integers.

    Source: Raffel et al. 2020, section 2.1 (packing); Krell et al. 2021.
    """

    query_ids: Integers[Array | np.ndarray, "*heads T"]
    key_ids: Integers[Array | np.ndarray, "*heads S"]

    def __post_init__(self):
        for name in ("query_ids", "key_ids"):
            checks.check_array(f"segments: {name}", getattr(self, name), jnp.integer)
        for name, ids in zip(("query_ids", "key_ids"), dtypes.in_32_bits(self.query_ids, self.key_ids)):
            object.__setattr__(self, name, ids)

    def _resolve(self, T, S):
        checks.check_shape("segments: query_ids", self.query_ids, (T,))
        checks.check_shape("segments: key_ids", self.key_ids, (S,))
        return self

    def __call__(self, i: Index, j: Index):
        query_ids, key_ids = dtypes.comparable(self.query_ids, self.key_ids)
        return query_ids[i] == key_ids[j]

    def extent(self) -> tuple[int, int]:
        return self.query_ids.shape[-1], self.key_ids.shape[-1]

    def bounds(self, rows, columns):
        query_ids, key_ids = dtypes.comparable(self.query_ids, self.key_ids)
        queries, keys = query_ids[rows], key_ids[columns]
        low, high = queries.min(axis=1)[:, None], queries.max(axis=1)[:, None]
        key_low, key_high = keys.min(axis=1)[None, :], keys.max(axis=1)[None, :]
        # Every pair is equal if all ids of both blocks are the same.
        return (low <= key_high) & (key_low <= high), (low == key_high) & (key_low == high)

    def _picture_shape(self):
        return self.query_ids.shape[0], self.key_ids.shape[0]


@register
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class dense(Mask):
    """Allows query i to attend to key j if array[i, j].

    Args:
      array: `[T S]` bools.

    Raises:
      TypeError: not an array of bools.
    """

    array: Bool[Array | np.ndarray, "*heads T S"]

    def __post_init__(self):
        checks.check_array("masks.dense", self.array, jnp.bool_)

    def _resolve(self, T, S):
        checks.check_shape("masks.dense", self.array, (T, S))
        return self

    def __call__(self, i: Index, j: Index):
        return jnp.asarray(self.array)[i, j]

    def extent(self) -> tuple[int, int]:
        return self.array.shape[-2:]

    def bounds(self, rows, columns):
        return tuple(over_blocks(reduce, jnp.asarray(self.array), rows, columns) for reduce in (jnp.any, jnp.all))

    def _picture_shape(self):
        return self.array.shape


@register
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class placed(Placed, Mask):
    """Evaluates a mask at absolute positions: mask(query_positions of row i, key_positions of row j).

    The inner mask is given positions, not row numbers. Its unset offsets mean 0. Its bounds are used, so blocks are
    still skipped. With the Python int 0 as both offsets and T = S, it resolves to the inner mask itself.

    Args:
      mod: the mask, of absolute positions.
      query_positions: an integer offset, position = i + offset, which may be traced; or ascending integers `[T]`.
      key_positions: the same for the keys, `[S]`.

    Raises:
      TypeError: positions that are not integers.
      ValueError: in the attention functions: positions whose length is not that of the queries or keys.
    """

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "mod", as_mask(self.mod))

    def resolve(self, T: int, S: int) -> Mask:
        # Unwrapped, since implementations recognise some masks by their class; arrays may hold more positions than T.
        is_identity = (
            T == S
            and self.mod.extent() == (dtypes.FAR, dtypes.FAR)
            and all(isinstance(x, int) and x == 0 for x in (self.query_positions, self.key_positions))
        )
        return self.mod.resolve(T, S) if is_identity else super().resolve(T, S)

    def __call__(self, i: Index, j: Index):
        i, j = self.positions(i, j)
        visible, in_range = evaluate_bools(self.mod, i, j), self.in_range(i, j)
        return visible if in_range is None else visible & in_range

    def bounds(self, rows, columns):
        rows, columns = self.positions(rows, columns)
        some, every = self.mod.bounds(rows, columns)
        first_i, last_i, first_j, last_j = _first_and_last(rows, columns)
        in_range = self.in_range(first_i, first_j)
        return some, every if in_range is None else every & in_range & self.in_range(last_i, last_j)

    def _picture_shape(self):
        return tuple(
            positions.shape[0] if getattr(positions, "shape", ()) else default
            for positions, default in zip((self.query_positions, self.key_positions), super()._picture_shape())
        )
