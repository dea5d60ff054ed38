"""Mechanisms without positions, and mechanisms made of functions of positions."""

import functools
import operator
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from attn.functional import dtypes, masks, mods, scores
from attn.mechanisms.mechanism import Chain, Layer, Mechanism
from attn.mechanisms.rows import Rows
from attn.settings import POSITIVE, between, setting


class none(Mechanism):
    """Attention as in the equation."""


class scaled(Mechanism):
    """Scores are multiplied by `scale` instead of 1 / sqrt(H)."""

    scale: float = setting(constraint=POSITIVE)


class unscaled(Mechanism):
    """Scores are not scaled."""

    scale = 1.0


class softcap(Mechanism):
    """cap tanh(s / cap): scores stay between -cap and cap. See `attn.scores.softcap`."""

    cap: float = setting(constraint=POSITIVE)

    def score(self, q: Rows, k: Rows):
        return scores.softcap(self.cap)


class window(Mechanism):
    """Keys at most `left` tokens before and `right` after the query are visible. See `attn.masks.sliding_window`."""

    left: int = setting(constraint=between(0))
    right: int = setting(constraint=between(0))

    def mask(self, q: Rows, k: Rows):
        return masks.sliding_window(self.left, self.right)


class qk_norm(Mechanism):
    """Queries and keys are divided by their root mean square, and multiplied by a learned gain per feature.

    Source: Henry et al. 2020, with one gain per feature, not per layer, as in Dehghani et al. 2023, section 2.1.
    """

    def setup(self, layer: Layer, rngs: nnx.Rngs):
        self.query_gain = nnx.Param(jnp.ones(layer.head_width))
        self.key_gain = nnx.Param(jnp.ones(layer.head_width))

    def query(self, x: Float[Array, "T H"], q: Rows) -> Float[Array, "T H"]:
        return _divide_by_rms(x) * self.query_gain[...].astype(x.dtype)

    def key(self, x: Float[Array, "S H"], k: Rows) -> Float[Array, "S H"]:
        return _divide_by_rms(x) * self.key_gain[...].astype(x.dtype)


def _divide_by_rms(x: Float[Array, "T H"]) -> Float[Array, "T H"]:
    x32 = x.astype(jnp.float32)
    return (x32 * jax.lax.rsqrt(jnp.mean(x32**2, axis=-1, keepdims=True) + 1e-6)).astype(x.dtype)


class _Function(Mechanism):
    """A function of positions; see `of`."""

    function: Callable[[], mods.Mod]  # a function, since NNX would treat the arrays of a score as parameters

    @property
    def max_positions(self) -> int | None:
        size = min(self.function().extent())
        return size if size < dtypes.FAR else None


class _Score(_Function):
    """A score of `attn.scores`, or a function `(s, i, j) -> s` of positions."""

    def setup(self, layer: Layer, rngs: nnx.Rngs):
        self.num_heads = layer.num_heads

    def score(self, q: Rows, k: Rows):
        of_heads, of_head = mods.unwrap_per_head(self.function(), self.num_heads)
        return scores.as_score(of_head([jnp.asarray(x)[q.head] for x in of_heads]))


class _Mask(_Function):
    """A mask of `attn.masks`, or a function `(i, j) -> bool` of positions."""

    def mask(self, q: Rows, k: Rows):
        return self.function()


def of(*, score=None, mask=None, scale: float | None = None) -> Mechanism | Chain:
    """Make a mechanism of functions of positions.

    Args:
      score: a score of `attn.scores`, which may be marked by `attn.per_head`, or a function `(s, i, j) -> s`.
      mask: a mask of `attn.masks`, or a function `(i, j) -> bool`, in addition to padding and causality.
      scale: of the scores; None for 1 / sqrt(H).

    `i` and `j` are positions of query and key, counted from the first token of their texts.

    Raises:
      TypeError: the score or the mask is not such a function.
    """
    score, mask = scores.as_score(score), masks.as_mask(mask)
    changes = [] if score is None else [_Score(lambda: score)]
    changes += [] if mask is None else [_Mask(lambda: mask)]
    changes += [] if scale is None else [scaled(scale)]
    return functools.reduce(operator.add, changes, none()) if len(changes) != 1 else changes[0]
