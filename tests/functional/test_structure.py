"""Properties of attention for any numbers: causality, padding, symmetries, and the edges of the number range."""

import attention_cases as cases
import attention_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attn
from attn import masks, scores

T, S, H, HV = 3, 5, 2, 7
HIGHEST = float(np.finfo(np.float32).max)


def head(T=T, S=S, dtype="float32", seed=0):
    return cases.normal((T, H), (S, H), (S, HV), dtype=dtype, seed=seed)


def call_with(implementation, **options):
    return jax.jit(lambda *arrays: attn.attention(*arrays, implementation=implementation, **options))


def dependence(call, query, key, value) -> tuple[np.ndarray, np.ndarray]:
    """[T S]: whether output i depends on key j, and on value j, by its derivative."""
    by_key, by_value = jax.jacobian(call, argnums=(1, 2))(query, key, value)
    return tuple(np.any(np.asarray(g) != 0, axis=(1, 3)) for g in (by_key, by_value))


def test_causal_attention_never_depends_on_the_future(implementation):
    i, j = cases.positions(5, 5)
    on_key, on_value = dependence(call_with(implementation, mask=masks.causal()), *head(T=5))
    np.testing.assert_array_equal(on_value, j <= i)
    np.testing.assert_array_equal(on_key, (j <= i) & (i > 0))  # one visible key has weight 1 whatever it is


def test_causal_attention_with_an_offset_never_depends_on_the_future(implementation):
    i, j = cases.positions(T, S)
    call = call_with(implementation, mask=masks.causal(2), score=scores.alibi(0.3, 2))
    for dependent in dependence(call, *head()):
        np.testing.assert_array_equal(dependent, j <= i + 2)


@pytest.mark.parametrize("length", [2, 4])
def test_padded_attention_never_depends_on_the_padding(implementation, length):
    for dependent in dependence(call_with(implementation, mask=masks.padding(length)), *head()):
        np.testing.assert_array_equal(dependent, np.broadcast_to(np.arange(S) < length, (T, S)))


def test_output_depends_on_its_own_query_alone(implementation):
    jacobian = jax.jacobian(call_with(implementation))(*head())
    np.testing.assert_array_equal(np.any(np.asarray(jacobian) != 0, axis=(1, 3)), np.eye(T, dtype=bool))


def test_the_order_of_the_keys_does_not_matter(implementation):
    query, key, value = head()
    order = np.random.default_rng(1).permutation(S)
    mask, bias = np.random.default_rng(2).random((T, S)) < 0.7, cases.normal((T, S), seed=3)[0]

    def call(key, value, mask, bias):
        options = {"mask": masks.dense(jnp.array(mask)), "score": scores.dense(bias), "return_logsumexp": True}
        return attn.attention(query, key, value, implementation=implementation, **options)

    shuffled = call(key[order], value[order], mask[:, order], bias[:, order])
    for ours, expected in zip(shuffled, call(key, value, mask, bias)):
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)


