"""A mask or a score taken apart: what depends on i, on j or on j - i alone is computed once, outside of the tiles.

The function is traced on one tile, `i` `[r 1]` by `j` `[1 c]`. Each value in it has a kind: what it depends on.

    CONSTANT    captured arrays and numbers alone           outside: one value
    QUERY       i                                           outside: [T]
    KEY         j                                           outside: [S]
    DISTANCE    j - i, which takes T + S - 1 values         outside: [T + S - 1], from -(T - 1) to S - 1
    PAIR        i and j                                     outside: [T S]
    SCORE       the score s, and anything else              on tiles only

The values that leave a tile are called parts; which ones do is the caller's choice. They are computed by ordinary JAX
from the captured arrays, so they are differentiated as anything else.

A mask or score is a function of single positions, so tracing it on tiles of other shapes gives the same equations.
Where it does not, because the function reads the shape of its tile, nothing is taken out.
"""

import dataclasses
import enum
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, Var
from jaxtyping import Array, Shaped


class Kind(enum.Enum):
    """The positions and arrays that a value depends on."""

    CONSTANT = "captured arrays"
    QUERY = "i"
    KEY = "j"
    DISTANCE = "j - i"
    PAIR = "i and j"
    SCORE = "s"


@dataclasses.dataclass(frozen=True)
class Value:
    """A value inside the function.

    Attributes:
      kind: what it depends on.
      shape: its shape on the tile.
      dtype: its dtype.
      primitives: names of the primitives that compute it from values of other kinds.
      reads: number of entries of the largest captured array that it depends on.
      slope: 1 or -1 if it is i or j, or -i or -j, plus a constant; else 0. Sums of opposite slopes are distances.
    """

    kind: Kind
    shape: tuple[int, ...]
    dtype: object  # of NumPy, or of random keys
    primitives: frozenset[str] = frozenset()
    reads: int = 0
    slope: int = 0


