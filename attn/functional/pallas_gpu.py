"""Fused attention on NVIDIA GPUs in Pallas: the user's mask and score inside the kernel, forward and backward.

A program of the forward kernel computes one block of queries: it keeps the largest score m, the sum l and the weighted
sum a in registers (see `blockwise` for the recurrence), and loops over the tiles that the mask needs. The backward
kernels recompute p = exp(s - m), and with the cotangents do of the output and delta of its normaliser

    dv = p^T do,    ds = p (do v^T - delta),    dq = ds' k,    dk = ds'^T q,    where ds' = ds . ds/d(q k^T).

The score is differentiated inside of the kernel, by `jax.vjp`. One kernel loops over the keys of a block of queries,
for dq and most parts, the other over the queries of a block of keys, for dk, dv and the parts that depend on j.

Rows of queries, keys and values that are not finite must not meet a product. They are replaced before the kernels, in
the pass that brings heads to the front, so that a kernel passes what it reads straight to the tensor cores.

Programs run in any order and share no memory that adds up in order. So each has its own results, which are added up
outside; only gradients of numbers per distance are added by atomic operations (see `add_part`).

Pallas lowers these kernels through Triton, which arranges threads, shared memory and tensor cores itself, for Ampere,
Hopper and Blackwell alike. With Mosaic GPU, the other lowering, each of these generations needs kernels of its own,
written in warp groups, barriers and asynchronous copies, and functions of the user's would have to be laid out for
them.

Source: Dao 2023 (FlashAttention-2); Tillet et al. 2019 (Triton).
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from attn.functional import fused
from attn.functional.contract import Call, Normalizer
from attn.functional.fused import Kernels
from attn.functional.pallas_gpu_layout import (
    Program,
    Result,
    Tile,
    lists,
    of_parts,
    read_rows,
    run,
    width_inside,
)
from attn.functional.pallas_gpu_parts import add_part, gradient_of_part, result_of_part
from attn.functional.plans import Blocks, Plan, Processor
from attn.functional.taken_apart import Kind
from attn.functional.tiles import add_up, count, padded

_LOG2_E = math.log2(math.e)
_NT = (((1,), (1,)), ((), ()))  # a b^T

# What Triton can evaluate on a tile, with its derivative. Its max and min of NaN and a number are the number: products
# that are NaN stay so by `_scores`, and parts are computed outside.
INSIDE = frozenset(
    (
        *("add", "sub", "mul", "div", "neg", "abs", "sign", "max", "min", "rem", "floor", "ceil", "clamp", "square"),
        *("exp", "exp2", "expm1", "log", "log1p", "sqrt", "rsqrt", "cbrt", "pow", "integer_pow", "logistic", "erf_inv"),
        *("sin", "cos", "tan", "asin", "acos", "atan", "atan2"),
        *("sinh", "cosh", "tanh", "asinh", "acosh", "atanh"),
        *("select_n", "eq", "ne", "lt", "le", "gt", "ge", "and", "or", "xor", "not", "is_finite"),
        *("shift_left", "shift_right_logical", "shift_right_arithmetic", "population_count", "clz"),
        *("convert_element_type", "bitcast_convert_type", "broadcast_in_dim", "stop_gradient", "custom_jvp_call"),
        *("pvary", "pcast"),
    )
)
PROCESSOR = Processor(INSIDE.__contains__)


def attend(
    call: Call, *, known=None, interpret: bool = False, block_size: int | None = None
) -> tuple[Array, Normalizer]:
    """Compute the attention of all heads.

    Args:
      call: of all heads.
      known: as in `fused.attend`.
      interpret: run the kernels as ordinary JAX on any device.
      block_size: number of queries, and of keys, in a tile; None for what suits the width of the heads.
    """
    return fused.attend(call, _blocks(call, block_size), _kernels(interpret), known)


def unsupported_reason(call: Call, *, supported: Sequence[str] = fused.DTYPES) -> str | None:
    """Return the part of a call that the kernels cannot serve, or None.

    Args:
      call: with marks of `attn.per_head`.
      supported: names of dtypes; in an interpreter also float64.
    """
    if max(call.query.shape[-1], call.value.shape[-1]) > _WIDEST:
        return f"heads wider than {_WIDEST}"
    return fused.unsupported_reason(call, _blocks(call, None), _kernels(False), supported)


class _Choice(NamedTuple):
    """Shapes and warps for heads up to a width.

    Attributes:
      masked, scored: numbers of queries and keys in a tile, without and with a score, which takes registers.
      warps: of a program of the forward kernel, and of those by rows and by columns.
    """

    masked: tuple[int, int]
    scored: tuple[int, int]
    warps: tuple[int, int, int]


# By bytes of a number and width: the largest tiles for which Triton keeps everything in the registers of an H100, for
# the masks and scores of this library.
_CHOICES = {
    (2, 64): _Choice((64, 64), (64, 32), (4, 4, 4)),
    (2, 128): _Choice((64, 64), (64, 32), (4, 4, 8)),
    (2, 256): _Choice((32, 32), (32, 32), (8, 8, 8)),
    (4, 64): _Choice((64, 32), (32, 32), (4, 4, 4)),
    (4, 128): _Choice((32, 32), (32, 32), (4, 8, 8)),
    (4, 256): _Choice((16, 16), (16, 16), (8, 8, 8)),
}
_WIDEST = 256


def _choice(query: Array | jax.ShapeDtypeStruct, value: Array | jax.ShapeDtypeStruct) -> _Choice:
    """Return the choice for heads of this width and dtype."""
    width = max(64, *(width_inside(x.shape[-1]) for x in (query, value)))
    itemsize = 2 if query.dtype == value.dtype == jnp.bfloat16 else 4
    return _CHOICES[itemsize, min(width, _WIDEST)]


def _blocks(call: Call, block_size: int | None) -> Blocks:
    """Return the shape of a tile: powers of two, as small as hold short sequences."""
    choice = _choice(call.query, call.value)
    rows, columns = choice.masked if call.score is None else choice.scored
    rows, columns = (block_size, block_size) if block_size else (rows, columns)
    return Blocks(*(min(size, width_inside(n)) for size, n in ((rows, call.T), (columns, call.S))))


def _kernels(interpret: bool) -> Kernels:
    forward, backward = (functools.partial(each, interpret) for each in (_forward, _backward))
    return Kernels(forward, backward, PROCESSOR)


# Forward


def _forward(interpret: bool, plan: Plan, query, key, value, parts, flags) -> list[Array]:
    """Compute (out `[B N T Hv]`, peak and total `[B N T]`)."""
    Hv, (bq, bk, _) = value.shape[-1], plan.blocks

    def call(query, key, value, *rest):
        key, value = _with_nan(key, value)
        operands = [padded(x, 2, block) for x, block in ((query, bq), (key, bk), (value, bk))]
        rows = count(plan.T, bq) * bq
        width = width_inside(Hv)
        results = [Result((rows, width), (bq, width), value.dtype)]
        results += [Result((rows,), (bq,), plan.wide)] * 2
        operands += of_parts(plan, rest[: len(parts)])
        listed = lists(plan, rest[len(parts) :], "rows")
        warps = _choice(query, value).warps[0]
        return run(_forward_kernel, "attn_forward_rows", plan, listed, operands, results, warps, interpret)

    out, peak, total = fused.folded(call)(query, key, value, *parts, *flags)
    return [out[:, :, : plan.T, :Hv], peak[:, :, : plan.T], total[:, :, : plan.T]]


def _forward_kernel(plan: Plan, program: Program, operands, results):
    """Compute the output of a block of queries."""
    (q_ref, k_ref, v_ref, *parts), (out_ref, peak_ref, total_ref) = operands, results
    bq, row = plan.blocks.rows, program.number
    q = read_rows(q_ref, Tile(plan, row, 0, parts).rows)

    def update(is_whole: bool, column, carry):
        peak, total, weighted = carry
        tile = Tile(plan, row, column, parts)
        v = read_rows(v_ref, tile.columns)
        s = _scores(plan, tile, _dot(plan, q, read_rows(k_ref, tile.columns), _NT))
        s = s if is_whole else tile.only_visible(s, -jnp.inf)
        new = jnp.maximum(peak, s.max(axis=1))
        safe = jnp.where(new == -jnp.inf, 0.0, new)  # -inf - -inf would be NaN
        p, shrink = _exp(s - safe[:, None]), _exp(peak - safe)
        weighted = weighted * shrink[:, None] + _dot(plan, tile.drop(p).astype(v.dtype), v)
        return new, total * shrink + p.sum(axis=1), weighted

    empty = (
        jnp.full((bq,), -jnp.inf, plan.wide),
        jnp.zeros((bq,), plan.wide),
        jnp.zeros((bq, out_ref.shape[1]), plan.wide),
    )
    peak, total, weighted = program.loop(update, empty)
    is_empty = total == 0
    inverse = 1 / (jnp.where(is_empty, 1.0, total) * (1 - plan.rate))
    out_ref[...] = (weighted * inverse[:, None]).astype(out_ref.dtype)
    peak_ref[...] = jnp.where(is_empty, 0.0, peak)
    total_ref[...] = total


def _scores(plan: Plan, tile: Tile, raw: Array) -> Array:
    """Return the scores of products; NaN where the product is NaN, for which a score may return a number.

    A score of -inf hides a pair, also one whose product is NaN.
    """
    if not plan.has_score:
        return tile.score(raw)
    is_number = raw == raw
    s = tile.score(jnp.where(is_number, raw, 0.0))
    return jnp.where(is_number | (s == -jnp.inf), s, jnp.nan)


# Backward


def _backward(interpret: bool, plan: Plan, query, key, value, parts, flags, peak, dout, delta, wanted) -> list[Array]:
    """Compute the gradients of the wanted inputs: query, key, value, and parts."""
    if plan.rate:
        dout = (dout / (1 - plan.rate)).astype(dout.dtype)
    kinds = [Kind.QUERY, Kind.KEY, Kind.KEY, *(part.kind for part in plan.parts)]
    numbers = [n for n, is_wanted in enumerate(wanted) if is_wanted]
    work = {
        "rows": [n for n in numbers if kinds[n] != Kind.KEY],
        "columns": [n for n in numbers if kinds[n] == Kind.KEY],
    }
    found = {}
    for order, names in work.items():
        if names:
            call = functools.partial(_run_backward, interpret, plan, order, names)
            results = fused.folded(call)(query, key, value, dout, peak, delta, *parts, *flags)
            found.update(zip(names, results, strict=True))
    inputs = query, key, value, *parts
    return [add_up(plan, _cut(plan, n, found[n], inputs[n]), inputs[n]) for n in numbers]


def _cut(plan: Plan, n: int, gradient: Array, x: Array) -> Array:
    """Return the gradient of input n without the padding of blocks and widths, `[B N ...]`."""
    if n >= 3:
        return gradient_of_part(plan, plan.parts[n - 3].kind, gradient)
    return gradient[:, :, : x.shape[2], : x.shape[3]]


def _run_backward(interpret, plan: Plan, order: str, names: list[int], query, key, value, dout, peak, delta, *rest):
    """Run one backward kernel: the gradients of the inputs of these numbers, `[B N ...]`."""
    parts, flags = rest[: len(plan.parts)], rest[len(plan.parts) :]
    bq, bk, _ = plan.blocks
    query, key, value = map(_finite, (query, key, value))
    operands = [padded(x, 2, block) for x, block in ((query, bq), (key, bk), (value, bk), (dout, bq))]
    # Queries of padding get the weights exp(s - inf) = 0.
    missing = [(0, 0), (0, 0), (0, -plan.T % bq)]
    operands += [jnp.pad(peak, missing, constant_values=jnp.inf), jnp.pad(delta, missing)]
    of_keys = [x.dtype if plan.group == 1 else plan.wide for x in (key, value)]
    dtypes = query.dtype, *of_keys
    batch = max(map(len, (*operands, *parts, *flags)))
    results = []
    for n in names:
        if n < 3:
            (length, width), block = operands[n].shape[2:], bk if n else bq
            width = width_inside(width)
            results.append(Result((length, width), (block, width), dtypes[n]))
        else:
            results.append(result_of_part(plan, plan.parts[n - 3].kind, batch * plan.N))
    warps = _choice(query, value).warps[("rows", "columns").index(order) + 1]
    kernel = functools.partial(_backward_kernel, order, names)
    listed = lists(plan, flags, order)
    operands += of_parts(plan, parts)
    return run(kernel, f"attn_backward_{order}", plan, listed, operands, results, warps, interpret)


def _backward_kernel(order: str, names: list[int], plan: Plan, program: Program, operands, results):
    """Compute the gradients of a block of queries, or of a block of keys."""
    q_ref, k_ref, v_ref, dout_ref, peak_ref, delta_ref, *parts = operands
    outs = dict(zip(names, results, strict=True))
    of_parts = [n - 3 for n in names if n >= 3]
    by_row = order == "rows"

    def of_queries(tile: Tile):
        return [read_rows(ref, tile.rows) for ref in (q_ref, dout_ref)] + [
            ref[tile.rows] for ref in (peak_ref, delta_ref)
        ]

    def of_keys(tile: Tile):
        return [read_rows(ref, tile.columns) for ref in (k_ref, v_ref)]

    def tile_of(other):
        return Tile(plan, *((program.number, other) if by_row else (other, program.number)), parts)

    def product(of_queries: Array, of_keys: Array) -> Array:
        # A tile is an operand of the next product as the product before has left it in registers, rows first.
        return _dot(plan, of_queries, of_keys, _NT) if by_row else _dot(plan, of_keys, of_queries, _NT).T

    own = (of_queries if by_row else of_keys)(tile_of(0))

    def update(is_whole: bool, other, sums: dict):
        tile = tile_of(other)
        (q, dout, peak, delta), (k, v) = (own, of_keys(tile)) if by_row else (of_queries(tile), own)
        s, pull = tile.score_and_pullback(product(q, k), of_parts)
        p = _exp(s - peak[:, None])
        p = p if is_whole else tile.only_visible(p, 0.0)
        ds = p * (tile.drop(product(dout, v)) - delta[:, None])
        draw, *dparts = pull(ds)
        draw = draw.astype(q.dtype)
        terms = {
            0: lambda: _dot(plan, draw, k),
            1: lambda: _dot(plan, draw.T, q),
            2: lambda: _dot(plan, tile.drop(p).astype(dout.dtype).T, dout),
        }
        terms |= {3 + n: functools.partial(add_part, tile, plan.parts[n].kind, outs[3 + n], d)
                  for n, d in zip(of_parts, dparts)}  # fmt: skip
        added = {n: terms[n]() for n in names}
        return {n: x + added[n] for n, x in sums.items()}

    shapes = {n: out.shape for n, out in outs.items() if n < 3}
    for n in of_parts:
        kind = plan.parts[n].kind
        if kind in (Kind.CONSTANT, Kind.QUERY, Kind.KEY):
            shapes[3 + n] = () if kind == Kind.CONSTANT else outs[3 + n].shape
    sums = program.loop(update, {n: jnp.zeros(shape, plan.wide) for n, shape in shapes.items()})
    for n, x in sums.items():
        outs[n][...] = jnp.broadcast_to(x, outs[n].shape).astype(outs[n].dtype)


# Arrays


def _dot(plan: Plan, a: Array, b: Array, dimensions=(((1,), (0,)), ((), ()))) -> Array:
    """Return a matrix product, in the dtype of scores and sums."""
    return lax.dot_general(a, b, dimensions, precision=plan.precision, preferred_element_type=plan.wide)


def _exp(x: Array) -> Array:
    """Return exp(x) by the instruction that GPUs have."""
    return jnp.exp2(x * _LOG2_E)


def _is_finite(x: Array) -> Array:
    """Return True for rows of finite numbers: `[... 1]`."""
    return jnp.isfinite(x).all(axis=-1, keepdims=True)


def _finite(x: Array) -> Array:
    """Replace rows with a number that is not finite by 0."""
    return jnp.where(_is_finite(x), x, 0)


def _with_nan(key: Array, value: Array) -> tuple[Array, Array]:
    """Return keys that are NaN where their value is not finite, and 0 for such values: a hidden one has weight 0."""
    is_finite = _is_finite(value)
    return jnp.where(is_finite, key, jnp.nan), jnp.where(is_finite, value, 0)
