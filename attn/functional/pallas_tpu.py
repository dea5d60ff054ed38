"""Fused attention on TPUs in Pallas: the user's mask and score inside the kernel, forward and backward.

One grid axis visits the tiles that the mask needs, in the order of a list. The forward kernel keeps the largest score
m, the sum l and the weighted sum a of one block of queries in VMEM (see `blockwise` for the recurrence). The backward
kernels recompute p = exp(s - m), and with the cotangents do of the output and delta of its normaliser

    dv = p^T do,    ds = p (do v^T - delta),    dq = ds' k,    dk = ds'^T q,    where ds' = ds . ds/d(q k^T).

The score is differentiated inside of the kernel, by `jax.vjp`. A kernel visits the tiles row by row, for the gradients
of queries, or column by column, for those of keys and values; if the gradients of all queries fit into VMEM, one kernel
computes both.

Source: Dao 2023 (FlashAttention-2); the layout follows JAX's flash_attention and splash_attention for TPUs.
"""

import functools
from collections.abc import Callable, Sequence

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from attn.functional import fused
from attn.functional.contract import Call, Normalizer
from attn.functional.fused import Kernels
from attn.functional.pallas_tpu_layout import (
    FIRST,
    LAST,
    NEEDED,
    WHOLE,
    Operand,
    Result,
    Tile,
    add_part,
    by_column,
    by_row,
    gradient_of_part,
    has_whole_tiles,
    of_parts,
    result_of_part,
    steps,
)
from attn.functional.pallas_tpu_layout import run as run_kernel
from attn.functional.plans import Blocks, Plan
from attn.functional.taken_apart import Kind
from attn.functional.tiles import add_up, count

BLOCK_SIZE = 512
_MEMORY_OF_BOTH = 8 << 20  # bytes of VMEM for the gradients of all queries of a head
_NT = (((1,), (1,)), ((), ()))  # a b^T
_TN = (((0,), (0,)), ((), ()))  # a^T b

# What a kernel can evaluate on a tile.
INSIDE = frozenset(
    (
        *("add", "sub", "mul", "div", "neg", "abs", "sign", "max", "min", "rem", "floor", "ceil", "round", "clamp"),
        *("exp", "exp2", "log", "log1p", "tanh", "sin", "cos", "sqrt", "rsqrt", "pow", "integer_pow", "square"),
        *("logistic", "select_n", "eq", "ne", "lt", "le", "gt", "ge", "and", "or", "xor", "not", "is_finite"),
        *("shift_left", "shift_right_logical", "shift_right_arithmetic", "convert_element_type"),
        *("broadcast_in_dim", "stop_gradient", "custom_jvp_call", "pvary", "pcast"),
    )
)


def attend(
    call: Call, *, known=None, interpret=False, block_size: int = BLOCK_SIZE, lanes: int = 128
) -> tuple[Array, Normalizer]:
    """Compute the attention of all heads.

    Args:
      call: of all heads.
      known: as in `fused.attend`.
      interpret: run the kernels as ordinary JAX on any device; `pltpu.InterpretParams()` also models memory and copies.
      block_size: largest number of queries, and of keys, in a tile.
      lanes: width of vectors; less than 128 in tests only.
    """
    return fused.attend(call, _blocks(call, block_size, lanes), _kernels(interpret), known)


def unsupported_reason(call: Call, *, supported: Sequence[str] = fused.DTYPES) -> str | None:
    """Return the part of a call that the kernels cannot serve, or None.

    Args:
      call: with marks of `attn.per_head`.
      supported: names of dtypes; in an interpreter also float64.
    """
    return fused.unsupported_reason(call, _blocks(call, BLOCK_SIZE, 128), _kernels(False), supported)


