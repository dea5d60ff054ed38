"""Arrays on their way to the kernels of `pallas_tpu`: blocks of operands, the list of tiles, and the parts of a tile.

A grid has two axes: the heads of all examples, and steps. A step is an entry of a list of tiles in scalar memory. The
blocks of all operands follow from it, so blocks that no tile needs are not even fetched.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from attn.functional import sharding, tiles
from attn.functional.plans import Plan
from attn.functional.sharding import shape_like
from attn.functional.taken_apart import Kind
from attn.functional.tiles import count, of_head, padded

# The bits of a step: the numbers of two blocks, then flags: the first and last step of its row or column; a tile that
# holds a visible pair; one in which all pairs are visible.
_BITS = 13
FIRST, LAST, NEEDED, WHOLE = (1 << (2 * _BITS + n) for n in range(4))
MOST_BLOCKS = 2**_BITS  # of queries, or of keys
MOST_STEPS = 7 << 15  # in the lists of a call: of a MiB of scalar memory, seven eighths
_WITHOUT_STRIDES = ("TPU v2", "TPU v3", "TPU v4")  # they cannot roll each row by one more than the row before


class Operand(NamedTuple):
    """An input of a kernel.

    Attributes:
      array: `[b n ...]`.
      block: shape of its block without these axes; None for a table of one number per head, in scalar memory.
      index: (row, column) -> the block's numbers.
    """

    array: Array
    block: tuple[int, ...] | None = None
    index: Callable | None = None


class Result(NamedTuple):
    """An output of a kernel, `[B N ...]`.

    Attributes:
      shape: its shape without these axes.
      block: shape of its block.
      index: (row, column) -> the block's numbers.
      dtype: its dtype.
    """

    shape: tuple[int, ...]
    block: tuple[int, ...]
    index: Callable
    dtype: object


class Step(NamedTuple):
    """The step at which a kernel is: its entry of the list, and whether it is the head's first or last."""

    code: Array
    is_first: Array
    is_last: Array
    head: Array  # of all examples

    @property
    def row(self):
        """Return the number of the block of queries."""
        return _row(self.code)

    @property
    def column(self):
        """Return the number of the block of keys."""
        return _column(self.code)

    def has(self, flag: int):
        """Return whether the step has a flag."""
        return (self.code & np.int32(flag)) != 0


def _row(code):
    return code & np.int32(MOST_BLOCKS - 1)


def _column(code):
    return lax.shift_right_logical(code, np.int32(_BITS)) & np.int32(MOST_BLOCKS - 1)


# The list of tiles


def has_whole_tiles(plan: Plan) -> bool:
    """Return whether some tiles may need neither the mask nor a look at what the score hides."""
    return not plan.may_hide and (plan.tiles.whole is None or bool(plan.tiles.whole.any()))


def steps(plan: Plan, flags: Sequence[Array], *, every: bool = False) -> Array:
    """List the tiles, row by row: `[b n steps]`.

    Args:
      plan: the plan.
      flags: as in `fused.Kernels`.
      every: list all tiles, also those that are known not to be needed.
    """
    listed, is_known = plan.tiles, plan.tiles.needed is not None
    rows, columns = listed.rows, listed.columns
    is_needed, is_whole = (listed.needed[None, None], listed.whole[None, None]) if is_known else flags[:2]
    if len(flags) % 2:
        is_whole = is_whole & flags[-1][..., None]
    if every:
        rows, columns, is_needed, is_whole = _all_tiles(plan, rows, columns, is_needed, is_whole)
    kept = np.lexsort((columns, rows))
    if is_known and not every:  # leave out what is not needed, but visit every block whose result has to be written
        needed = is_needed[0, 0, kept]
        kept = kept[needed | (~np.isin(rows[kept], rows[kept][needed]) & _changes(rows[kept]))]
    rows, columns, is_needed, is_whole = rows[kept], columns[kept], is_needed[..., kept], is_whole[..., kept]
    known = rows + (columns << _BITS) + FIRST * _changes(rows) + LAST * _changes(rows[::-1])[::-1]
    code = known[None, None] + NEEDED * is_needed.astype(np.int32) + WHOLE * is_whole.astype(np.int32)
    if not (is_known or every):  # a step of `every` writes its own tile, needed or not
        code = _without_fetches(code, columns, is_needed)
    return jnp.asarray(code, jnp.int32)


