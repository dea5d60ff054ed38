"""Scores: functions `(s, i, j) -> s` that change the scaled score of query position i and key position j.

Any callable will do. Those here are pytrees besides (see `mods`) and chain in the order applied:

    alibi(slope) >> softcap(30.0)        relative_bias(table) >> (lambda s, i, j: s * temperature)

A score of -inf counts as masked. They are classes used as functions, hence their lower-case names.
"""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from attn.functional import closures, dtypes, mods
from attn.functional.dtypes import Integer, Real
from attn.functional.masks import Positions
from attn.functional.mods import Mod, PerHead, register


class Score(Mod):
    """Base of the scores: chaining with `>>`."""

    def __rshift__(self, other):
        return NotImplemented if other is None else chain(self, as_score(other))

    def __rrshift__(self, other):
        return NotImplemented if other is None else chain(as_score(other), self)


def as_score(score) -> Score | None:
    """Take what was given for `score=`: None, one of ours, or any callable.

    Raises:
      TypeError: anything else; an array is pointed to `scores.dense`, a mask to `mask=`.
    """
    if score is None or isinstance(score, Score):
        return score
    if isinstance(score, Mod):
        raise TypeError(f"{mods.describe(score)} is a mask: give it as mask=, not as score=")
    mods.check_function("score", "(s, i, j) -> s", score)
    return function(score)


def evaluate(score: Score, s: Float[Array, "T S"], i, j) -> Float[Array, "T S"]:
    """The score on a tile, in the dtype of `s`.

    Raises:
      TypeError: the score returns anything but real floats.
      ValueError: what it returns does not broadcast to the tile.
    """

    def changed(s, i, j):
        value = mods.returned("score", score, s, i, j)
        if not jnp.issubdtype(jnp.result_type(value), jnp.floating):
            raise TypeError(f"score {mods.describe(score)} must return real floats, got {jnp.result_type(value)}")
        return jnp.broadcast_to(mods.as_tile("score", score, value, i, j), s.shape).astype(s.dtype)

    return closures.call(changed, s, i, j) if mods.holds_function(score) else changed(s, i, j)


@register
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class function(Score):
    """A plain function or another callable pytree as a score."""

    call: Callable

    def __call__(self, s, i, j):
        return self.call(s, i, j)

    def expression(self) -> str:
        return mods.describe(self.call)


@register
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class chain(Score):
    """One score after another; written `first >> second`."""

    first: Callable
    second: Callable

    def __call__(self, s: Array, i: Positions, j: Positions):
        return self.second(self.first(s, i, j), i, j)

    def expression(self) -> str:
        return f"({mods.describe(self.first)} >> {mods.describe(self.second)})"


@register
class PerHeadScore(PerHead, Score):
    """A score marked by `attn.per_head`."""


@register
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class softcap(Score):
    """Bound the scores smoothly: cap tanh(s / cap). It bounds -inf as well: hide keys after it, or by a mask.

    Args:
      cap: positive scalar, may be traced.

    Raises:
      ValueError: a number that is not positive and finite.

    Source: Gemma Team 2024 (Gemma 2), section 2.
    """

    cap: Real

    def __post_init__(self):
        mods.check_real("softcap: cap", self.cap)
        object.__setattr__(self, "cap", dtypes.as_real(self.cap))
        known = dtypes.known(self.cap)
        if known is not None and not ((known > 0) & (known < np.inf)).all():
            raise ValueError(f"softcap: cap must be positive and finite, got {self.cap}")

    def _at(self, T, S):
        mods.check_scalar("softcap: cap", self.cap)
        return self

    def __call__(self, s: Array, i: Positions, j: Positions):
        cap = jnp.asarray(self.cap, jnp.result_type(s))
        return cap * jnp.tanh(s / cap)


