import jax.numpy as jnp

from attn import mechanisms


@mechanisms.register
class temperature(mechanisms.Mechanism):
    def setup(self, layer, rngs):
        self.log = mechanisms.HeadParam(jnp.zeros(layer.num_heads))

    def score(self, q, k):
        return lambda s, q, k: s * jnp.exp(self.log[...])
