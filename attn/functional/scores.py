"""Scores: functions `(s, i, j) -> s` that change the scaled score of query position i and key position j.

Any callable works. The scores here are also pytrees (see `mods`) and chain in the order in which they are applied:

    alibi(slope) >> softcap(30.0)        relative_bias(table) >> (lambda s, i, j: s * temperature)

A score of -inf counts as masked. The scores are classes used as functions, so their names are lower-case.
"""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from attn.functional import checks, closures, dtypes, mods
from attn.functional.dtypes import Integer, Real
from attn.functional.mask_algebra import Index
from attn.functional.mods import Mod, PerHead, Placed, register


class Score(Mod):
    """Base class of scores: chaining with `>>`."""

    def __rshift__(self, other):
        return NotImplemented if other is None else chain(self, as_score(other))

    def __rrshift__(self, other):
        return NotImplemented if other is None else chain(as_score(other), self)


def as_score(score) -> Score | None:
    """Convert the argument `score=` (None, one of our scores, or any callable) to a score or None.

    Raises:
      TypeError: anything else; the message offers `scores.dense` for an array and `mask=` for a mask.
    """
    if score is None or isinstance(score, Score):
        return score
    if isinstance(score, Mod):
        raise TypeError(f"{checks.describe(score)} is a mask: give it as mask=, not as score=")
    checks.check_function("score", "(s, i, j) -> s", score)
    return function(score)


def evaluate(score: Score, s: Float[Array, "T S"], i, j) -> Float[Array, "T S"]:
    """Evaluate a score on a tile, in the dtype of `s`.

    Raises:
      TypeError: the score returns anything but real floats.
      ValueError: the result does not broadcast to the tile.
    """

    def changed(s, i, j):
        value = mods.returned("score", score, s, i, j)
        if not jnp.issubdtype(jnp.result_type(value), jnp.floating):
            raise TypeError(f"score {checks.describe(score)} must return real floats, got {jnp.result_type(value)}")
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
        return checks.describe(self.call)


@register
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class chain(Score):
    """Applies one score after another; written `first >> second`."""

    first: Callable
    second: Callable

    def __call__(self, s: Array, i: Index, j: Index):
        return self.second(self.first(s, i, j), i, j)

    def expression(self) -> str:
        return f"({checks.describe(self.first)} >> {checks.describe(self.second)})"


@register
class PerHeadScore(PerHead, Score):
    """A score marked by `attn.per_head`."""


@register
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class softcap(Score):
    """Bounds the scores smoothly: cap tanh(s / cap). It also bounds -inf: mask keys after it, or by `mask=`.

    Args:
      cap: positive scalar, may be traced.

    Raises:
      ValueError: a number that is not positive and finite.

    Source: Gemma Team 2024 (Gemma 2), section 2.
    """

    cap: Real

    def __post_init__(self):
        checks.check_real("softcap: cap", self.cap)
        object.__setattr__(self, "cap", dtypes.as_real(self.cap))
        known = dtypes.known(self.cap)
        if known is not None and not ((known > 0) & (known < np.inf)).all():
            raise ValueError(f"softcap: cap must be positive and finite, got {self.cap}")

    def _resolve(self, T, S):
        checks.check_scalar("softcap: cap", self.cap)
        return self

    def __call__(self, s: Array, i: Index, j: Index):
        cap = jnp.asarray(self.cap, jnp.result_type(s))
        return cap * jnp.tanh(s / cap)


@register
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class alibi(Score):
    """Subtracts a linear function of the distance (ALiBi): s - slope |i + offset - j|.

    Args:
      slope: scalar, may be traced; one per head by `per_head(alibi(positions.alibi_slopes(N)))`.
      offset: position of query 0 among the keys. Unset: 0 where T = S, else an error.

    Source: Press et al. 2022, section 3 (with the absolute distance, so that it also serves encoders).
    """

    slope: Real
    offset: Integer | None = None

    def __post_init__(self):
        checks.check_real("alibi: slope", self.slope)
        object.__setattr__(self, "slope", dtypes.as_real(self.slope))
        checks.check_integer_or_none("alibi: offset", self.offset)
        _check_offset_range("alibi", self.offset)

    def _resolve(self, T, S):
        checks.check_scalar("alibi: slope", self.slope)
        return dataclasses.replace(self, offset=mods.resolve_offset("alibi", self.offset, T, S))

    def __call__(self, s: Array, i: Index, j: Index):
        distance = jnp.abs(mods.shift(i, self.offset) - j)
        return s - jnp.asarray(self.slope, s.dtype) * jnp.asarray(distance, s.dtype)


