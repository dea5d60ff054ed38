"""The table of semantics in docs/attention.md: what every implementation does with each topic, and its errors."""

import attention_cases as cases
import attention_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_cases import HIDDEN, HV, H, S, T, head, heads
from traces import equations, is_matrix_product

import attn
from attn import masks, scores

# Polarity


def test_true_means_may_attend(implementation):
    query, key, value = head()
    out = attn.attention(query, key, value, mask=lambda i, j: j == 2, implementation=implementation)
    np.testing.assert_array_equal(out, np.broadcast_to(value[2], (T, HV)))


def test_a_mask_may_compare_floats_whose_gradient_is_zero(implementation):
    (query, key, value), score = head(), scores.softcap(2.0)
    limits = np.linspace(1, S, T, dtype=np.float32)

    def total(query, limits):
        mask = lambda i, j: j < limits[i]  # noqa: E731
        return jnp.sum(attn.attention(query, key, value, mask=mask, score=score, implementation=implementation) ** 2)

    found, of_limits = jax.grad(total, argnums=(0, 1))(query, jnp.asarray(limits))
    visible = np.arange(S) < limits[:, None]
    masked = lambda query: attn.attention(query, key, value, mask=masks.dense(visible), score=score)  # noqa: E731
    expected = jax.grad(lambda query: jnp.sum(masked(query) ** 2))(query)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(of_limits, np.zeros(T))


@pytest.mark.parametrize("dtype", ["float32", "int32", "uint8"])
def test_a_mask_that_is_not_boolean_is_sent_to_score(implementation, dtype):
    with pytest.raises(TypeError, match=r"additive values belong in score="):
        attn.attention(*head(), mask=lambda i, j: (i + j).astype(dtype), implementation=implementation)


@pytest.mark.parametrize("array", [np.ones((T, S), bool), jnp.ones((T, S), bool), np.bool_(True)])
def test_an_array_as_mask_is_sent_to_masks_dense(untyped, array):
    with pytest.raises(TypeError, match=r"masks\.dense"):
        attn.attention(*head(), mask=array)
    with pytest.raises(TypeError, match=r"masks\.dense"):
        attn.multi_head_attention(*heads(), mask=array)


@pytest.mark.parametrize("array", [np.zeros((T, S)), jnp.zeros((T, S))])
def test_an_array_as_score_is_sent_to_scores_dense(untyped, array):
    with pytest.raises(TypeError, match=r"scores\.dense"):
        attn.attention(*head(), score=array)


def test_a_mask_as_score_and_a_score_as_mask_are_told_apart(untyped):
    with pytest.raises(TypeError, match="mask="):
        attn.attention(*head(), score=masks.padding(2))
    with pytest.raises(TypeError, match="score="):
        attn.attention(*head(), mask=scores.softcap(2.0))


@pytest.mark.parametrize("bad", [3, "causal", [True]])
def test_what_is_not_callable_is_no_mask_and_no_score(untyped, bad):
    with pytest.raises(TypeError, match="function"):
        attn.attention(*head(), mask=bad)
    with pytest.raises(TypeError, match="function"):
        attn.attention(*head(), score=bad)


def test_a_score_that_is_not_real_is_refused(implementation):
    with pytest.raises(TypeError, match="real"):
        attn.attention(*head(), score=lambda s, i, j: s > 0, implementation=implementation)
    with pytest.raises(TypeError, match="real"):
        attn.attention(*head(), score=lambda s, i, j: s * 1j, implementation=implementation)


def test_masks_and_scores_that_do_not_fit_the_tile_are_refused(implementation):
    rows = {"pallas_tpu": 128, "pallas_gpu": 16}.get(implementation, 3)  # tiles of kernels are padded
    with pytest.raises(ValueError, match=rf"mask .* shape \(2, 5\) for a tile of {rows} by \d+ positions, .*broadcast"):
        attn.attention(*head(), mask=lambda i, j: jnp.ones((2, S), bool), implementation=implementation)
    with pytest.raises(ValueError, match=rf"score .* for a tile of {rows} by \d+ positions, .*broadcast"):
        attn.attention(*head(), score=lambda s, i, j: s[None], implementation=implementation)


def test_what_masks_and_scores_return_broadcasts_to_the_tile(implementation):
    query, key, value = head()
    bias = jnp.arange(5.0)
    out = attn.attention(
        query,
        key,
        value,
        mask=lambda i, j: j != HIDDEN,
        score=lambda s, i, j: jnp.full((1, 1), 0.5),
        implementation=implementation,
    )
    np.testing.assert_allclose(out, np.broadcast_to(np.delete(value, HIDDEN, 0).mean(0), out.shape), rtol=1e-6)
    row = attn.attention(query, key, value, score=lambda s, i, j: bias[j[0]], implementation=implementation)
    softmax = np.exp(np.arange(5.0)) / np.exp(np.arange(5.0)).sum()
    np.testing.assert_allclose(row, np.broadcast_to(softmax @ np.asarray(value), row.shape), rtol=2e-6, atol=1e-7)


