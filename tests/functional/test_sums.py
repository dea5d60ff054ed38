"""Sums that must not be rounded on the way: of weights beside large scores, and of gradients in 16 bits."""

import attention_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

import attn
from attn import masks, per_head, positions, scores

T, S, H, HV = 2, 7, 4, 3
LOWEST = float(np.finfo(np.float32).min)


def head():
    return cases.normal((T, H), (S, H), (S, HV))


def shifted(implementation):
    """Output and logsumexp under a constant that is added to every score."""

    def call(shift, query, key, value):
        options = {"implementation": implementation, "return_logsumexp": True}
        return attn.attention(query, key, value, score=lambda s, i, j: s + shift, **options)

    return call


# What a constant adds cancels in the softmax, whatever is left of the scores beside it.
@pytest.mark.some(2)
@pytest.mark.derivatives("forward")
@pytest.mark.parametrize("shift", [0.0, 1e4, -1e6, 1e7, -1e9, 1e20, LOWEST])
def test_weights_beside_large_scores_sum_to_one_in_every_derivative(implementation, shift):
    query, key, value = head()
    call, shift = shifted(implementation), jnp.float32(shift)
    dvalue = jax.grad(lambda v: call(shift, query, key, v)[0].sum())(value)
    np.testing.assert_allclose(dvalue.sum(), T * HV, rtol=1e-5)
    logsumexp = lambda shift: call(shift, query, key, value)[1]  # noqa: E731
    np.testing.assert_allclose(jax.jacrev(logsumexp)(shift), np.ones(T), rtol=1e-5)
    np.testing.assert_allclose(jax.jacfwd(logsumexp)(shift), np.ones(T), rtol=1e-5)
    _, dout = jax.jvp(lambda v: call(shift, query, key, v)[0], (value,), (jnp.ones_like(value),))
    np.testing.assert_allclose(dout, np.ones((T, HV)), rtol=1e-5)


@pytest.mark.some(1)
@pytest.mark.derivatives("second")
@pytest.mark.parametrize("shift", [-1e9, LOWEST])
def test_second_derivatives_beside_large_scores_are_those_of_even_weights(implementation, shift):
    """Beside such a shift all scores are equal, so p = 1 / S, and d2 logsumexp / db2 = diag(p) - p p^T."""
    query, key, value = head()

    def logsumexp(bias):
        score = lambda s, i, j: s + shift + bias[j]  # noqa: E731
        options = {"implementation": implementation, "return_logsumexp": True}
        return attn.attention(query, key, value, score=score, **options)[1][0]

    expected = np.eye(S) / S - 1 / S**2
    for hessian in (jax.hessian(logsumexp), jax.jacrev(jax.jacrev(logsumexp))):
        np.testing.assert_allclose(hessian(jnp.zeros(S)), expected, atol=1e-6)


@pytest.mark.parametrize("low", [-1e9, LOWEST])
@pytest.mark.parametrize("drop_in", ["jax", "flax"])
def test_an_example_that_a_bias_hides_entirely_has_gradients_of_even_weights(drop_in, low):
    batch, length, heads = 2, 640, 1
    query, key, value = cases.normal(*[(batch, length, heads, 2)] * 3)
    bias = jnp.zeros((batch, 1, 1, length)).at[1].set(low)
    call = {"jax": attn.interop.dot_product_attention, "flax": attn.interop.flax_attention_fn}[drop_in]
    dvalue = jax.jit(jax.grad(lambda v: call(query, key, v, bias).sum()))(value)
    np.testing.assert_allclose(dvalue[1], np.ones((length, heads, 2)), rtol=1e-4)
    np.testing.assert_allclose(dvalue[0].sum(), length * heads * 2, rtol=1e-5)


# Gradients in 16 bits. Zero queries under a window of (0, 0) see one key each, so that every derivative is a count.
LONG = 600  # a sum of ones in bfloat16 stops at 256


def diagonal(implementation, score, length=LONG):
    zeros = jnp.zeros((length, 2))
    options = {"mask": masks.sliding_window(0, 0), "implementation": implementation, "return_logsumexp": True}
    return attn.attention(zeros, zeros, zeros, score=score, **options)[1].sum()


def reading(read):
    """A score of the user's that captures a table of two entries."""

    def score(x):
        table = jnp.stack([x, x])
        return lambda s, i, j: s + read(table, i)

    return score