def _changes(rows: np.ndarray) -> np.ndarray:
    """Return True where an entry differs from the one before."""
    return np.concatenate([[True], rows[1:] != rows[:-1]])


def _all_tiles(plan: Plan, rows, columns, *flags):
    """Add the tiles that are not listed, without flags."""
    every = [x.ravel() for x in np.indices((count(plan.T, plan.blocks.rows), count(plan.S, plan.blocks.columns)))]
    number = rows * count(plan.S, plan.blocks.columns) + columns
    flags = [jnp.zeros((*x.shape[:2], len(every[0])), bool).at[..., number].set(x) for x in flags]
    return *every, *flags


def _without_fetches(code, columns, is_needed):
    """Give a step that is not needed the block of the needed one before it, which is there already."""
    before = lax.cummax(jnp.where(is_needed, np.arange(len(columns))[None, None], 0), axis=2)
    return code + ((jnp.asarray(columns)[before] - columns[None, None]) << _BITS)


# Operands


def by_row(plan: Plan, x: Array, mode: str = "edge") -> Operand:
    """Return an operand `[b n T width]` in blocks of rows; padding repeats the last one, or is 0 ("constant")."""
    block = plan.blocks.rows, x.shape[3]
    return Operand(padded(x, 2, plan.blocks.rows, mode), block, lambda row, column: (row, 0))


def by_column(plan: Plan, x: Array, mode: str = "edge") -> Operand:
    """Return an operand `[b n S width]` in blocks of columns."""
    block = plan.blocks.columns, x.shape[3]
    return Operand(padded(x, 2, plan.blocks.columns, mode), block, lambda row, column: (column, 0))


def of_parts(plan: Plan, parts: Sequence[Array]) -> list[Operand]:
    """Return the operands of the parts."""
    return [_of_part(plan, part.kind, x) for part, x in zip(plan.parts, parts, strict=True)]


def _of_part(plan: Plan, kind: Kind, x: Array) -> Operand:
    bq, bk, _ = plan.blocks
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.int32)
    if kind == Kind.CONSTANT:
        return Operand(x)
    if kind == Kind.QUERY:
        return Operand(padded(x[..., None], 2, bq, "edge"), (bq, 1), lambda row, column: (row, 0))
    if kind == Kind.KEY:
        return Operand(padded(x[:, :, None], 3, bk, "edge"), (1, bk), lambda row, column: (0, column))
    if kind == Kind.PAIR:
        block, index = _pairs(plan)
        return Operand(padded(padded(x, 2, block[0], "edge"), 3, block[1], "edge"), block, index)
    before, length = _vector(plan)
    x = _distances(plan, x)
    x = jnp.pad(x[:, :, None], ((0, 0), (0, 0), (0, 0), (before, length - before - x.shape[2])), mode="edge")
    return Operand(x, (1, length), lambda row, column: (0, 0))


def _pairs(plan: Plan) -> tuple[tuple[int, int], Callable]:
    """Return the block of an array of pairs, and the map to its numbers. It is transposed in the kernel, if at all."""
    bq, bk, _ = plan.blocks
    if plan.is_transposed:
        return (bk, bq), lambda row, column: (column, row)
    return (bq, bk), lambda row, column: (row, column)


def _distances(plan: Plan, x: Array) -> Array:
    """Return a vector over distances from columns to rows in the order of those from keys to queries, or back."""
    return x[..., ::-1] if plan.is_transposed else x


def _vector(plan: Plan) -> tuple[int, int]:
    """Return the padding before the vector of distances, and its length. Distance 0 is at a multiple of a block."""
    rows = count(plan.T, plan.blocks.rows) * plan.blocks.rows
    return rows - (plan.T - 1), rows + count(plan.S, plan.blocks.columns) * plan.blocks.columns


