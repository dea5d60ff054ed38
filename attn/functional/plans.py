"""A call of fused kernels, planned while it is traced: its functions taken apart, and its tiles.

A kernel evaluates on its tile what is cheap there. It reads the parts, which ordinary JAX computes outside: what it
cannot evaluate, and every captured number (see `taken_apart`). What it can neither evaluate nor read is refused.
"""

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Jaxpr, Literal
from jaxtyping import Array

from attn.functional import blockwise, dtypes, masks, mods, scores, survey
from attn.functional.blocks import positions_in_blocks
from attn.functional.contract import Call, Unsupported
from attn.functional.taken_apart import Kind, TakenApart, Value, evaluate, evaluate_one, take_apart


class Blocks(NamedTuple):
    """The shape of a tile, and the width of the processor's vectors."""

    rows: int
    columns: int
    lanes: int = 128


class Processor(NamedTuple):
    """The abilities of kernels on one kind of processor.

    Attributes:
      is_inside: True for the name of a primitive that they can evaluate on a tile.
      narrow: names of dtypes that they cannot evaluate on a tile.
      most_steps: of the lists of tiles of all heads; None for any number.
    """

    is_inside: Callable[[str], bool]
    narrow: frozenset[str] = frozenset()
    most_steps: int | None = None


class Tiles(NamedTuple):
    """The tiles that a kernel visits, in order of rows.

    Attributes:
      rows, columns: `[steps]` block numbers, in NumPy.
      needed, whole: `[steps]` bools: tiles that hold a visible pair, and those in which all pairs are visible. In
        NumPy, or None where they are not known while tracing; then the kernel gets arrays.
    """

    rows: np.ndarray
    columns: np.ndarray
    needed: np.ndarray | None
    whole: np.ndarray | None


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """Everything about a call that is known while tracing.

    Attributes:
      T, S, N, K: lengths, of which T is that of the rows of tiles and S that of their columns, and numbers of heads.
      blocks: the shape of a tile.
      score: function of a tile, `(raw, i, j) -> s` of the products raw = q . k, taken apart.
      mask, keep: functions `(i, j) -> bool` of a tile, taken apart: visible pairs, and weights that dropout keeps; None
        for all.
      rate: of the dropout.
      tiles: the tiles.
      has_score: whether the user gave a score.
      may_hide: whether the score may be -inf, which hides a pair, for parts that are not extreme.
      others: the three functions on the tiles of `blockwise`.
      wide: dtype of scores and sums.
      precision: of matrix products, as asked for by `jax.default_matmul_precision`.
      is_transposed: whether rows are keys, and columns queries.
    """

    T: int
    S: int
    N: int
    K: int
    blocks: Blocks
    score: TakenApart
    mask: TakenApart | None
    keep: TakenApart | None
    rate: float
    tiles: Tiles
    has_score: bool
    may_hide: bool
    others: list[TakenApart | None]
    wide: object
    precision: object
    is_transposed: bool = False

    def transposed(self) -> "Plan":
        """Return the plan for transposed tiles, `[keys queries]`: all that belongs to rows and columns is swapped."""
        score, mask, keep = (each and each.transposed() for each in (self.score, self.mask, self.keep))
        blocks, tiles = self.blocks, self.tiles
        return dataclasses.replace(
            self,
            **{"T": self.S, "S": self.T, "score": score, "mask": mask, "keep": keep},
            blocks=blocks._replace(rows=blocks.columns, columns=blocks.rows),
            tiles=tiles._replace(rows=tiles.columns, columns=tiles.rows),
            is_transposed=not self.is_transposed,
        )

    @property
    def group(self) -> int:
        """Return how many query heads read one head of keys."""
        return self.N // self.K

    @property
    def functions(self) -> list[TakenApart]:
        """Return the functions of a tile that there are."""
        return [each for each in (self.score, self.mask, self.keep) if each is not None]

    @property
    def parts(self) -> list[Value]:
        """Return the parts of all functions, in their order."""
        return [part for each in self.functions for part in each.parts]

    def split(self, parts: Sequence) -> tuple[Sequence, Sequence, Sequence]:
        """Split one entry per part into those of score, mask and keep."""
        counts = np.cumsum([len(each.parts) if each else 0 for each in (self.score, self.mask, self.keep)])
        return parts[: counts[0]], parts[counts[0] : counts[1]], parts[counts[1] :]


