"""Attention under settings of JAX that people turn on to find faults, and transformations that few use."""

import re

import attention_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import attn
from attn import masks, positions, scores

T, S, N, H, HV = 8, 10, 2, 3, 2
MASKS = {"none": None, "padding": masks.padding(7), "causal": masks.causal(2), "function": lambda i, j: j <= i + 2}


def heads(groups=N):
    return cases.normal((T, N, H), (S, groups, H), (S, groups, HV))


@pytest.mark.some(2)
@pytest.mark.parametrize("name", MASKS)
def test_infinities_are_no_error_where_none_is_returned(implementation, name):
    with jax.debug_infs(True), jax.debug_nans(True):
        out = attn.multi_head_attention(*heads(), mask=MASKS[name], implementation=implementation)
        jax.grad(lambda v: attn.multi_head_attention(*heads()[:2], v, mask=MASKS[name]).sum())(heads()[2])
    np.testing.assert_array_equal(
        out, attn.multi_head_attention(*heads(), mask=MASKS[name], implementation=implementation)
    )


def test_the_drop_in_makes_no_infinities_either():
    query, key, value = (x[None] for x in heads())
    mask = np.arange(S) < np.arange(T)[:, None]  # query 0 sees nothing
    with jax.debug_infs(True), jax.debug_nans(True):
        out = attn.interop.dot_product_attention(query, key, value, mask=mask[None, None])
    assert not np.any(out[0, 0]) and np.all(np.isfinite(out))


