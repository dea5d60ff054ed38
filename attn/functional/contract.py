"""The contract around the equation: the arguments of an implementation, and edge cases handled once for all of them.

An implementation takes a `Call`. `prepare` converts the call of one head to a `Head`: finite queries and keys; mask,
score and dropout as functions of a tile (some queries by some keys) that are defined everywhere.
"""

import functools
import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num

from attn.functional import dtypes, masks, scores
from attn.functional.dropout import Dropout
from attn.functional.sharding import gathered


class Unsupported(NotImplementedError):
    """A named implementation cannot serve a call; the message names the feature and the implementations that can."""


class Call(NamedTuple):
    """The arguments of an attention function, checked.

    Attributes:
      query: `[T H]`, or `[T N H]` for all heads.
      key, value: `[S H]` and `[S Hv]`, or `[S K H]` and `[S K Hv]`.
      mask, score: `Mask` and `Score` or None, offsets resolved; for all heads, with the marks of `attn.per_head`.
      scale: factor of the products q . k; a Python number where known.
      dropout: dropout of the weights, or None.
    """

    query: Array
    key: Array
    value: Array
    mask: masks.Mask | None
    score: scores.Score | None
    scale: float | Num[Array, ""]
    dropout: Dropout | None = None

    @property
    def T(self) -> int:
        return self.query.shape[0]

    @property
    def S(self) -> int:
        return self.key.shape[0]


class Normalizer(NamedTuple):
    """The sum of exp(score) over the keys of each query, as total * exp(peak).

    They are kept apart: peak + log(total) would round log(total) away where the peak is large, and derivatives need
    the weights exp(score - peak) / total.

    Attributes:
      peak: the largest score; 0 where no key is visible.
      total: the sum of exp(score - peak); 0 where no key is visible.
    """

    peak: Float[Array, "*T"]
    total: Float[Array, "*T"]

    def inverse(self) -> Float[Array, "*T"]:
        """Return 1 / total, and 1 where no key is visible."""
        return 1 / jnp.where(self.total == 0, 1, self.total)

    def logsumexp(self) -> Float[Array, "*T"]:
        """Return log sum exp(score); -inf where no key is visible."""
        empty = self.total == 0
        return jnp.where(empty, -jnp.inf, self.peak + jnp.log(jnp.where(empty, 1, self.total)))


class Head(NamedTuple):
    """One head, prepared: arrays that are safe to multiply, and functions of a tile that are defined everywhere.

    Attributes:
      query, key: `[T H]` and `[S H]`, with 0 in rows that are not finite.
      value: `[S Hv]` in the dtype to sum in, float32 or wider.
      nonfinite_queries, nonfinite_keys: `[T]` and `[S]`, True for rows that held a NaN or an infinity.
      mask, score, scale, dropout: as in `Call`, the scale as an array in the dtype of the scores, float32 or wider.
    """

    query: Float[Array, "T H"]
    key: Float[Array, "S H"]
    value: Float[Array, "S Hv"]
    nonfinite_queries: Bool[Array, "T"]
    nonfinite_keys: Bool[Array, "S"]
    mask: masks.Mask | None
    score: scores.Score | None
    scale: Float[Array, ""]
    dropout: Dropout | None

    def apply_score(self, s: Float[Array, "r c"], i: Int[Array, "r 1"], j: Int[Array, "1 c"]) -> Float[Array, "r c"]:
        """Change the scaled products of a tile by the score function."""
        return s if self.score is None else scores.evaluate(self.score, s, i, j)

    def apply_mask(
        self, s: Float[Array, "T S"], i: Int[Array, "T 1"], j: Int[Array, "1 S"]
    ) -> tuple[Float[Array, "T S"], Bool[Array, "T S"] | None]:
        """Find the visible pairs of all queries and keys, and set to NaN those of rows that were not finite.

        Returns:
          (scores, visible pairs; None where all are visible).
        """
        visible = self.visible(s, i, j)
        nonfinite = self.nonfinite_queries[:, None] | self.nonfinite_keys[None, :]
        return jnp.where(nonfinite if visible is None else visible & nonfinite, jnp.nan, s), visible

    def visible(
        self,
        s: Float[Array, "r c"],
        i: Int[Array, "r 1"],
        j: Int[Array, "1 c"],
        is_key: Bool[Array, "1 c"] | None = None,
    ) -> Bool[Array, "r c"] | None:
        """Find the visible pairs of a tile; None where all are visible.

        Args:
          s: scores; -inf counts as masked.
          i, j: positions, in range.
          is_key: False in columns that are padding of the tile; None if there is no padding.
        """
        # Without a score, s is not read, so that under `vmap` a mask that heads share stays one array for all.
        parts = [] if self.score is None else [s != -jnp.inf]
        parts += [] if self.mask is None else [masks.evaluate(self.mask, i, j)]
        parts += [] if is_key is None else [is_key]
        return jnp.broadcast_to(functools.reduce(operator.and_, parts), (i.shape[0], j.shape[1])) if parts else None

    def apply_dropout(self, p: Float[Array, "r c"], i: Int[Array, "r 1"], j: Int[Array, "1 c"]) -> Float[Array, "r c"]:
        """Drop weights of a tile and rescale the others."""
        return p if self.dropout is None else self.dropout(p, i, j)

    def visible_values(self, visible: Bool[Array, "T S"] | None) -> Float[Array, "S Hv"]:
        """Return the values, with 0 for those that no query sees."""
        return zero_hidden_values(self.value, None if visible is None else visible.any(axis=0))