def plan_call(call: Call, blocks: Blocks, processor: Processor) -> tuple[Plan, list[Array], list[Array]]:
    """Take the functions of a call apart, and find its tiles.

    Returns:
      (plan, parts `[1 n ...]`, flags `[1 n ...]`; see `Kernels`).

    Raises:
      Unsupported: a function that a kernel cannot evaluate.
    """
    (T, N, _), (S, K, _) = call.query.shape, call.key.shape
    marked, of_head = mods.unwrap_per_head((call.mask, call.score), N)
    wide = dtypes.wide_dtype(call.query.dtype, call.value.dtype)
    example, scale = call.query[0, 0, 0].astype(wide), jnp.asarray(call.scale, wide)
    rate = 0.0 if call.dropout is None else call.dropout.rate
    plans = []

    def of_one(slices, head, query, key):
        mask, score = of_head(slices)
        mask, score = masks.as_mask(mask), scores.resolve_vectors(scores.as_score(score), query, key)
        mask, score = (None if each is None else each.resolve(T, S) for each in (mask, score))

        def of_products(raw, i, j):
            return scale * raw if score is None else scores.evaluate(score, scale * raw, i, j)

        functions = {
            "score": of_products,
            "mask": None if mask is None else functools.partial(masks.evaluate, mask),
            "dropout": call.dropout.for_head(head).keep if rate else None,
        }
        apart = [
            None
            if each is None
            else _take_apart(name, each, blocks, T * S, processor, example if name == "score" else None)
            for name, each in functions.items()
        ]
        tiles, dynamic = find_tiles(mask, T, S, blocks)
        may_hide = score is not None and _may_hide(apart[0])
        values = [value for each in apart if each is not None for value in _values(each, T, S)]
        others = [None if each is None else _at_tiles_of_blockwise(each, T, S) for each in apart]
        plan = Plan(
            *(T, S, N, K, blocks, *apart, rate, tiles),
            *(score is not None, may_hide, others, wide, jax.config.jax_default_matmul_precision),
        )
        plans.append(plan)
        of_score, _, _ = plan.split(values)
        is_tame = [] if may_hide or not of_score else [_is_tame(of_score)]
        return dtypes.widened(values), [*dynamic, *is_tame]

    queries, keys = jnp.moveaxis(call.query, 1, 0), jnp.repeat(jnp.moveaxis(call.key, 1, 0), N // K, axis=0)
    parts, dynamic = _for_each_head(of_one, (marked, jnp.arange(N), queries, keys))
    steps = len(plans[0].tiles.rows) * max((x.shape[1] for x in dynamic), default=1)
    if processor.most_steps is not None and steps > processor.most_steps:
        raise Unsupported(f"{steps} tiles in the lists of all heads, of at most {processor.most_steps}")
    return plans[0], parts, dynamic


# Primitives that take tens or hundreds of operations per pair: of one position or a distance they are computed outside.
_COSTLY = frozenset(("rem", "sin", "cos", "pow", "log", "log1p", "erf"))


def _take_apart(name: str, function: Callable, blocks: Blocks, pairs: int, processor: Processor, example) -> TakenApart:
    """Take a function apart for a kernel: outside is what the kernel cannot evaluate, and every captured number.

    Raises:
      Unsupported: the kernel cannot evaluate what is left.
    """

    def is_part(value: Value) -> bool:
        if value.kind == Kind.CONSTANT:
            return math.prod(value.shape) == 1
        is_evaluated = all(map(processor.is_inside, value.primitives))
        if value.kind == Kind.SCORE or len(value.shape) != 2:
            return False
        if value.kind == Kind.PAIR:  # one number per pair is memory of T x S, unless the function has that much already
            return not is_evaluated and value.reads >= pairs
        return not is_evaluated or bool(_COSTLY & value.primitives)

    apart = take_apart(function, blocks.rows, blocks.columns, example, is_part)
    for equation in apart.equations() + [e for e in apart.closed.jaxpr.eqns if e.effects]:
        for primitive in _primitives(apart.closed.jaxpr, equation):
            if not processor.is_inside(primitive):
                raise Unsupported(f"primitive {primitive!r} in the {name}{_place(equation)}")
        for v in (*equation.invars, *equation.outvars):
            if v.aval.dtype.name in processor.narrow:
                raise Unsupported(f"dtype {v.aval.dtype.name} in the {name}{_place(equation)}")
        # JAX would trace the rule in the kernel, where no value varies, and find that its result does not fit.
        if equation.primitive.name == "custom_jvp_call" and any(v.aval.mat.varying for v in equation.outvars):
            rule = f"a function with a derivative rule of its own, as jax.nn.relu, in the {name}{_place(equation)}"
            raise Unsupported(f"{rule}, under jax.shard_map with check_vma=True")
    if shapes := apart.captured():
        raise Unsupported(f"an array of shape {shapes[0]} in the {name}, other than read at i, at j or at j - i")
    return apart


def _primitives(jaxpr: Jaxpr, equation) -> Iterator[str]:
    """Iterate over the primitives of an equation; of a function with a derivative of its own, over those of both."""
    yield equation.primitive.name
    if equation.primitive.name != "custom_jvp_call" or any(v.aval.mat.varying for v in equation.outvars):
        return
    inputs = list(dict.fromkeys(v for v in equation.invars if not isinstance(v, Literal)))
    floats = [v for v in inputs if jnp.issubdtype(v.aval.dtype, jnp.floating)]

    def with_derivative(*arrays):
        values = dict(zip(inputs, arrays))

        def of_floats(*moving):
            read = (values | dict(zip(floats, moving))).get
            return evaluate_one(jaxpr, equation, read)

        moving = [values[v] for v in floats]
        return jax.jvp(of_floats, moving, moving)

    shapes = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in inputs]
    for closed in (equation.params["call_jaxpr"], jax.make_jaxpr(with_derivative)(*shapes)):
        yield from _inner_primitives(closed.jaxpr)


