"""An implementation of attention: a Pallas kernel for all heads at once, in tiles of its own, in interpret mode."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from attn import masks, multi_head_attention
from attn.functional import contract, dtypes, mods, sharding
from attn.functional.blocks import in_blocks
from attn.functional.implementations import Implementation, register

QUERIES, KEYS = 8, 4  # at most so many make a tile


def limits(mask):
    """Return the largest visible j - i, and the number of keys."""
    if isinstance(mask, masks.both):
        return tuple(map(jnp.minimum, limits(mask.left), limits(mask.right)))
    reach = dtypes.clamped(mask.offset) if isinstance(mask, masks.causal) else dtypes.FAR
    return jnp.int32(reach), jnp.int32(dtypes.clamped(mask.length) if isinstance(mask, masks.padding) else dtypes.FAR)


def unsupported_reason(call):
    if sharding.is_sharded((call.query, call.key, call.value)):
        return "arrays sharded on an explicit mesh"
    parts = [part for part in mods.nested(call.mask) if not isinstance(part, masks.both)]
    known = all(isinstance(part, masks.causal | masks.padding) for part in parts)
    return None if known else f"mask {call.mask.expression()} (causal and padding, joined by &)"


def kernel(reach, length, scale, query, query_marks, key, key_marks, value, out):
    q = query[0, 0]  # [r H]
    r, (blocks, c) = len(q), key_marks.shape[1:]
    i = pl.program_id(1) * r + jnp.arange(r)[:, None]

    def step(n, carry):
        peak, total, mean = carry
        j = n * c + jnp.arange(c)[None, :]
        s = scale[0] * (q @ key[0, n].T) + query_marks[0, 0][:, None] + key_marks[0, n][None, :]
        visible = (j - i <= reach[0]) & (j < length[0])
        s = jnp.where(visible, s, -jnp.inf)
        new = jnp.maximum(peak, s.max(axis=1))
        finite = jnp.where(new == -jnp.inf, 0, new)
        p, shrink = jnp.exp(s - finite[:, None]), jnp.exp(peak - finite)
        v = contract.zero_hidden_values(value[0, n], visible.any(axis=0))
        before, total = total * shrink, total * shrink + p.sum(axis=1)
        each = jnp.where(total == 0, 1, total)[:, None]  # a mean, not a sum, so that large values do not overflow
        return new, total, mean * (before[:, None] / each) + (p / each) @ v

    zeros = jnp.zeros(r, q.dtype)
    _, _, mean = jax.lax.fori_loop(0, blocks, step, (zeros - jnp.inf, zeros, jnp.zeros((r, out.shape[-1]))))
    out[0, 0] = mean.astype(out.dtype)


@jax.custom_vjp
def attend_all(query, key, value, mask, scale):
    (T, N, _), S, wide = query.shape, len(key), dtypes.wide_dtype(query.dtype)
    marked, mask_of_head = mods.unwrap_per_head(mask, N)

    def limits_of_head(slices):
        mask = mask_of_head(slices)
        reach, length = (dtypes.FAR, S) if mask is None else limits(masks.as_mask(mask).resolve(T, S))
        return jnp.int32(reach), jnp.minimum(length, S)

    def by_head(x, size):  # [N blocks size ...], or [K blocks size ...]
        return jax.vmap(lambda one: in_blocks(one, size))(x.swapaxes(0, 1))

    def marked_blocks(x, size):
        x, nonfinite = contract.zero_nonfinite_rows(x)
        return by_head(x.astype(wide), size), by_head(jnp.where(nonfinite, jnp.nan, jnp.zeros((), wide)), size)

    reach, length = jax.vmap(limits_of_head, axis_size=N)(marked)
    scales = jnp.broadcast_to(jnp.asarray(scale, wide), N)
    (queries, query_marks), (keys, key_marks) = marked_blocks(query, QUERIES), marked_blocks(key, KEYS)
    arrays = reach, length, scales, queries, query_marks, keys, key_marks, by_head(value.astype(wide), KEYS)
    arrays = sharding.vary_alike(arrays)
    shape = sharding.shape_like(arrays[3], (*queries.shape[:3], value.shape[-1]), wide)

    def whole(x):  # all blocks of head n, or of the group that it reads
        return pl.BlockSpec((1, *x.shape[1:]), lambda n, m: (n * len(x) // N,) + (0,) * (x.ndim - 1))

    def block(x):  # block m of head n
        return pl.BlockSpec((1, 1, *x.shape[2:]), lambda n, m: (n, m) + (0,) * (x.ndim - 2))

    specs = [block(x) if number in (3, 4) else whole(x) for number, x in enumerate(arrays)]
    run = pl.pallas_call(kernel, shape, grid=queries.shape[:2], in_specs=specs, out_specs=block(shape), interpret=True)
    return run(*arrays).reshape(N, -1, value.shape[-1])[:, :T].swapaxes(0, 1).astype(value.dtype)


def backward(saved, g):  # by recomputation
    def again(query, key, value, scale):
        return multi_head_attention(query, key, value, mask=mask, scale=scale, implementation="reference")

    query, key, value, mask, scale = saved
    dquery, dkey, dvalue, dscale = jax.vjp(again, query, key, value, scale)[1](g)
    return dquery, dkey, dvalue, None, dscale


attend_all.defvjp(lambda *arguments: (attend_all(*arguments), arguments), backward)


def attend(call):
    return attend_all(call.query, call.key, call.value, call.mask, jnp.asarray(call.scale)), None


features = {"features": {"mask"}, "derivatives": {"reverse"}}
register("tiled", Implementation(attend, all_heads=True, **features, unsupported_reason=unsupported_reason))
