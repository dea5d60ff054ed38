"""What fused kernels share: a call taken apart, its tiles in order, and every derivative.

A fused kernel computes a tile of scores, the user's mask and score of it, and its part of the output in fast memory.
The mask and the score are functions of positions, taken apart by what they depend on (see `taken_apart`). A kernel
evaluates what is cheap on its tile, and reads the parts, which ordinary JAX has computed outside and differentiates.

`attend` does everything but run the kernels: `pallas_tpu` and `pallas_gpu` give it two functions, forward and backward.

Axes: `b` batch, 1 or B; `n` heads, 1 or N. Every array of a kernel has both in front, and 1 where it is shared.
"""

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap
from jax.extend.core import Literal
from jaxtyping import Array

from attn.functional import blockwise, derivatives, dtypes, masks, mods, scores, survey
from attn.functional.blocks import positions_in_blocks, spread
from attn.functional.contract import Call, Normalizer, Unsupported, resolve_offsets
from attn.functional.dropout import Dropout
from attn.functional.sharding import is_sharded, vary_alike
from attn.functional.taken_apart import Kind, TakenApart, Value, take_apart


class Blocks(NamedTuple):
    """The shape of a tile, and the width of the processor's vectors."""

    rows: int
    columns: int
    lanes: int = 128


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
      T, S, N, K: lengths, and numbers of heads.
      blocks: the shape of a tile.
      score: function of a tile, `(raw, i, j) -> s` of the products raw = q . k, taken apart.
      mask, keep: functions `(i, j) -> bool` of a tile, taken apart: visible pairs, and weights that dropout keeps; None
        for all.
      rate: of the dropout.
      tiles: the tiles.
      has_score: whether the user gave a score.
      may_hide: whether the score may be -inf, which hides a pair, for parts that are not extreme.
      others: score and mask on the tiles of `blockwise`.
      wide: dtype of scores and sums.
      precision: of matrix products, as asked for by `jax.default_matmul_precision`.
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


class Kernels(NamedTuple):
    """The kernels of one kind of processor.

    Attributes:
      forward: (plan, query, key, value, parts, flags) -> (out, peak, total).
      backward: (plan, query, key, value, parts, flags, peak, dout, delta, wanted) -> gradients, one per wanted input.
      is_inside: True for the name of a primitive that a kernel can evaluate on a tile.

    Arrays are query `[b N T H]`, key `[b K S H]`, value `[b K S Hv]`, parts `[b n ...]` (see `taken_apart`) and flags:
    needed and whole tiles, `[b n steps]`, where the plan does not have them; and, `[b n]`, whether the parts of a score
    are tame, so that it hides nothing, where `may_hide` is False and it has parts. b is the size of the batch, or 1.
    """

    forward: Callable
    backward: Callable
    is_inside: Callable[[str], bool]