def _inner_primitives(jaxpr: Jaxpr) -> Iterator[str]:
    for equation in jaxpr.eqns:
        inner = [x.jaxpr for x in equation.params.values() if hasattr(x, "jaxpr")]
        if not inner:
            yield equation.primitive.name
        for each in inner:
            yield from _inner_primitives(each)


# Primitives whose result is finite where their inputs are, unless these are extreme, and NaN where one of them is.
_TAME = frozenset(
    (
        *("add", "sub", "mul", "div", "neg", "abs", "max", "min", "tanh", "logistic", "erf", "sin", "cos"),
        *("convert_element_type", "broadcast_in_dim", "stop_gradient", "pvary", "pcast"),
    )
)


def _may_hide(score: TakenApart) -> bool:
    """Return whether a score may be -inf, or a number for NaN, where products are finite and `_is_tame` holds."""
    equations, described = score.equations(), score.describe()
    literals = [v.val for e in equations for v in e.invars if isinstance(v, Literal)]
    divisors = [e.invars[1] for e in equations if e.primitive.name == "div"]
    of_scores = {e.primitive.name for e in equations if described[e.outvars[0]].kind == Kind.SCORE}
    are_numbers = all(np.isfinite(x).all() for x in literals)
    has_divisors = all(isinstance(v, Literal) or v.aval.shape == () for v in divisors)
    # An array of T x S would be read once more, to see if it is tame.
    is_small = all(part.kind != Kind.PAIR for part in score.parts)
    return not (of_scores <= _TAME and are_numbers and has_divisors and is_small and _are_finite(equations))


def _are_finite(equations: Sequence) -> bool:
    """Return whether equations of positions and parts have no result that is infinite for finite inputs."""
    return not any(
        e.primitive.name in ("exp", "exp2", "log", "log1p", "pow", "integer_pow", "rsqrt") for e in equations
    )


