"""The zig-zag order of a sequence over devices, in which causal attention is the same work for each of them.

Cut into 2 U chunks, device d of U holds the chunks d and 2 U - 1 - d: one from the beginning and its mirror image from
the end. For U = 4:

    consecutive    0 1 | 2 3 | 4 5 | 6 7
    zig-zag        0 7 | 1 6 | 2 5 | 3 4

All functions are called inside `jax.shard_map`, over a mesh axis that is manual there.

Source: Brandon et al. 2023 (Striped Attention: the imbalance); the order as in Llama Team 2024, section 3.3.2.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

ORDERS = ("balanced", "consecutive", "zigzag")


def to_zigzag(tree, axis_name: str):
    """Move rows from the consecutive order to the zig-zag order; two messages of half of the rows per array.

    Args:
      tree: an array `[T/U ...]` per leaf, this device's rows; T/U is even.
      axis_name: the mesh axis, of U devices, over which the sequence is sharded.

    Returns:
      The same tree, with the rows of `zigzag_positions`.

    Raises:
      ValueError: a number of rows that is odd.
    """

    def move(x):
        even, odd = _halves(x)  # the chunks 2 d and 2 d + 1
        even, odd = (lax.ppermute(half, axis_name, perm) for half, perm in zip((even, odd), _moves(axis_name)))
        return jnp.concatenate(_swapped_on_odd_devices(even, odd, axis_name))

    return jax.tree.map(move, tree)


def from_zigzag(tree, axis_name: str):
    """Move rows from the zig-zag order to the consecutive order: the inverse of `to_zigzag`."""

    def move(x):
        even, odd = _swapped_on_odd_devices(*_halves(x), axis_name)
        back = ([(target, source) for source, target in perm] for perm in _moves(axis_name))
        return jnp.concatenate([lax.ppermute(half, axis_name, perm) for half, perm in zip((even, odd), back)])

    return jax.tree.map(move, tree)


def zigzag_positions(rows: int, axis_name: str) -> Int[Array, "rows"]:
    """Return the positions in the sequence of this device's rows, for position encodings of rows in zig-zag order.

    Raises:
      ValueError: a number of rows that is odd.
    """
    check_even(rows)
    first = chunk_numbers("zigzag", lax.axis_index(axis_name), lax.axis_size(axis_name)) * (rows // 2)
    return (first[:, None] + jnp.arange(rows // 2, dtype=jnp.int32)).reshape(-1)


def chunk_numbers(order: str, device: Int[Array, ""], devices: int) -> Int[Array, "chunks"]:
    """Return the numbers of the chunks that a device holds: 2 of 2 U in zig-zag order, else 1 of U."""
    return jnp.stack([device, 2 * devices - 1 - device] if order == "zigzag" else [device])


def _moves(axis_name: str) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Return (source, target) for the even and for the odd chunks; either sends one chunk from and to every device."""
    devices = lax.axis_size(axis_name)
    home = [min(chunk, 2 * devices - 1 - chunk) for chunk in range(2 * devices)]
    return tuple([(chunk // 2, home[chunk]) for chunk in range(first, 2 * devices, 2)] for first in (0, 1))


def _swapped_on_odd_devices(left: Array, right: Array, axis_name: str) -> tuple[Array, Array]:
    """Swap two arrays on odd devices: there the first chunk in zig-zag order has an odd number, and the second not."""
    is_even = lax.axis_index(axis_name) % 2 == 0
    return jnp.where(is_even, left, right), jnp.where(is_even, right, left)


def _halves(x: Array) -> tuple[Array, Array]:
    check_even(len(x))
    return x[: len(x) // 2], x[len(x) // 2 :]


def check_even(rows: int):
    """Check that a device's rows can be cut into two chunks.

    Raises:
      ValueError: their number is odd.
    """
    if rows % 2:
        raise ValueError(f"in zig-zag order each device holds two chunks: its number of rows must be even, got {rows}")
