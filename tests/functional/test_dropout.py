"""Dropout: bits that depend on (key, head, i, j) alone, the right rate, an unbiased mean, and errors."""

import attention_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attn

T, S, H, HV = 3, 5, 2, 7
KEY = jax.random.key(7)


def tile(T, S):
    return tuple(map(jnp.asarray, cases.positions(T, S)))


def dropped_weights(query, key, **options):
    """The dropped weights themselves: attention to an identity matrix."""
    return attn.attention(query, key, jnp.eye(key.shape[0]), **options)


@pytest.mark.parametrize("rate", [0.25, 0.6])
def test_weights_are_dropped_or_scaled(implementation, rate):
    query, key = cases.normal((T, H), (S, H))
    dropout = attn.Dropout(rate, KEY)
    keep, weights = np.asarray(dropout.keep(*tile(T, S))), attn.attention_weights(query, key)
    ours = dropped_weights(query, key, dropout=dropout, implementation=implementation)
    np.testing.assert_allclose(ours, np.where(keep, weights / (1 - rate), 0), rtol=1e-6)
    assert 0 < keep.sum() < keep.size


def test_every_implementation_drops_the_same_through_its_gradient_too(implementation):
    query, key, value = cases.normal((T, H), (S, H), (S, HV))
    dropout = attn.Dropout(0.5, KEY)
    call = lambda value: attn.attention(query, key, value, dropout=dropout, implementation=implementation)  # noqa: E731
    gradient = jax.jacobian(lambda value: call(value)[:, 0])(value)[..., 0]
    np.testing.assert_array_equal(gradient != 0, dropout.keep(*tile(T, S)))


def test_a_bit_depends_on_key_head_and_positions_alone():
    dropout = attn.Dropout(0.5, KEY)
    i, j = tile(64, 32)
    whole = np.asarray(dropout.keep(i, j))
    np.testing.assert_array_equal(dropout.keep(i[17:23], j[:, 5:9]), whole[17:23, 5:9])
    np.testing.assert_array_equal(jax.jit(lambda i, j: dropout.keep(i, j))(i, j), whole)
    one_by_one = jax.jit(jax.vmap(jax.vmap(dropout.keep, (None, 0)), (0, None)))(i[:, 0], j[0])
    np.testing.assert_array_equal(one_by_one, whole)
    with jax.enable_x64(True):
        np.testing.assert_array_equal(dropout.keep(*tile(64, 32)), whole)


def test_a_part_drops_what_the_whole_drops():
    whole = attn.Dropout(0.5, KEY)
    part = whole.part(heads=jnp.int32(3)).part(queries=17, keys=jnp.int32(2)).part(keys=3)  # parts of parts add up
    expected = np.asarray(whole.for_head(jnp.int32(5)).keep(*tile(64, 32)))[17:23, 5:9]
    np.testing.assert_array_equal(part.for_head(jnp.int32(2)).keep(*tile(6, 4)), expected)
    assert 0 < expected.sum() < expected.size


def test_other_keys_and_other_heads_drop_other_weights():
    i, j = tile(64, 64)
    base = attn.Dropout(0.5, KEY)
    for other in (attn.Dropout(0.5, jax.random.key(8)), base.for_head(jnp.int32(1)), base.for_head(jnp.int32(2))):
        same = np.mean(np.asarray(base.keep(i, j)) == np.asarray(other.keep(i, j)))
        assert abs(same - 0.5) < 5 * 0.5 / 64  # five standard deviations of 4096 fair coins
    np.testing.assert_array_equal(base.keep(i, j), base.for_head(jnp.int32(0)).keep(i, j))


def test_bits_are_independent_along_rows_columns_and_heads():
    keep = np.stack([np.asarray(attn.Dropout(0.5, KEY).for_head(jnp.int32(n)).keep(*tile(64, 64))) for n in range(4)])
    signs = 2.0 * keep - 1
    for first, second in ((signs[:, 1:], signs[:, :-1]), (signs[:, :, 1:], signs[:, :, :-1]), (signs[1:], signs[:-1])):
        assert abs(np.mean(first * second)) < 5 / np.sqrt(first.size)
    rectangles = signs[:, 1:, 1:] * signs[:, 1:, :-1] * signs[:, :-1, 1:] * signs[:, :-1, :-1]
    assert abs(rectangles.mean()) < 5 / np.sqrt(rectangles.size)
    assert np.abs(signs.mean(axis=2)).max() < 5 / np.sqrt(64) and np.abs(signs.mean(axis=1)).max() < 5 / np.sqrt(64)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_the_rate_is_what_was_asked_for(rate):
    keep = attn.Dropout(rate, KEY).keep(*tile(256, 256))
    assert abs(np.mean(keep) - (1 - rate)) < 5 * np.sqrt(rate * (1 - rate)) / 256


