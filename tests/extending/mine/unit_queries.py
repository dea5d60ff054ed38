import jax.numpy as jnp

from attn import mechanisms


@mechanisms.register
class unit_queries(mechanisms.Mechanism):
    def setup(self, layer, rngs):
        self.gain = mechanisms.HeadParam(jnp.full(layer.num_heads, 4.0))

    def query(self, x, q):
        return self.gain[...] * x / (jnp.linalg.norm(x, axis=-1, keepdims=True) + 1e-6)

    def key(self, x, k):
        return x / (jnp.linalg.norm(x, axis=-1, keepdims=True) + 1e-6)