@register
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class relative_bias(Score):
    """Adds one learned bias per distance: s + table[j - (i + offset) + T - 1].

    Args:
      table: `[P]` floats. T queries over S keys read the entries -offset .. S + T - 2 - offset, so a table of
        T + S - 1 entries serves offset 0.
      offset: position of query 0 among the keys, 0 or negative. A positive offset reads before the table: an error if
        it is known, NaN if it is traced. Unset: 0 where T = S, else an error.
      num_queries: T, filled in by the attention functions. Unset (in direct calls and inside `placed`), distance 0 is
        the table's middle entry.

    Raises:
      ValueError: in the attention functions: a distance outside the table.

    Source: Shaw et al. 2018, section 3.2, with scalars for vectors as in Raffel et al. 2020, section 2.1.
    """

    table: Float[Array | np.ndarray, "*heads P"]
    offset: Integer | None = None
    num_queries: int | None = None

    def __post_init__(self):
        checks.check_array("relative_bias: table", self.table, jnp.floating)
        checks.check_integer_or_none("relative_bias: offset", self.offset)
        _check_offset_range("relative_bias", self.offset)

    def _resolve(self, T, S):
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

    def __call__(self, s: Array, i: Index, j: Index):
        zero = (self.table.shape[-1] - 1) // 2 if self.num_queries is None else self.num_queries - 1
        entry = j - mods.shift(i, self.offset) + zero
        # With a traced offset a distance outside the table gives NaN, not the bias of another distance.
        bias = jnp.asarray(self.table).at[entry].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
        return s + bias.astype(s.dtype)


@register
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class dense(Score):
    """Adds an array: s + bias[i, j].

    Args:
      bias: `[T S]` floats; -inf masks.
    """

    bias: Float[Array | np.ndarray, "*heads T S"]

    def __post_init__(self):
        checks.check_array("scores.dense", self.bias, jnp.floating)

    def _resolve(self, T, S):
        checks.check_shape("scores.dense", self.bias, (T, S))
        return self

    def __call__(self, s: Array, i: Index, j: Index):
        return s + jnp.asarray(self.bias)[i, j].astype(s.dtype)

    def extent(self) -> tuple[int, int]:
        return self.bias.shape[-2:]


@register
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class placed(Placed, Score):
    """Evaluates a score at absolute positions: score(s, query_positions of row i, key_positions of row j).

    Args:
      mod: the score, of absolute positions; its unset offsets mean 0.
      query_positions: an integer offset, position = i + offset, which may be traced; or ascending integers `[T]`.
      key_positions: the same for the keys, `[S]`.

    Raises:
      TypeError: positions that are not integers.
      ValueError: in the attention functions: positions whose length is not that of the queries or keys.
    """

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "mod", as_score(self.mod))

    def __call__(self, s: Array, i: Index, j: Index):
        i, j = self.positions(i, j)
        changed, in_range = self.mod(s, i, j), self.in_range(i, j)
        return changed if in_range is None else jnp.where(in_range, changed, jnp.nan)


@register
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class from_vectors(Score):
    """A score made by make(query, key) from the queries and keys of its head, once per head, before any tile.

    The score that `make` returns captures what `make` has computed, such as one product per query and distance:

        def make(table, query, key):
            products = query @ table.T / query.shape[-1] ** 0.5          # [T P]
            return lambda s, i, j: s + products[i, jnp.clip(j - i, -C, C) + C]

        score = from_vectors(jax.tree_util.Partial(make, table))

    Args:
      make: function of one head's query `[T H]` and key `[S H]`, not scaled, that returns a score, or None for no
        change. Its array leaves, such as those of `jax.tree_util.Partial`, may be marked by `attn.per_head`.

    Raises:
      TypeError: `make` is not a function, or does not return a score.

    Source: the use of vectors: Shaw et al. 2018, section 3.2; Dai et al. 2019, section 3.3.
    """

    make: Callable

    def __post_init__(self):
        checks.check_function("score", "(query, key) -> score", self.make)

    def __call__(self, s, i, j):
        raise TypeError(f"{self.expression()} is made from queries and keys: give it to an attention function")


def resolve_vectors(
    score: Score | Callable | None, query: Float[Array, "T H"], key: Float[Array, "S H"]
) -> Score | Callable | None:
    """Replace every `from_vectors` in a score, at any depth, by the score that it makes for one head.

    Returns:
      A score, or None if every part of it is None.
    """
    if isinstance(score, from_vectors):
        return resolve_vectors(dtypes.widened(as_score(score.make(query, key))), query, key)
    if isinstance(score, chain):
        first, second = (resolve_vectors(part, query, key) for part in (score.first, score.second))
        if first is None or second is None:
            return second if first is None else first
        return chain(first, second)
    if isinstance(score, placed):
        mod = resolve_vectors(score.mod, query, key)
        return None if mod is None else dataclasses.replace(score, mod=mod)
    return score


def _check_offset_range(name: str, offset):
    """Check that distances from an offset fit into 32 bits, if the offset is known.

    Raises:
      ValueError: it is beyond 2^30.
    """
    known = dtypes.known(offset)
    if known is not None and (known != np.asarray(dtypes.clamped(offset))).any():
        raise ValueError(f"{name}: offset must lie within 2^30 of 0, got {offset}")