@register
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class alibi(Score):
    """Attention with linear biases: s - slope |i + offset - j|.

    Args:
      slope: scalar, may be traced; one a head by `per_head(alibi(positions.alibi_slopes(N)))`.
      offset: position of query 0 among the keys. Unset: 0 where T = S, else an error.

    Source: Press et al. 2022, section 3 (the distance taken absolutely, so that it serves encoders too).
    """

    slope: Real
    offset: Integer | None = None

    def __post_init__(self):
        mods.check_real("alibi: slope", self.slope)
        object.__setattr__(self, "slope", dtypes.as_real(self.slope))
        mods.check_integer_or_none("alibi: offset", self.offset)
        _check_reach("alibi", self.offset)

    def _at(self, T, S):
        mods.check_scalar("alibi: slope", self.slope)
        return dataclasses.replace(self, offset=mods.resolve_offset("alibi", self.offset, T, S))

    def __call__(self, s: Array, i: Positions, j: Positions):
        distance = jnp.abs(mods.place(i, self.offset) - j)
        return s - jnp.asarray(self.slope, s.dtype) * jnp.asarray(distance, s.dtype)


@register
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class relative_bias(Score):
    """One learned bias a distance: s + table[j - (i + offset) + T - 1].

    Args:
      table: `[R]` floats. T queries over S keys read the entries -offset .. S + T - 2 - offset, so a table of
        T + S - 1 entries serves offset 0.
      offset: position of query 0 among the keys, 0 or negative: a positive one reads before the table, which is an
        error where it is known and NaN where it is traced. Unset: 0 where T = S, else an error.
      num_queries: T. The attention functions fill it in; by hand, unset puts distance 0 in the table's middle.

    Raises:
      ValueError: in the attention functions, where a distance would fall outside the table.

    Source: Shaw et al. 2018, section 3.2, with scalars for vectors as in Raffel et al. 2020, section 2.1.
    """

    table: Float[Array | np.ndarray, "*heads R"]
    offset: Integer | None = None
    num_queries: int | None = None

    def __post_init__(self):
        mods.check_array("relative_bias: table", self.table, jnp.floating)
        mods.check_integer_or_none("relative_bias: offset", self.offset)
        _check_reach("relative_bias", self.offset)

    def _at(self, T, S):
        if len(self.table.shape) != 1:
            raise ValueError(f"relative_bias: table must have one axis here, got {tuple(self.table.shape)}")
        offset = mods.resolve_offset("relative_bias", self.offset, T, S)
        if (known := dtypes.known(offset)) is not None:
            first, last = -int(known), S + T - 2 - int(known)
            if not 0 <= first <= last < self.table.shape[0]:
                raise ValueError(
                    f"relative_bias: T = {T} queries and S = {S} keys with offset {known} read the entries {first} "
                    f"to {last} of a table of {self.table.shape[0]}"
                )
        return dataclasses.replace(self, offset=offset, num_queries=T)

    def __call__(self, s: Array, i: Positions, j: Positions):
        zero = (self.table.shape[-1] - 1) // 2 if self.num_queries is None else self.num_queries - 1
        entry = j - mods.place(i, self.offset) + zero
        # A distance outside the table, by a traced offset, shows as NaN and not as some other distance's bias.
        bias = jnp.asarray(self.table).at[entry].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
        return s + bias.astype(s.dtype)


@register
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class dense(Score):
    """A given array: s + bias[i, j].

    Args:
      bias: `[T S]` floats; -inf masks.
    """

    bias: Float[Array | np.ndarray, "*heads T S"]

    def __post_init__(self):
        mods.check_array("scores.dense", self.bias, jnp.floating)

    def _at(self, T, S):
        mods.check_shape("scores.dense", self.bias, (T, S))
        return self

    def __call__(self, s: Array, i: Positions, j: Positions):
        return s + jnp.asarray(self.bias)[i, j].astype(s.dtype)


def _check_reach(name: str, offset):
    """Check an offset that is known: distances from it must fit into 32 bits.

    Raises:
      ValueError: it is farther than any position.
    """
    known = dtypes.known(offset)
    if known is not None and (known != np.asarray(dtypes.clamped(offset))).any():
        raise ValueError(f"{name}: offset must lie within 2^30 of 0, got {offset}")
