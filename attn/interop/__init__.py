"""Our attention inside other people's models: drop-ins for the functions of JAX and Flax.

Imports no framework besides JAX: `flax_attention_fn` knows Flax's calling convention, not Flax.
"""

from attn.interop.flax_hook import flax_attention_fn
from attn.interop.jax_nn import dot_product_attention

__all__ = ["dot_product_attention", "flax_attention_fn"]
