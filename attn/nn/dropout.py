"""Dropout of activations and of attention weights; without a random key it does nothing."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attn.functional import Dropout, sharding


def dropout(x: Float[Array, "..."], rate: float, key: Array | None) -> Float[Array, "..."]:
    """Zero each element with probability `rate` and scale the rest by 1 / (1 - rate); without a key, do nothing.

    Source: Srivastava et al. 2014.
    """
    if key is None or rate == 0:
        return x
    kept = jax.random.bernoulli(key, 1 - rate, x.shape)
    if sharding.platform() == "tpu":
        # XLA would draw the bits again in each product that reads them, and take minutes to compile all of these.
        kept = jax.lax.optimization_barrier(kept)
    return jnp.where(kept, x / (1 - rate), 0)


def weights_dropout(rate: float, key: Array | None) -> Dropout | None:
    """Make the dropout of attention weights; None without a key or a rate."""
    return None if key is None or rate == 0 else Dropout(rate, key)