@dataclasses.dataclass(frozen=True, eq=False)
class TakenApart:
    """A function of a tile, without its parts.

    Attributes:
      function: `(i, j)` or `(s, i, j)` to an array.
      closed: its jaxpr on the tile, without inner calls.
      score: an example of one score; None for a function of `(i, j)`.
      parts: the values that are computed outside.
      places: for each part, the number of the equation that computes it, and which of its results it is; for a
        captured array that is a part itself, -1 and its number.
      is_transposed: whether its tiles are transposed; see `transposed`.
    """

    function: Callable
    closed: ClosedJaxpr
    score: Array | None
    parts: tuple[Value, ...]
    places: tuple[tuple[int, int], ...]
    is_transposed: bool = False

    def transposed(self) -> "TakenApart":
        """Return the function for transposed tiles, `(j, i)` or `(s, j, i)`: queries and keys have changed places.

        So a part that depends on j, `[c 1]`, is of Kind.QUERY, and distances are i - j. Only kernels evaluate it.
        """
        other = {Kind.QUERY: Kind.KEY, Kind.KEY: Kind.QUERY}
        parts = (dataclasses.replace(x, kind=other.get(x.kind, x.kind), shape=x.shape[::-1]) for x in self.parts)
        return dataclasses.replace(self, parts=tuple(parts), is_transposed=not self.is_transposed)

    def values(self, T: int, S: int) -> list[Shaped[Array, "..."]] | None:
        """Compute the parts: `[]`, `[T]`, `[S]`, `[T + S - 1]` or `[T S]`, by their kind.

        Returns:
          One array per part; None where the function has other equations on tiles of other shapes.
        """
        # Two at least: on tiles of one row or column, equations that broadcast would be missing.
        i, j = (np.minimum(np.arange(max(2, length), dtype=np.int32), length - 1) for length in (T, S))
        distance, zeros = np.arange(1 - T, max(S, 3 - T), dtype=np.int32), np.zeros(2, np.int32)
        # For each kind: positions of queries and of keys, and the shape of the result.
        tiles = {
            Kind.CONSTANT: (zeros, zeros, (1, 1)),
            Kind.QUERY: (i, zeros, (T, 1)),
            Kind.KEY: (zeros, j, (1, S)),
            Kind.DISTANCE: (zeros, distance, (1, T + S - 1)),
            Kind.PAIR: (i, j, (T, S)),
        }
        results = {}
        for kind in {part.kind for part in self.parts}:
            rows, columns, (height, width) = tiles[kind]
            numbers = [n for n, part in enumerate(self.parts) if part.kind == kind]
            found = self._evaluate_at(rows, columns, [self.places[n] for n in numbers])
            if found is None:
                return None
            for n, value in zip(numbers, found):
                value = jnp.atleast_2d(value)[:height, :width]
                results[n] = value if kind == Kind.PAIR else value.reshape([max(value.shape)] * (kind != Kind.CONSTANT))
        return [results[n] for n in range(len(self.parts))]

    def _evaluate_at(self, rows, columns, places) -> list[Array] | None:
        """Evaluate some of the function's values on a tile of another shape."""
        closed = trace(self.function, len(rows), len(columns), self.score)
        if _equations(closed) != _equations(self.closed):
            return None
        arguments = [rows[:, None], columns[None, :]]
        if self.score is not None:  # no part depends on s
            arguments.insert(0, jnp.zeros((len(rows), len(columns)), self.score.dtype))
        return evaluate(closed, arguments, {}, _at_places(closed, places))

    def at(self, r: int, c: int) -> "TakenApart | None":
        """Return the same parts of the same function on tiles of another shape; None where its equations differ."""
        closed = trace(self.function, r, c, self.score)
        if _equations(closed) != _equations(self.closed):
            return None
        variables = _at_places(closed, self.places)
        parts = (dataclasses.replace(part, shape=v.aval.shape) for part, v in zip(self.parts, variables))
        return dataclasses.replace(self, closed=closed, parts=tuple(parts))

    def describe(self) -> dict[Var, Value]:
        """Describe every variable of the function."""
        return _describe(self.closed, self.score is not None)

    def equations(self) -> list:
        """Return the equations that are evaluated on each tile."""
        return needed_equations(self.closed.jaxpr, self.variables(), self.closed.jaxpr.outvars)[0]

    def captured(self) -> list[tuple[int, ...]]:
        """Return the shapes of the captured arrays that are read on each tile."""
        known = self.variables()
        needed = needed_equations(self.closed.jaxpr, known, self.closed.jaxpr.outvars)[1].difference(known)
        return [v.aval.shape for v in self.closed.jaxpr.constvars if v in needed]

    def variables(self) -> list[Var]:
        """Return the variables of the parts."""
        return _at_places(self.closed, self.places)

    def __call__(self, parts: Sequence[Array], *arguments: Array) -> Array:
        """Evaluate the function on a tile in ordinary JAX; `on_tiles` does it in kernels.

        Args:
          parts: the parts on this tile, in shapes that broadcast to their own.
          arguments: `(i, j)` or `(s, i, j)`, in the shapes of the tile.
        """
        known = {}
        for variable, part, value in zip(self.variables(), self.parts, parts, strict=True):
            known[variable] = jnp.broadcast_to(value, part.shape).astype(part.dtype)
        (result,) = evaluate(self.closed, arguments, known, self.closed.jaxpr.outvars)
        return result


