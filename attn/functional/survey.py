"""The survey of a mask: the blocks of keys that each block of queries needs, found before any tile is computed."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Bool, Int

from attn.functional import masks


def needed_blocks(
    mask: masks.Mask, rows: Int[np.ndarray, "q r"], columns: Int[np.ndarray, "k c"]
) -> Bool[Array | np.ndarray, "q k"]:
    """Find the blocks that may hold a visible pair.

    Args:
      mask: resolved for these lengths.
      rows, columns: positions of queries and of keys in blocks, as from `blocks.positions_in_blocks`.

    Returns:
      `[q k]`; in NumPy where the mask is known while tracing.
    """
    some, _ = mask.bounds(rows, columns)
    known = isinstance(some, (np.ndarray, np.bool_, bool))
    return (np if known else jnp).broadcast_to(some, (len(rows), len(columns)))


def banded(needed: Bool[np.ndarray, "q k"], blocks, widest: int = 4):
    """Give each block of queries only the blocks of keys that it needs, if these are few, as in a narrow window.

    A block that is skipped is still read, and written to by the backward pass. The price is memory: a block of keys is
    stored once for each block of queries that needs it.

    Args:
      needed: from `needed_blocks`.
      blocks: tree of arrays `[k ...]`.
      widest: the largest number of blocks that counts as few.

    Returns:
      (needed, blocks) as given, or with `[q width]` in place of `[q k]` and `[k]`.
    """
    width = max(1, needed.sum(axis=1).max())
    if width > min(widest, needed.shape[1] // 2):
        return needed, blocks
    band = np.argsort(~needed, axis=1, kind="stable")[:, :width]
    return np.take_along_axis(needed, band, axis=1), jax.tree.map(lambda x: x[band], blocks)


@custom_vmap
def any_of_batch(needed):
    """Return the blocks needed by any example of a batch: without a batch axis `lax.cond` still skips under `vmap`."""
    return needed


@any_of_batch.def_vmap
def _any_of_batch_vmap(axis_size, is_batched, needed):
    return any_of_batch(needed.any(axis=0)), False
