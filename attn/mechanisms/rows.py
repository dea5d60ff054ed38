"""The rows that an attention layer reads: its queries and its keys, and where each of them stands in its text."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Count = int | Int[Array, "..."]  # with a batch axis where a batch is handed around


class LengthUnknown(ValueError):
    """A mechanism reads the length of the answer, which is not known before the answer is written."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Example:
    """Lengths and random key of one example, known to all layers of a model.

    Attributes:
      source_length: number of tokens of the source, its end token included.
      answer_length: number of tokens of the answer, its end token included; None if it is not known.
      num_positions: how many positions source and answer take; None if it is not known.
      key: random key, the same in all layers; None outside of training.
    """

    source_length: Count
    answer_length: Count | None = None
    num_positions: Count | None = None
    key: Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows of one side of an attention layer: its queries, or its keys.

    Two numbers tell a row. `row` counts the rows of the array. `position` counts the tokens of the text from its first
    one, which stands at 0, whatever part of the text the array holds: it is the same in training, in decoding token by
    token, and in a padded prompt, whose padding stands before 0.

    Attributes:
      row: `[T]`, or the shape of a tile.
      start: the number in the text of the token in row 0.
      table: `[R]` positions by the number of the token, ascending; None where the position is that number.
      total: number of tokens of the whole text, its end token included; None if it is not known.
      example: what all layers know of the example.
      vectors: `[T H]`, the queries or keys of one head; given to `Mechanism.score` alone.
      head: number of the head, where a mechanism is asked for one head.
    """

    row: Int[Array, "..."]
    start: Count = 0
    table: Int[Array, "R"] | None = None
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
        """The position of row 0 if positions count up by one; else those of all rows."""
        return self.start if self.table is None else self.position

    @property
    def length(self) -> Count:
        """Number of tokens of the whole text, its end token included.

        Raises:
          LengthUnknown: the text is an answer that is still to be written.
        """
        return known(self.total)

    def tile(self, row: Int[Array, "..."]) -> "Rows":
        """Return some of these rows, by their numbers."""
        return dataclasses.replace(self, row=row)


def known(length: Count | None, error: type[LengthUnknown] = LengthUnknown) -> Count:
    """Return a length.

    Raises:
      LengthUnknown: it is None.
    """
    if length is None:
        raise error("a mechanism reads the length of the answer, which is not known before it is written")
    return length


def rows(count: int, *, start: Count = 0, total: Count | None, example: Example) -> Rows:
    """Return rows 0..count-1 of an array whose row 0 holds token `start` of its text."""
    return Rows(jnp.arange(count), start=start, total=total, example=example)
