"""The survey of a mask: the blocks of keys that each block of queries needs, computed before any tile."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Bool, Int

from attn.functional import masks
from attn.functional.sharding import any_of_devices


def needed_blocks(
    mask: masks.Mask, rows: Int[np.ndarray, "q r"], columns: Int[np.ndarray, "k c"]
) -> Bool[Array | np.ndarray, "q k"]:
    """Find the blocks that may hold a visible pair.

    Args:
      mask: the mask, resolved for these lengths.
      rows, columns: positions of queries and of keys in blocks, as from `blocks.positions_in_blocks`.

    Returns:
      `[q k]`; in NumPy where the mask is known while tracing.
    """
    some, _ = mask.bounds(rows, columns)
    is_known = isinstance(some, (np.ndarray, np.bool_, bool))
    return (np if is_known else jnp).broadcast_to(some, (len(rows), len(columns)))


def needed_by_loop(mask: masks.Mask, rows, columns, blocks, floats):
    """Find the blocks of keys that a loop over the blocks of queries visits.

    Args:
      mask, rows, columns: as for `needed_blocks`.
      blocks: tree of arrays `[k ...]`, one entry per block of keys.
      floats: arrays that are read in the loop and may have a derivative.

    Returns:
      (needed, blocks): needed is `[q k]` without a batch axis, or None for all; of a narrow band both are `[q width]`.
    """
    needed = needed_blocks(mask, rows, columns)
    if not isinstance(needed, np.ndarray):
        return any_of_batch(any_of_devices(needed, floats)), blocks
    # The mask is known while tracing, so that a narrow band can be cut out before anything runs.
    return (None, blocks) if needed.all() else banded(needed, blocks)


def known_blocks(
    mask: masks.Mask, rows: Int[np.ndarray, "q r"], columns: Int[np.ndarray, "k c"]
) -> Bool[np.ndarray, "q k"]:
    """Find the blocks that may hold a visible pair whatever the traced arrays of the mask hold: `[q k]`, in NumPy."""
    if isinstance(mask, masks.both):
        left, right = (known_blocks(masks.as_mask(part), rows, columns) for part in (mask.left, mask.right))
        return left & right
    some, _ = mask.bounds(rows, columns)
    is_known = isinstance(some, (np.ndarray, np.bool_, bool))
    return np.array(np.broadcast_to(some if is_known else True, (len(rows), len(columns))))


def banded(needed: Bool[np.ndarray, "q k"], blocks, widest: int = 4):
    """Select for each block of queries only the blocks of keys that it needs, if they are few, as in a narrow window.

    A skipped block costs time: it is still read, and the backward pass writes to it. The band costs memory: a block of
    keys is stored once per block of queries that needs it.

    Args:
      needed: from `needed_blocks`.
      blocks: tree of arrays `[k ...]`, one entry per block of keys.
      widest: the largest number of blocks that counts as few.

    Returns:
      (needed, blocks) unchanged, or with the axes `[q width]` in place of `[q k]` and `[k]`.
    """
    width = max(1, needed.sum(axis=1).max())
    if width > min(widest, needed.shape[1] // 2):
        return needed, blocks
    # A stable sort: needed blocks first, each part in order. A row with fewer is filled up with blocks not needed.
    band = np.argsort(~needed, axis=1, kind="stable")[:, :width]
    return np.take_along_axis(needed, band, axis=1), jax.tree.map(lambda x: x[band], blocks)


@custom_vmap
def any_of_batch(needed):
    """Return the blocks needed by any example of a batch, without a batch axis.

    With a batch axis, `vmap` would turn the `lax.cond` that skips blocks into a select, which computes all of them.
    """
    return needed


@any_of_batch.def_vmap
def _any_of_batch_vmap(axis_size, is_batched, needed):
    return any_of_batch(needed.any(axis=0)), False
