"""Positions in blocks: an axis of any length cut into blocks of equal size."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped


def positions_in_blocks(length: int, block_size: int) -> Int[np.ndarray, "blocks n"]:
    """Cut 0..length-1 into as few blocks as possible, of equal size and at most `block_size`.

    If the blocks do not divide `length`, the last one is padded with the last position, so that all stay in range.
    """
    count = -(-length // block_size)
    size = -(-length // count)
    return np.minimum(np.arange(count * size, dtype=np.int32), length - 1).reshape(count, size)


def in_blocks(x: Shaped[Array, "length *rest"], block_size: int) -> Shaped[Array, "blocks n *rest"]:
    """Cut the leading axis of an array into blocks, padded with its last entry.

    The padding is a real entry, since a score may give NaN for other numbers: so it adds no new NaN.
    """
    count, size = positions_in_blocks(len(x), block_size).shape
    missing = count * size - len(x)
    padded = jnp.concatenate([x, jnp.broadcast_to(x[-1:], (missing, *x.shape[1:]))]) if missing else x
    return padded.reshape(count, size, *x.shape[1:])


class BlockedAxis(NamedTuple):
    """The queries or the keys in blocks; without the leading axis, one block.

    Attributes:
      first: the first position of each block.
      marks: added to the scores of each query or key: NaN if it was not finite, else 0.
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
        """Return the positions of one block; padding repeats the last position."""
        return jnp.minimum(self._unclipped(), length - 1)

    def is_position(self, length: int) -> Bool[Array, "n"] | None:
        """Return True for the entries of one block that are not padding; None if no block has padding."""
        return None if length % self.marks.shape[-1] == 0 else self._unclipped() < length

    def _unclipped(self) -> Int[Array, "n"]:
        return self.first + jnp.arange(self.marks.shape[-1], dtype=self.first.dtype)
