"""The executable equation: softmax(Q K^T / sqrt(d_k)) V for one head of one sequence, with the T x S scores in memory.

`contract`, shared by all implementations, prepares the arrays of a head and makes score, mask and dropout functions of
a tile, which here is all queries by all keys.

Source: Vaswani et al. 2017, equation 1.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from attn.functional.contract import Call, Head, Normalizer, prepare, softmax


def equation(
    head: Head, i: Int[Array, "T 1"], j: Int[Array, "1 S"]
) -> tuple[Float[Array, "T Hv"], Float[Array, "T S"], Normalizer]:
    """Compute out_i = sum_j p_ij v_j, p_ij = softmax_j(score(scale q_i . k_j, i, j)) over the keys with mask(i, j)."""
    s = head.scale * jnp.matmul(head.query, head.key.T, preferred_element_type=head.scale.dtype)  # [T S]
    s = head.apply_score(s, i, j)
    s, visible = head.apply_mask(s, i, j)
    p, normalizer = softmax(s, visible)
    kept = head.apply_dropout(p, i, j)
    out = jnp.matmul(kept.astype(head.value.dtype), head.visible_values(visible))  # [T Hv]
    return out, p, normalizer


def attend(call: Call) -> tuple[Float[Array, "T Hv"], Normalizer]:
    """Compute the output of one head, and the normaliser of its softmax."""
    i, j = (jnp.arange(length, dtype=jnp.int32) for length in (call.T, call.S))
    out, _, normalizer = equation(prepare(call), i[:, None], j[None, :])
    return out, normalizer


def weights(call: Call, rows: Int[Array, "R"]) -> Float[Array, "R S"]:
    """Compute the weights p of the queries at positions `rows`."""
    j = jnp.arange(call.S, dtype=jnp.int32)
    _, p, _ = equation(prepare(call._replace(query=call.query[rows])), rows[:, None], j[None, :])
    return p