def take_apart(function: Callable, r: int, c: int, score: Array | None, is_part: Callable[[Value], bool]) -> TakenApart:
    """Trace a function on a tile and find its parts.

    Args:
      function: `(i, j)` or `(s, i, j)` to an array that broadcasts to the tile.
      r, c: the shape of the tile, two at least.
      score: a scalar with the dtype of the scores `s` and, under `shard_map`, their varying axes; its value
        is not used. None for a function of `(i, j)`.
      is_part: True for a value to compute outside. It is called from the result backwards, and not for values that
        only parts need.
    """
    closed = trace(function, r, c, score)
    if closed.jaxpr.effects:  # of a callback, such as `jax.debug.print`, which has to see every tile
        return TakenApart(function, closed, score, (), ())
    values = _describe(closed, score is not None)
    made = {v: (-1, n) for n, v in enumerate(closed.jaxpr.constvars)}
    made |= {v: (number, n) for number, e in enumerate(closed.jaxpr.eqns) for n, v in enumerate(e.outvars)}
    parts, seen, waiting = {}, set(), list(closed.jaxpr.outvars)
    while waiting:
        variable = waiting.pop()
        if isinstance(variable, Literal) or variable in seen or variable not in made:
            continue
        seen.add(variable)
        if is_part(values[variable]):
            parts[made[variable]] = values[variable]
        elif made[variable][0] >= 0:
            waiting += closed.jaxpr.eqns[made[variable][0]].invars
    places = tuple(sorted(parts))
    return TakenApart(function, closed, score, tuple(parts[place] for place in places), places)


def _at_places(closed: ClosedJaxpr, places: Sequence[tuple[int, int]]) -> list:
    """Return the variables at these places."""
    jaxpr = closed.jaxpr
    return [(jaxpr.constvars if number < 0 else jaxpr.eqns[number].outvars)[n] for number, n in places]


def trace(function: Callable, r: int, c: int, score: Array | None = None) -> ClosedJaxpr:
    """Return the jaxpr of a function of a tile `[r c]`, with the calls of jitted functions inlined."""
    examples: list = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((r, 1), (1, c))]
    if score is not None:
        examples.insert(0, jnp.broadcast_to(score, (r, c)))
    closed = jax.make_jaxpr(function)(*examples)
    return jax.make_jaxpr(lambda *arguments: _inlined(closed.jaxpr, closed.consts, arguments))(*examples)


def _inlined(jaxpr: Jaxpr, consts, arguments) -> list:
    """Evaluate a jaxpr, and in the same way the jaxprs of jitted functions that it calls."""
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *arguments), strict=True))

    def read(variable):
        return variable.val if isinstance(variable, Literal) else values[variable]

    for equation in jaxpr.eqns:
        if equation.primitive.name in ("jit", "pjit", "closed_call"):
            inner = equation.params["jaxpr"]
            # Who calls a jitted function is known here only, since it is traced once for all its callers.
            calling = inner.jaxpr.replace(eqns=[_called_from(e, equation) for e in inner.jaxpr.eqns])
            results = _inlined(calling, inner.consts, map(read, equation.invars))
        else:
            results = evaluate_one(jaxpr, equation, read)
        values.update(zip(equation.outvars, results, strict=True))
    return [read(v) for v in jaxpr.outvars]


def _called_from(equation, call):
    """Return an equation of a jitted function with the traceback of the call."""
    return equation.replace(source_info=equation.source_info.replace(traceback=call.source_info.traceback))


def evaluate_one(jaxpr: Jaxpr, equation, read: Callable) -> list:
    """Evaluate one equation of a jaxpr."""
    inputs = dict.fromkeys(v for v in equation.invars if not isinstance(v, Literal))
    single = jaxpr.replace(constvars=[], invars=[*inputs], eqns=[equation], outvars=equation.outvars)
    return jax.core.eval_jaxpr(single, (), *map(read, inputs))


def evaluate(closed: ClosedJaxpr, arguments: Sequence, known: dict, wanted: Sequence) -> list:
    """Evaluate some variables of a jaxpr, where the values of others are known, and nothing that they do not need."""
    jaxpr = closed.jaxpr
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*closed.consts, *arguments), strict=True)) | known
    equations, needed = needed_equations(jaxpr, known, wanted)
    inputs = [v for v in values if v in needed]
    part = jaxpr.replace(constvars=[], invars=inputs, eqns=equations, outvars=list(wanted))
    return jax.core.eval_jaxpr(part, (), *(values[v] for v in inputs))