def attend(call: Call, blocks: Blocks, kernels: Kernels) -> tuple[Array, Normalizer]:
    """Compute the attention of all heads by fused kernels.

    Raises:
      implementations.Unsupported: a function of the user's that they cannot evaluate.
    """
    call = vary_alike(resolve_offsets(call._replace(**_without_float16(call))))
    plan, parts, flags = plan_call(call, blocks, kernels.is_inside)
    is_moving = [jnp.issubdtype(x.dtype, jnp.floating) for x in parts]

    def split(inputs, fixed):
        query, key, value, *moving = inputs
        moving, still = iter(moving), iter(fixed)
        return query, key, value, [next(moving) if each else next(still) for each in is_moving], list(still)

    def value(inputs, fixed):
        query, key, value, parts, rest = split(inputs, fixed)
        out, peak, total = kernels.forward(plan, query, key, value, parts, rest[: len(flags)])
        return [out, peak, total, jnp.zeros_like(total)]

    def like(inputs, fixed):
        query, key, value, parts, rest = split(inputs, fixed)
        return _like(plan, query[0], key[0], value[0], parts, rest[len(flags) :])

    def pullback(inputs, fixed, results, cotangents, wanted):
        query, key, value, parts, rest = split(inputs, fixed)
        (out, peak, total, _), (dout, _, _, dlogsumexp) = results, cotangents
        wide = plan.wide
        # The kernel's weights are exp(s - peak), not divided by their total, so its cotangents are.
        inverse = Normalizer(peak, total).inverse()
        delta = jnp.sum(dout.astype(wide) * out.astype(wide), axis=-1) - dlogsumexp
        dout = (dout.astype(wide) * inverse[..., None]).astype(value.dtype)
        wanted = (*wanted[:3], *_spread_over(wanted[3:], is_moving))
        return kernels.backward(plan, query, key, value, parts, rest[: len(flags)], peak, dout, delta * inverse, wanted)

    # Sums of weights times large values may overflow, although their means do not. A power of two is exact.
    headroom = 2.0 ** -math.ceil(math.log2(plan.S / (1 - plan.rate)))
    arrays = [jnp.moveaxis(x, 1, 0)[None] for x in (call.query, call.key, call.value * headroom)]
    inputs = [*arrays, *(x for x, each in zip(parts, is_moving) if each)]
    fixed = [*(x for x, each in zip(parts, is_moving) if not each), *flags]
    fixed += [] if call.dropout is None or plan.rate == 0 else [call.dropout.key]
    forms = derivatives.Forms(value, like, pullback)
    # The total depends on which peak a kernel takes, so its derivative is that of the logsumexp, whose value here is 0.
    out, peak, total, logsumexp = derivatives.differentiable(forms)(inputs, fixed)
    total = total * jnp.exp(logsumexp)
    dtype = dtypes.wide_dtype(call.query.dtype)
    return jnp.moveaxis(out[0] / headroom, 0, 1), Normalizer(*(x[0].T.astype(dtype) for x in (peak, total)))


def _without_float16(call: Call) -> dict[str, Array]:
    """Return the arrays of a call, float32 in place of float16, which not all processors have."""
    arrays = {name: getattr(call, name) for name in ("query", "key", "value")}
    return {name: x.astype(jnp.float32) if x.dtype == jnp.float16 else x for name, x in arrays.items()}


def _spread_over(wanted: Sequence[bool], is_moving: Sequence[bool]) -> list[bool]:
    """Return one bool per part: those of the parts that have a derivative, and False for the others."""
    wanted = iter(wanted)
    return [next(wanted) if each else False for each in is_moving]


# A call taken apart


def plan_call(call: Call, blocks: Blocks, is_inside: Callable[[str], bool]) -> tuple[Plan, list[Array], list[Array]]:
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

    def of_one(slices, head):
        mask, score = of_head(slices)
        mask, score = masks.as_mask(mask), scores.as_score(score)
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
            else _take_apart(name, each, blocks, T * S, is_inside, example if name == "score" else None)
            for name, each in functions.items()
        ]
        tiles, dynamic = find_tiles(mask, T, S, blocks)
        may_hide = score is not None and _may_hide(apart[0])
        values = [value for each in apart if each is not None for value in _values(each, T, S)]
        others = [None if each is None else _at_tiles_of_blockwise(each, T, S) for each in apart[:2]]
        plan = Plan(
            *(T, S, N, K, blocks, *apart, rate, tiles),
            *(score is not None, may_hide, others, wide, jax.config.jax_default_matmul_precision),
        )
        plans.append(plan)
        of_score, _, _ = plan.split(values)
        is_tame = [] if may_hide or not of_score else [_is_tame(of_score)]
        return dtypes.widened(values), [*dynamic, *is_tame]

    parts, dynamic = _for_each_head(of_one, marked, jnp.arange(N))
    return plans[0], parts, dynamic