def test_the_mean_over_keys_is_the_output_without_dropout(implementation):
    query, key, value = cases.normal((T, H), (S, H), (S, HV))
    exact = attn.attention(query, key, value)

    @jax.jit
    @jax.vmap
    def dropped(key_):
        return attn.attention(query, key, value, dropout=attn.Dropout(0.3, key_), implementation=implementation)

    samples = np.asarray(dropped(jax.random.split(KEY, 4096)))
    standard_error = samples.std(axis=0) / 64
    assert np.all(np.abs(samples.mean(axis=0) - exact) < 5 * standard_error)
    assert np.all(standard_error > 0)


def test_logsumexp_is_not_dropped(implementation):
    arrays = cases.normal((T, H), (S, H), (S, HV))
    options = {"return_logsumexp": True, "implementation": implementation}
    plain = attn.attention(*arrays, **options)
    dropped = attn.attention(*arrays, dropout=attn.Dropout(0.5, KEY), **options)
    np.testing.assert_array_equal(dropped[1], plain[1])
    assert np.any(dropped[0] != plain[0])


@pytest.mark.some(1)
@pytest.mark.parametrize("K", [2, 4])
def test_one_head_at_a_time_drops_what_all_heads_drop(implementation, K):
    query, key, value = cases.normal((T, 4, H), (S, K, H), (S, K, HV))
    dropout = attn.Dropout(0.5, KEY)
    out = attn.multi_head_attention(query, key, value, dropout=dropout, implementation=implementation)
    for n in range(4):
        group = n // (4 // K)
        one = attn.attention(query[:, n], key[:, group], value[:, group], dropout=dropout.for_head(jnp.int32(n)))
        np.testing.assert_allclose(out[:, n], one, rtol=1e-5, atol=1e-6)


def test_dropout_under_jit_and_over_a_batch_of_keys(implementation):
    query, key, value = cases.normal((T, H), (S, H), (S, HV))
    keys = jax.random.split(KEY, 2)
    call = lambda k: attn.attention(query, key, value, dropout=attn.Dropout(0.5, k), implementation=implementation)  # noqa: E731
    batch = jax.jit(jax.vmap(call))(keys)
    for k, ours in zip(keys, batch):
        np.testing.assert_allclose(ours, call(k), rtol=1e-5, atol=1e-6)
    assert np.any(batch[0] != batch[1])


def test_dropout_is_a_pytree_whose_key_is_a_leaf():
    traces = []

    @jax.jit
    def keep(dropout):
        traces.append(dropout)
        return dropout.keep(*tile(T, S))

    for seed in range(3):
        keep(attn.Dropout(0.5, jax.random.key(seed)))
    assert len(traces) == 1
    assert len(jax.tree.leaves(attn.Dropout(0.5, KEY))) == 1 and not jax.tree.leaves(attn.Dropout(0.0))


def test_rate_zero_drops_nothing_and_needs_no_key(untyped, implementation):
    arrays = cases.normal((T, H), (S, H), (S, HV))
    plain = attn.attention(*arrays, implementation=implementation)
    for dropout in (attn.Dropout(0), attn.Dropout(0.0), attn.Dropout(0.0, KEY)):
        ours = attn.attention(*arrays, dropout=dropout, implementation=implementation)
        np.testing.assert_array_equal(ours, plain)


@pytest.mark.parametrize("rate", [-0.1, 1.0, 1, 7.5, float("nan")])
def test_a_rate_outside_its_range_is_refused(untyped, rate):
    with pytest.raises(ValueError, match=r"rate.*\[0, 1\)"):
        attn.Dropout(rate, KEY)


@pytest.mark.parametrize("rate", ["0.5", None, True, np.zeros(2)])
def test_a_rate_that_is_no_number_is_refused(untyped, rate):
    with pytest.raises(TypeError, match="rate"):
        attn.Dropout(rate, KEY)


def test_a_positive_rate_needs_a_key(untyped):
    with pytest.raises(ValueError, match="key"):
        attn.Dropout(0.5)


@pytest.mark.parametrize("dropout", [0.5, KEY])
def test_what_is_no_dropout_is_refused(untyped, dropout):
    one, many = cases.normal((T, H), (S, H), (S, HV)), cases.normal((T, 4, H), (S, 2, H), (S, 2, HV))
    with pytest.raises(TypeError, match=r"attn\.Dropout"):
        attn.attention(*one, dropout=dropout)
    with pytest.raises(TypeError, match=r"attn\.Dropout"):
        attn.multi_head_attention(*many, dropout=dropout)


@pytest.mark.parametrize("key", [3, "key", np.zeros(2), np.zeros(2, np.int32)])
def test_a_key_is_a_random_key(untyped, key):
    with pytest.raises(TypeError, match=r"random key.*jax\.random\.key"):
        attn.Dropout(0.5, key)