def resolve(call: Call) -> Call:
    """Complete a call of one head: make scores from vectors, fill in offsets, gather rows of an explicit mesh."""
    key, value = gathered(call.key), gathered(call.value)
    score = None if call.score is None else scores.resolve_vectors(call.score, gathered(call.query), key)
    return resolve_offsets(call._replace(key=key, value=value, score=score))


def resolve_offsets(call: Call) -> Call:
    """Fill in unset offsets and check shapes in masks and scores, except in those marked by `attn.per_head`.

    Raises:
      ValueError: an offset is unset although T != S, or an array does not fit T and S.
    """
    mask, score = (None if mod is None else mod.resolve(call.T, call.S) for mod in (call.mask, call.score))
    return call._replace(mask=mask, score=score)


def prepare(call: Call) -> Head:
    """Prepare the arrays of one head's call."""
    wide = dtypes.wide_dtype(call.query.dtype)
    (query, nonfinite_queries), (key, nonfinite_keys) = map(zero_nonfinite_rows, (call.query, call.key))
    value = call.value.astype(dtypes.wide_dtype(call.value.dtype, wide))
    scale = jnp.asarray(call.scale, wide)
    return Head(query, key, value, nonfinite_queries, nonfinite_keys, call.mask, call.score, scale, call.dropout)


def zero_nonfinite_rows(x: Float[Array, "*n width"]) -> tuple[Float[Array, "*n width"], Bool[Array, "*n"]]:
    """Replace rows that hold a NaN or an infinity by 0, and return a bool per row: True if replaced.

    0 * NaN is NaN, so a NaN in a masked key would contaminate every row. `Head.apply_mask` puts the NaN back for the
    queries that see it.
    """
    nonfinite = ~jnp.isfinite(x).all(axis=-1)
    return jnp.where(nonfinite[..., None], 0, x), nonfinite


def zero_hidden_values(
    value: Float[Array, "..."], seen: Bool[Array, "c"] | None, keys_axis: int = 0
) -> Float[Array, "..."]:
    """Replace the values that no query of a tile sees by 0: they may be NaN.

    `seen` does not depend on the values, so attention stays linear in them (`jax.linear_transpose`).

    Args:
      value: `[c Hv]`, or `[Hv c]` with `keys_axis=1`.
      seen: keys that some query of the tile sees; None for all.
      keys_axis: the axis of the keys.
    """
    return value if seen is None else jnp.where(jnp.expand_dims(seen, 1 - keys_axis), value, 0)


@jax.custom_jvp
def _softmax(s: Float[Array, "r c"], visible: Bool[Array, "r c"] | None) -> tuple[Float[Array, "r c"], Normalizer]:
    """Compute the softmax of each row over its visible keys, and its normaliser; 0 in rows without a visible key."""
    s = s if visible is None else jnp.where(visible, s, -jnp.inf)
    peak = s.max(axis=-1)
    peak = jnp.where(peak == -jnp.inf, 0, peak)  # -inf - -inf would be NaN
    e = jnp.exp(s - peak[:, None])
    normalizer = Normalizer(peak, e.sum(axis=-1))
    return e * normalizer.inverse()[:, None], normalizer


# Jitted, so that jax_debug_infs does not report the -inf of intermediate results.
softmax = jax.jit(_softmax)


@_softmax.defjvp
def _softmax_jvp(primals, tangents):
    """Compute dp = p (ds - r) with r = sum p ds, and d log total = r, for a constant peak."""
    ds, _ = tangents
    p, normalizer = softmax(*primals)
    # Not (p * ds).sum(axis=1): jaxlib 0.10 miscompiles it for a CPU where ds is batched and p is not.
    r = jnp.einsum("ij,ij->i", p, ds, precision="highest")
    dnormalizer = Normalizer(jnp.zeros_like(normalizer.peak), normalizer.total * r)
    return (p, normalizer), (p * (ds - r[:, None]), dnormalizer)