COUNTING = {
    "relative_bias": lambda x: scores.relative_bias(jnp.broadcast_to(x, 2 * LONG - 1)),
    "a table of the user's": reading(lambda table, i: table[0 * i]),
    "a slice": reading(lambda table, i: table[1:]),
    "take": reading(lambda table, i: jnp.take(table, 0 * i, axis=0)),
    "a scalar": lambda x: lambda s, i, j: s + x,
    "where": lambda x: lambda s, i, j: s + jnp.where(i == j, x, jnp.zeros((), x.dtype)),
    "a pytree": lambda x: Partial(lambda table, s, i, j: s + table[0 * i + 0 * j], jnp.stack([x, x])),
    "after ours": lambda x: scores.softcap(50.0) >> (lambda s, i, j: s + x),
    "a checkpoint": reading(lambda table, i: jax.checkpoint(lambda table: table[0 * i])(table)),
    "a condition": reading(lambda table, i: jax.lax.cond(i[0, 0] >= 0, lambda t: t[0 * i], lambda t: t[0 * i], table)),
    "a loop": reading(lambda table, i: jax.lax.map(lambda row: table[0 * row], i)),
    "a scalar that arithmetic spreads": lambda x: lambda s, i, j: s + x * jnp.ones(s.shape, x.dtype),
    "dense": lambda x: scores.dense(jnp.broadcast_to(x, (LONG, LONG))),
}


@pytest.mark.some(4)
@pytest.mark.parametrize("name", COUNTING)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_gradient_to_what_is_captured_in_16_bits_is_summed_in_32(implementation, name, dtype):
    gradient = jax.grad(lambda x: diagonal(implementation, COUNTING[name](x)))
    found = gradient(jnp.zeros((), dtype))
    assert found.dtype == dtype
    np.testing.assert_allclose(np.float32(found), np.float32(jnp.asarray(LONG, dtype)))


def test_arithmetic_of_a_score_stays_in_the_dtype_it_asks_for(implementation):
    """1 + 2^-9 is 1 in bfloat16: what the function computes is not what it would compute in float32."""
    small = jnp.asarray([2.0**-9], "bfloat16")
    score = lambda s, i, j: s + 1e3 * (jnp.ones((), "bfloat16") + small[0 * j])  # noqa: E731
    query, key, value = head()
    options = {"implementation": implementation, "return_logsumexp": True}
    _, logsumexp = attn.attention(query, key, value, score=score, **options)
    _, expected = attn.attention(query, key, value, score=lambda s, i, j: s + 1e3, **options)
    np.testing.assert_array_equal(logsumexp, expected)


@pytest.mark.some(1)
@pytest.mark.parametrize("form", ["a pytree", "a closure"])
def test_t5s_table_in_bfloat16_has_the_gradient_of_float32(implementation, form):
    heads, length = 2, 96
    query, key, value = cases.normal(*[(length, heads, 4)] * 3)
    table = cases.normal((heads, 32), dtype="bfloat16")[0]

    def bias(table, s, i, j):
        return s + table[positions.relative_buckets(j - i)]

    def loss(table):
        score = per_head(Partial(bias, table)) if form == "a pytree" else lambda *tile: bias(table[0], *tile)
        out = attn.multi_head_attention(query, key, value, score=score, implementation=implementation)
        return (out * jnp.arange(4)).sum()

    ours, expected = jax.grad(loss)(table), jax.grad(loss)(table.astype("float32"))
    scale = float(jnp.abs(expected).max())
    np.testing.assert_allclose(ours.astype("float32"), expected, rtol=2.0**-8, atol=2.0**-8 * scale)


@pytest.mark.some(1)
@pytest.mark.parametrize("num_groups", [1, 2])
def test_gradients_to_shared_keys_and_values_in_bfloat16_are_summed_over_heads_in_float32(implementation, num_groups):
    heads, length = 64, 8
    query = cases.normal((length, heads, 4), dtype="bfloat16")[0]
    key, value = cases.normal((length, num_groups, 4), (length, num_groups, 4), dtype="bfloat16", seed=1)
    weights = jnp.round(cases.normal((length, heads, 4), seed=2)[0] * 4) / 4  # exact in bfloat16

    def loss(key, value, query):
        out = attn.multi_head_attention(query, key, value, implementation=implementation)
        return (out.astype("float32") * weights).sum()

    ours = jax.grad(loss, argnums=(0, 1))(key, value, query)
    expected = jax.grad(loss, argnums=(0, 1))(*(x.astype("float32") for x in (key, value, query)))
    for got, want in zip(ours, expected):
        np.testing.assert_allclose(got.astype("float32"), want, rtol=0, atol=2.0**-8 * float(jnp.abs(want).max()))


def test_a_bias_in_bfloat16_shared_by_examples_and_heads_gets_the_sum_over_them():
    """Zero queries and keys, one key: the gradient to the bias of the logsumexp is 1 for every example and head."""
    batch, heads = 30, 20
    zeros = jnp.zeros((batch, 1, heads, 2))

    def residual(bias):
        weights = jnp.zeros((batch, 2, heads, 2)).at[:, 0].set(1)
        out = attn.interop.dot_product_attention(zeros, jnp.zeros_like(weights), weights, bias)
        return out.sum()

    found = jax.grad(residual)(jnp.zeros((1, 1, 1, 2), "bfloat16"))
    # d out / d bias_0 = p (1 - p) per example, head and feature, with p = 1/2.
    np.testing.assert_allclose(np.float32(found).ravel(), [batch * heads * 2 / 4, -batch * heads * 2 / 4], rtol=2.0**-8)