def test_the_order_of_the_queries_is_the_order_of_the_outputs(implementation):
    query, key, value = head()
    call = call_with(implementation)
    np.testing.assert_allclose(call(query[::-1], key, value), call(query, key, value)[::-1], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("shift", [-1000.0, 3.0, 1000.0])
def test_a_shift_of_all_scores_moves_the_logsumexp_alone(implementation, shift):
    arrays = head()
    call = call_with(implementation, return_logsumexp=True)
    shifted = call_with(implementation, score=lambda s, i, j: s + shift, return_logsumexp=True)
    rounding = 2.0**-22 * (1 + abs(shift))
    np.testing.assert_allclose(shifted(*arrays)[0], call(*arrays)[0], atol=4 * rounding)
    np.testing.assert_allclose(shifted(*arrays)[1], call(*arrays)[1] + shift, atol=4 * rounding)


def test_outputs_are_linear_in_the_values(implementation):
    query, key, value = head()
    other, call = head(seed=1)[2], call_with(implementation, mask=masks.causal(0))
    combined = call(query, key, 2 * value - 3 * other)
    expected = 2 * call(query, key, value) - 3 * call(query, key, other)
    np.testing.assert_allclose(combined, expected, rtol=1e-5, atol=1e-5)


def test_outputs_lie_between_the_smallest_and_the_largest_value(implementation):
    query, key, value = head()
    out = np.asarray(call_with(implementation)(query, key, value))
    rounding = 4 * 2.0**-24 * np.abs(value).max()  # weights sum to one but for that
    assert np.all(out <= value.max(axis=0) + rounding) and np.all(out >= value.min(axis=0) - rounding)


@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_one_visible_key_returns_its_value_exactly(implementation, x64, dtype):
    query, key, value = head(dtype=dtype)
    out, logsumexp = call_with(implementation, mask=lambda i, j: j == i + 1, return_logsumexp=True)(query, key, value)
    np.testing.assert_array_equal(out, value[1 : T + 1])
    exact = oracle.Head(query, key, value, np.eye(T, S, 1, dtype=bool))
    np.testing.assert_allclose(logsumexp, oracle.forward(exact)[1], rtol=1e-5)


def test_tied_keys_share_their_weight_equally(implementation):
    query, key, value = head()
    out = call_with(implementation)(query, jnp.broadcast_to(key[0], key.shape), value)
    np.testing.assert_allclose(out, np.broadcast_to(value.mean(axis=0), out.shape), rtol=1e-5, atol=1e-6)
    weights = attn.attention_weights(query, jnp.zeros_like(key))
    np.testing.assert_array_equal(weights, np.broadcast_to(weights[0, 0], (T, S)))
    np.testing.assert_allclose(weights, 1 / S, rtol=1e-6)


@pytest.mark.some(2)
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scores_of_ten_thousand_do_not_overflow(implementation, debug_nans, sign, dtype):
    query, key, value = jnp.full((T, H), 100.0, dtype), jnp.full((S, H), 100.0 * sign, dtype), head(dtype=dtype)[2]
    call = call_with(implementation, scale=0.5, return_logsumexp=True)
    out, logsumexp = call(query, key, value)
    np.testing.assert_allclose(logsumexp, sign * 1e4 + np.log(S), rtol=1e-6)
    mean = np.asarray(value).astype(float).mean(axis=0)
    np.testing.assert_allclose(out.astype("float32"), np.broadcast_to(mean, (T, HV)), rtol=1e-2, atol=1e-2)
    gradients = jax.grad(lambda *a: call(*a)[0].sum().astype("float32"), argnums=(0, 1, 2))(query, key, value)
    assert all(np.all(np.isfinite(g.astype("float32"))) for g in gradients)


def test_a_lead_of_ten_thousand_takes_all_the_weight(implementation, debug_nans):
    _, key, value = head()
    key = jnp.zeros_like(key).at[2].set(100.0)
    out = call_with(implementation, scale=1.0)(jnp.full((T, H), 100.0), key, value)
    np.testing.assert_array_equal(out, np.broadcast_to(value[2], out.shape))


@pytest.mark.parametrize("size", [1e37, HIGHEST / 2])
def test_large_values_do_not_overflow(implementation, size):
    query, key, _ = head()
    value = jnp.sign(head()[2]) * size
    exact = oracle.forward(oracle.Head(query, key, value))[0]
    np.testing.assert_allclose(call_with(implementation)(query, key, value), exact, rtol=1e-5, atol=1e-6 * size)


def test_large_values_have_finite_gradients(implementation, debug_nans):
    query, key, value = head()
    value = value * 1e30
    gradients = jax.grad(lambda *a: call_with(implementation)(*a).mean(), argnums=(0, 1, 2))(query, key, value)
    exact = oracle.backward(oracle.Head(query, key, value), np.full((T, HV), 1 / (T * HV)), np.zeros(T))
    for ours, expected in zip(gradients, exact):
        np.testing.assert_allclose(ours, expected.astype(float), rtol=1e-4, atol=1e-5 * float(np.abs(expected).max()))


@pytest.mark.parametrize("T, S", [(1, 1), (1, 5), (3, 1)])
def test_lengths_of_one(implementation, T, S):
    arrays = head(T, S)
    out, logsumexp = call_with(implementation, return_logsumexp=True)(*arrays)
    expected = oracle.forward(oracle.Head(*arrays))
    np.testing.assert_allclose(out, expected[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(logsumexp, expected[1], rtol=1e-5, atol=1e-6)


def test_denormal_numbers_are_harmless(implementation, debug_nans):
    query, key, value = head()
    tiny = float(np.finfo(np.float32).smallest_subnormal)
    out = call_with(implementation)(query * tiny, key, value)
    np.testing.assert_allclose(out, np.broadcast_to(value.mean(axis=0), out.shape), rtol=1e-5, atol=1e-6)
    out = np.asarray(call_with(implementation)(query, key, jnp.full_like(value, 5 * tiny)))
    assert np.all((out >= 0) & (out <= np.finfo(np.float32).smallest_normal))  # a CPU may flush them to 0
    gradients = jax.grad(lambda *a: call_with(implementation)(*a).sum(), argnums=(0, 1, 2))(query * tiny, key, value)
    assert all(np.all(np.isfinite(g)) for g in gradients)
