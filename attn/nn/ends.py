"""The two ends of a model: from embeddings to the input of a stack, and from its output to logits."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from attn.nn.dropout import dropout
from attn.nn.style import ACTIVATIONS, Style


class Bottom(nnx.Module):
    """The bottom of a stack: scale the embeddings, add positions, normalise and project them, as the style says.

    Args:
      style: whether embeddings are scaled and normalised.
      width: D.
      embedding_width: E, the width of the embeddings, which are projected to D; None for D without a projection.
      rate: of the dropout.
      dtype: of the computation.
      rngs: keys for the initial parameters.

    Source: scale: Vaswani et al. 2017, section 3.4; norm: Devlin et al. 2019; projection: Lan et al. 2020, section 3.1.
    """

    def __init__(
        self, style: Style, width: int, embedding_width: int | None, *, rate: float, dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        E = embedding_width or width
        self.scale = E**0.5 if style.embedding_scale else None
        self.norm = style.make_norm(E, dtype, rngs) if style.embedding_norm else None
        self.project = None if embedding_width is None else nnx.Linear(E, width, dtype=dtype, rngs=rngs)
        self.rate, self.dtype = rate, dtype

    def __call__(
        self, embedded: Float[Array, "T E"], added: Float[Array, "T E"] | float, key: Array | None
    ) -> Float[Array, "T D"]:
        """Compute the input of the stack from the embeddings of tokens and what mechanisms add to them."""
        # Not scaled by default, unlike in the source: positions stand out next to small embeddings.
        x = embedded if self.scale is None else embedded * self.scale
        x = (x + added).astype(self.dtype)
        x = dropout(x if self.norm is None else self.norm(x), self.rate, key)
        return x if self.project is None else self.project(x)


class LogitsTransform(nnx.Module):
    """A linear layer, the activation and a norm, before the matrix of the logits.

    Args:
      style: the activation and the norm.
      width, embedding_width: D and E, the widths of the input and of the output.
      dtype: of the computation.
      rngs: keys for the initial parameters.

    Source: the code of Devlin et al. 2019.
    """

    def __init__(self, style: Style, width: int, embedding_width: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.linear = nnx.Linear(width, embedding_width, dtype=dtype, rngs=rngs)
        self.norm, self.activation = style.make_norm(embedding_width, dtype, rngs), style.activation

    def __call__(self, x: Float[Array, "T D"]) -> Float[Array, "T E"]:
        return self.norm(ACTIVATIONS[self.activation](self.linear(x)))
