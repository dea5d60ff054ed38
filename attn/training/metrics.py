"""Metrics as (sum, count): added up over steps, examples and devices, and divided once, at the end."""

from typing import NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int


class Mean(NamedTuple):
    """A mean in the making."""

    sum: Float[Array, "..."] | float = 0.0
    count: Float[Array, "..."] | float = 0.0

    def value(self):
        """The mean so far; NaN of nothing."""
        return self.sum / self.count if jnp.ndim(self.count) or self.count else float("nan")


def cross_entropy(logits: Float[Array, "T V"], target: Int[Array, "T"], padding: int) -> Mean:
    """Negative log-likelihood of the target tokens, in nats a token; padding does not count."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, target)
    counts = target != padding
    return Mean(jnp.sum(losses * counts), jnp.sum(counts, dtype=losses.dtype))