def _take_apart(name: str, function: Callable, blocks: Blocks, pairs: int, is_inside, example) -> TakenApart:
    """Take a function apart for a kernel: outside is what the kernel cannot evaluate, and every captured number.

    Raises:
      Unsupported: the kernel cannot evaluate what is left.
    """

    def is_part(value: Value) -> bool:
        if value.kind == Kind.CONSTANT:
            return math.prod(value.shape) == 1
        if value.kind == Kind.SCORE or len(value.shape) != 2 or all(map(is_inside, value.primitives)):
            return False
        # One number per pair is memory of T x S, unless the function has that much already.
        return value.kind != Kind.PAIR or value.reads >= pairs

    apart = take_apart(function, blocks.rows, blocks.columns, example, is_part)
    for equation in apart.equations() + [e for e in apart.closed.jaxpr.eqns if e.effects]:
        if not is_inside(equation.primitive.name):
            raise Unsupported(f"primitive {equation.primitive.name!r} in the {name}{_place(equation)}")
    if shapes := apart.captured():
        raise Unsupported(f"an array of shape {shapes[0]} in the {name}, other than read at i, at j or at j - i")
    return apart


# Primitives whose result is finite where their inputs are, or overflows only for extreme ones.
_TAME = frozenset(
    (
        *("add", "sub", "mul", "div", "neg", "abs", "sign", "max", "min", "floor", "ceil", "round", "clamp"),
        *("tanh", "logistic", "erf", "sin", "cos", "select_n", "eq", "ne", "lt", "le", "gt", "ge", "and", "or", "xor"),
        *("not", "convert_element_type", "broadcast_in_dim", "copy", "stop_gradient", "pvary", "pcast"),
    )
)


def _may_hide(score: TakenApart) -> bool:
    """Return whether a score may be -inf for finite products and parts that `_is_tame` finds tame."""
    equations = score.equations()
    literals = [v.val for e in equations for v in e.invars if isinstance(v, Literal)]
    divisors = [e.invars[1] for e in equations if e.primitive.name == "div"]
    is_tame = all(e.primitive.name in _TAME for e in equations) and all(np.isfinite(x).all() for x in literals)
    has_divisors = all(isinstance(v, Literal) or v.aval.shape == () for v in divisors)
    # An array of T x S would be read once more, to see if it is tame.
    return not is_tame or not has_divisors or any(part.kind == Kind.PAIR for part in score.parts)


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


def _for_each_head(function: Callable, slices: Sequence, heads: Array):
    """Evaluate function(slices, head) per head, `[1 N ...]`, and what does not depend on the head once, `[1 1 ...]`."""
    arguments = jax.tree.leaves((slices, heads))
    closed, shapes = jax.make_jaxpr(function, return_shape=True)(*jax.tree.map(lambda x: x[0], (slices, heads)))
    dependent = set(closed.jaxpr.invars)
    for equation in closed.jaxpr.eqns:
        if any(not isinstance(v, Literal) and v in dependent for v in equation.invars):
            dependent.update(equation.outvars)

    def evaluate(*arguments):
        return jax.core.eval_jaxpr(closed.jaxpr, closed.consts, *arguments)

    once = evaluate(*(x[0] for x in arguments))
    is_per_head = [not isinstance(v, Literal) and v in dependent for v in closed.jaxpr.outvars]
    many = jax.vmap(evaluate)(*arguments) if any(is_per_head) else once
    results = [m[None] if each else jnp.asarray(o)[None, None] for m, o, each in zip(many, once, is_per_head)]
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


# The same in ordinary JAX


