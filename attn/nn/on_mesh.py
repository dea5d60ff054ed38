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

from attn.functional import Dropout, masks
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
    sizes, heads, tokens = divided_axes(), axis_of("heads"), axis_of("tokens")
    if not sizes:
        return attend(query, memory, departures)
    T = len(query)
    query = jnp.pad(query, ((0, -T % sizes.get(tokens, 1)), (0, 0), (0, 0)))
    graphdef, of_heads, params = nnx.split(departures.mechanism, HeadParam, ...)
    # Arrays of the whole model must be arguments; numbers stay numbers, since kernels recognise masks by them.
    shared, structure = jax.tree.flatten((params, departures.sides, departures.dropout))
    arrays = [x if isinstance(x, jax.Array) else None for x in shared]

    def of_device(query, memory, of_heads, head_numbers, arrays):
        shared = [number if x is None else x for number, x in zip(numbers, arrays)]
        params, sides, dropout = structure.unflatten(shared)
        first_row = 0 if tokens is None else jax.lax.axis_index(tokens) * len(query)
        mechanism = nnx.merge(graphdef, of_heads, params)
        sides, dropout = _from_row(sides, first_row, len(query)), _of_device(dropout, first_row, head_numbers)
        return attend(query, memory, Departures(mechanism, sides, head_numbers, dropout))

    numbers = [None if isinstance(x, jax.Array) else x for x in shared]
    # Ring attention would take the keys and values of the device's own rows here: PartitionSpec(tokens, heads).
    specs = PartitionSpec(tokens, heads), PartitionSpec(None, heads), PartitionSpec(heads), PartitionSpec(heads)
    sharded = jax.shard_map(
        of_device,
        in_specs=(*specs, PartitionSpec()),
        out_specs=PartitionSpec(tokens, heads),
        axis_names={*sizes},
        check_vma=False,  # as in training: kernels in Pallas's interpret mode do not pass the check
    )
    return sharded(query, memory, of_heads, departures.heads, arrays)[:T]


def _from_row(sides: Sides, first: int | Int[Array, ""], count: int) -> Sides:
    """Return the sides of `count` rows of the queries, from row `first` on."""
    if isinstance(first, int) and first == 0 and count == len(sides.q.row):
        return sides
    q = dataclasses.replace(sides.q, row=jnp.arange(count), start=sides.q.start + first)
    return Sides(q, sides.k, None if sides.mask is None else masks.placed(sides.mask, first, 0))


def _of_device(dropout: Dropout | None, first_row, heads: Int[Array, "N"]) -> Dropout | None:
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
