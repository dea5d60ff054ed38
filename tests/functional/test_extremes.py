"""The ends of the number range over many blocks: large values, long sums, large scores, NaN."""

import functools

import attention_cases as cases
import attention_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attn
from attn import masks

H, HV = 2, 3


def head(T, S, dtype="float32"):
    return cases.normal((T, H), (S, H), (S, HV), dtype=dtype)


@functools.cache
def with_gradients(implementation, **options):
    """Jitted: (out, logsumexp) and the gradients of the sum of both."""
    options = {**options, "implementation": implementation, "return_logsumexp": True}

    @jax.jit
    def call(*arrays):
        results, pullback = jax.vjp(lambda *a: attn.attention(*a, **options), *arrays)
        return results, pullback(jax.tree.map(jnp.ones_like, results))

    return call


@pytest.mark.parametrize("sign", [1, -1])
def test_a_mean_of_the_largest_values_does_not_overflow(implementation, debug_nans, sign):
    S = 1000
    value = jnp.full((S, HV), sign * 1e37, jnp.float32)  # their sum is no float32
    (out, logsumexp), gradients = with_gradients(implementation)(jnp.ones((2, H)), jnp.zeros((S, H)), value)
    np.testing.assert_allclose(out, np.full((2, HV), sign * 1e37), rtol=1e-5)
    np.testing.assert_allclose(logsumexp, np.log(S), rtol=1e-6)
    np.testing.assert_allclose(gradients[2], np.full((S, HV), 2 / S), rtol=1e-5)