# Scale


def test_the_scale_is_one_over_the_root_of_the_width_unless_given(implementation):
    query, key, value = head()
    for scale in (None, 0.3, 2, jnp.float32(0.3), np.float64(-1.0)):
        ours = attn.attention(query, key, value, scale=scale, implementation=implementation)
        expected, _ = oracle.forward(oracle.Head(query, key, value, scale=scale))
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)


def test_a_score_sees_scaled_scores_and_positions_in_range(implementation):
    query, key, value = head()
    seen = {}

    def score(s, i, j):
        jax.debug.callback(lambda i, j: seen.update(i=(i.min(), i.max()), j=(j.min(), j.max())), i, j, ordered=False)
        return s * s

    out = attn.attention(query, key, value, score=score, scale=3.0, implementation=implementation)
    jax.effects_barrier()
    assert 0 <= seen["i"][0] <= seen["i"][1] < T and 0 <= seen["j"][0] <= seen["j"][1] < S
    square = oracle.Head(query, key, value, scale=3.0, score=lambda s, i, j: (s**2, 2 * s, 2 * np.abs(s)))
    np.testing.assert_allclose(out, oracle.forward(square)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [1j, np.complex64(1), "1", True, np.ones(2, np.float32), np.ones((T, S), np.float32)])
def test_a_scale_that_is_no_real_scalar_is_refused(untyped, scale):
    query, key, value = head()
    with pytest.raises(TypeError, match="scale"):
        attn.attention(query, key, value, scale=scale)
    with pytest.raises(TypeError, match="scale"):
        attn.attention_weights(query, key, scale=scale)
    with pytest.raises(TypeError, match=r"^scale must be"):
        many = (x[:, None] for x in (query, key, value))
        attn.multi_head_attention(*many, scale=scale, implementation="blockwise")


# Causal with other lengths

OFFSETS = [masks.causal(), ~masks.causal() & masks.padding(2), masks.sliding_window(1, 1)]


@pytest.mark.parametrize("mask", OFFSETS, ids=lambda mask: mask.expression())
def test_an_offset_that_is_missing_is_asked_for(mask):
    query, key, value = head()
    for call in (
        lambda: attn.attention(query, key, value, mask=mask),
        lambda: attn.attention_weights(query, key, mask=mask),
        lambda: attn.multi_head_attention(*heads(), mask=mask),
        lambda: attn.multi_head_attention_weights(*heads()[:2], mask=mask),
    ):
        with pytest.raises(ValueError, match=r"T = 3 .*S = 5.*offset=0.*offset=S-T \(here 2\)"):
            call()


@pytest.mark.parametrize("offset", [0, S - T, -1])
def test_causal_with_an_offset_places_the_queries(implementation, offset):
    query, key, value = head()
    out = attn.attention(query, key, value, mask=masks.causal(offset), implementation=implementation)
    i, j = cases.positions(T, S)
    expected, _ = oracle.forward(oracle.Head(query, key, value, j <= i + offset))
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)


# Precision


@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_dtypes_of_the_results(implementation, x64, dtype):
    options = {"implementation": implementation, "return_logsumexp": True}
    wide = "float64" if dtype == "float64" else "float32"
    for call, arrays in ((attn.attention, head), (attn.multi_head_attention, heads)):
        query, key, _ = arrays(dtype)
        for value_dtype in ("float16", "bfloat16", dtype):
            out, logsumexp = jax.eval_shape(
                lambda *a, call=call: call(*a, **options), query, key, arrays(value_dtype)[2]
            )
            assert (out.dtype, logsumexp.dtype) == (value_dtype, wide)
    assert jax.eval_shape(attn.attention_weights, *head(dtype)[:2]).dtype == wide
    assert jax.eval_shape(attn.multi_head_attention_weights, *heads(dtype)[:2]).dtype == wide


def test_float64_stays_float64(implementation, x64):
    query, key, value = head("float64")
    options = {"mask": masks.causal(2), "score": scores.alibi(0.3, 2), "implementation": implementation}
    out, logsumexp = attn.attention(query, key, value, return_logsumexp=True, **options)
    i, j = cases.positions(T, S)
    distance = np.abs(i + 2 - j)
    score = lambda s, i, j: (s - 0.3 * distance[i, j], 1, 1)  # noqa: E731
    exact = oracle.Head(query, key, value, j <= i + 2, lambda s, i, j: oracle_score(score, s, i, j))
    np.testing.assert_allclose(out, oracle.forward(exact)[0], rtol=1e-14, atol=1e-14)
    np.testing.assert_allclose(logsumexp, oracle.forward(exact)[1], rtol=1e-14, atol=1e-14)


def oracle_score(score, s, i, j):
    changed, slope, size = score(s, i, j)
    return changed, np.full_like(s, slope), np.full_like(s, size)