def _is_tame(parts: Sequence[Array]) -> Array:
    """Return whether no part holds numbers with which arithmetic would overflow."""
    floats = [jnp.abs(x) for x in parts if jnp.issubdtype(x.dtype, jnp.floating)]
    return functools.reduce(jnp.logical_and, [((x == 0) | (x > 1e-15)).all() & (x < 1e15).all() for x in floats], True)


def _place(equation) -> str:
    """Return the line of the user's function that an equation comes from, as far as it is known."""
    frames = equation.source_info.traceback.frames if equation.source_info.traceback else ()
    ours = (os.path.dirname(__file__), os.path.dirname(jax.__file__))
    for frame in frames:
        if not frame.file_name.startswith(ours):
            return f", {frame.file_name}:{frame.line_num}"
    return ""


def _values(apart: TakenApart, T: int, S: int) -> list[Array]:
    values = apart.values(T, S)
    if values is None:
        raise Unsupported("a function that reads the shape of its tile")
    return values


def _at_tiles_of_blockwise(apart: TakenApart, T: int, S: int) -> TakenApart:
    """Return the same function on tiles as `blockwise` has them, of two rows and two columns at least."""
    other = apart.at(*(max(2, positions_in_blocks(n, blockwise.BLOCK_SIZE).shape[1]) for n in (T, S)))
    if other is None:
        raise Unsupported("a function that reads the shape of its tile")
    return other


def _for_each_head(function: Callable, xs: tuple):
    """Map a function over the leading axis of its arguments: `[1 N ...]`; what does not depend on them: `[1 1 ...]`."""
    arguments = jax.tree.leaves(xs)
    closed, shapes = jax.make_jaxpr(function, return_shape=True)(*jax.tree.map(lambda x: x[0], xs))
    dependent = set(closed.jaxpr.invars)
    for equation in closed.jaxpr.eqns:
        if any(not isinstance(v, Literal) and v in dependent for v in equation.invars):
            dependent.update(equation.outvars)

    is_per_head = [not isinstance(v, Literal) and v in dependent for v in closed.jaxpr.outvars]
    of_head = [v for v, each in zip(closed.jaxpr.outvars, is_per_head) if each]
    shared = [v for v, each in zip(closed.jaxpr.outvars, is_per_head) if not each]
    once = iter(evaluate(closed, [x[0] for x in arguments], {}, shared))
    many = iter(jax.vmap(lambda *xs: evaluate(closed, xs, {}, of_head))(*arguments) if of_head else ())
    results = [next(many)[None] if each else jnp.asarray(next(once))[None, None] for each in is_per_head]
    return jax.tree.unflatten(jax.tree.structure(shapes), results)


def find_tiles(mask: masks.Mask | None, T: int, S: int, blocks: Blocks) -> tuple[Tiles, list[Array]]:
    """Find the tiles that hold a visible pair.

    Returns:
      (tiles, [needed, whole] `[steps]` of each tile if they are traced, else []).
    """
    positions = [
        np.minimum(np.arange(-(-length // size) * size, dtype=np.int32), length - 1).reshape(-1, size)
        for length, size in ((T, blocks.rows), (S, blocks.columns))
    ]
    shape = tuple(map(len, positions))
    possible = np.ones(shape, bool) if mask is None else survey.known_blocks(mask, *positions)
    some, every = (True, True) if mask is None else mask.bounds(*positions)
    # Rows and columns without a visible pair are visited, too, since their results have to be written.
    possible[:, 0] |= ~possible.any(axis=1)
    possible[0] |= ~possible.any(axis=0)
    rows, columns = np.nonzero(possible)
    is_full = (columns + 1) * blocks.columns <= S  # a block with padding is never whole
    if all(isinstance(each, (np.ndarray, np.bool_, bool)) for each in (some, every)):
        needed, whole = (np.broadcast_to(each, shape)[rows, columns] for each in (some, every))
        return Tiles(rows, columns, needed, whole & is_full), []
    needed, whole = (jnp.broadcast_to(each, shape)[rows, columns] for each in (some, every))
    return Tiles(rows, columns, None, None), [needed, whole & is_full]
