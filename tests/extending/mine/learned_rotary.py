import jax.numpy as jnp
from flax import nnx

from attn import mechanisms, positions


@mechanisms.register
class learned_rotary(mechanisms.Mechanism):
    def setup(self, layer, rngs):
        self.frequencies = nnx.Param(10_000.0 ** -jnp.linspace(0, 1, layer.head_width // 2))

    def query(self, x, q):
        return positions.rotary(x, q.position, frequencies=self.frequencies[...])

    key = query
