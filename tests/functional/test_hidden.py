"""The semantics of what is hidden: rows without a visible key, and NaN and infinity in keys and values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_cases import HIDDEN, S, T, gradients, head

import attn
from attn import masks, scores

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
@pytest.mark.derivatives("forward")
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


@pytest.mark.parametrize("poison", [np.inf, -np.inf])
def test_infinity_in_a_key_reaches_all_rows_where_nothing_is_hidden(implementation, poison):
    query, key, value = head()
    key = key.at[1].set(poison)  # whose scores are infinite, of either sign
    out, logsumexp = attn.attention(query, key, value, implementation=implementation, return_logsumexp=True)
    assert np.all(np.isnan(out)) and np.all(np.isnan(logsumexp))
    assert np.all(np.isnan(attn.attention_weights(query, key)))


def test_nan_in_a_value_is_not_hidden_by_a_weight_that_rounds_to_zero(implementation):
    query, key, value = head()
    bias = jnp.zeros((T, S)).at[:, HIDDEN].set(-1e30)
    value = value.at[HIDDEN].set(np.nan)
    assert np.all(np.isnan(attn.attention(query, key, value, score=scores.dense(bias), implementation=implementation)))
