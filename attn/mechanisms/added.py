"""Positions that are added to embeddings at the bottom of a stack."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from attn.functional import positions
from attn.mechanisms.mechanism import Layer, Mechanism
from attn.mechanisms.rows import Rows
from attn.settings import POSITIVE, between, setting


class sinusoidal(Mechanism):
    """Sines and cosines of the positions.

    Args:
      base: the longest wavelength is 2 pi base tokens.

    Source: Vaswani et al. 2017, section 3.5.
    """

    base: float = setting(10_000.0, POSITIVE)

    def setup(self, layer: Layer, rngs: nnx.Rngs):
        self.width = layer.width

    def embedding(self, rows: Rows) -> Float[Array, "T D"]:
        return positions.sinusoidal(rows.position, self.width, base=self.base)


class learned(Mechanism):
    """A learned table with one row per position.

    Args:
      max_length: number of rows.

    Source: Gehring et al. 2017, section 3.1.
    """

    max_length: int = setting(512, between(1, 10_000_000))

    @property
    def max_positions(self) -> int:
        return self.max_length

    def setup(self, layer: Layer, rngs: nnx.Rngs):
        init = nnx.initializers.normal(layer.width**-0.5)
        self.table = nnx.Param(init(rngs.params(), (self.max_length, layer.width)))

    def embedding(self, rows: Rows) -> Float[Array, "T D"]:
        # Padding before a prompt stands at negative positions; no row attends to it.
        return positions.learned(jnp.maximum(rows.position, 0), self.table[...])
