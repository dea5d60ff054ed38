"""Functions of positions evaluated in a kernel, on a tile that may be transposed, from the function's parts.

A kernel pays for every operation on every pair, so a value stays as small as what it depends on. Equations are
evaluated one by one on values in any shapes that broadcast to the tile `[r c]`:

    []                what is the same for all pairs
    [r 1], [1 c]      what depends on one position
    squares           what depends on j - i alone: a tile is cut into squares, those on a diagonal are the same, and
                      each diagonal is evaluated once: a tuple, the upper right corner first
    [r c]             anything else
"""

from collections.abc import Callable, Iterator, Sequence

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Jaxpr, Literal, Var
from jaxtyping import Array

from attn.functional.taken_apart import Kind, TakenApart, Value, evaluate_one, needed_equations


def evaluate(
    apart: TakenApart, parts: Sequence, *arguments: Array, corner: tuple[Array, Array], side: int | None = None
) -> Array:
    """Evaluate a function on a tile: an array that broadcasts to it.

    Args:
      apart: the function.
      parts: its parts, in shapes that broadcast to the tile; those of Kind.DISTANCE in such shapes, or as squares.
      arguments: positions of rows `[r 1]` and of columns `[1 c]`, after the scores `[r c]` if it is a score.
      corner: the first positions of rows and of columns, where these are not clipped.
      side: of a square, if distances are evaluated on squares. Then no position may be clipped.
    """
    *scores, rows, columns = arguments
    shape = rows.shape[0], columns.shape[1]
    order = slice(None, None, -1 if apart.is_transposed else 1)  # of queries and keys
    known = {v: x for v, x in zip(apart.variables(), map(_converted, parts, apart.parts), strict=True)}
    jaxpr, kinds = apart.closed.jaxpr, apart.describe()
    inputs, outputs = jaxpr.invars, jaxpr.outvars

    def walk(positions, known, wanted):
        values = dict(zip(inputs, scores)) | dict(zip(inputs[-2:], positions[order], strict=True)) | known
        return _evaluate(apart, kinds, values, known, corner[order], wanted)

    if side is not None:
        wanted = _read_by_pairs(jaxpr, kinds, known)
        found = []
        for n, positions in enumerate(diagonals(rows, columns, side)):
            of_square = {v: x[n] if isinstance(x, tuple) else x for v, x in known.items()}
            found.append(walk(positions, of_square, wanted))
        known |= dict(zip(wanted, zip(*found)))
    known = {v: _whole(x, shape) if isinstance(x, tuple) else x for v, x in known.items()}
    (result,) = walk((rows, columns), known, outputs)
    return result


def _converted(x, part: Value):
    return tuple(y.astype(part.dtype) for y in x) if isinstance(x, tuple) else x.astype(part.dtype)


# Squares


def diagonals(rows: Array, columns: Array, side: int) -> Iterator[tuple[Array, Array]]:
    """Yield positions, of rows and of columns, whose differences are those of each diagonal of squares."""
    width, height = columns.shape[1] // side, rows.shape[0] // side
    for n in reversed(range(1 - height, width)):
        yield rows[:side], columns[:, :side] + np.int32(n * side)