def _like(plan: Plan, query, key, value, parts: Sequence[Array], dropout_key: Sequence[Array]) -> list[Array]:
    """Compute the call by `blockwise`, as a function of the parts: out `[1 N T Hv]`, and `[1 N T]` as `value` does.

    Peak and total have no derivative, and the logsumexp has its own, up to a constant.
    """
    score, mask = plan.others

    def read(part: Value, x: Array, i, j):
        if part.kind == Kind.DISTANCE:
            return spread(x, i, j, plan.T)
        return {Kind.CONSTANT: lambda: x, Kind.QUERY: lambda: x[i], Kind.KEY: lambda: x[j]}.get(
            part.kind, lambda: x[i, j]
        )()

    def on_tile(apart: TakenApart, values: Sequence[Array], *arguments):
        """Evaluate on a tile, which has one more row or column where it has one."""
        shape = jnp.broadcast_shapes(*map(jnp.shape, arguments))
        more = [(0, int(n == 1)) for n in shape]
        i, j = (jnp.pad(x, [more[0], (0, 0)][::step], mode="edge") for x, step in zip(arguments[-2:], (1, -1)))
        s = [jnp.pad(x, more, mode="edge") for x in arguments[:-2]]
        tiles = [read(part, x, i, j) for part, x in zip(apart.parts, values)]
        return apart(tiles, *s, i, j)[: shape[0], : shape[1]]

    def one(query, key, value, parts, head):
        of_score, of_mask, _ = plan.split(parts)
        dropout = Dropout(plan.rate, dropout_key[0], head) if plan.rate else None
        call = Call(
            query,
            key,
            value,
            None if mask is None else masks.function(functools.partial(on_tile, mask, of_mask)),
            scores.function(functools.partial(on_tile, score, of_score)),
            1.0,
            dropout,
        )
        out, normalizer = blockwise.attend(call, is_apart=True)
        empty = normalizer.total == 0
        logsumexp = jnp.where(empty, 0, jnp.log(jnp.where(empty, 1, normalizer.total)))
        return out.astype(value.dtype), *map(jnp.zeros_like, normalizer), logsumexp

    def grouped(x):
        return x.reshape(plan.K, plan.group, *x.shape[1:])

    is_shared = [x.shape[1] == 1 for x in parts]
    parts = [x[0, 0] if each else grouped(x[0]) for x, each in zip(parts, is_shared)]
    of_parts = [None if each else 0 for each in is_shared]
    of_group = jax.vmap(one, in_axes=(0, None, None, of_parts, 0))
    heads = jnp.arange(plan.N)
    results = jax.vmap(of_group, in_axes=(0, 0, 0, of_parts, 0))(grouped(query), key, value, parts, grouped(heads))
    return [x.reshape(1, plan.N, *x.shape[2:]) for x in results]


# Batches


def folded(function: Callable) -> Callable:
    """Let `jax.vmap` of a function of arrays `[b n ...]` become one call with a larger axis b.

    Otherwise a kernel with a list of tiles per example would run in a loop over the examples.

    Args:
      function: arrays to a list of arrays `[B ...]`, for B the largest b.
    """

    @custom_vmap
    def call(*arrays):
        return list(function(*arrays))

    @call.def_vmap
    def _(size, is_batched, *arrays):
        before = max(x.shape[1 if batched else 0] for x, batched in zip(arrays, is_batched))

        def fold(x, batched):
            if not batched and len(x) == 1:
                return x
            x = x if batched else jnp.broadcast_to(x, (size, *x.shape))
            x = jnp.broadcast_to(x, (size, before, *x.shape[2:]))
            return x.reshape(size * before, *x.shape[2:])

        results = call(*(fold(x, batched) for x, batched in zip(arrays, is_batched)))
        # Where no array has a batch any more, the results have none either.
        results = [jnp.broadcast_to(x, (size * before, *x.shape[1:])) for x in results]
        return [x.reshape(size, before, *x.shape[1:]) for x in results], [True] * len(results)

    return call


def unsupported_reason(call: Call, blocks: Blocks, kernels: Kernels, supported: Sequence[str]) -> str | None:
    """Return the part of a call that kernels cannot serve, or None.

    Args:
      call: the call of `attention` or `multi_head_attention`, with marks of `attn.per_head`.
      blocks: the shape of a tile.
      kernels: the kernels.
      supported: names of the dtypes that they can read.
    """
    names = sorted({str(x.dtype) for x in (call.query, call.key, call.value)} - set(supported))
    if names:
        return f"dtype {names[0]} (supported: {', '.join(supported)})"
    if any(isinstance(part, scores.from_vectors) for part in mods.nested(call.score)):
        return "a score made from vectors"
    if is_sharded((call.query, call.key, call.value)):
        return "arrays that are sharded on an explicit mesh; use jax.shard_map"
    if call.query.ndim == 2:
        call = call._replace(query=call.query[:, None], key=call.key[:, None], value=call.value[:, None])
    try:
        plan_call(call, blocks, kernels.is_inside)
    except Unsupported as error:
        return str(error)
    return None
