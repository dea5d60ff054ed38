"""The results of `attn.interop.dot_product_attention`, compared with those of `jax.nn.dot_product_attention`."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from interop_cases import normal, quick_jit
from jax_nn_cases import (
    CASES,
    CLOSE,
    B,
    H,
    K,
    N,
    S,
    T,
    assert_close,
    bools,
    compare,
    inputs,
    ours,
    run,
    theirs,
    visible,
)

from attn import masks, scores
from attn.functional import mods
from attn.interop import arrays, dot_product_attention


@pytest.mark.some(5)
@pytest.mark.parametrize("case", CASES)
def test_agrees(case):
    compare(CASES[case])


@functools.cache
def jax_with_full_mask_and_bias():
    """Return jax.nn's function, jitted: output, residual and gradients for a mask and a bias of all four axes."""

    @quick_jit
    def call(arrays, cotangent, mask):
        def attend(query, key, value, bias):
            return jax.nn.dot_product_attention(query, key, value, bias, mask, return_residual=True)

        (out, residual), pullback = jax.vjp(attend, *arrays)
        return out, residual, pullback((cotangent, jnp.zeros_like(residual)))

    return call


@pytest.mark.some(3)
@pytest.mark.parametrize("axes", [axes for axes in itertools.product((0, 1), repeat=4) if sum(axes) % 2 == 0], ids=str)
def test_broadcasts_of_mask_and_bias(axes):
    """The mask has the axes that the bias lacks; jax.nn gets both broadcast. Three axes meet in all combinations."""
    full = (B, N, T, S)
    mask = bools(*np.where(axes, full, 1), seed=2) | (sum(axes) == 0)
    bias = normal(*np.where(axes, 1, full), seed=3)
    rows = visible(T, S, N, mask).any(-1).swapaxes(1, 2)
    *arrays, cotangent = inputs()
    cotangent = np.where(rows[..., None], cotangent, 0)
    spread = [*arrays, np.broadcast_to(bias, full)]
    expected = jax_with_full_mask_and_bias()(spread, cotangent, np.broadcast_to(mask, full))
    out, residual, gradients = jax.device_get(expected)
    summed = gradients[3].sum(tuple(np.flatnonzero(axes)), keepdims=True)
    results = run(dot_product_attention, [*arrays, cotangent], {"mask": mask, "bias": bias}, rows)
    assert_close(results, (out, residual, [*gradients[:3], summed]), rows)


@pytest.mark.parametrize("T, S", [(7, 5), (1, 7), (5, 1)])
def test_positions_count_from_the_first_key_whatever_the_lengths(T, S):
    compare({"is_causal": True, "local_window_size": (4, 0), "key_value_seq_lengths": np.array([S, 1])}, T=T, S=S)


@pytest.mark.parametrize("N, K", [(1, 1), (3, 3), (5, 1)])
def test_heads(N, K):
    compare({"bias": normal(B, N, 1, S), "mask": bools(B, N, T, 1)}, N=N, K=K)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_rounds_only_its_results(dtype):
    """Results are those of jax.nn in float32, rounded once; gradients once more per query head of a group."""
    arguments = CASES["everything"]
    rows = visible(T, S, N, **arguments).any(-1).swapaxes(1, 2)
    arrays = inputs(dtype=dtype)
    out, residual, gradients = run(dot_product_attention, arrays, arguments, rows)
    wide = run(jax.nn.dot_product_attention, [x.astype("float32") for x in arrays], arguments, rows)
    like_jax = jax.eval_shape(functools.partial(jax.nn.dot_product_attention, return_residual=True), *arrays[:3])
    assert (out.dtype, residual.dtype) == tuple(x.dtype for x in like_jax)
    half = float(jnp.finfo(dtype).eps) / 2

    def close(x, exact, roundings):
        x, exact = np.asarray(x, "float64"), np.asarray(exact, "float64")
        np.testing.assert_allclose(x, exact, rtol=half, atol=(roundings - 1) * half * np.abs(exact).max() + 1e-5)

    close(out[rows], wide[0][rows], 1)
    close(residual[rows], wide[1][rows], 1)
    for x, exact in zip(gradients, wide[2], strict=True):
        close(x, exact, 1 + N // K)


def test_float64_is_computed_in_float64():
    with jax.enable_x64(True):
        query, key, value, _ = inputs(N=K, dtype="float64")
        out = ours(query, key, value)
        s = np.einsum("btnh,bsnh->bnts", query, key) / np.sqrt(H)
        p = np.exp(s) / np.exp(s).sum(-1, keepdims=True)
        np.testing.assert_allclose(out, np.einsum("bnts,bsnh->btnh", p, value), rtol=1e-13, atol=1e-13)


def test_without_a_batch_axis():
    query, key, value, _ = inputs()
    arguments = {"bias": normal(N, T, S), "mask": bools(T, S), "key_value_seq_lengths": np.array([5])}
    single = ours(query[0], key[0], value[0], return_residual=True, **arguments)
    batched = ours(query[:1], key[:1], value[:1], return_residual=True, **arguments)
    assert [x.shape for x in single] == [(T, N, H), (T, N)]
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b[0]), single, batched)


