"""Positions in blocks: an axis of any length cut into blocks of equal size."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
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
      end: the position after the last one of each block, where blocks have padding before the end of the axis.
    """

    first: Int[Array, "*blocks"]
    marks: Float[Array, "*blocks n"]
    end: Int[Array, "*blocks"] | None = None

    @classmethod
    def cut(cls, nonfinite: Bool[Array, "length"], block_size: int, dtype) -> "BlockedAxis":
        """Cut an axis into blocks, with marks in the dtype of the scores."""
        first = positions_in_blocks(len(nonfinite), block_size)[:, 0]
        marks = jnp.where(nonfinite, jnp.nan, jnp.zeros((), dtype))
        return cls(jnp.asarray(first), in_blocks(marks, block_size))

    def index(self, length: int) -> Int[Array, "n"]:
        """Return the positions of one block, in range: padding at the end of the axis repeats the last position."""
        return jnp.minimum(self._unclipped(), length - 1)

    def is_position(self, length: int) -> Bool[Array, "n"] | None:
        """Return True for the entries of one block that are not padding; None if no block has padding."""
        if self.end is None and length % self.marks.shape[-1] == 0:
            return None
        return self._unclipped() < (length if self.end is None else self.end)

    def _unclipped(self) -> Int[Array, "n"]:
        return self.first + jnp.arange(self.marks.shape[-1], dtype=self.first.dtype)


def spread(
    vector: Shaped[Array, "distances"], i: Int[Array, "r 1"], j: Int[Array, "1 c"], T: int
) -> Shaped[Array, "r c"]:
    """Return vector[j - i + T - 1] for a tile of consecutive positions, without a gather of single numbers.

    Args:
      vector: one entry per distance, from -(T - 1) to S - 1.
      i, j: positions, consecutive; at the end, padding may repeat the last one, and gets the entry of some distance.
      T: the number of queries.
    """
    r, c = i.shape[0], j.shape[1]
    padded = jnp.pad(vector, (r, c), mode="edge")
    # Entry u is that of distance u - r from the tile's corner, so a row of the tile is the one before it, moved by one.
    row = lax.dynamic_slice(padded, (j[0, 0] - i[0, 0] + T - 1,), (r + c + 1,))

    def by_slices(row):
        return jax.vmap(lambda down: lax.dynamic_slice(row, (r - down,), (c,)))(jnp.arange(r))

    def by_reshape(row):
        # Copies of `row`, each one entry longer than the rows into which they are cut again.
        return jnp.broadcast_to(row, (r, r + c + 1)).reshape(-1)[: r * (r + c)].reshape(r, r + c)[:, r:]

    # A TPU takes ten times as long for the slices, a CPU twice as long for the reshape, and in the gradients even more.
    return lax.platform_dependent(row, cpu=by_slices, default=by_reshape)