def result_of_part(plan: Plan, kind: Kind) -> Result:
    """Return the result that holds the gradient of a part."""
    bq, bk, lanes = plan.blocks
    rows, columns = count(plan.T, bq) * bq, count(plan.S, bk) * bk
    length, (block, index) = _vector(plan)[1], _pairs(plan)
    pairs = (columns, rows) if plan.is_transposed else (rows, columns)
    return {
        Kind.CONSTANT: Result((8, lanes), (8, lanes), lambda row, column: (0, 0), plan.wide),
        Kind.QUERY: Result((rows, 1), (bq, 1), lambda row, column: (row, 0), plan.wide),
        Kind.KEY: Result((1, columns), (1, bk), lambda row, column: (0, column), plan.wide),
        Kind.DISTANCE: Result((1, length), (1, length), lambda row, column: (0, 0), plan.wide),
        Kind.PAIR: Result(pairs, block, index, plan.wide),
    }[kind]


def gradient_of_part(plan: Plan, kind: Kind, x: Array) -> Array:
    """Cut the gradient of a part from its result: `[B N ...]`."""
    before, _ = _vector(plan)
    T, S = (plan.S, plan.T) if plan.is_transposed else (plan.T, plan.S)
    return {
        Kind.CONSTANT: lambda: x[:, :, 0, 0],
        Kind.QUERY: lambda: x[:, :, : plan.T, 0],
        Kind.KEY: lambda: x[:, :, 0, : plan.S],
        Kind.DISTANCE: lambda: _distances(plan, x[:, :, 0, before : before + T + S - 1]),
        Kind.PAIR: lambda: x[:, :, :T, :S],
    }[kind]()


# Running a kernel


def run(
    kernel: Callable,
    name: str,
    plan: Plan,
    listed: Array,
    operands: Sequence[Operand],
    results: Sequence[Result],
    scratch: Sequence,
    interpret,
) -> Sequence[Array]:
    """Run `kernel(plan, step, parts, operands, results, scratch)` for every head and step: results `[B N ...]`.

    Examples whose lists do not fit into scalar memory together take turns.
    """

    def once(listed, *arrays):
        given = [operand._replace(array=x) for operand, x in zip(operands, arrays, strict=True)]
        return list(_run_once(kernel, name, plan, listed, given, results, scratch, interpret))

    arrays = [listed, *(operand.array for operand in operands)]
    if listed.size <= MOST_STEPS or len(listed) == 1:
        return once(*arrays)
    batch, steps = len(listed), math.prod(listed.shape[1:])
    size = max(n for n in range(1, batch) if batch % n == 0 and (n == 1 or n * steps <= MOST_STEPS))
    is_batched = [len(x) == batch for x in arrays]

    def in_turn(some):
        some = iter(some)
        return once(*(next(some) if each else x for x, each in zip(arrays, is_batched)))

    turns = [x.reshape(-1, size, *x.shape[1:]) for x, each in zip(arrays, is_batched) if each]
    return [x.reshape(batch, *x.shape[2:]) for x in lax.map(in_turn, turns)]