def test_without_the_residual():
    arrays = inputs()[:3]
    out, _ = ours(*arrays, is_causal=True, return_residual=True)
    np.testing.assert_array_equal(ours(*arrays, is_causal=True), out)


@pytest.mark.parametrize("function", [dot_product_attention, jax.nn.dot_product_attention])
def test_no_gradient_through_the_residual(function):
    query, key, value, _ = inputs()
    gradient = jax.grad(lambda key: function(query, key, value, return_residual=True)[1].sum())
    assert not np.any(quick_jit(gradient)(key))


def test_values_of_another_width():
    query, key, value, _ = inputs()
    np.testing.assert_allclose(ours(query, key, value[..., :3]), theirs(query, key, value)[..., :3], **CLOSE)


def test_a_traced_scale_is_differentiated():
    *arrays, cotangent = inputs()

    def gradient(function):
        return quick_jit(jax.grad(lambda scale: jnp.vdot(function(*arrays, scale=scale), cotangent)))(0.37)

    np.testing.assert_allclose(gradient(dot_product_attention), gradient(jax.nn.dot_product_attention), **CLOSE)


def test_under_vmap():
    """Compare with a loop over one more axis of every array."""
    query, key, value, _ = (np.stack([x, 2 * x, -x]) for x in inputs())
    arrays = [query, key, value, normal(3, 1, N, 1, S), bools(3, B, 1, T, S), np.array([[3, 5], [7, 1], [2, 2]])]

    def call(query, key, value, bias, mask, lengths):
        return dot_product_attention(query, key, value, bias, mask, key_value_seq_lengths=lengths, is_causal=True)

    together, one = quick_jit(jax.vmap(call))(*arrays), quick_jit(call)
    for index in range(3):
        np.testing.assert_allclose(together[index], one(*(x[index] for x in arrays)), **CLOSE)


class TestNothingToAttendTo:
    """Queries that see no key, for which jax.nn returns the mean of the values."""

    def test_rows_are_zero(self):
        mask = np.ones((T, S), bool)
        mask[2] = False
        rows = np.ones((B, T, N), bool)
        with jax.debug_nans(True):
            out, residual, gradients = run(dot_product_attention, inputs(), {"mask": mask}, rows)
        assert not np.any(out[:, 2]) and np.all(residual[:, 2] == -np.inf)
        assert np.all(gradients[0][:, 2] == 0) and np.any(gradients[0][:, 1])
        others = np.arange(T) != 2
        np.testing.assert_allclose(out[:, others], theirs(*inputs()[:3], mask=mask)[:, others], **CLOSE)

    def test_a_length_of_zero(self):
        out = ours(*inputs()[:3], key_value_seq_lengths=np.array([0, S]))
        assert not np.any(out[0]) and np.all(np.any(out[1], axis=-1))

    @pytest.mark.parametrize("function", [ours, theirs])
    def test_queries_past_their_length_are_zero_there_and_here(self, function):
        out = function(*inputs()[:3], query_seq_lengths=np.array([3, T], np.int32))
        assert not np.any(out[0, 3:]) and np.all(np.any(out[0, :3], axis=-1)) and np.all(np.any(out[1], axis=-1))

    def test_a_bias_of_minus_infinity_masks(self):
        bias = np.where(bools(T, S), 0, -np.inf).astype(np.float32)
        arrays = inputs()[:3]
        np.testing.assert_allclose(ours(*arrays, bias=bias), ours(*arrays, mask=bools(T, S)), **CLOSE)


def test_hidden_nan_reaches_nothing():
    """NaNs beyond the lengths of keys and queries change neither outputs nor gradients."""
    lengths = {"query_seq_lengths": np.array([3, 5]), "key_value_seq_lengths": np.array([6, 2])}
    clean = inputs()
    query, key, value, cotangent = clean
    real_queries = np.arange(T) < lengths["query_seq_lengths"][:, None]
    real_keys = np.arange(S) < lengths["key_value_seq_lengths"][:, None]

    def spoil(x, real):
        return np.where(real[..., None, None], x, np.float32(np.nan))

    spoilt = [spoil(query, real_queries), spoil(key, real_keys), spoil(value, real_keys), cotangent]
    rows = np.ones((B, T, N), bool)
    results, expected = (run(dot_product_attention, arrays, lengths, rows) for arrays in (spoilt, clean))
    jax.tree.map(np.testing.assert_array_equal, results, expected)
    assert np.isfinite(results[0]).all()


def test_what_the_drop_ins_hand_on_compiles_once_outside_of_jit():
    """Our masks and scores may be cached between calls; functions and classes of users may not."""
    mask, bias = arrays.spread_mask(jnp.ones((1, 3), bool)), arrays.spread_bias(jnp.ones((1, 3)))
    for known in (mask & arrays.query_padding(jnp.int32(2)) | masks.causal(0), bias, bias >> scores.softcap(2.0)):
        assert not mods.holds_function(known)
    of_user = type("of_user", (masks.causal,), {})
    for users in (mask & (lambda i, j: i == j), bias >> (lambda s, i, j: s), mods.register(of_user)(0)):
        assert mods.holds_function(users)