def needed_equations(jaxpr: Jaxpr, known, wanted: Sequence) -> tuple[list, set]:
    """Return the equations that compute some variables from known ones, and all variables that these read."""
    needed, equations = {v for v in wanted if not isinstance(v, Literal)}, []
    for equation in reversed(jaxpr.eqns):
        if not needed.isdisjoint(v for v in equation.outvars if v not in known):
            equations.insert(0, equation)
            needed.update(v for v in equation.invars if not isinstance(v, Literal))
    return equations, needed


def _equations(closed: ClosedJaxpr) -> list[tuple]:
    """Return what is the same on every tile: the primitives, and the numbers that are written in their equations."""

    def numbers(equation):
        return [np.asarray(v.val).tolist() for v in equation.invars if isinstance(v, Literal)]

    return [(equation.primitive.name, repr(numbers(equation))) for equation in closed.jaxpr.eqns]


# Primitives that keep n * i + constant as it is, if their results have one of these dtypes: others wrap, or round.
_KEEP_SLOPE = frozenset(("broadcast_in_dim", "reshape", "squeeze", "copy", "convert_element_type"))
_EXACT = (np.dtype("int32"), np.dtype("int64"), np.dtype("float32"), np.dtype("float64"))


def _describe(closed: ClosedJaxpr, has_score: bool) -> dict[Var, Value]:
    """Describe every variable of a jaxpr."""
    jaxpr = closed.jaxpr
    kinds = {Kind.QUERY: 1, Kind.KEY: 1}
    kinds = ({Kind.SCORE: 0} if has_score else {}) | kinds
    values = {v: Value(Kind.CONSTANT, v.aval.shape, v.aval.dtype, reads=v.aval.size) for v in jaxpr.constvars}
    for variable, (kind, slope) in zip(jaxpr.invars, kinds.items(), strict=True):
        values[variable] = Value(kind, variable.aval.shape, variable.aval.dtype, slope=slope)

    def read(variable):
        is_literal = isinstance(variable, Literal)
        return Value(Kind.CONSTANT, variable.aval.shape, variable.aval.dtype) if is_literal else values[variable]

    for equation in jaxpr.eqns:
        inputs = [read(v) for v in equation.invars]
        kind, slope = _kind_and_slope(equation.primitive.name, inputs)
        primitives = {equation.primitive.name}.union(*(each.primitives for each in inputs if each.kind == kind))
        reads = max((each.reads for each in inputs), default=0)
        for v in equation.outvars:
            exact_slope = slope if v.aval.dtype in _EXACT else 0
            values[v] = Value(kind, v.aval.shape, v.aval.dtype, frozenset(primitives), reads, exact_slope)
    return values


def _kind_and_slope(primitive: str, inputs: Sequence[Value]) -> tuple[Kind, int]:
    """Return what the results of an equation depend on, and their slope."""
    kind = _join({each.kind for each in inputs})
    slopes = [each.slope for each in inputs]
    if primitive in _KEEP_SLOPE:
        return kind, slopes[0]
    if primitive == "neg":
        return kind, -slopes[0]
    if primitive in ("add", "sub"):
        left, right = slopes if primitive == "add" else (slopes[0], -slopes[1])
        if {each.kind for each in inputs} == {Kind.QUERY, Kind.KEY}:
            return (Kind.DISTANCE if left and left + right == 0 else kind), 0
        # A constant that varies over the tile, such as an array of zeros, is not looked into.
        if any(each.kind == Kind.CONSTANT and np.prod(each.shape) == 1 for each in inputs):
            return kind, left + right
    return kind, 0


def _join(kinds: set[Kind]) -> Kind:
    """Return the kind of what is computed from values of these kinds."""
    kinds = kinds - {Kind.CONSTANT}
    if len(kinds) < 2:
        return kinds.pop() if kinds else Kind.CONSTANT
    return Kind.SCORE if Kind.SCORE in kinds else Kind.PAIR
