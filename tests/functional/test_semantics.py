"""The table of semantics: what every implementation does with each topic, and what a bad call is told."""

import re

import attention_cases as cases
import attention_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from traces import equations, is_matrix_product

import attn
from attn import masks, scores

T, S, H, HV = 3, 5, 2, 7
HIDDEN = 1  # the key that no query may attend to, where a test hides one


def head(dtype="float32"):
    return cases.normal((T, H), (S, H), (S, HV), dtype=dtype)


def heads(dtype="float32"):
    return cases.normal((T, 4, H), (S, 2, H), (S, 2, HV), dtype=dtype)


def gradients(call, *arrays):
    """Gradients of the sum of squares of everything finite that `call` returns."""

    def objective(*arrays):
        leaves = jax.tree.leaves(call(*arrays))
        return sum(jnp.sum(jnp.where(jnp.isfinite(x), x, 0) ** 2) for x in leaves)

    return jax.grad(objective, argnums=tuple(range(len(arrays))))(*arrays)


# Polarity


def test_true_means_may_attend(implementation):
    query, key, value = head()
    out = attn.attention(query, key, value, mask=lambda i, j: j == 2, implementation=implementation)
    np.testing.assert_array_equal(out, np.broadcast_to(value[2], (T, HV)))


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
    with pytest.raises(ValueError, match=r"mask .* shape \(2, 5\) for a tile of 3 by \d positions, .*broadcast"):
        attn.attention(*head(), mask=lambda i, j: jnp.ones((2, S), bool), implementation=implementation)
    with pytest.raises(ValueError, match=r"score .* for a tile of 3 by \d positions, .*broadcast"):
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


# Fully masked rows

NOTHING = {
    "by the mask": {"mask": lambda i, j: (i != 1) & (j >= 0)},
    "by the score": {"score": lambda s, i, j: jnp.where(i == 1, -jnp.inf, s)},
    "by both": {"mask": lambda i, j: (i != 1) | (j < 2), "score": lambda s, i, j: jnp.where(j < 2, -jnp.inf, s)},
    "every row": {"mask": masks.padding(0)},
    "every row by the score": {"score": lambda s, i, j: jnp.full_like(s, -jnp.inf)},
}


@pytest.mark.some(5)
@pytest.mark.parametrize("how", NOTHING)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_fully_masked_rows_are_zero(implementation, debug_nans, how, dtype):
    options = {**NOTHING[how], "implementation": implementation, "return_logsumexp": True}
    out, logsumexp = attn.attention(*head(dtype), **options)
    empty = slice(None) if how.startswith("every") else slice(1, 2)
    assert np.all(np.asarray(out[empty]) == 0)
    assert np.all(logsumexp[empty] == -np.inf)
    assert np.all(np.isfinite(out.astype(np.float32)))
    if not how.startswith("every"):
        assert np.all(np.isfinite(np.delete(logsumexp, 1)))


@pytest.mark.some(3)
@pytest.mark.parametrize("how", NOTHING)
def test_fully_masked_rows_have_gradient_zero(implementation, debug_nans, how):
    options = {**NOTHING[how], "implementation": implementation, "return_logsumexp": True}
    dquery, dkey, dvalue = gradients(lambda *a: attn.attention(*a, **options), *head())
    if how.startswith("every"):
        assert not any(np.any(g) for g in (dquery, dkey, dvalue))
    else:
        assert not np.any(dquery[1])
        assert np.all(np.any(np.delete(dquery, 1, 0), axis=1)) and np.any(dkey) and np.any(dvalue)
        assert all(np.all(np.isfinite(g)) for g in (dquery, dkey, dvalue))


@pytest.mark.some(2)
@pytest.mark.parametrize("how", NOTHING)
def test_fully_masked_rows_have_tangent_zero(implementation, debug_nans, how):
    query, key, value = head()
    options = {**NOTHING[how], "implementation": implementation}
    call = lambda *a: attn.attention(*a, **options)  # noqa: E731
    _, tangent = jax.jvp(call, (query, key, value), (query, key, value))
    assert np.all(np.isfinite(tangent)) and not np.any(tangent[slice(None) if how.startswith("every") else 1])


def test_a_cotangent_for_the_logsumexp_of_a_fully_masked_row_changes_nothing(implementation, debug_nans):
    def logsumexp(*arrays):
        options = {**NOTHING["by the mask"], "implementation": implementation, "return_logsumexp": True}
        return attn.attention(*arrays, **options)[1]

    _, pullback = jax.vjp(logsumexp, *head())
    assert not any(np.any(g) for g in pullback(jnp.array([0.0, 3.0, 0.0])))


# NaN and infinity where nobody looks

