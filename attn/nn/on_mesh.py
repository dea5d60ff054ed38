"""Attention on a mesh that divides a model: each device has some heads, and some rows of the queries.

This is the one place that says how attention runs there. Inside, all axes of the mesh are manual, so that every
implementation, kernels among them, computes what one device would. Heads need no communication. Rows need the keys and
values of all rows, which are gathered.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from attn.functional import Dropout, dtypes, masks
from attn.functional.mods import register
from attn.mechanisms.mechanism import HeadParam
from attn.nn.departures import Departures, Sides
from attn.nn.sharding import axis_of, divided_axes


def attend_on_mesh(attend: Callable, query: Float[Array, "T N H"], memory, departures: Departures):
    """Compute attention; on a mesh that divides the model, each device computes its heads and rows.

    Args:
      attend: `(query, memory, departures) -> [T N H]`.
      query: `[T N H]`. If the number of rows is not a multiple of the number of devices, some rows are added and cut.
      memory: keys and values `[S K H]`, where the number of devices divides K.
      departures: of the layer.
    """
    axes, heads, tokens = divided_axes(), axis_of("heads"), axis_of("tokens")
    if not axes:
        return attend(query, memory, departures)
    T, dtype = len(query), query.dtype
    query = jnp.pad(query, ((0, -T % axes.get(tokens, 1)), (0, 0), (0, 0)))
    if tokens is not None:  # the gradients of keys and values are sums over devices with other rows: not in 16 bits
        memory = dtypes.widened(memory)
    graphdef, of_heads, params = nnx.split(departures.mechanism, HeadParam, ...)
    arrays, merge = _split((params, departures.sides, departures.dropout))

    def of_device(query, memory, of_heads, numbers, arrays):
        params, sides, dropout = merge(arrays)
        first_row = 0 if tokens is None else jax.lax.axis_index(tokens) * len(query)
        memory, mechanism = jax.tree.map(lambda x: x.astype(dtype), memory), nnx.merge(graphdef, of_heads, params)
        sides, dropout = _from_row(sides, first_row, len(query)), _of_part(dropout, first_row, numbers)
        return attend(query, memory, Departures(mechanism, sides, numbers, dropout))

    # Ring attention would take the device's own rows of keys and values here: PartitionSpec(tokens, heads).
    of_queries, of_memory, of_head = PartitionSpec(tokens, heads), PartitionSpec(None, heads), PartitionSpec(heads)
    sharded = jax.shard_map(
        of_device,
        in_specs=(of_queries, of_memory, of_head, of_head, PartitionSpec()),
        out_specs=of_queries,
        axis_names={*axes},
        check_vma=False,  # as in training: kernels in Pallas's interpret mode do not pass the check
    )
    return sharded(query, memory, of_heads, departures.heads, arrays)[:T]


def _split(tree) -> tuple[list[jax.Array], Callable]:
    """Return the arrays of a tree, and the function that makes the tree of such arrays.

    Under `shard_map` arrays must be arguments. Numbers stay numbers, since kernels recognise some masks by them.
    """
    leaves, structure = jax.tree.flatten(tree)
    is_array = [isinstance(leaf, jax.Array) for leaf in leaves]

    def merge(arrays: list[jax.Array]):
        arrays = iter(arrays)
        return structure.unflatten([next(arrays) if yes else leaf for yes, leaf in zip(is_array, leaves)])

    return [leaf for yes, leaf in zip(is_array, leaves) if yes], merge


def _from_row(sides: Sides, first: int | Int[Array, ""], count: int) -> Sides:
    """Return the sides of `count` rows of the queries, from row `first` on."""
    if isinstance(first, int) and first == 0 and count == len(sides.q.row):
        return sides
    q = dataclasses.replace(sides.q, row=jnp.arange(count), start=sides.q.start + first)
    return Sides(q, sides.k, None if sides.mask is None else masks.placed(sides.mask, first, 0))


def _of_part(dropout: Dropout | None, first_row, heads: Int[Array, "N"]) -> Dropout | None:
    """Return the dropout of a device's heads and rows, which drops the weights that one device would drop."""
    return None if dropout is None else _DropoutOfPart(dropout.rate, dropout.key, 0, heads, first_row)


@register
@dataclasses.dataclass(frozen=True, eq=False)
class _DropoutOfPart(Dropout):
    """Dropout of some heads and of the rows from one on, with the random bits of these heads and rows."""

    heads: Int[Array, "N"] | None = None
    first_row: int | Int[Array, ""] = 0

    def for_head(self, head: Int[Array, ""]) -> Dropout:
        return dataclasses.replace(self, head=self.heads[head])

    def keep(self, i: Int[Array, "..."], j: Int[Array, "..."]):
        return super().keep(i + self.first_row, j)