def _run_once(kernel, name: str, plan: Plan, listed, operands, results, scratch, interpret) -> Sequence[Array]:
    """Run a kernel; see `run`."""
    batch = max(len(x) for x in (listed, *(operand.array for operand in operands)))
    num_parts = len(plan.parts)

    def body(list_ref, *refs):
        head, number = pl.program_id(0), pl.program_id(1)
        step = Step(
            _code(plan, listed.shape, list_ref, head, number), number == 0, number == pl.num_programs(1) - 1, head
        )
        inputs, refs = refs[: len(operands)], refs[len(operands) :]
        arrays, parts = inputs[: len(operands) - num_parts], inputs[len(operands) - num_parts :]
        shapes = [operand.array.shape for operand in operands[len(operands) - num_parts :]]
        load = functools.partial(_load_parts, plan, step, parts, shapes)
        kernel(plan, step, load, arrays, refs[: len(results)], refs[len(results) :])

    def spec(shape, block, index):
        if block is None:
            return pl.BlockSpec(memory_space=pltpu.SMEM)

        def numbers(head, number, list_ref):
            code = _code(plan, listed.shape, list_ref, head, number)
            return (*of_head(plan, shape, head), *index(_row(code), _column(code)))

        return pl.BlockSpec((None, None, *block), numbers)

    shapes = [(batch, plan.N, *result.shape) for result in results]
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(batch * plan.N, listed.shape[2]),
        in_specs=[spec(operand.array.shape, operand.block, operand.index) for operand in operands],
        out_specs=[spec(shape, result.block, result.index) for shape, result in zip(shapes, results)],
        scratch_shapes=list(scratch),
    )
    settings = {"interpret": interpret} if interpret else {}
    return pl.pallas_call(
        body,
        grid_spec=grid,
        out_shape=[shape_like(operands[0].array, shape, result.dtype) for shape, result in zip(shapes, results)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        name=name,
        **settings,
    )(listed.reshape(-1, listed.shape[2]), *(operand.array for operand in operands))


def _code(plan: Plan, shape: Sequence[int], list_ref, head, number):
    example, of_heads = of_head(plan, shape, head)
    return list_ref[example * shape[1] + of_heads, number]


# The parts on a tile


def _load_parts(plan: Plan, step: Step, refs: Sequence, shapes: Sequence[Sequence[int]]) -> list:
    """Return the parts on this tile, as `on_tiles` takes them."""

    def load(kind: Kind, ref, shape):
        if kind == Kind.CONSTANT:
            return ref[of_head(plan, shape, step.head)]
        if kind == Kind.DISTANCE:
            return _spread(plan, step, ref)
        return ref[...].T if kind == Kind.PAIR and plan.is_transposed else ref[...]

    return [load(part.kind, ref, shape) for part, ref, shape in zip(plan.parts, refs, shapes, strict=True)]


def _corner(plan: Plan, step: Step):
    """Return where the distances of a tile begin in the vector."""
    bq, bk, lanes = plan.blocks
    start = step.column * bk - step.row * bq + (count(plan.T, bq) - 1) * bq
    return pl.ds(pl.multiple_of(start, lanes), bq + bk)


def _spread(plan: Plan, step: Step, ref) -> tuple[Array, ...]:
    """Return squares with the vector's entry for the distance of each pair: rows are rolled, each by one more."""
    bq, bk, lanes = plan.blocks
    x = ref[:, _corner(plan, step)]
    if sharding.device_kind() in _WITHOUT_STRIDES:
        while len(x) < lanes:
            x = jnp.concatenate([x, pltpu.roll(x, len(x), 1)])
    else:
        x = pltpu.roll(jnp.broadcast_to(x, (lanes, bq + bk)), 0, 1, stride=1, stride_axis=0)
    return tuple(x[:, n : n + lanes] for n in reversed(range(lanes, bq + bk, lanes)))


def add_part(plan: Plan, kind: Kind, step: Step, out, gradient):
    """Add the gradient of a part on this tile to its result."""
    if kind == Kind.PAIR:
        out[...] = gradient.T if plan.is_transposed else gradient
    elif kind == Kind.DISTANCE:
        # The transpose of `_spread`. Rows are rolled back and added up by halves, since Mosaic has no such roll.
        x = jnp.concatenate([jnp.zeros_like(gradient[0]), *reversed(gradient)], axis=1)
        while len(x) > 1:
            half = len(x) // 2
            x = x[:half] + pltpu.roll(x[half:], x.shape[1] - half, 1)
        out[:, _corner(plan, step)] += x
    else:
        out[...] += jnp.broadcast_to(gradient, out.shape)


class Tile(tiles.Tile):
    """The functions of positions on the tile of a step."""

    def __init__(self, plan: Plan, step: Step, parts: Sequence):
        super().__init__(plan, step.row, step.column)
        bq, bk, lanes = plan.blocks
        self.side = None if plan.T % bq or plan.S % bk else lanes
        self._parts = dict(zip(("score", "mask", "keep"), plan.split(parts)))

    def read(self, name: str) -> Sequence:
        return self._parts[name]
