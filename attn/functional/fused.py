"""The common part of fused kernels: a call taken apart, its tiles in order, and every derivative.

A fused kernel computes a tile of scores, the user's mask and score of it, and its part of the output in fast memory.
`plans` says which of it runs inside of the kernel.

`attend` does everything but run the kernels: `pallas_tpu` and `pallas_gpu` give it two functions, forward and backward.

Axes: `b` batch, 1 or B; `n` heads, 1 or N. Every array of a kernel has both in front, and 1 where it is shared.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jaxtyping import Array

from attn.functional import blockwise, derivatives, dtypes, masks, scores
from attn.functional.blocks import spread
from attn.functional.contract import Call, Normalizer, Unsupported, resolve_offsets
from attn.functional.plans import Blocks, Plan, Processor, plan_call
from attn.functional.sharding import is_sharded, vary_alike
from attn.functional.taken_apart import Kind, TakenApart, Value

DTYPES = ("bfloat16", "float16", "float32")  # that kernels read on a processor; float16 as float32


class Kernels(NamedTuple):
    """The kernels of one kind of processor.

    Attributes:
      forward: (plan, query, key, value, parts, flags) -> (out, peak, total).
      backward: (plan, query, key, value, parts, flags, peak, dout, delta, wanted) -> gradients, one per wanted input.
      processor: what they can do.

    Arrays are query `[b N T H]`, key `[b K S H]`, value `[b K S Hv]`, parts `[b n ...]` (see `taken_apart`) and flags:
    needed and whole tiles, `[b n steps]`, where the plan does not have them; and, `[b n]`, whether the parts of a score
    are tame, so that it hides nothing, where `may_hide` is False and it has parts. b is the size of the batch, or 1.
    """

    forward: Callable
    backward: Callable
    processor: Processor


def attend(call: Call, blocks: Blocks, kernels: Kernels, known=None) -> tuple[Array, Normalizer]:
    """Compute the attention of all heads by fused kernels, or its derivative alone.

    Args:
      call: of all heads.
      blocks: the shape of a tile.
      kernels: of the processor.
      known: (out `[T N Hv]`, normaliser of `[T N]`) over more keys than these. They are returned, and nothing is
        computed; the derivative is these keys' summand of theirs, as in `blockwise.attend_part`.

    Raises:
      Unsupported: a function of the user's that they cannot evaluate.
    """
    call = vary_alike(resolve_offsets(call._replace(**_without_float16(call))))
    plan, parts, flags = plan_call(call, blocks, kernels.processor)
    # Parts of the score come first; those of mask and dropout are compared, and have no derivative.
    is_moving = [n < len(plan.score.parts) and jnp.issubdtype(x.dtype, jnp.floating) for n, x in enumerate(parts)]

    def split(inputs, fixed):
        (query, key, value, *moving), (still, flags, known) = inputs, fixed
        moving, still = iter(moving), iter(still)
        return query, key, value, [next(moving) if each else next(still) for each in is_moving], flags, known

    def value(inputs, fixed):
        query, key, value, parts, flags, known = split(inputs, fixed)
        out, peak, total = known or kernels.forward(plan, query, key, value, parts, flags)
        return [out, peak, total, jnp.zeros_like(total)]

    def like(inputs, fixed):
        query, key, value, parts, _, known = split(inputs, fixed)
        return _like(plan, query[0], key[0], value[0], parts, known)

    def pullback(inputs, fixed, results, cotangents, wanted):
        query, key, value, parts, flags, _ = split(inputs, fixed)
        (out, peak, total, _), (dout, _, _, dlogsumexp) = results, cotangents
        wide = plan.wide
        # The kernel's weights are exp(s - peak), not divided by their total, so its cotangents are.
        inverse = Normalizer(peak, total).inverse()
        delta = jnp.sum(dout.astype(wide) * out.astype(wide), axis=-1) - dlogsumexp
        dout = (dout.astype(wide) * inverse[..., None]).astype(value.dtype)
        wanted = (*wanted[:3], *_spread_over(wanted[3:], is_moving))
        return kernels.backward(plan, query, key, value, parts, flags, peak, dout, delta * inverse, wanted)

    # Sums of weights times large values may overflow, although their means do not. A power of two is exact.
    headroom = 2.0 ** -math.ceil(math.log2(plan.S / (1 - plan.rate)))
    # Products with infinity may be -inf, which would seem hidden, so infinite queries and keys are NaN for a kernel.
    query, key = (jnp.where(jnp.isfinite(x), x, jnp.nan) for x in (call.query, call.key))
    arrays = [jnp.moveaxis(x, 1, 0)[None] for x in (query, key, call.value * headroom)]
    inputs = [*arrays, *(x for x, each in zip(parts, is_moving) if each)]
    fixed = [x for x, each in zip(parts, is_moving) if not each], flags, _in_front(known, headroom)
    inputs, fixed = vary_alike((inputs, fixed))  # again: what a plain function captures is not a leaf of the call
    forms = derivatives.Forms(value, like, pullback)
    # The total depends on which peak a kernel takes, so its derivative is that of the logsumexp, whose value here is 0.
    out, peak, total, logsumexp = derivatives.differentiable(forms)(inputs, fixed)
    total = total * jnp.exp(logsumexp)
    dtype = dtypes.wide_dtype(call.query.dtype)
    return jnp.moveaxis(out[0] / headroom, 0, 1), Normalizer(*(x[0].T.astype(dtype) for x in (peak, total)))


def _in_front(known, headroom: float) -> list[Array]:
    """Return known results with heads in front, as kernels have them: out `[1 N T Hv]`, peak and total `[1 N T]`."""
    if known is None:
        return []
    out, normalizer = known
    return [jnp.moveaxis(x, 1, 0)[None] for x in (out * headroom, *normalizer)]


def _without_float16(call: Call) -> dict[str, Array]:
    """Return the arrays of a call, float32 in place of float16, which not all processors have."""
    arrays = {name: getattr(call, name) for name in ("query", "key", "value")}
    return {name: x.astype(jnp.float32) if x.dtype == jnp.float16 else x for name, x in arrays.items()}


def _spread_over(wanted: Sequence[bool], is_moving: Sequence[bool]) -> list[bool]:
    """Return one bool per part: those of the parts that have a derivative, and False for the others."""
    wanted = iter(wanted)
    return [next(wanted) if each else False for each in is_moving]


# The same in ordinary JAX


@dataclasses.dataclass(frozen=True, eq=False)
class _Kept:
    """Dropout by a function `(i, j)` that is True for the weights that are kept."""

    rate: float
    keep: Callable

    def __call__(self, weights: Array, i, j) -> Array:
        """Drop weights of a tile and rescale the others."""
        return jnp.where(self.keep(i, j), weights / (1 - self.rate), 0)


def _like(plan: Plan, query, key, value, parts: Sequence[Array], known: list[Array]) -> list[Array]:
    """Compute the call by `blockwise`, as a function of the parts: out `[1 N T Hv]`, and `[1 N T]` as `value` does.

    With known results (see `attend`), return these. Peak and total have no derivative, and the logsumexp has its own,
    up to a constant.
    """

    def read(part: Value, x: Array, i, j):
        if part.kind == Kind.DISTANCE:
            return spread(x, i, j, plan.T)
        index = {Kind.CONSTANT: (), Kind.QUERY: (i,), Kind.KEY: (j,), Kind.PAIR: (i, j)}[part.kind]
        return x[index] if index else x

    def on_tile(apart: TakenApart, values: Sequence[Array], *arguments):
        """Evaluate on a tile, which gets a second row or column where it has only one."""
        *s, i, j = arguments
        rows, columns = i.shape[0], j.shape[1]
        more = (0, int(rows == 1)), (0, int(columns == 1))
        i, j = jnp.pad(i, (more[0], (0, 0)), mode="edge"), jnp.pad(j, ((0, 0), more[1]), mode="edge")
        tiles = [read(part, x, i, j) for part, x in zip(apart.parts, values)]
        return apart(tiles, *(jnp.pad(x, more, mode="edge") for x in s), i, j)[:rows, :columns]

    def one(query, key, value, parts, known):
        score, mask, keep = (
            None if each is None else functools.partial(on_tile, each, values)
            for each, values in zip(plan.others, plan.split(parts))
        )
        dropout = None if keep is None else _Kept(plan.rate, keep)
        call = Call(query, key, value, masks.as_mask(mask), scores.as_score(score), 1.0, dropout)
        if known:
            known = known[0], Normalizer(*known[1:])
            out, normalizer = blockwise.attend_part(call, blockwise.BLOCK_SIZE, known=known, is_apart=True)
        else:
            out, normalizer = blockwise.attend(call, is_apart=True)
        empty = normalizer.total == 0
        logsumexp = jnp.where(empty, 0, jnp.log(jnp.where(empty, 1, normalizer.total)))
        return out if known else out.astype(value.dtype), *map(jnp.zeros_like, normalizer), logsumexp

    def grouped(x):
        return x.reshape(plan.K, plan.group, *x.shape[1:])

    is_shared = [x.shape[1] == 1 for x in parts]
    parts = [x[0, 0] if each else grouped(x[0]) for x, each in zip(parts, is_shared)]
    of_parts = [None if each else 0 for each in is_shared]
    of_group = jax.vmap(one, in_axes=(0, None, None, of_parts, 0))
    arrays = grouped(query), key, value, parts, [grouped(x[0]) for x in known]
    results = jax.vmap(of_group, in_axes=(0, 0, 0, of_parts, 0))(*arrays)
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
    if is_sharded((call.query, call.key, call.value)):
        return "arrays that are sharded on an explicit mesh; use jax.shard_map"

    def planned(*arrays):
        query, key, value = (x if x.ndim == 3 else x[:, None] for x in arrays)
        return plan_call(call._replace(query=query, key=key, value=value), blocks, kernels.processor)[1:]

    try:
        # Traced apart, so that nothing of it is left in the program of the caller.
        jax.make_jaxpr(planned)(call.query, call.key, call.value)
    except Unsupported as error:
        return str(error)
    return None
