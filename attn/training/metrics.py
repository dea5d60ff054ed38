"""Metrics as (sum, count): added over steps, examples and devices, and divided once, at the end."""

from typing import NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int


class Mean(NamedTuple):
    """A mean that is not divided yet."""

    sum: Float[Array, "..."] | float = 0.0
    count: Float[Array, "..."] | float = 0.0

    def value(self):
        """Return the mean so far; NaN if the count is 0."""
        return self.sum / self.count if jnp.ndim(self.count) or self.count else float("nan")


def cross_entropy(logits: Float[Array, "T V"], target: Int[Array, "T"], padding: int) -> Mean:
    """Compute the negative log-likelihood of the target tokens, in nats per token; padding does not count."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, target)
    counts = target != padding
    return Mean(jnp.sum(losses * counts), jnp.sum(counts, dtype=losses.dtype))
