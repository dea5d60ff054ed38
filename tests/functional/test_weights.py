"""Attention weights: softmax itself, whole or for chosen rows, for one head and for many."""

import attention_cases as cases
import attention_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attn
from attn import masks, scores

T, S, N, K, H, HV = 3, 5, 4, 2, 2, 7
OPTIONS = {
    "plain": {},
    "mask": {"mask": masks.causal(1)},
    "score": {"score": scores.alibi(0.3, 2)},
    "everything": {"mask": lambda i, j: (i != 1) & (j != 2), "score": scores.softcap(1.0), "scale": 2.0},
}


@pytest.mark.some(3)
@pytest.mark.parametrize("name", OPTIONS)
def test_weights_agree_with_attention(implementation, name):
    query, key, value = cases.normal((T, H), (S, H), (S, HV))
    weights = attn.attention_weights(query, key, **OPTIONS[name])
    out = attn.attention(query, key, value, **OPTIONS[name], implementation=implementation)
    np.testing.assert_allclose(weights @ value, out, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", OPTIONS)
def test_weights_of_a_row_sum_to_one_or_zero(name):
    query, key = cases.normal((T, H), (S, H))
    weights = np.asarray(attn.attention_weights(query, key, **OPTIONS[name]))
    expected = np.array([1.0, name != "everything", 1.0])
    np.testing.assert_allclose(weights.sum(axis=1), expected, rtol=1e-6)
    assert np.all(weights >= 0) and (name != "everything" or not weights[1].any())


def test_weights_are_the_oracles():
    query, key = cases.normal((T, H), (S, H))
    i, j = cases.positions(T, S)
    head = oracle.Head(query, key, np.zeros((S, 1)), j <= i + 1)
    np.testing.assert_allclose(
        attn.attention_weights(query, key, mask=masks.causal(1)), oracle.weights(head), rtol=1e-6
    )


@pytest.mark.some(2)
@pytest.mark.parametrize("name", OPTIONS)
def test_chosen_rows_are_rows_of_the_whole(name):
    rows = [2, 0]
    query, key = cases.normal((T, H), (S, H))
    whole = np.asarray(attn.attention_weights(query, key, **OPTIONS[name]))
    ours = attn.attention_weights(query, key, rows=jnp.array(rows), **OPTIONS[name])
    np.testing.assert_allclose(ours, whole[rows], rtol=1e-6, atol=1e-7)
    query, key = cases.normal((T, N, H), (S, K, H))
    whole = np.asarray(attn.multi_head_attention_weights(query, key, **OPTIONS[name]))
    ours = attn.multi_head_attention_weights(query, key, rows=jnp.array(rows), **OPTIONS[name])
    np.testing.assert_allclose(ours, whole[:, rows], rtol=1e-6, atol=1e-7)


def test_rows_may_be_traced_and_repeat():
    query, key = cases.normal((T, H), (S, H))
    rows = jnp.array([2, 0, 0, 1])
    whole = np.asarray(attn.attention_weights(query, key))
    traced = jax.jit(lambda rows: attn.attention_weights(query, key, rows=rows))(rows)
    np.testing.assert_allclose(traced, whole[[2, 0, 0, 1]], rtol=1e-6)


def test_rows_may_be_captured_under_jit():
    query, key = cases.normal((T, H), (S, H))
    rows = jnp.array([2, 0])
    captured = jax.jit(lambda query: attn.attention_weights(query, key, rows=rows))(query)
    np.testing.assert_allclose(captured, np.asarray(attn.attention_weights(query, key))[[2, 0]], rtol=1e-6)


def test_only_the_chosen_rows_are_computed():
    query, key = cases.normal((61, H), (S, H))
    jaxpr = str(jax.make_jaxpr(lambda q, k, r: attn.attention_weights(q, k, rows=r))(query, key, jnp.array([1, 2])))
    assert "[2,5]" in jaxpr and "[61,5]" not in jaxpr


@pytest.mark.parametrize("K", [1, 2, 4])
def test_many_heads_equal_one_at_a_time(K):
    query, key = cases.normal((T, N, H), (S, K, H))
    weights = attn.multi_head_attention_weights(query, key, mask=masks.causal(1))
    assert weights.shape == (N, T, S)
    for n in range(N):
        one = attn.attention_weights(query[:, n], key[:, n // (N // K)], mask=masks.causal(1))
        np.testing.assert_allclose(weights[n], one, rtol=1e-6, atol=1e-7)


FUNCTIONS = {
    attn.attention_weights: ((T, H), (S, H)),
    attn.multi_head_attention_weights: ((T, N, H), (S, K, H)),
}


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_rows_that_are_no_positions_are_refused(untyped, function):
    query, key = cases.normal(*FUNCTIONS[function])
    for rows in ([3], [-1], [0, 7]):
        with pytest.raises(ValueError, match=r"rows must lie in 0\.\.2"):
            function(query, key, rows=jnp.array(rows))
    for rows in (np.zeros((1, 1), int), np.int32(1), np.zeros(0, int)):
        with pytest.raises(ValueError, match=r"rows must have shape \[R\]"):
            function(query, key, rows=rows)
    for rows in (np.zeros(1), np.ones(T, bool), [0.5]):
        with pytest.raises(TypeError, match="rows must be integers"):
            function(query, key, rows=rows)
