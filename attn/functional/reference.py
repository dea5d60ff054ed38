"""The reference: softmax(Q K^T / sqrt(d_k)) V for one head of one sequence, with the T x S scores in memory.

Source: Vaswani et al. 2017, equation 1.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from attn.functional import masks, scores
from attn.functional.dropout import Dropout


def attend(
    query: Float[Array, "T H"],
    key: Float[Array, "S H"],
    value: Float[Array, "S Hv"],
    *,
    mask: masks.Mask | None,
    score: scores.Score | None,
    scale: Float[Array, ""],
    dropout: Dropout | None,
) -> tuple[Float[Array, "T Hv"], Float[Array, "T"]]:
    """Weigh the values: out = softmax(scores) value, and logsumexp(scores)."""
    i = jnp.arange(query.shape[0])
    s, visible = masked_scores(query, key, i, mask, score, scale)
    p, logsumexp = softmax(s)
    if dropout is not None:
        p = dropout(p, i[:, None], jnp.arange(key.shape[0])[None, :])
    value = _where_seen(visible, value, queries=False)
    out = jnp.matmul(p, value.astype(jnp.promote_types(value.dtype, p.dtype)))
    return out, logsumexp


def weights(
    query: Float[Array, "R H"],
    key: Float[Array, "S H"],
    rows: Int[Array, "R"],
    *,
    mask: masks.Mask | None,
    score: scores.Score | None,
    scale: Float[Array, ""],
) -> Float[Array, "R S"]:
    """What each query, at position `rows`, gives to each key: softmax(scores)."""
    return softmax(masked_scores(query, key, rows, mask, score, scale)[0])[0]


def masked_scores(query, key, rows, mask, score, scale) -> tuple[Float[Array, "R S"], Bool[Array, "_ _"] | None]:
    """The scores, -inf where masked, and where they are not (None for everywhere)."""
    i, j = rows[:, None], jnp.arange(key.shape[0])[None, :]

    def products(visible):
        q, k = _where_seen(visible, query, queries=True), _where_seen(visible, key, queries=False)
        return jnp.matmul(q, k.T, preferred_element_type=scale.dtype) * scale

    visible = None if mask is None else masks.evaluate(mask, i, j)
    s = products(visible)
    if score is not None:
        # -inf from a score counts as masked, so what only such scores would read must not be read either. That is
        # found out with finite numbers, since NaN - inf is NaN.
        alive = scores.evaluate(score, jnp.nan_to_num(s), i, j) != -jnp.inf
        visible = alive if visible is None else visible & alive
        s = scores.evaluate(score, products(visible), i, j)
    return (s if visible is None else jnp.where(visible, s, -jnp.inf)), visible


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
    """With r = sum p ds: dp = p ds - p r and d logsumexp = r, from p alone instead of back through exp and sum."""
    (s,), (ds,) = primals, tangents
    p, logsumexp = softmax(s)
    weighted = p * ds
    r = weighted.sum(axis=-1, keepdims=True)
    return (p, logsumexp), (weighted - p * r, r[:, 0])


def _where_seen(visible, x, *, queries: bool):
    """Rows of `x` that take part in some visible pair; 0 for the rest, since 0 * NaN is NaN."""
    if visible is None:
        return x
    return jnp.where(visible.any(axis=1 if queries else 0)[:, None], x, 0)
