"""The rows of an attention layer, its queries and its keys, and their positions in the texts."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Count = int | Int[Array, "..."]  # has a batch axis outside of `jax.vmap`


class LengthUnknown(ValueError):
    """A mechanism needs the length of the answer, which is not known before the answer is written."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Example:
    """The lengths and the random key of one example, which all layers of a model get.

    Attributes:
      source_length: number of tokens of the source, its end token included.
      answer_length: number of tokens of the answer, its end token included; None if it is not known.
      num_positions: number of positions of source and answer; None if it is not known.
      key: random key, the same in all layers; None outside of training.
    """

    source_length: Count
    answer_length: Count | None = None
    num_positions: Count | None = None
    key: Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """The queries of an attention layer, or its keys, as rows.

    A row has two numbers. `row` counts the rows of the array. `position` counts the tokens of the text from its first
    one, which is at 0. It does not depend on the part of the text that the array holds: it is the same in training, in
    decoding token by token, and in a padded prompt, whose padding has negative positions.

    Attributes:
      row: `[T]`, or the shape of a tile.
      start: number, in the text, of the token in row 0.
      table: `[P]` ascending positions, by the number of the token; None if the position is that number.
      total: number of tokens of the whole text, its end token included; None if it is not known.
      example: lengths and random key of the example.
      vectors: `[T H]`, the queries or keys of one head; only given to `Mechanism.score`.
      head: number of the head; None for functions that are not per head.
    """

    row: Int[Array, "..."]
    start: Count = 0
    table: Int[Array, "P"] | None = None
    total: Count | None = None
    example: Example | None = None
    vectors: Float[Array, "T H"] | None = None
    head: Int[Array, ""] | None = None

    @property
    def token(self) -> Int[Array, "..."]:
        """Numbers of the tokens in the text, in the shape of `row`."""
        return self.row + self.start

    @property
    def position(self) -> Int[Array, "..."]:
        """Positions, in the shape of `row`."""
        return self.token if self.table is None else self.table[jnp.clip(self.token, 0, len(self.table) - 1)]

    @property
    def placement(self) -> Count | Int[Array, "T"]:
        """The position of row 0 if positions are consecutive, else the positions of all rows."""
        return self.start if self.table is None else self.position

    @property
    def length(self) -> Count:
        """Number of tokens of the whole text, its end token included.

        Raises:
          LengthUnknown: the text is an answer that is not written yet.
        """
        return known(self.total)

    def tile(self, row: Int[Array, "..."]) -> "Rows":
        """Return the rows with these numbers."""
        return dataclasses.replace(self, row=row)


def known(length: Count | None, error: type[LengthUnknown] = LengthUnknown) -> Count:
    """Return a length that must be known.

    Raises:
      LengthUnknown: the length is None.
    """
    if length is None:
        raise error("a mechanism reads the length of the answer, which is not known before it is written")
    return length


def rows(count: int, *, start: Count = 0, total: Count | None, example: Example) -> Rows:
    """Return rows 0..count-1 of an array whose row 0 holds token `start` of its text."""
    return Rows(jnp.arange(count), start=start, total=total, example=example)