def _whole(squares: Sequence[Array], shape: tuple[int, int]) -> Array:
    """Return the tile with these squares on its diagonals."""
    side = len(squares[0])
    height, width = (n // side for n in shape)
    lines = [[squares[row - column + width - 1] for column in range(width)] for row in range(height)]
    return jnp.concatenate([jnp.concatenate(line, axis=1) for line in lines])


def _read_by_pairs(jaxpr: Jaxpr, kinds: dict[Var, Value], known: dict) -> list[Var]:
    """Return the values by distance that the function has a use for beyond other values by distance."""

    def has_squares(v):
        if kinds[v].kind != Kind.DISTANCE:
            return False
        read = {kinds[x].kind for x in needed_equations(jaxpr, known, [v])[1] if x in known}
        # The equations of a function with a derivative of its own are for a whole tile.
        return v in known or (read <= {Kind.CONSTANT, Kind.DISTANCE} and "custom_jvp_call" not in kinds[v].primitives)

    found = {v: None for v in jaxpr.outvars if not isinstance(v, Literal) and has_squares(v)}
    for equation in needed_equations(jaxpr, known, jaxpr.outvars)[0]:
        if not has_squares(equation.outvars[0]):
            found |= {v: None for v in equation.invars if not isinstance(v, Literal) and has_squares(v)}
    return list(found)


# Equations


def _evaluate(apart: TakenApart, kinds, values: dict, known: dict, corner: tuple, wanted: Sequence) -> list[Array]:
    """Evaluate variables; integers that are distances are in float32 as well, where they are converted to it.

    That takes fewer operations per pair than integers do. Distances below 2^24 are exact in both.
    """
    jaxpr, floats = apart.closed.jaxpr, {}
    positions = jaxpr.invars[-2:]

    def read(variable):
        return jnp.asarray(variable.val, variable.aval.dtype) if isinstance(variable, Literal) else values[variable]

    for equation in needed_equations(jaxpr, known, wanted)[0]:
        (first, *_), (out, *_) = equation.invars, equation.outvars
        if not isinstance(first, Literal) and first in floats and equation.params.get("new_dtype") == jnp.float32:
            values[out] = floats[first]
            continue
        values.update(zip(equation.outvars, _evaluate_one(jaxpr, equation, read, apart.is_transposed), strict=True))
        if kinds[out].kind != Kind.DISTANCE or not jnp.issubdtype(out.aval.dtype, jnp.integer):
            continue
        name, inputs = equation.primitive.name, equation.invars
        if any(v in positions for v in inputs if not isinstance(v, Literal)):
            floats[out] = _difference_in_float32(equation, read, positions, corner)
        elif name in _IN_FLOATS and all(abs(v.val) < 2**23 if isinstance(v, Literal) else v in floats for v in inputs):
            numbers = [jnp.float32(v.val) if isinstance(v, Literal) else floats[v] for v in inputs]
            floats[out] = _IN_FLOATS[name](*numbers)
    return [read(v) for v in wanted]


def _evaluate_one(jaxpr: Jaxpr, equation, read: Callable, is_transposed: bool) -> list:
    """Evaluate one equation on values in shapes that broadcast to those of its own, or to their transposes."""
    name, (out, *_) = equation.primitive.name, equation.outvars
    # Values broadcast where they meet, and a kernel knows nothing of `shard_map`.
    if name in ("broadcast_in_dim", "pvary", "pcast"):
        return [read(equation.invars[0])]
    inputs = {v: read(v) for v in equation.invars if not isinstance(v, Literal)}
    if name == "custom_jvp_call":
        return _evaluate_in_own_shapes(jaxpr, equation, inputs, is_transposed)
    shape = np.broadcast_shapes((1,) * out.aval.ndim, *(x.shape for x in inputs.values()))
    return evaluate_one(jaxpr, equation, {v: jnp.broadcast_to(x, shape) for v, x in inputs.items()}.get)


def _evaluate_in_own_shapes(jaxpr: Jaxpr, equation, inputs: dict, is_transposed: bool) -> list:
    """Evaluate an equation that holds others, whose shapes are fixed."""
    shapes = {v: v.aval.shape[:: -1 if is_transposed else 1] for v in inputs}
    inputs = {v: jnp.broadcast_to(x, shapes[v]) for v, x in inputs.items()}
    if all(shape == shape[::-1] for shape in shapes.values()) or not is_transposed:
        return evaluate_one(jaxpr, equation, inputs.get)
    return [x.T for x in evaluate_one(jaxpr, equation, {v: x.T for v, x in inputs.items()}.get)]


_IN_FLOATS = {
    "add": jnp.add,
    "sub": jnp.subtract,
    "max": jnp.maximum,
    "min": jnp.minimum,
    "neg": jnp.negative,
    "abs": jnp.abs,
}


def _difference_in_float32(equation, read: Callable, positions: Sequence, corner: tuple) -> Array:
    """Return the sum or difference of two values of opposite slope, of which at least one is a position, in float32.

    Positions may be too large for float32 where their difference is not, so they are counted from the tile's corner.
    """
    combine, (left, right) = getattr(lax, equation.primitive.name), equation.invars
    is_first = left in positions
    position, other = (left, right) if is_first else (right, left)
    first = corner[positions.index(position)]
    near = (read(position) - first).astype(jnp.float32)
    if is_first:
        return near + combine(first, read(other)).astype(jnp.float32)
    return combine(combine(read(other), first).astype(jnp.float32), near)