def test_the_largest_values_of_both_signs_cancel(implementation, debug_nans):
    S, largest = 1000, float(np.finfo(np.float32).max)
    value = jnp.where(jnp.arange(S)[:, None] < S // 2, largest, -largest) * jnp.ones((1, HV))
    out = jax.jit(lambda *a: attn.attention(*a, implementation=implementation))(
        jnp.ones((2, H)), jnp.zeros((S, H)), value
    )
    assert np.all(np.abs(out) <= 1e-4 * largest)


@pytest.mark.some(1)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_of_thousands_of_keys_sum_to_one_in_half_precision(monkeypatch, implementation, dtype):
    cases.use_real_blocks(monkeypatch)
    T, S = 3, 8192
    query, key = (4 * x for x in cases.normal((T, 16), (S, 16), dtype=dtype))
    call = with_gradients(implementation, mask=masks.padding(8000))
    (out, logsumexp), gradients = call(query, key, jnp.ones((S, HV), dtype))
    assert out.dtype == dtype and np.max(np.abs(out.astype(np.float32) - 1)) <= 2.0**-7
    query, key = (np.asarray(x).astype(float) for x in (query, key))
    s = query @ key[:8000].T / 4
    peak = s.max(axis=1, keepdims=True)
    exact = np.log(np.exp(s - peak).sum(axis=1)) + peak[:, 0]
    np.testing.assert_allclose(logsumexp, exact, rtol=1e-5)
    weights = np.exp(s - exact[:, None]).sum(axis=0)
    dvalue = gradients[2][:, 0].astype(np.float32)
    np.testing.assert_allclose(dvalue[:8000], weights, rtol=2.0**-7, atol=1e-7)
    assert not np.any(dvalue[8000:])


def test_float16_scores_beyond_its_range_are_no_matter(implementation, debug_nans):
    query, key, value = jnp.full((2, 4), 200.0, "float16"), jnp.full((9, 4), 200.0, "float16"), head(2, 9)[2]
    key = key.at[4].set(201.0)
    (out, logsumexp), gradients = with_gradients(implementation, scale=1.0)(query, key, value.astype("float16"))
    np.testing.assert_array_equal(out, np.broadcast_to(value[4].astype("float16"), (2, HV)))  # ahead by 800
    np.testing.assert_array_equal(logsumexp, np.full(2, 4 * 200 * 201.0, np.float32))
    assert all(np.all(np.isfinite(g)) for g in gradients)


S_LOGITS = 13  # four blocks
LOGITS = {
    "falling": np.linspace(1e4, -1e4, S_LOGITS),
    "rising": np.linspace(-1e4, 1e4, S_LOGITS),
    "in turns": 1e4 * (-1.0) ** np.arange(S_LOGITS),
    "all low": -1e4 + np.arange(S_LOGITS) / 8,
    "the first blocks hidden": np.where(np.arange(S_LOGITS) < 8, -np.inf, 1e4 - np.arange(S_LOGITS) / 8),
    "the last blocks hidden": np.where(np.arange(S_LOGITS) >= 4, -np.inf, np.arange(S_LOGITS) / 8 - 1e4),
    "one in the middle": np.where(np.arange(S_LOGITS) == 6, -1e30, -np.inf),
}


@functools.cache
def with_bias(implementation):
    """Jitted: as `with_gradients`, with a bias for each key in front."""

    def call(bias, *arrays):
        options = {"score": lambda s, i, j: s + bias[j], "implementation": implementation, "return_logsumexp": True}
        results, pullback = jax.vjp(lambda *a: attn.attention(*a, **options), *arrays)
        return *results, *pullback(jax.tree.map(jnp.ones_like, results))

    return jax.jit(call)


def test_values_that_dropout_enlarges_do_not_overflow_on_the_way(implementation, debug_nans):
    T, S, rate = 20, 8, 0.5
    largest = np.float32(np.finfo(np.float32).max)
    dropout = attn.Dropout(rate, jax.random.key(0))
    value = jnp.full((S, 1), largest * 0.49)  # even a row that keeps everything has a mean in range
    out = attn.attention(jnp.ones((T, 2)), jnp.zeros((S, 2)), value, dropout=dropout, implementation=implementation)
    kept = np.asarray(dropout.keep(*map(jnp.asarray, cases.positions(T, S)))).sum(axis=1)
    assert kept.max() > S * rate  # more than are kept on average
    np.testing.assert_allclose(out[:, 0], kept / S / (1 - rate) * (largest * 0.49), rtol=1e-6)


@pytest.mark.parametrize("name", LOGITS)
def test_logits_of_ten_thousand_in_any_order_of_blocks(implementation, debug_nans, name):
    T, bias = 5, LOGITS[name].astype(np.float32)
    arrays = head(T, S_LOGITS)
    found = with_bias(implementation)(bias, *arrays)
    wide = bias.astype(oracle.WIDE)
    exact = oracle.Head(*arrays, None, lambda s, i, j: (s + wide[j], np.ones_like(s), np.ones_like(s)))
    expected = *oracle.forward(exact), *oracle.backward(exact, np.ones((T, HV)), np.ones(T))
    for ours, theirs in zip(found, expected, strict=True):
        # Scores near ten thousand are known to half a unit of their last place: 2**-11.
        np.testing.assert_allclose(ours, theirs.astype(float), rtol=2e-3, atol=2e-3)


# Key 1 lies among visible ones, 8 as well; 12 and 13 are behind the padding. Queries 2 and 8 see nothing.
HIDING = masks.padding(jnp.int32(12)) & (lambda i, j: (j != 1) & (j != 8) & (i != 2) & (i != 8))
HIDDEN = {"query": np.array([2, 8]), "key": np.array([1, 8, 12, 13]), "value": np.array([1, 8, 12, 13])}
SEEN = masks.causal(3)


@pytest.mark.some(3)
@pytest.mark.parametrize("where", ["query", "key", "value"])
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_nan_hidden_beside_what_is_visible_and_in_blocks_passed_over_never_matters(implementation, where, poison):
    arrays = dict(zip(("query", "key", "value"), head(9, 14)))
    call = with_gradients(implementation, mask=HIDING)
    clean, dirty = (arrays | {where: arrays[where].at[HIDDEN[where]].set(filler)} for filler in (0, poison))
    ours, expected = (jax.tree.leaves(call(*given.values())) for given in (dirty, clean))
    for a, b in zip(ours, expected):
        np.testing.assert_array_equal(a, b)
    assert np.all(np.isfinite(expected[0])) and all(np.any(x) for x in expected)


@pytest.mark.parametrize("where", ["key", "value"])
def test_nan_reaches_every_row_that_sees_it_in_whatever_block(implementation, where):
    T, S = 9, 14
    arrays = dict(zip(("query", "key", "value"), head(T, S)))
    for at in (0, 5, 9, 11):
        dirty = arrays | {where: arrays[where].at[at].set(np.nan)}
        (out, logsumexp), _ = with_gradients(implementation, mask=SEEN)(*dirty.values())
        sees = at <= np.arange(T) + 3
        assert sees.any() and np.all(np.isnan(np.asarray(out)[sees]))
        assert where == "value" or np.all(np.isnan(np.asarray(logsumexp)[sees]))


def test_a_score_is_differentiated_at_nothing_but_scores(implementation):
    """The filling of the last block must not reach a kink: the derivative of a root is infinite at 0."""
    arrays = head(9, 14)
    root = lambda s, i, j: jnp.sign(s) * jnp.sqrt(jnp.abs(s))  # noqa: E731
    call = lambda *a: jnp.sum(jnp.sin(attn.attention(*a, score=root, implementation=implementation)))  # noqa: E731
    s = arrays[0] @ arrays[1].T
    assert np.all(s != 0)
    for gradient in jax.jit(jax.grad(call, argnums=(0, 1, 2)))(*arrays):
        assert np.all(np.isfinite(gradient)) and np.any(gradient)