@pytest.mark.some(1)
@pytest.mark.derivatives("forward")
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("groups", [1, N])
def test_attention_is_linear_in_the_values(implementation, name, groups):
    """`jax.linear_transpose` beside the pullback and, entry by entry, beside the weights."""
    if cases.is_kernel(implementation):
        pytest.skip("a kernel has a pullback, but jax.linear_transpose cannot see that it is linear")
    query, key, value = heads(groups)
    attend = lambda v: attn.multi_head_attention(query, key, v, mask=MASKS[name], implementation=implementation)  # noqa: E731
    cotangent = cases.normal((T, N, HV), seed=1)[0]
    [transposed] = jax.linear_transpose(attend, value)(cotangent)
    weights = attn.multi_head_attention_weights(query, key, mask=MASKS[name])
    expected = np.einsum("nts,tnv->snv", weights, cotangent).reshape(S, groups, N // groups, HV).sum(axis=2)
    np.testing.assert_allclose(transposed, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(transposed, jax.vjp(attend, value)[1](cotangent)[0], rtol=1e-6, atol=1e-6)


@pytest.mark.some(1)
@pytest.mark.parametrize("sharded", ["queries", "keys and values", "all"])
@pytest.mark.parametrize("name", ["none", "causal", "function"])
def test_sequences_may_be_sharded_on_an_explicit_mesh(implementation, sharded, name):
    if jax.device_count() < 2:
        pytest.skip("one device")
    call = lambda *a: attn.multi_head_attention(*a, mask=MASKS[name], implementation=implementation)  # noqa: E731
    loss = jax.grad(lambda *a: jnp.sin(call(*a)).sum(), argnums=(0, 1, 2))
    expected = call(*heads()), loss(*heads())
    places = {"queries": (P("x"), P(), P()), "keys and values": (P(), P("x"), P("x")), "all": (P("x"), P("x"), P("x"))}
    with jax.set_mesh(jax.make_mesh((2,), ("x",), axis_types=(AxisType.Explicit,))):
        given = [jax.device_put(x, spec) for x, spec in zip(heads(), places[sharded])]
        for run in (lambda f: f, jax.jit):
            out, gradients = run(call)(*given), run(loss)(*given)
            assert jax.typeof(out).sharding.spec[0] == (None if sharded == "keys and values" else "x")
            for ours, theirs in zip((out, *gradients), (expected[0], *expected[1])):
                np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.fixture
def strict_dtypes():
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.mark.some(1)
@pytest.mark.parametrize("dtype, x64", [("float32", False), ("bfloat16", False), ("float32", True), ("float64", True)])
def test_strict_promotion_of_dtypes_accepts_what_is_ours(implementation, strict_dtypes, dtype, x64):
    with jax.enable_x64(x64):
        call_with_mods_of_mixed_dtypes(implementation, dtype)


def call_with_mods_of_mixed_dtypes(implementation, dtype):
    half, byte = jnp.bfloat16, jnp.int8
    query, key, value = cases.normal((S, H), (S, H), (S, HV), dtype=dtype)
    ids = jnp.zeros(S, byte)
    mask = masks.padding(byte(7)) & masks.causal(byte(0)) & masks.sliding_window(jnp.uint8(3), jnp.int16(0))
    mask = mask & masks.segments(ids, ids.astype(jnp.int32))
    score = scores.relative_bias(jnp.zeros(2 * S - 1, half)) >> scores.softcap(half(3)) >> scores.alibi(half(0.5))
    score = score >> scores.dense(jnp.zeros((S, S), jnp.float16))
    options = dict(mask=mask, score=score)
    out = attn.attention(query, key, value, **options, implementation=implementation)
    assert out.shape == (S, HV) and out.dtype == dtype
    assert attn.attention_weights(query, key, **options).shape == (S, S)


def test_strict_promotion_of_dtypes_accepts_positions(strict_dtypes):
    assert positions.sinusoidal(jnp.arange(5), 8).shape == (5, 8)
    assert positions.rotary(jnp.ones((5, 4), "bfloat16"), jnp.arange(5), scale=2.0).dtype == jnp.bfloat16
    assert positions.relative_buckets(jnp.arange(5)).shape == (5,)


@pytest.mark.parametrize("kind", ["mask", "score"])
def test_strict_promotion_of_dtypes_names_the_function_that_mixes_them(implementation, strict_dtypes, untyped, kind):
    query, key, value = cases.normal((T, H), (S, H), (S, HV))
    table, length = jnp.zeros(S, "bfloat16"), jnp.int8(3)
    given = {"score": {"score": lambda s, i, j: s + table[j]}, "mask": {"mask": lambda i, j: j < length}}[kind]
    words = {"score": "s float32, i int32, j int32", "mask": "i int32, j int32"}[kind]
    with pytest.raises(TypeError, match=rf"{kind} <lambda> mixes dtypes.*\({words}\)"):
        attn.attention(query, key, value, **given, implementation=implementation)


@pytest.mark.parametrize("call", [attn.interop.dot_product_attention, attn.interop.flax_attention_fn])
@pytest.mark.parametrize("name, shape", [("query", (2, 0, 4, 8)), ("key", (2, 0, 4, 8)), ("query", (0, 4, 8))])
def test_a_drop_in_names_the_shape_of_length_0_that_it_was_given(untyped, call, name, shape):
    arrays = dict.fromkeys(("query", "key", "value"), jnp.ones((*shape[:-3], 5, 4, 8))) | {name: jnp.ones(shape)}
    with pytest.raises(
        ValueError, match=f"^{name} must have shape .* no axis of length 0, got {re.escape(str(shape))}"
    ):
        call(*arrays.values())


def test_eager_calls_with_a_function_leave_no_programs_behind():
    """Blocks of such a call are compiled for it alone, since what the function reads may change; then forgotten."""
    arrays = cases.normal((T, H), (S, H), (S, HV))
    attend = lambda shift: attn.attention(*arrays, mask=lambda i, j: j <= i + shift, implementation="blockwise")  # noqa: E731
    attend(0)
    before = len(jax.live_arrays()), _programs()
    for shift in range(1, 4):
        attend(shift)
    assert (len(jax.live_arrays()), _programs()) == before


def _programs() -> int:
    """Compiled programs that are alive."""
    return len(jax.devices()[0].client.live_executables())
