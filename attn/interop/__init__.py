"""Drop-ins for the attention functions of JAX and Flax, computed by `attn.multi_head_attention`.

Of the frameworks only JAX is imported: `flax_attention_fn` follows Flax's calling convention without importing Flax.
"""

from attn.interop.flax_hook import flax_attention_fn
from attn.interop.jax_nn import dot_product_attention

__all__ = ["dot_product_attention", "flax_attention_fn"]