def _blocks(call: Call, block_size: int, lanes: int) -> Blocks:
    """Return the shape of a tile: whole vectors, as few as hold short sequences."""
    rows, columns = (min(block_size, -(-n // lanes) * lanes) for n in (call.T, call.S))
    return Blocks(rows, columns, lanes)


def _kernels(interpret) -> Kernels:
    forward, backward = (functools.partial(each, interpret) for each in (_forward, _backward))
    return Kernels(forward, backward, INSIDE.__contains__)


# Forward


def _forward(interpret, plan: Plan, query, key, value, parts, flags) -> list[Array]:
    """Compute (out `[B N T Hv]`, peak and total `[B N T]`)."""
    Hv, (bq, _, lanes) = value.shape[-1], plan.blocks

    def run(query, key, value, *rest):
        operands = [by_row(plan, query), by_column(plan, key), by_column(plan, value)]
        operands += of_parts(plan, rest[: len(parts)])
        listed = steps(plan, rest[len(parts) :], "rows")
        rows = count(plan.T, bq) * bq
        results = [
            Result((rows, Hv), (bq, Hv), lambda row, column: (row, 0), value.dtype),
            Result((2, rows), (2, bq), lambda row, column: (0, row), plan.wide),
        ]
        scratch = [pltpu.VMEM(shape, plan.wide) for shape in ((bq, lanes), (bq, lanes), (bq, Hv))]
        return run_kernel(_forward_kernel, "attn_forward", plan, listed, operands, results, scratch, interpret)

    out, stats = fused.folded(run)(query, key, value, *parts, *flags)
    return [out[:, :, : plan.T], *(stats[:, :, n, : plan.T] for n in range(2))]


def _forward_kernel(plan: Plan, step, load_parts, operands, results, scratch):
    """Update the statistics of a block of queries by a tile; after the last tile of the row, write the results."""
    (q_ref, k_ref, v_ref), (out_ref, stats_ref) = operands, results
    peak_ref, total_ref, weighted_ref = scratch
    bk = plan.blocks.columns

    @pl.when(step.has(FIRST))
    def _():
        peak_ref[...] = jnp.full(peak_ref.shape, -jnp.inf, plan.wide)
        total_ref[...] = jnp.zeros(total_ref.shape, plan.wide)
        weighted_ref[...] = jnp.zeros(weighted_ref.shape, plan.wide)

    def update(is_whole: bool):
        tile = Tile(plan, step, load_parts())
        q, k, v = q_ref[...], k_ref[...], v_ref[...]
        if is_whole:
            s = tile.score(_dot(plan, q, k, _NT))
        else:
            raw = _dot(plan, q, _with_marks(k, v), _NT)
            if plan.has_score:  # which may return a number for NaN
                s = tile.score(jnp.where(raw == raw, raw, 0.0))
                s = tile.only_visible(jnp.where(raw == raw, s, jnp.nan), -jnp.inf, s != -jnp.inf)
            else:
                s = tile.only_visible(tile.score(raw), -jnp.inf)
            v = _finite(v)
        peak, total = peak_ref[...], total_ref[...]
        new = jnp.maximum(peak, s.max(axis=1, keepdims=True))
        safe = jnp.where(new == -jnp.inf, 0.0, new)  # -inf - -inf would be NaN
        p = jnp.exp(s - _wide(safe, bk))
        shrink = jnp.exp(peak - safe)
        peak_ref[...] = new
        total_ref[...] = total * shrink + p.sum(axis=1, keepdims=True)
        kept = tile.drop(p).astype(v.dtype)
        weighted_ref[...] = weighted_ref[...] * _wide(shrink, v.shape[1]) + _dot(plan, kept, v)

    _when_needed(plan, step, update)

    @pl.when(step.has(LAST))
    def _():
        peak, total = peak_ref[...], total_ref[...]
        empty = total == 0
        inverse = 1 / (jnp.where(empty, 1.0, total) * (1 - plan.rate))
        out_ref[...] = (weighted_ref[...] * _wide(inverse, weighted_ref.shape[1])).astype(out_ref.dtype)
        stats = jnp.where(empty, 0.0, peak), total
        stats_ref[...] = jnp.concatenate([x.T[:1] for x in stats])


# Backward


def _backward(interpret, plan: Plan, query, key, value, parts, flags, peak, dout, delta, wanted) -> list[Array]:
    """Compute the gradients of the wanted inputs: query, key, value, and parts."""
    if plan.rate:
        dout = (dout / (1 - plan.rate)).astype(dout.dtype)
    stats = jnp.stack([peak, delta], axis=2)  # [b N 2 T]
    found = {}
    for order, names in _split_work(plan, wanted, query.shape[-1]).items():
        run = functools.partial(_run_backward, interpret, plan, order, names)
        results = fused.folded(run)(query, key, value, dout, stats, *parts, *flags)
        found.update(zip(names, results, strict=True))
    inputs = query, key, value, *parts
    return [add_up(plan, _cut(plan, n, found[n], x), x) for n, x in enumerate(inputs) if wanted[n]]


def _cut(plan: Plan, n: int, gradient: Array, x: Array) -> Array:
    """Return the gradient of input n without the padding of blocks, `[B N ...]`."""
    return gradient_of_part(plan, plan.parts[n - 3].kind, gradient) if n >= 3 else gradient[:, :, : x.shape[2]]


def _split_work(plan: Plan, wanted: Sequence[bool], H: int) -> dict[str, list[int]]:
    """Return which kernel computes which inputs' gradients, by their numbers.

    Args:
      plan: the plan.
      wanted: one bool per input: query, key, value, and the parts.
      H: the width of a query.
    """
    kinds = [Kind.QUERY, Kind.KEY, Kind.KEY, *(part.kind for part in plan.parts)]
    numbers = [n for n, is_wanted in enumerate(wanted) if is_wanted]
    by_row = [n for n in numbers if kinds[n] == Kind.QUERY]
    by_column = [n for n in numbers if kinds[n] != Kind.QUERY]
    rows = count(plan.T, plan.blocks.rows) * plan.blocks.rows
    if (
        by_row == [0] and by_column and 12 * rows * H <= _MEMORY_OF_BOTH
    ):  # float32, and the result, which has two copies
        return {"both": numbers}
    work = {"rows": by_row, "columns": by_column}
    return {order: names for order, names in work.items() if names}


def _run_backward(interpret, plan: Plan, order: str, names: list[int], query, key, value, dout, stats, *rest):
    """Run one backward kernel: the gradients of the inputs of these numbers, `[B N ...]`."""
    parts, flags = rest[: len(plan.parts)], rest[len(plan.parts) :]
    bq, bk, lanes = plan.blocks
    # Queries of padding get the weights exp(s - inf) = 0.
    missing = -plan.T % bq
    stats = jnp.concatenate(
        [stats, jnp.broadcast_to(jnp.array([jnp.inf, 0], plan.wide)[:, None], (*stats.shape[:2], 2, missing))], axis=3
    )
    operands = [by_row(plan, query), by_column(plan, key), by_column(plan, value), by_row(plan, dout, "constant")]
    operands += [Operand(stats, (2, bq), lambda row, column: (0, row)), *of_parts(plan, parts)]
    dense = [3 + n for n, part in enumerate(plan.parts) if part.kind == Kind.PAIR]
    listed = steps(plan, flags, "rows" if order == "rows" else "columns", every=any(n in dense for n in names))
    widths = [x.shape[-1] for x in (query, key, value)]
    of_keys = [x.dtype if plan.group == 1 else plan.wide for x in (key, value)]
    rows = count(plan.T, bq) * bq
    results, scratch = [], []
    for n in names:
        if n == 0:
            block = rows if order == "both" else bq, widths[0]
            index = (lambda row, column: (0, 0)) if order == "both" else (lambda row, column: (row, 0))
            results.append(Result((rows, widths[0]), block, index, query.dtype))
            scratch.append(pltpu.VMEM(block, plan.wide))
        elif n < 3:
            block = bk, widths[n]
            shape = count(plan.S, bk) * bk, widths[n]
            results.append(Result(shape, block, lambda row, column: (column, 0), of_keys[n - 1]))
            scratch.append(pltpu.VMEM(block, plan.wide))
        else:
            results.append(result_of_part(plan, plan.parts[n - 3].kind))
    if order == "rows":  # what belongs to the block of queries: clean queries, and statistics as columns
        scratch += [pltpu.VMEM((bq, widths[0]), query.dtype), *[pltpu.VMEM((bq, lanes), plan.wide)] * 2]
    else:  # clean keys and values
        scratch += [pltpu.VMEM((bk, x.shape[-1]), x.dtype) for x in (key, value)]
    kernel = functools.partial(_backward_kernel, order, names)
    return run_kernel(kernel, f"attn_backward_{order}", plan, listed, operands, results, scratch, interpret)


def _backward_kernel(order: str, names: list[int], plan: Plan, step, load_parts, operands, results, scratch):
    """Add the gradients of a tile to those of its block of queries or keys; write these after the last tile."""
    q_ref, k_ref, v_ref, dout_ref, stats_ref = operands
    bq, bk, lanes = plan.blocks
    sums = dict(zip([n for n in names if n < 3], scratch))
    kept = scratch[len(sums) :]
    outs = dict(zip(names, results, strict=True))
    of_parts = [n - 3 for n in names if n >= 3]

    def columns():
        return [_column(stats_ref[n : n + 1], lanes) for n in range(2)]

    @pl.when(step.is_first)
    def _():
        for n in names:
            if n == 0 and order == "both":
                sums[0][...] = jnp.zeros(sums[0].shape, plan.wide)
            elif n >= 3 and plan.parts[n - 3].kind in (Kind.CONSTANT, Kind.DISTANCE):
                outs[n][...] = jnp.zeros(outs[n].shape, plan.wide)

    @pl.when(step.has(FIRST))
    def _():
        for n in names:
            if n in sums and not (n == 0 and order == "both"):
                sums[n][...] = jnp.zeros(sums[n].shape, plan.wide)
            elif n >= 3 and plan.parts[n - 3].kind in (Kind.QUERY, Kind.KEY):
                outs[n][...] = jnp.zeros(outs[n].shape, plan.wide)
        own = [_finite(q_ref[...]), *columns()] if order == "rows" else [_finite(ref[...]) for ref in (k_ref, v_ref)]
        for ref, x in zip(kept, own, strict=True):
            ref[...] = x

    for n in names:
        if n >= 3 and plan.parts[n - 3].kind == Kind.PAIR:

            @pl.when(jnp.logical_not(step.has(NEEDED)))
            def _(out=outs[n]):
                out[...] = jnp.zeros(out.shape, plan.wide)

    def update(is_whole: bool):
        tile = Tile(plan, step, load_parts())
        clean = (lambda x: x) if is_whole else _finite
        dout = dout_ref[...]
        if order == "rows":
            (q, peak, delta), k, v = [ref[...] for ref in kept], clean(k_ref[...]), clean(v_ref[...])
        else:
            q, (k, v), (peak, delta) = clean(q_ref[...]), [ref[...] for ref in kept], columns()
        s, pull = tile.score_and_pullback(_dot(plan, q, k, _NT), of_parts)
        p = jnp.exp(s - _wide(peak, bk))
        if not is_whole:
            p = tile.only_visible(p, 0.0, *([s != -jnp.inf] if plan.has_score else []))
        ds = p * (tile.drop(_dot(plan, dout, v, _NT)) - _wide(delta, bk))
        draw, *dparts = pull(ds)
        if 2 in sums:
            sums[2][...] += _dot(plan, tile.drop(p).astype(dout.dtype), dout, _TN)
        draw = draw.astype(q.dtype)
        if 1 in sums:
            sums[1][...] += _dot(plan, draw, q, _TN)
        if 0 in sums:
            rows = pl.ds(pl.multiple_of(step.row * bq, bq), bq) if order == "both" else slice(None)
            sums[0][rows, :] += _dot(plan, draw, k)
        for n, d in zip(of_parts, dparts):
            add_part(plan, plan.parts[n].kind, step, outs[3 + n], d)

    _when_needed(plan, step, update)

    for n in sums:

        @pl.when(step.is_last if n == 0 and order == "both" else step.has(LAST))
        def _(n=n):
            outs[n][...] = sums[n][...].astype(outs[n].dtype)


# One tile


def _when_needed(plan: Plan, step, update: Callable[[bool], None]):
    """Run `update(is_whole)` if the tile is needed."""
    has_whole = has_whole_tiles(plan)
    is_whole = step.has(WHOLE) if has_whole else False

    @pl.when(step.has(NEEDED) & jnp.logical_not(is_whole))
    def _():
        update(False)

    if has_whole:

        @pl.when(step.has(NEEDED) & is_whole)
        def _():
            update(True)


def _dot(plan: Plan, a: Array, b: Array, dimensions=(((1,), (0,)), ((), ()))) -> Array:
    """Return a matrix product, in float32."""
    return lax.dot_general(a, b, dimensions, precision=plan.precision, preferred_element_type=plan.wide)


def _wide(x: Array, width: int) -> Array:
    """Return a tile of this width whose columns are those of x `[r lanes]`, which are all the same."""
    lanes = x.shape[1]
    return jnp.tile(x, (1, width // lanes)) if width % lanes == 0 else x[:, :width] if width < lanes else x[:, :1]


def _column(row: Array, lanes: int) -> Array:
    """Return a row `[1 r]` as a column, once per lane: `[r lanes]`."""
    return jnp.broadcast_to(row, (lanes, row.shape[1])).T


def _finite(x: Array) -> Array:
    """Replace numbers that are not finite by 0."""
    return jnp.where(x - x == 0, x, 0)


def _with_marks(key: Array, value: Array) -> Array:
    """Return keys that are NaN where their value has a number that is not finite: so are the scores that see it."""
    wide = jnp.promote_types(value.dtype, jnp.float32)
    return key + (value - value).astype(wide).sum(axis=1, keepdims=True).astype(key.dtype)
