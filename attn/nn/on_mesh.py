"""Attention on a mesh that divides a model: each device has some heads, and some rows of queries, keys and values.

This is the one place that says how attention runs there. Inside, all axes of the mesh are manual, so that every
implementation, kernels among them, computes what one device would. Heads need no communication. Rows need the keys and
values of all rows: these travel by ring attention where it can compute the layer, and are gathered elsewhere.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from attn.functional import dtypes, masks, mods, multi_head_attention, scores
from attn.functional.implementations import IMPLEMENTATIONS
from attn.functional.ring import ring_attention
from attn.mechanisms.mechanism import HeadParam
from attn.nn.departures import Departures, Sides
from attn.nn.sharding import axes_of_attention, axis_of, divided_axes


def attend_on_mesh(query: Float[Array, "T N H"], memory, departures: Departures, *, scale: float, implementation: str):
    """Compute attention `[T N H]`; on a mesh that divides the model, each device computes its heads and rows.

    Args:
      query: `[T N H]`. If the number of rows is not a multiple of the number of devices, some rows are added and cut.
      memory: keys and values `[S K H]`, where the number of devices divides K.
      departures: of the layer.
      scale, implementation: as for `attn.multi_head_attention`.
    """
    axes, heads, tokens = divided_axes(), axis_of("heads"), axis_of("tokens")
    options = dict(scale=scale, implementation=implementation)
    if not axes:
        return _attend(query, memory, departures, **options)
    devices, lengths, dtype = axes.get(tokens, 1), (len(query), len(memory.key)), query.dtype
    of_parts = None if tokens is None else _of_parts(query, memory.key, departures, implementation, devices)
    query = _padded(query, devices)
    if of_parts is not None:
        memory = jax.tree.map(lambda x: _padded(x, devices), memory)
    elif tokens is not None:  # the gradients of keys and values are sums over devices with other rows: not in 16 bits
        memory = dtypes.widened(memory)
    graphdef, of_heads, params = nnx.split(departures.mechanism, HeadParam, ...)
    arrays, merge = _split((params, departures.sides, departures.dropout))

    def of_device(query, memory, of_heads, numbers, arrays):
        params, sides, dropout = merge(arrays)
        dropout = None if dropout is None else dropout.part(heads=numbers[0])
        departures = Departures(nnx.merge(graphdef, of_heads, params), sides, numbers, dropout)
        if of_parts is not None:
            return _attend_by_ring(
                query, memory, departures, lengths, axis_name=tokens, scale=scale, implementation=of_parts
            )
        first_row = 0 if tokens is None else jax.lax.axis_index(tokens) * len(query)
        memory = jax.tree.map(lambda x: x.astype(dtype), memory)
        return _attend(query, memory, _from_row(departures, first_row, len(query)), **options)

    of_queries, of_head = PartitionSpec(tokens, heads), PartitionSpec(heads)
    of_memory = PartitionSpec(None if of_parts is None else tokens, heads)
    sharded = jax.shard_map(
        of_device,
        in_specs=(of_queries, of_memory, of_head, of_head, PartitionSpec()),
        out_specs=of_queries,
        axis_names=axes_of_attention(),
        check_vma=False,  # as in training: kernels in Pallas's interpret mode do not pass the check
    )
    return sharded(query, memory, of_heads, departures.heads, arrays)[: lengths[0]]


def _of_parts(query, key, departures: Departures, implementation: str, devices: int) -> str | None:
    """Return the implementation with which a ring of devices computes its parts; None where keys are gathered.

    They are gathered where a score is made from vectors, which no device has all of; where there are fewer rows than
    devices, as in decoding token by token; and where the settings name an implementation that does not attend parts.
    """
    name = "blockwise" if implementation in ("auto", "fastest") else implementation
    attends_parts = name == "blockwise" or (name in IMPLEMENTATIONS and IMPLEMENTATIONS[name].attends_parts)
    is_short = min(len(query), len(key)) < devices
    return name if attends_parts and not is_short and not departures.reads_vectors(query, key) else None


def _attend(query: Float[Array, "T N H"], memory, departures: Departures, **options):
    options |= dict(mask=departures.mask(), score=departures.score(), dropout=departures.dropout)
    return multi_head_attention(query, *memory, **options)


def _attend_by_ring(query, memory, departures: Departures, lengths: tuple[int, int], *, axis_name: str, **options):
    """Compute attention of this device's rows, where keys and values travel.

    Args:
      query, memory: this device's rows, padding included.
      departures: with rows, mask and dropout of the whole texts.
      lengths: of the whole texts, T and S.
      axis_name: the axis of the mesh along which the rows are sharded.
      options: scale and implementation.
    """
    mask, score = departures.mask(), departures.score_of_positions(query, memory.key)
    has_causal = any(isinstance(part, masks.causal) for part in mods.nested(mask))
    padded = [len(x) * jax.lax.axis_size(axis_name) for x in (query, memory.key)]
    if padded != [*lengths]:  # keys of the padding are hidden, and functions of positions see the last one there
        positions = [np.minimum(np.arange(n), length - 1) for n, length in zip(padded, lengths)]
        mask = None if mask is None else masks.placed(mask.resolve(*lengths), *positions)
        mask = masks.padding(lengths[1]) if mask is None else mask & masks.padding(lengths[1])
        score = None if score is None else scores.placed(score, *positions)
    order = "balanced" if has_causal else "consecutive"
    options |= dict(mask=mask, score=score, dropout=departures.dropout, order=order)
    return ring_attention(query, *memory, axis_name=axis_name, **options)


def _padded(x: Float[Array, "n heads width"], multiple: int) -> Float[Array, "m heads width"]:
    """Return the array with rows of zeros at its end, so that their number is a multiple of this one."""
    return jnp.pad(x, ((0, -len(x) % multiple), (0, 0), (0, 0)))


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


def _from_row(departures: Departures, first: int | Int[Array, ""], count: int) -> Departures:
    """Return the departures of `count` rows of the queries, from row `first` on."""
    (q, k, mask), dropout = departures.sides, departures.dropout
    if isinstance(first, int) and first == 0 and count == len(q.row):
        return departures
    q = dataclasses.replace(q, row=jnp.arange(count), start=q.start + first)
    mask = None if mask is None else masks.placed(mask, first, 0)
    dropout = None if dropout is None else dropout.part(queries=first)
    return departures._replace(sides=Sides(q, k, mask), dropout=dropout)