HIDING = {
    "mask": {"mask": lambda i, j: j != HIDDEN},
    "masks.dense": {"mask": masks.dense(jnp.arange(S)[None, :].repeat(T, 0) != HIDDEN)},
    "score": {"score": lambda s, i, j: jnp.where(j == HIDDEN, -jnp.inf, s)},
    "mask and score": {
        "mask": lambda i, j: (j != HIDDEN) | (i == 0),
        "score": lambda s, i, j: jnp.where((j == HIDDEN) & (i == 0), -jnp.inf, s),
    },
    "mask, other score": {"mask": lambda i, j: j != HIDDEN, "score": scores.softcap(2.0)},
}


@pytest.mark.some(3)
@pytest.mark.parametrize("how", HIDING)
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_what_no_query_may_attend_to_never_matters(implementation, how, poison):
    query, key, value = head()
    options = {**HIDING[how], "implementation": implementation, "return_logsumexp": True}
    call = lambda *a: attn.attention(*a, **options)  # noqa: E731
    clean = query, key.at[HIDDEN].set(0), value.at[HIDDEN].set(0)
    dirty = query, key.at[HIDDEN].set(poison), value.at[HIDDEN].set(poison)
    for ours, expected in zip(call(*dirty), call(*clean)):
        np.testing.assert_array_equal(ours, expected)
        assert np.all(np.isfinite(expected))
    for ours, expected in zip(gradients(call, *dirty), gradients(call, *clean)):
        np.testing.assert_array_equal(ours, expected)
        assert np.all(np.isfinite(expected))


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_a_value_hidden_by_a_dense_score_of_minus_infinity_never_matters(implementation, poison):
    query, key, value = head()
    bias = jnp.zeros((T, S)).at[:, HIDDEN].set(-jnp.inf)
    call = lambda *a: attn.attention(*a, score=scores.dense(bias), implementation=implementation)  # noqa: E731
    clean, dirty = (query, key, value.at[HIDDEN].set(0)), (query, key, value.at[HIDDEN].set(poison))
    np.testing.assert_array_equal(call(*dirty), call(*clean))
    for ours, expected in zip(gradients(call, *dirty), gradients(call, *clean)):
        np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_a_key_hidden_by_a_dense_score_of_minus_infinity_never_matters(implementation, poison):
    query, key, value = head()
    bias = jnp.zeros((T, S)).at[:, HIDDEN].set(-jnp.inf)
    call = lambda *a: attn.attention(*a, score=scores.dense(bias), implementation=implementation)  # noqa: E731
    clean, dirty = (query, key.at[HIDDEN].set(0), value), (query, key.at[HIDDEN].set(poison), value)
    np.testing.assert_array_equal(call(*dirty), call(*clean))
    for ours, expected in zip(gradients(call, *dirty), gradients(call, *clean)):
        np.testing.assert_array_equal(ours, expected)


def test_a_query_that_may_attend_to_nothing_may_be_nan(implementation):
    query, key, value = head()
    options = {**NOTHING["by the mask"], "implementation": implementation, "return_logsumexp": True}
    call = lambda *a: attn.attention(*a, **options)  # noqa: E731
    dirty = query.at[1].set(np.nan)
    for ours, expected in zip(call(dirty, key, value), call(query, key, value)):
        np.testing.assert_array_equal(ours, expected)
    for ours, expected in zip(gradients(call, dirty, key, value), gradients(call, query, key, value)):
        np.testing.assert_array_equal(ours, expected)


def test_what_no_query_may_attend_to_never_matters_to_the_weights():
    query, key, _ = head()
    clean = attn.attention_weights(query, key.at[HIDDEN].set(0), mask=HIDING["mask"]["mask"])
    dirty = attn.attention_weights(query, key.at[HIDDEN].set(np.nan), mask=HIDING["mask"]["mask"])
    np.testing.assert_array_equal(dirty, clean)
    assert np.all(np.isfinite(clean))


@pytest.mark.parametrize("where", ["key", "value"])
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_nan_or_infinity_in_a_value_or_key_reaches_the_rows_that_see_it(implementation, where, poison):
    query, key, value = head()
    query = jnp.abs(query)  # so that an infinite key has an infinite score, not minus infinity
    key, value = (key.at[2].set(poison), value) if where == "key" else (key, value.at[2].set(poison))
    out = attn.attention(query, key, value, mask=masks.causal(offset=0), implementation=implementation)
    assert not np.any(np.isfinite(out[2]))