def test_the_value_decides_the_output_s_dtype_and_query_and_key_the_logsumexp_s(implementation, x64):
    query, key, _ = head("float32")
    value = head("float64")[2]
    out, logsumexp = attn.attention(query, key, value, implementation=implementation, return_logsumexp=True)
    assert (out.dtype, logsumexp.dtype) == (np.float64, np.float32)
    np.testing.assert_allclose(out, oracle.forward(oracle.Head(query, key, value))[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_sums_in_float32(implementation, dtype):
    S = 4096  # in half precision a running sum of ones stops at 256 or 2048
    query, key, value = jnp.zeros((1, 2), dtype), jnp.zeros((S, 2), dtype), jnp.ones((S, 3), dtype)
    out, logsumexp = attn.attention(query, key, value, implementation=implementation, return_logsumexp=True)
    np.testing.assert_allclose(out.astype(np.float32), 1, rtol=1e-6)
    np.testing.assert_allclose(logsumexp, np.log(S), rtol=1e-6)


def test_query_and_key_must_have_one_dtype(untyped):
    query, key, value = head()
    for call in (
        lambda: attn.attention(query, key.astype("bfloat16"), value),
        lambda: attn.attention_weights(query, key.astype("bfloat16")),
        lambda: attn.multi_head_attention(heads()[0].astype("bfloat16"), *heads()[1:]),
        lambda: attn.multi_head_attention_weights(heads()[0].astype("bfloat16"), heads()[1]),
    ):
        with pytest.raises(TypeError, match=r"float32.*bfloat16|bfloat16.*float32"):
            call()


@pytest.mark.parametrize("dtype", ["int32", "bool", "complex64"])
@pytest.mark.parametrize("argument", [0, 1, 2])
def test_arrays_that_are_not_real_floats_are_refused(untyped, dtype, argument):
    name = ("query", "key", "value")[argument]
    one, many = head(), heads()
    one[argument], many[argument] = one[argument].astype(dtype), many[argument].astype(dtype)
    for call in (lambda: attn.attention(*one), lambda: attn.multi_head_attention(*many)):
        with pytest.raises(TypeError, match=rf"{name}.*{dtype}"):
            call()
    if argument < 2:
        with pytest.raises(TypeError, match=rf"{name}.*{dtype}"):
            attn.attention_weights(*one[:2])
        with pytest.raises(TypeError, match=rf"{name}.*{dtype}"):
            attn.multi_head_attention_weights(*many[:2])


def precisions(call, *arguments) -> list[str]:
    """The precision of every matrix product in a trace, nested ones included."""
    return [str(one.params["precision"]) for one, _ in equations(call, *arguments) if is_matrix_product(one)]


@pytest.mark.parametrize("precision", ["highest", "high", "default"])
def test_the_default_matmul_precision_is_honoured(implementation, precision):
    def value_and_gradient(*arrays):
        call = lambda *a: attn.attention(*a, implementation=implementation)  # noqa: E731
        out, pullback = jax.vjp(call, *arrays)
        return out, pullback(out)

    with jax.default_matmul_precision(precision):
        found = precisions(value_and_gradient, *head())
        weights = precisions(attn.attention_weights, *head()[:2])
    assert len(found) >= 6 and len(weights) >= 1  # two products forward, four backward
    assert all(precision.upper() in each for each in found + weights)


# Grouped queries and the width of a value


@pytest.mark.parametrize("K", [1, 2, 4])
def test_grouped_queries_equal_repeated_heads(implementation, K):
    query, key, value = cases.normal((T, 4, H), (S, K, H), (S, K, HV))
    options = {"implementation": implementation, "return_logsumexp": True}
    out, logsumexp = attn.multi_head_attention(query, key, value, **options)
    assert out.shape == (T, 4, HV) and logsumexp.shape == (T, 4)
    for n in range(4):
        group = n // (4 // K)
        expected = oracle.forward(oracle.Head(query[:, n], key[:, group], value[:, group]))
        np.testing.assert_allclose(out[:, n], expected[0], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(logsumexp[:, n], expected[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("N, K", [(4, 3), (2, 4)])
def test_heads_that_do_not_divide_are_named(untyped, N, K):
    query, key, value = cases.normal((T, N, H), (S, K, H), (S, K, HV))
    for call in (
        lambda: attn.multi_head_attention(query, key, value),
        lambda: attn.multi_head_attention_weights(query, key),
    ):
        with pytest.raises(ValueError, match=rf"N = {N} .*K = {K}"):
            call()


@pytest.mark.parametrize("width", [1, 2, 13])
def test_a_value_may_have_another_width(implementation, width):
    query, key, value = cases.normal((T, H), (S, H), (S, width))
    out = attn.attention(query, key, value, implementation=implementation)
    np.testing.assert_allclose(out, oracle.forward(oracle.Head(query, key, value))[0], rtol=1e-5, atol=1e-6)
