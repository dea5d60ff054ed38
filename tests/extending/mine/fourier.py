import jax
import jax.numpy as jnp
from flax import nnx

from attn import mechanisms


@mechanisms.register
class fourier(mechanisms.Mechanism):
    def setup(self, layer, rngs):
        self.frequencies = nnx.Param(jax.random.normal(rngs.params(), (layer.width,)) / 8)
        self.phases = nnx.Param(jnp.zeros(layer.width))

    def embedding(self, rows):
        return jnp.sin(rows.position[:, None] * self.frequencies[...] + self.phases[...])
