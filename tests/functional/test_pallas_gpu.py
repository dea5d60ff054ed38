"""Kernels for GPUs: lists of tiles, gradients of distances, what Triton can evaluate, and that calls lower for CUDA.

Nothing here needs a GPU. What every implementation has to do is in the other tests, which run these kernels in the
interpreter.
"""

import functools

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

import attn
from attn import masks, positions, scores
from attn.functional import fused, pallas_gpu, pallas_gpu_layout, pallas_gpu_parts
from attn.functional.contract import Call
from attn.functional.fused import Blocks

# Later versions compile kernels while they lower them, for which they need the CUDA plugin.
lowers_without_plugin = pytest.mark.skipif(jaxlib.version.__version_info__ > (0, 10, 2), reason="needs the CUDA plugin")


# Lists of tiles


def listed_tiles(mask, T: int, S: int, blocks: Blocks, order: str) -> pallas_gpu_layout.Lists:
    query, key = jnp.zeros((T, 1, 8)), jnp.zeros((S, 1, 8))
    plan, _, flags = fused.plan_call(Call(query, key, key, mask, None, 1.0), blocks, pallas_gpu.PROCESSOR)
    return pallas_gpu_layout.lists(plan, flags, order)


def lists_by_pairs(visible: np.ndarray, blocks: Blocks, order: str) -> tuple[list[list[int]], list[int]]:
    """Each block's needed tiles, and how many of them, which come first, are whole."""
    T, S = visible.shape
    found = []
    for row in range(-(-T // blocks.rows)):
        for column in range(-(-S // blocks.columns)):
            tile = visible[row * blocks.rows :, column * blocks.columns :][: blocks.rows, : blocks.columns]
            is_full = tile.shape[1] == blocks.columns
            found.append((row, column, tile.any(), tile.all() and is_full))
    main, other = (0, 1) if order == "rows" else (1, 0)
    numbers = range(1 + max(each[main] for each in found))
    whole = [[each[other] for each in found if each[main] == n and each[3]] for n in numbers]
    partial = [[each[other] for each in found if each[main] == n and each[2] and not each[3]] for n in numbers]
    return [first + rest for first, rest in zip(whole, partial)], list(map(len, whole))


@pytest.mark.parametrize("order", ["rows", "columns"])
@pytest.mark.parametrize("is_traced", [False, True])
@pytest.mark.parametrize("S", [70, 96])
def test_programs_visit_the_tiles_with_a_visible_pair_whole_ones_first(order, is_traced, S):
    T, blocks = 50, Blocks(16, 32)

    def of(offset, *, traced: bool = False):
        mask = masks.sliding_window(40, 2, offset=jnp.asarray(offset) if traced else offset)
        return mask.resolve(T, S)

    visible = np.asarray(masks.evaluate(of(20), jnp.arange(T)[:, None], jnp.arange(S)[None, :]))
    expected = lists_by_pairs(visible, blocks, order)
    assert 0 < sum(expected[1]) < sum(map(len, expected[0])) < -(-T // 16) * -(-S // 32)
    listed = listed_tiles(of(20, traced=is_traced), T, S, blocks, order)
    numbers, counts = (np.asarray(x)[0, 0] for x in (listed.numbers, listed.counts))
    found = [row[:needed].tolist() for row, (_, needed) in zip(numbers, counts)], counts[:, 0].tolist()
    assert found == expected


def test_lists_are_as_wide_as_the_longest():
    T = 256
    listed = listed_tiles(masks.sliding_window(16, 0, offset=0).resolve(T, T), T, T, Blocks(16, 16), "rows")
    assert listed.numbers.shape == (1, 1, 16, 2) and not listed.has_whole and listed.has_others


# Values and gradients by NumPy


def numpy_gradients(q, k, v, table, dout, offset):
    """Attention with a causal mask and a table of biases per distance in float64: (out, dq, dk, dv, dtable)."""
    q, k, v, table, dout = (np.asarray(x, np.float64) for x in (q, k, v, table, dout))
    (T, H), S = q.shape, len(k)
    distance = np.arange(S)[None, :] - np.arange(T)[:, None]
    s = q @ k.T / np.sqrt(H) + table[distance + T - 1]
    s = np.where(distance <= offset, s, -np.inf)
    p = np.exp(s - s.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    ds = p * (dout @ v.T - ((p @ v) * dout).sum(axis=1, keepdims=True))
    dtable = np.zeros(T + S - 1)
    np.add.at(dtable, distance + T - 1, ds)
    return p @ v, ds @ k / np.sqrt(H), ds.T @ q / np.sqrt(H), p.T @ dout, dtable


@pytest.mark.some(7)
@pytest.mark.parametrize("copies", ["one per block", "shared"])
@pytest.mark.parametrize("blocks", [(16, 16), (16, 64), (64, 16), (32, 32)])
@pytest.mark.parametrize("T, S, H, Hv", [(50, 70, 5, 3), (13, 7, 16, 32), (1, 20, 4, 4)])
def test_odd_shapes_and_gradients_of_distances(T, S, H, Hv, blocks, copies, monkeypatch):
    monkeypatch.setattr(pallas_gpu, "_blocks", lambda call, block_size: Blocks(*blocks))
    if copies == "shared":
        monkeypatch.setattr(pallas_gpu_parts, "_MEMORY_OF_COPIES", 1)
    rng = np.random.default_rng(T)
    shapes = (T, H), (S, H), (S, Hv), (T + S - 1,), (T, Hv)
    *arrays, dout = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)
    offset = max(0, S - T)

    def out(q, k, v, table):
        def score(s, i, j):
            return s + table[j - i + (T - 1)]

        mask = masks.causal(offset).resolve(T, S)
        call = Call(*(x[:, None] for x in (q, k, v)), mask, scores.function(score), H**-0.5)
        return pallas_gpu.attend(call, interpret=True)[0][:, 0]

    value, pull = jax.vjp(out, *arrays)
    for name, found, expected in zip(
        ("out", "dq", "dk", "dv", "dtable"), (value, *pull(dout)), numpy_gradients(*arrays, dout, offset), strict=True
    ):
        np.testing.assert_allclose(found, expected, atol=2e-6 * np.abs(expected).max(), err_msg=name)


def test_tiles_have_powers_of_two_and_fit_short_sequences():
    def blocks(T, S, H, dtype=jnp.bfloat16, score=None):
        q, k = (jax.ShapeDtypeStruct((n, 2, H), dtype) for n in (T, S))
        return pallas_gpu._blocks(Call(q, k, k, None, score, 1.0), None)[:2]

    assert blocks(4096, 4096, 64) == (64, 64)
    assert blocks(4096, 4096, 80, score=scores.softcap(5.0)) == (64, 32)
    assert blocks(4096, 20, 64) == (64, 32) and blocks(1, 4096, 64) == (16, 64)
    assert blocks(4096, 4096, 128, jnp.float32) == blocks(4096, 4096, 128, jnp.float16) == (32, 32)


def test_what_the_kernels_cannot_serve_is_named():
    def reason(H=16, dtype=jnp.float32, score=None):
        x = jnp.zeros((32, 2, H), dtype)
        return pallas_gpu.unsupported_reason(Call(x, x, x, None, score, 1.0))

    assert reason() is None and reason(dtype=jnp.float16) is None
    assert reason(H=257) == "heads wider than 256"
    assert "primitive 'erf' in the score" in reason(score=scores.function(lambda s, i, j: lax.erf(s)))


# Lowering for CUDA


def lowered(function, *shapes) -> str:
    """The program for a GPU, which this machine need not have."""
    return jax.jit(function).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()


def unary(name):
    return getattr(lax, name)


def binary(name):
    return lambda x: getattr(lax, name)(x, x + 2)


def comparison(name):
    return lambda x: jnp.where(getattr(lax, name)(x, x * x), x, 0)


def logical(name):
    return lambda x: jnp.where(getattr(lax, f"bitwise_{name}")(x > 1, x < 2), x, 2 * x)


def of_integers(name, *others):
    return lambda x: x * getattr(lax, name)(x.astype(jnp.int32), *map(jnp.int32, others)).astype(jnp.float32)


UNARY = (
    *("neg", "abs", "sign", "floor", "ceil", "square", "exp", "exp2", "expm1", "log", "log1p", "sqrt", "rsqrt", "cbrt"),
    *("logistic", "erf_inv", "sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "tanh", "asinh", "acosh"),
    *("atanh", "stop_gradient"),
)
FUNCTIONS = {
    **{name: unary(name) for name in UNARY},
    **{name: binary(name) for name in ("add", "sub", "mul", "div", "max", "min", "rem", "pow", "atan2")},
    **{name: comparison(name) for name in ("eq", "ne", "lt", "le", "gt", "ge")},
    **{name: logical(name) for name in ("and", "or", "xor")},
    **{name: of_integers(name) for name in ("population_count", "clz")},
    **{name: of_integers(name, 3) for name in ("shift_left", "shift_right_logical", "shift_right_arithmetic")},
    "clamp": lambda x: lax.clamp(-1.0, x, 1.0),
    "integer_pow": lambda x: x**3,
    "select_n": lambda x: lax.select(x > 0, x, -x),
    "not": lambda x: jnp.where(~(x > 1), x, 0),
    "is_finite": lambda x: jnp.where(lax.is_finite(x), x, 0),
    "convert_element_type": lambda x: x.astype(jnp.bfloat16).astype(jnp.float32),
    "bitcast_convert_type": lambda x: x * lax.bitcast_convert_type(x, jnp.int32).astype(jnp.float32),
    "broadcast_in_dim": lambda x: x + jnp.broadcast_to(x.sum(), x.shape),
    "custom_jvp_call": jax.nn.relu,
}


@lowers_without_plugin
@pytest.mark.parametrize("name", sorted(pallas_gpu.INSIDE - {"pvary", "pcast"}))  # which kernels leave out
def test_a_primitive_inside_a_kernel_lowers_with_its_derivative(name):
    function, shape = FUNCTIONS[name], jax.ShapeDtypeStruct((16, 32), jnp.float32)
    assert name in str(jax.make_jaxpr(function)(shape))

    def kernel(x_ref, value_ref, gradient_ref):
        value_ref[...], pull = jax.vjp(function, x_ref[...])
        (gradient_ref[...],) = pull(value_ref[...])

    call = pl.pallas_call(kernel, out_shape=[shape, shape], compiler_params=plgpu.CompilerParams())
    assert "triton" in lowered(call, shape)


@lowers_without_plugin
@pytest.mark.parametrize("name", ["erf", "erfc", "lgamma", "round"])
def test_a_primitive_that_is_not_inside_does_not_lower(name):
    def kernel(x_ref, value_ref):
        value_ref[...] = getattr(lax, name)(x_ref[...])

    shape = jax.ShapeDtypeStruct((16, 32), jnp.float32)
    call = pl.pallas_call(kernel, out_shape=shape, compiler_params=plgpu.CompilerParams())
    with pytest.raises(NotImplementedError, match=f"primitive in Pallas Triton lowering: {name}"):
        lowered(call, shape)
    assert name not in pallas_gpu.INSIDE


T, N, K = 100, 4, 2


def t5(table, s, i, j):
    return s + table[positions.relative_buckets(j - i)]


CALLS = {
    "no mask": lambda p: {},
    "causal": lambda p: {"mask": masks.causal()},
    "causal, traced offset": lambda p: {"mask": masks.causal(p["n"])},
    "segments": lambda p: {"mask": masks.segments(p["ids"], p["ids"]) & masks.causal()},
    "padding per head": lambda p: {"mask": attn.per_head(masks.padding(p["n"] + jnp.arange(N)))},
    "dense mask": lambda p: {"mask": masks.dense(p["dense"] > 0)},
    "own mask": lambda p: {"mask": masks.function(lambda i, j: (i - j) % 3 != 1)},
    "ALiBi per head": lambda p: {"score": attn.per_head(scores.alibi(p["slopes"])), "mask": masks.causal()},
    "soft-cap": lambda p: {"score": scores.softcap(p["slopes"][0])},
    "T5": lambda p: {"score": scores.function(functools.partial(t5, p["table"])), "mask": masks.causal()},
    "dense score": lambda p: {"score": scores.dense(p["dense"])},
    "bias of keys": lambda p: {"score": scores.function(lambda s, i, j: s + p["bias"][j] * p["slopes"][0])},
    "temperature": lambda p: {"score": scores.function(lambda s, i, j: s * jnp.exp(p["bias"][i]))},
    "dropout": lambda p: {"dropout": attn.Dropout(0.1, jax.random.key(0)), "mask": masks.causal()},
}


@lowers_without_plugin
@pytest.mark.some(16)
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype, H", [("bfloat16", 64), ("float32", 24), ("float16", 16)])
def test_calls_and_their_gradients_lower(name, dtype, H):
    floats = {"slopes": (N,), "table": (32,), "bias": (T,), "dense": (T, T)}
    floats = {key: jax.ShapeDtypeStruct(shape, jnp.float32) for key, shape in floats.items()}
    integers = {"n": jax.ShapeDtypeStruct((), jnp.int32), "ids": jax.ShapeDtypeStruct((T,), jnp.int32)}
    arrays = [jax.ShapeDtypeStruct((T, heads, H), dtype) for heads in (N, K, K)]

    def loss(floats, integers, q, k, v):
        settings = CALLS[name](floats | integers)
        call = Call(q, k, v, settings.get("mask"), settings.get("score"), 0.1, settings.get("dropout"))
        assert pallas_gpu.unsupported_reason(call) is None
        return pallas_gpu.attend(call)[0].astype(jnp.float32).sum()

    text = lowered(jax.grad(loss, argnums=(0, 2, 3, 4)), floats, integers, *arrays)
    for kernel in ("attn_forward_rows", "attn_backward_rows", "attn_backward_columns"):
        assert text.count(f'name = "{kernel}"') == 1
