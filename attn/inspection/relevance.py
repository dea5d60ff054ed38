"""Maps that are computed from attention weights to say which source token an answer comes from.

A weight says how much of a value is read, not whether the answer depends on it, and a value may hold more than the
token at its position. Rollout follows the weights through all layers; gradients weigh them by their effect.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def rollout(weights: Float[Array | np.ndarray, "L N T T"]) -> Float[Array, "T T"]:
    """Compute attention rollout: the share of each token in the output of a stack, if weights were all that mattered.

        R = Â_L ... Â_1,   Â_l = (mean_n p^(l,n) + I) / 2

    where I stands for the residual connection. Rows sum to 1 if those of the weights do.

    Args:
      weights: of self-attention, of all layers and heads.

    Source: Abnar and Zuidema 2020, section 3.
    """
    shares = jnp.eye(weights.shape[-1], dtype=weights.dtype)
    for layer in weights:
        shares = _half(layer) @ shares + shares / 2
    return shares


def rollout_to_source(
    encoder: Float[Array | np.ndarray, "_ _ S S"],
    decoder: Float[Array | np.ndarray, "L N T T"],
    cross: Float[Array | np.ndarray, "L N T S"],
) -> Float[Array, "T S"]:
    """Compute attention rollout from the output of a decoder to the tokens of the source.

    A token of the answer is a sum of tokens of the answer, which the decoder reads, and of the source. Self-attention
    and cross-attention of a layer each halve what was there, as in `rollout`, and add a half of what they read:

        R <- Â R,   R <- (R + mean_n p_cross^(n) R_encoder) / 2,   from R = 0

    A row sums to less than 1: the rest is the share of the tokens of the answer.

    Args:
      encoder, decoder: weights of the self-attention, of all layers and heads of each stack.
      cross: those of the cross-attention.

    Source: Abnar and Zuidema 2020, section 3, applied to one text of source and answer.
    """
    of_source, shares = rollout(encoder), jnp.zeros(cross.shape[-2:], cross.dtype)
    for own, read in zip(decoder, cross):
        shares = _half(own) @ shares + shares / 2
        shares = _half(read) @ of_source + shares / 2
    return shares


def gradient_weighted(
    weights: Float[Array | np.ndarray, "*L N T S"], gradients: Float[Array | np.ndarray, "*L N T S"]
) -> Float[Array, "*L T S"]:
    """Compute the relevance of each weight for an output y, the mean over heads of max(0, p * dy/dp).

    Args:
      weights: p, such as those of `Run.look`.
      gradients: dy/dp. `attn.interventions.weight_gradients` gives those of a loss; for the loss -log P(answer) take
        its negative.

    Source: Chefer et al. 2021, section 3.
    """
    return jnp.maximum(0, weights * gradients).mean(axis=-3)


def _half(weights: Float[Array | np.ndarray, "N T S"]) -> Float[Array, "T S"]:
    return jnp.mean(weights, axis=0) / 2