@pytest.mark.parametrize("where", ["query", "key", "value"])
def test_nan_reaches_all_who_see_it_where_nothing_is_hidden(implementation, where):
    arrays = dict(zip(("query", "key", "value"), head()))
    arrays[where] = arrays[where].at[1, 0].set(np.nan)
    out, logsumexp = attn.attention(**arrays, implementation=implementation, return_logsumexp=True)
    sees = (np.arange(T) == 1) | (where != "query")
    np.testing.assert_array_equal(np.isnan(out[:, 0]), sees)
    if where != "value":
        np.testing.assert_array_equal(np.isnan(out).all(axis=1), sees)
        np.testing.assert_array_equal(np.isnan(logsumexp), sees)
        np.testing.assert_array_equal(np.isnan(attn.attention_weights(arrays["query"], arrays["key"])).all(1), sees)


def test_nan_in_a_value_is_not_hidden_by_a_weight_that_rounds_to_zero(implementation):
    query, key, value = head()
    bias = jnp.zeros((T, S)).at[:, HIDDEN].set(-1e30)
    value = value.at[HIDDEN].set(np.nan)
    assert np.all(np.isnan(attn.attention(query, key, value, score=scores.dense(bias), implementation=implementation)))


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


# Ranks and lengths

FUNCTIONS = {
    attn.attention: ([(T, H), (S, H), (S, HV)], ["T H", "S H", "S Hv"]),
    attn.attention_weights: ([(T, H), (S, H)], ["T H", "S H"]),
    attn.multi_head_attention: ([(T, 4, H), (S, 2, H), (S, 2, HV)], ["T N H", "S K H", "S K Hv"]),
    attn.multi_head_attention_weights: ([(T, 4, H), (S, 2, H)], ["T N H", "S K H"]),
}
ARGUMENTS = [(function, index) for function, (shapes, _) in FUNCTIONS.items() for index in range(len(shapes))]


@pytest.mark.parametrize("function, argument", ARGUMENTS, ids=lambda x: getattr(x, "__name__", x))
def test_a_wrong_rank_is_explained(untyped, function, argument):
    shapes, axes = FUNCTIONS[function]
    name, expected = ("query", "key", "value")[argument], axes[argument]
    for shape in ((11, *shapes[argument]), shapes[argument][1:], ()):
        arrays = [jnp.zeros(shape if index == argument else usual) for index, usual in enumerate(shapes)]
        with pytest.raises(ValueError, match=re.escape(f"{name} must have shape [{expected}], got {shape}")):
            function(*arrays)


@pytest.mark.parametrize("function, argument", ARGUMENTS, ids=lambda x: getattr(x, "__name__", x))
def test_a_length_of_zero_is_explained(untyped, function, argument):
    shapes, axes = FUNCTIONS[function]
    name, expected = ("query", "key", "value")[argument], axes[argument]
    for axis in range(len(shapes[argument])):
        shape = (*shapes[argument][:axis], 0, *shapes[argument][axis + 1 :])
        arrays = [jnp.zeros(shape if index == argument else usual) for index, usual in enumerate(shapes)]
        with pytest.raises(ValueError) as caught:
            function(*arrays)
        for said in (name, f"[{expected}]", str(shape)):
            assert said in str(caught.value)


@pytest.mark.parametrize("function, argument", ARGUMENTS, ids=lambda x: getattr(x, "__name__", x))
@pytest.mark.parametrize("bad", [None, 1.0, [[1.0]]], ids=str)
def test_what_is_no_array_is_named(untyped, function, argument, bad):
    shapes, axes = FUNCTIONS[function]
    arrays = [bad if index == argument else jnp.zeros(usual) for index, usual in enumerate(shapes)]
    with pytest.raises(TypeError, match=re.escape(f"{('query', 'key', 'value')[argument]} must be an array")) as caught:
        function(*arrays)
    assert axes[argument] in str(caught.value)


@pytest.mark.parametrize("function", [attn.attention, attn.multi_head_attention])
def test_sizes_that_must_agree_are_named(untyped, function):
    shapes, _ = FUNCTIONS[function]
    query, key, value = (jnp.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError, match=r"query and key must agree on the width H") as caught:
        function(query[..., :1], key, value)
    assert str(key.shape) in str(caught.value) and str(query[..., :1].shape) in str(caught.value)
    with pytest.raises(ValueError, match=r"key and value must agree on S") as caught:
        function(query, key, value[1:])
    assert str(key.shape) in str(caught.value) and str(value[1:].shape) in str(caught.value)


def test_key_and_value_must_agree_on_their_heads(untyped):
    query, key, value = heads()
    with pytest.raises(ValueError, match=r"key and value must agree on S and K"):
        attn.multi_head_attention(query, key, value[:, :1])


def test_numpy_arrays_are_welcome(untyped):
    query, key, value = head()
    ours = attn.attention(*map(np.asarray, (query, key, value)))
    np.testing.assert_array_equal(ours, attn.attention(query, key, value))
