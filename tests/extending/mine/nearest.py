import jax.numpy as jnp

from attn import masks, mechanisms

# A score of distances, and a window: i and j are positions, in training and in decoding alike.
near = mechanisms.of(score=lambda s, i, j: s - 0.3 * jnp.abs(i - j), mask=masks.sliding_window(4, 4))
mechanisms.register(near, "near")
