"""Calls of ring attention and of the same of the whole sequence, and their derivatives, for the tests of the ring."""

import attention_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jax.tree_util import Partial

import attn
from attn import masks, per_head, positions, scores
from attn.functional import blockwise, ring_heads, zigzag
from attn.functional.ring import ring_attention

DEVICES = jax.device_count()
ORDERS = ("balanced", "consecutive", "zigzag")
AXIS = "sequence"
ROWS = P(AXIS)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Small tiles, and a turn for each head of keys, as long sequences have them."""
    monkeypatch.setattr(blockwise, "BLOCK_SIZE", cases.BLOCK_SIZE)
    monkeypatch.setattr(ring_heads, "TURN", 1)


def on_devices(call, in_specs, out_specs=ROWS, devices=DEVICES, **options):
    mesh = jax.make_mesh((devices,), (AXIS,), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])
    return jax.shard_map(call, mesh=mesh, in_specs=in_specs, out_specs=out_specs, **options)


def ring(query, key, value, *, order="balanced", **options):
    """Ring attention of consecutive rows, in any order."""
    if order != "zigzag":
        return ring_attention(query, key, value, axis_name=AXIS, order=order, **options)
    moved = zigzag.to_zigzag((query, key, value), AXIS)
    return zigzag.from_zigzag(ring_attention(*moved, axis_name=AXIS, order=order, **options), AXIS)


def whole(query, key, value, *, order=None, **options):
    """The same of the whole sequence, on one device."""
    return attn.multi_head_attention(query, key, value, implementation="reference", **options)


N, K, H, HV = 4, 2, 3, 5
T, S = 6 * DEVICES, 10 * DEVICES


def setting(dtype="float64") -> dict:
    """Arrays of every kind that a call may differentiate."""
    shapes = (T, N, H), (S, K, H), (S, K, HV), (N, 8), (N,), (T,), (S,), (T + S - 1,), ()
    drawn = cases.normal(*shapes, dtype=dtype)
    names = ("query", "key", "value", "buckets", "slopes", "of_query", "of_key", "table", "scale")
    return dict(zip(names, drawn)) | {"offset": jnp.int32(S - T)}


SHARDED = {name: P(AXIS) if name in ("query", "key", "value") else P() for name in setting("float32")}
IDS = jnp.arange(S) * 3 // S


def t5(table, s, i, j):
    return s + table[positions.relative_buckets(j - i, num_buckets=8, max_distance=16)]


def everything(attend, x, order="balanced"):
    """A mask and a score of all kinds: pytrees, marked and not, functions that capture arrays, traced integers."""
    mask = masks.causal(x["offset"]) & per_head(masks.padding(jnp.arange(N) + S - N)) | (lambda i, j: j == x["offset"])
    score = per_head(Partial(t5, x["buckets"])) >> per_head(scores.alibi(x["slopes"], 0)) >> scores.softcap(20.0)
    score = score >> (lambda s, i, j: s * x["of_query"][i] + x["of_key"][j]) >> scores.relative_bias(x["table"], 0)
    options = {"scale": x["scale"], "dropout": attn.Dropout(0.3, jax.random.key(5)), "return_logsumexp": True}
    return attend(x["query"], x["key"], x["value"], mask=mask, score=score, order=order, **options)


def packed(attend, x, order="balanced"):
    """Segments, which a window joins, and a score by distance from a function."""
    mask = masks.segments(IDS[:T], IDS) | masks.sliding_window(2, 1, x["offset"])
    score = lambda s, i, j: s + x["table"][j - i + T - 1] * x["of_query"][i] * jnp.exp(x["scale"] / 2)  # noqa: E731
    return attend(x["query"], x["key"], x["value"], mask=mask, score=score, order=order)


def unmasked(attend, x, order="balanced"):
    return attend(x["query"], x["key"], x["value"], order=order, return_logsumexp=True)


def objective(call):
    """A number from everything that a call returns, as a function of the floats."""

    def of_floats(floats, offset):
        leaves = jax.tree.leaves(call(floats | {"offset": offset}))
        return sum(jnp.sum(jnp.sin(jnp.where(jnp.isfinite(x), x, 0))) for x in leaves)

    return of_floats


def value(call):
    return lambda x: call(x)


def gradient(call):
    return lambda x: jax.grad(objective(call))(floats(x), x["offset"])


def tangent(call):
    return lambda x: jax.jvp(lambda f: call(f | {"offset": x["offset"]}), (floats(x),), (direction(x),))[1]


def forward_over_reverse(call):
    return lambda x: jax.jvp(lambda f: jax.grad(objective(call))(f, x["offset"]), (floats(x),), (direction(x),))[1]


def reverse_over_reverse(call):
    def of(x):
        inner = lambda f: jax.tree.leaves(jax.grad(objective(call))(f, x["offset"]))  # noqa: E731
        products = lambda f: sum(map(jnp.vdot, inner(f), jax.tree.leaves(direction(x))))  # noqa: E731
        return jax.grad(products)(floats(x))

    return of


def floats(x):
    return {name: array for name, array in x.items() if name != "offset"}


def direction(x):
    return jax.tree.map(jnp.cos, floats(x))


def compare(transform, function, order="balanced", attend=ring, **options):
    """Compare a transformed call on the devices with that of the whole sequence."""
    local = on_devices(lambda x: function(attend, x, order), (SHARDED,), **options)
    expected = jax.jit(transform(lambda x: function(whole, x)))(setting())
    found = jax.jit(transform(local))(setting())
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-10)


TRANSFORMS = (forward_over_reverse, tangent, gradient, value, reverse_over_reverse)
FUNCTIONS = (everything, packed, unmasked)
