"""The reference: softmax(Q K^T / sqrt(d_k)) V for one head of one sequence, with the T x S scores in memory.

Source: Vaswani et al. 2017, equation 1.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from attn.functional import masks, scores, tiles
from attn.functional.dropout import Dropout


def attend(
    query: Float[Array, "T H"],
    key: Float[Array, "S H"],
    value: Float[Array, "S Hv"],
    *,
    mask: masks.Mask | None,
    score: scores.Score | None,
    scale: float | Num[Array, ""],
    dropout: Dropout | None,
) -> tuple[Float[Array, "T Hv"], Float[Array, "T"]]:
    """Weigh the values: out = softmax(scores) value, and logsumexp(scores)."""
    i, j = jnp.arange(query.shape[0]), jnp.arange(key.shape[0])
    if mask is None and score is None:  # nothing is hidden, so that everybody sees a NaN
        tainted = None
    else:
        value, tainted = tiles.set_aside(value)
    p, logsumexp = softmax(masked_scores(query, key, i, tainted, mask, score, scale))
    if dropout is not None:
        p = dropout(p, i[:, None], j[None, :])
    out = jnp.matmul(p, value.astype(jnp.promote_types(value.dtype, p.dtype)))
    return out, logsumexp


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
    return softmax(masked_scores(query, key, rows, jnp.zeros(key.shape[0], bool), mask, score, scale))[0]


def masked_scores(query, key, rows, tainted_values, mask, score, scale) -> Float[Array, "R S"]:
    """The scores of the queries at positions `rows`: -inf where masked."""
    if mask is None and score is None:
        return _scaled_products(query, key, scale)
    (query, tainted_queries), (key, tainted_keys) = tiles.set_aside(query), tiles.set_aside(key)
    s = _scaled_products(query, key, scale)
    tainted = tainted_queries[:, None] | (tainted_keys | tainted_values)[None, :]
    i, j = rows[:, None], jnp.arange(key.shape[0])[None, :]
    s = s if score is None else scores.evaluate(score, s, i, j)
    return tiles.masked(s, i, j, tainted, mask)


def _scaled_products(query, key, scale) -> Float[Array, "R S"]:
    wide = jnp.promote_types(query.dtype, jnp.float32)
    return jnp.matmul(query, key.T, preferred_element_type=wide) * jnp.asarray(scale, wide)


@jax.custom_jvp
def softmax(s: Float[Array, "R S"]) -> tuple[Float[Array, "R S"], Float[Array, "R"]]:
    """Softmax and logsumexp of each row; 0 and -inf where a row is -inf throughout."""
    peak = s.max(axis=-1, keepdims=True)
    peak = jnp.where(peak == -jnp.inf, 0, peak)  # -inf - -inf would be NaN
    e = jnp.exp(s - peak)
    total = e.sum(axis=-1, keepdims=True)
    empty = total == 0
    p = e * (1 / jnp.where(empty, 1, total))
    return p, jnp.where(empty, -jnp.inf, jnp.log(total) + peak)[:, 0]


@softmax.defjvp
def _softmax_jvp(primals, tangents):
    """With r = sum p ds: dp = p (ds - r) and d logsumexp = r, from p alone instead of back through exp and sum."""
    (s,), (ds,) = primals, tangents
    p, logsumexp = softmax(s)
    # Not (p * ds).sum(axis=1): jaxlib 0.10 compiles that wrongly for a CPU where ds is batched and p is not.
    r = jnp.einsum("ij,ij->i", p, ds, precision="highest")
    return (p, logsumexp), (p * (ds - r[:, None]), r)
