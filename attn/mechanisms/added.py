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
      halves: all sines come first and then all cosines; otherwise they alternate.

    Source: Vaswani et al. 2017, section 3.5; halves: the code of that paper.
    """

    base: float = setting(10_000.0, POSITIVE)
    halves: bool = False

    def setup(self, layer: Layer, rngs: nnx.Rngs):
        self.width = layer.width

    def embedding(self, rows: Rows) -> Float[Array, "T D"]:
        encoding = positions.sinusoidal(rows.position, self.width, base=self.base)
        return jnp.concatenate([encoding[:, ::2], encoding[:, 1::2]], axis=-1) if self.halves else encoding


class learned(Mechanism):
    """A learned table with one row per position.

    Args:
      max_length: number of rows that hold positions.
      first: number of unused rows before them.
      per_stack: encoder and decoder have a table each; otherwise the model has one.

    Source: Gehring et al. 2017, section 3.1.
    """

    max_length: int = setting(512, between(1, 10_000_000))
    first: int = setting(0, between(0, 10_000_000))
    per_stack: bool = False

    @property
    def max_positions(self) -> int:
        return self.max_length

    @property
    def scope(self) -> str:
        return "stack" if self.per_stack else "model"

    def setup(self, layer: Layer, rngs: nnx.Rngs):
        init = nnx.initializers.normal(layer.width**-0.5)
        self.table = nnx.Param(init(rngs.params(), (self.first + self.max_length, layer.width)))

    def embedding(self, rows: Rows) -> Float[Array, "T D"]:
        # Padding before a prompt stands at negative positions; no row attends to it.
        return positions.learned(self.first + jnp.maximum(rows.position, 0), self.table[...])


class learned_grid(Mechanism):
    """A learned table with one row per row of a grid and one with one row per column; the sum is the position.

    The tokens fill the grid as one reads. The token after them, such as a class token, has a position of its own.

    Args:
      height, width: of the grid.

    Source: 2-D embeddings of Dosovitskiy et al. 2021, appendix D.4, which concatenates both instead of adding them.
    """

    height: int = setting(4, between(1, 10_000))
    width: int = setting(4, between(1, 10_000))

    @property
    def max_positions(self) -> int:
        return self.height * self.width + 1

    def setup(self, layer: Layer, rngs: nnx.Rngs):
        init = nnx.initializers.normal(layer.width**-0.5)
        self.rows = nnx.Param(init(rngs.params(), (self.height + 1, layer.width)))  # the last is the token's after it
        self.columns = nnx.Param(init(rngs.params(), (self.width, layer.width)))

    def embedding(self, rows: Rows) -> Float[Array, "T D"]:
        position = jnp.clip(rows.position, 0, self.height * self.width)
        row, column = jnp.divmod(position, self.width)
        is_in_grid = (row < self.height)[:, None]
        return self.rows[...][row] + jnp.where(is_in_grid, self.columns[...][column], 0)
