"""The reference: softmax(Q K^T / sqrt(d_k)) V for one head of one sequence, with the T x S scores in memory.

Source: Vaswani et al. 2017, equation 1.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num

from attn.functional import dtypes, masks, scores, tiles
from attn.functional.dropout import Dropout
from attn.functional.tiles import Normalizer


def attend(
    query: Float[Array, "T H"],
    key: Float[Array, "S H"],
    value: Float[Array, "S Hv"],
    *,
    mask: masks.Mask | None,
    score: scores.Score | None,
    scale: float | Num[Array, ""],
    dropout: Dropout | None,
) -> tuple[Float[Array, "T Hv"], Normalizer]:
    """Weigh the values: out = softmax(scores) value, and the sum that normalises the softmax."""
    i, j = (jnp.arange(x.shape[0], dtype=jnp.int32) for x in (query, key))
    s, visible = scores_of(query, key, i, mask, score, scale)
    p, normalizer = softmax(s, visible)
    if dropout is not None:
        p = dropout(p, i[:, None], j[None, :])
    if visible is not None:
        value = tiles.zero_hidden_values(value, visible)
    wide = dtypes.wide_dtype(value.dtype, p.dtype)
    return jnp.matmul(p.astype(wide), value.astype(wide)), normalizer


def weights(
    query: Float[Array, "R H"],
    key: Float[Array, "S H"],
    rows: Int[Array, "R"],
    *,
    mask: masks.Mask | None,
    score: scores.Score | None,
    scale: float | Num[Array, ""],
) -> Float[Array, "R S"]:
    """What each query, at position `rows`, gives to each key: softmax(scores)."""
    return softmax(*scores_of(query, key, rows, mask, score, scale))[0]


def scores_of(query, key, rows, mask, score, scale) -> tuple[Float[Array, "R S"], Bool[Array, "R S"] | None]:
    """The scores of the queries at positions `rows`, and which pairs are visible; None where nothing is hidden."""
    if mask is None and score is None:  # every query attends to every key, so NaNs may propagate
        return _scaled_products(query, key, scale), None
    (query, bad_queries), (key, bad_keys) = tiles.zero_nonfinite_rows(query), tiles.zero_nonfinite_rows(key)
    s = _scaled_products(query, key, scale)
    i, j = rows[:, None], jnp.arange(key.shape[0], dtype=jnp.int32)[None, :]
    s = s if score is None else scores.evaluate(score, s, i, j)
    visible = tiles.visible_pairs(None if score is None else s, i, j, mask)
    return tiles.mark_nonfinite(s, visible, bad_queries[:, None] | bad_keys[None, :]), visible


def _scaled_products(query, key, scale) -> Float[Array, "R S"]:
    wide = dtypes.wide_dtype(query.dtype)
    return jnp.matmul(query, key.T, preferred_element_type=wide) * jnp.asarray(scale, wide)


@jax.custom_jvp
def _softmax(s: Float[Array, "R S"], visible: Bool[Array, "R S"] | None) -> tuple[Float[Array, "R S"], Normalizer]:
    """Softmax of each row over its visible keys, and the sum that normalises it; 0 where a row sees nothing."""
    s = s if visible is None else jnp.where(visible, s, -jnp.inf)
    peak = s.max(axis=-1)
    peak = jnp.where(peak == -jnp.inf, 0, peak)  # -inf - -inf would be NaN
    e = jnp.exp(s - peak[:, None])
    normalizer = Normalizer(peak, e.sum(axis=-1))
    return e * normalizer.inverse()[:, None], normalizer


# Compiled as one, so that the -inf inside is no error under jax_debug_infs.
softmax = jax.jit(_softmax)


@_softmax.defjvp
def _softmax_jvp(primals, tangents):
    """With r = sum p ds: dp = p (ds - r), and d log total = r beside a peak that stands still."""
    ds, _ = tangents
    p, normalizer = softmax(*primals)
    # Not (p * ds).sum(axis=1): jaxlib 0.10 compiles that wrongly for a CPU where ds is batched and p is not.
    r = jnp.einsum("ij,ij->i", p, ds, precision="highest")
    moved = Normalizer(jnp.zeros_like(normalizer.peak), normalizer.total * r)
    return (p, normalizer), (p * (ds - r[:, None]), moved)
