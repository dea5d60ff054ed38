"""Positions in blocks: an axis of any length cut into blocks of equal size."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped


def positions_in_blocks(length: int, block_size: int) -> Int[np.ndarray, "blocks n"]:
    """Cut 0..length-1 into as few blocks as possible, of equal size and at most `block_size`.

    Where they do not come out even, the last position fills up the last block, so that every position is in range.
    """
    count = -(-length // block_size)
    size = -(-length // count)
    return np.minimum(np.arange(count * size, dtype=np.int32), length - 1).reshape(count, size)


def in_blocks(x: Shaped[Array, "length *rest"], block_size: int) -> Shaped[Array, "blocks n *rest"]:
    """Cut the leading axis of an array into blocks, filled up with its last entry.

    A score is sure to have seen numbers such as that entry: it makes no new NaN.
    """
    count, size = positions_in_blocks(len(x), block_size).shape
    missing = count * size - len(x)
    filled = jnp.concatenate([x, jnp.broadcast_to(x[-1:], (missing, *x.shape[1:]))]) if missing else x
    return filled.reshape(count, size, *x.shape[1:])


class BlockedAxis(NamedTuple):
    """The queries or the keys in blocks; without the leading axis, one block of them.

    Attributes:
      first: the first position of each block.
      marks: numbers to add to the scores of each query or key: NaN where it was not finite, else 0.
    """

    first: Int[Array, "*blocks"]
    marks: Float[Array, "*blocks n"]

    @classmethod
    def cut(cls, nonfinite: Bool[Array, "length"], block_size: int, dtype) -> "BlockedAxis":
        """Cut an axis into blocks, with marks in the dtype of the scores."""
        first = positions_in_blocks(len(nonfinite), block_size)[:, 0]
        marks = jnp.where(nonfinite, jnp.nan, jnp.zeros((), dtype))
        return cls(jnp.asarray(first), in_blocks(marks, block_size))

    def index(self, length: int) -> Int[Array, "n"]:
        """Return the positions of one block, in range: the last position fills up the last block."""
        return jnp.minimum(self._counted(), length - 1)

    def is_position(self, length: int) -> Bool[Array, "n"] | None:
        """Return which entries of one block are positions and not filling; None where no block has filling."""
        return None if length % self.marks.shape[-1] == 0 else self._counted() < length

    def _counted(self) -> Int[Array, "n"]:
        return self.first + jnp.arange(self.marks.shape[-1], dtype=self.first.dtype)
