"""Numbers that are known while tracing, of Python or of NumPy, mean the same, whatever their size and dtype."""

import attention_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attn
from attn import masks, positions, scores
from attn.interop.jax_nn import dot_product_attention

I, J = cases.positions(5, 7)
HUGE = 2**40

# A mask built from an integer that lies beyond 32 bits, and what it shows.
BEYOND = {
    "padding": (lambda n: masks.padding(n), J == J),
    "prefix": (lambda n: masks.prefix(n), J == J),
    "padding, negative": (lambda n: masks.padding(-n), J != J),
    "causal": (lambda n: masks.causal(n), J == J),
    "causal, negative": (lambda n: masks.causal(-n), J != J),
    "window to the left": (lambda n: masks.sliding_window(n, 0, 0), J <= I),
    "window to the right": (lambda n: masks.sliding_window(0, n, 0), J >= I),
    "window far away": (lambda n: masks.sliding_window(1, 1, n), J != J),
}


@pytest.mark.parametrize("number", [2**31, HUGE, 2**63 - 1, np.int64(2**31), np.int64(2**63 - 1), np.uint64(2**63)])
@pytest.mark.parametrize("name", BEYOND)
def test_integers_beyond_32_bits_do_not_wrap(name, number):
    if "negative" in name and isinstance(number, np.unsignedinteger):
        pytest.skip("an unsigned integer has no negative")
    build, expected = BEYOND[name]
    np.testing.assert_array_equal(np.broadcast_to(build(number)(I, J), (5, 7)), np.broadcast_to(expected, (5, 7)))


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize("name", BEYOND)
def test_traced_integers_near_the_largest_do_not_wrap(name, x64):
    build, expected = BEYOND[name]
    with jax.enable_x64(x64):
        dtype = jnp.int64 if x64 else jnp.int32
        found = jax.jit(lambda n: build(n)(jnp.asarray(I), jnp.asarray(J)))(jnp.asarray(jnp.iinfo(dtype).max, dtype))
    np.testing.assert_array_equal(np.broadcast_to(found, (5, 7)), np.broadcast_to(expected, (5, 7)))


@pytest.mark.some(2)
@pytest.mark.parametrize("name", BEYOND)
def test_they_do_not_wrap_inside_attention_either(implementation, name):
    build, expected = BEYOND[name]
    arrays = cases.normal((5, 3), (7, 3), (7, 2))
    ours = attn.attention(*arrays, mask=build(np.int64(HUGE)), implementation=implementation)
    dense = masks.dense(np.broadcast_to(expected, (5, 7)))
    np.testing.assert_allclose(
        ours, attn.attention(*arrays, mask=dense, implementation="reference"), rtol=1e-6, atol=1e-7
    )


# A real number of NumPy's integers beyond 32 bits, and what it must mean: the same as the float.
REAL = {
    "scale": lambda n: {"scale": n},
    "cap": lambda n: {"score": scores.softcap(n)},
    "cap per head": lambda n: {"score": attn.per_head(scores.softcap(np.stack([n, np.ones_like(n)])))},
    "slope": lambda n: {"score": scores.alibi(n, 0)},
    "slope per head": lambda n: {"score": attn.per_head(scores.alibi(np.stack([n, np.ones_like(n)]), 0))},
}


@pytest.mark.some(2)
@pytest.mark.parametrize("number", [np.int64(2**32), np.uint64(2**63), np.array(2**33)])
@pytest.mark.parametrize("name", REAL)
def test_real_numbers_beyond_32_bits_are_those_of_the_float(implementation, name, number):
    arrays = [1e-9 * x if name == "scale" else x for x in cases.normal((5, 2, 3), (7, 2, 3))]
    arrays.append(cases.normal((7, 2, 2))[0])
    ours, expected = (
        attn.multi_head_attention(*arrays, implementation=implementation, **REAL[name](n))
        for n in (number, number.astype(np.float32))
    )
    np.testing.assert_allclose(ours, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("base", [np.int64(2**32), np.uint64(2**63), np.array(2**33), 2**40])
def test_a_base_beyond_32_bits_is_that_of_the_float(base):
    places, x = jnp.arange(5), jnp.ones((5, 4))
    np.testing.assert_array_equal(
        positions.sinusoidal(places, 6, base=base), positions.sinusoidal(places, 6, base=float(base))
    )
    np.testing.assert_array_equal(positions.rotary(x, places, base=base), positions.rotary(x, places, base=float(base)))


@pytest.mark.parametrize("low", [-(2**40), -(2**32)])
def test_a_bias_beyond_32_bits_is_that_of_the_float(low):
    query, key, value = cases.normal((1, 4, 1, 2), (1, 4, 1, 2), (1, 4, 1, 2))
    bias = np.array([low, 0, 0, 0])[None, None, None]
    ours, expected = (dot_product_attention(query, key, value, bias=x) for x in (bias, bias.astype(np.float32)))
    np.testing.assert_array_equal(ours, expected)
    np.testing.assert_allclose(ours, dot_product_attention(query, key[:, 1:], value[:, 1:]), rtol=1e-5)


@pytest.mark.parametrize("x64, other", [(False, "int32"), (False, "int8"), (True, "int32"), (True, "int64")])
def test_signed_and_unsigned_ids_are_equal_only_where_the_numbers_are(x64, other):
    with jax.enable_x64(x64):
        unsigned = "uint64" if other == "int64" else "uint32"
        top = int(jnp.iinfo(unsigned).max)
        query_ids = np.array([0, 5, 100, top, top // 2 + 1, top - 1], unsigned)
        key_ids = np.array([-1, -2, -100, 0, 5, jnp.iinfo(other).min, jnp.iinfo(other).max], other)
        mask = masks.segments(jnp.asarray(query_ids), jnp.asarray(key_ids))
        expected = query_ids.astype(object)[:, None] == key_ids.astype(object)[None, :]
        i, j = np.arange(len(query_ids))[:, None], np.arange(len(key_ids))[None, :]
        np.testing.assert_array_equal(jax.jit(lambda mask: mask(i, j))(mask), expected)
        some, every = mask.bounds(i, j.T)
        assert (np.asarray(some) >= expected).all() and (np.asarray(every) <= expected).all()


@pytest.mark.parametrize("left, offset", [(HUGE, 2**35), (2**31 - 1, 2**30)])
def test_a_window_as_wide_as_can_be_reaches_however_far_its_queries_stand(left, offset):
    np.testing.assert_array_equal(masks.sliding_window(left, 0, offset)(I, J), np.ones((5, 7), bool))
    traced = jax.jit(lambda left, offset: masks.sliding_window(left, 0, offset)(jnp.asarray(I), jnp.asarray(J)))
    assert np.all(traced(jnp.int32(2**31 - 1), jnp.int32(2**30 + 5)))


@pytest.mark.parametrize("name", ["query_seq_lengths", "key_value_seq_lengths"])
@pytest.mark.parametrize("lengths", [[2**32], np.array([2**32]), np.array([2**63], np.uint64)])
def test_lengths_beyond_32_bits_hide_nothing_in_the_drop_in(name, lengths):
    x = jnp.ones((1, 4, 1, 2))
    np.testing.assert_array_equal(attn.interop.dot_product_attention(x, x, x, **{name: lengths}), x)


def test_a_count_of_numpy_beyond_32_bits_is_all():
    key = jax.random.key(0)
    drawn = positions.randomized(key, 3, 10, count=np.int64(2**32 + 2))
    np.testing.assert_array_equal(drawn, positions.randomized(key, 3, 10))


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "int32", "uint32"])
def test_integers_of_any_dtype_mean_the_same(dtype):
    number = jnp.asarray(3, dtype)
    for build in (masks.padding, masks.causal, lambda n: masks.sliding_window(n, n, n)):
        np.testing.assert_array_equal(build(number)(I, J), build(3)(I, J))


@pytest.mark.parametrize("ids", [[2**32, 0, 1], [-(2**40), 2**40, 0], [2**63, 2**64 - 1, 5]])
def test_ids_beyond_32_bits_stay_distinct_and_in_order(ids):
    ids = np.array(ids, np.uint64 if max(ids) >= 2**63 else np.int64)
    mask = masks.segments(ids, ids[::-1].copy())
    i, j = cases.positions(3, 3)
    np.testing.assert_array_equal(mask(i, j), ids[:, None] == ids[None, ::-1])
    assert np.array_equal(np.argsort(mask.query_ids), np.argsort(ids))


def test_ids_beyond_32_bits_beside_traced_ones_are_refused():
    with pytest.raises(ValueError, match="segments: ids beyond 32 bits must be NumPy arrays"):
        masks.segments(np.array([2**40]), jnp.zeros(1, jnp.int32))


REFUSED = {
    "softcap": (lambda: scores.softcap(np.float32(-1)), "softcap: cap must be positive"),
    "softcap per head": (lambda: scores.softcap(np.array([1.0, 0.0])), "softcap: cap must be positive"),
    "alibi": (lambda: scores.alibi(0.5, np.int64(HUGE)), "alibi: offset must lie within 2"),
    "alibi of Python": (lambda: scores.alibi(0.5, HUGE), "alibi: offset must lie within 2"),
    "relative_bias": (lambda: scores.relative_bias(np.zeros(3), -HUGE), "relative_bias: offset must lie within 2"),
    "a bias from after its table": (
        lambda: attn.attention(*cases.normal(*[(4, 2)] * 3), score=scores.relative_bias(np.zeros(7), np.int64(2))),
        "offset 2 read the entries -2 to 4",
    ),
    "alibi_slopes": (lambda: positions.alibi_slopes(np.int64(0)), "must be at least 1"),
    "rotary": (
        lambda: positions.rotary(jnp.ones((2, 4)), jnp.arange(2), scale=np.float32(0)),
        "scale must be positive",
    ),
    "positions": (lambda: positions.learned(np.array([2**32]), jnp.ones((4, 2))), "positions must fit into int32"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_known_numbers_that_cannot_be_are_refused(untyped, name):
    call, words = REFUSED[name]
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_positions_in_16_bits_are_refused(untyped, dtype):
    places = jnp.arange(300).astype(dtype)
    calls = (
        lambda: positions.sinusoidal(places, 8),
        lambda: positions.rotary(jnp.ones((300, 4)), places),
        lambda: positions.learned(places, jnp.ones((4, 2))),
    )
    for call in calls:
        with pytest.raises(TypeError, match=f"positions must be integers or floats of 32 bits or more, got {dtype}"):
            call()


def test_the_number_of_heads_may_be_numpys():
    np.testing.assert_array_equal(positions.alibi_slopes(np.int64(8)), positions.alibi_slopes(8))


@pytest.mark.parametrize("rate", [np.float16(0.5), np.float64(0.5), np.float32(0.5)])
def test_a_rate_of_numpy_drops_as_one_of_python_does(rate):
    key, weights = jax.random.key(0), jnp.ones((5, 7), "float32")
    with jax.enable_x64(True):
        ours, expected = (attn.Dropout(r, key)(weights, *map(jnp.asarray, (I, J))) for r in (rate, 0.5))
    assert ours.dtype == expected.dtype == jnp.float32
    np.testing.assert_array_equal(ours, expected)


# Raffel et al. 2020: floor(log(d / exact) / log(max / exact) * count), in whole numbers.
@pytest.mark.some(4)
@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize("num_buckets, max_distance", [(32, 128), (16, 64), (8, 20), (32, 32), (20, 70), (64, 1000)])
def test_buckets_begin_where_the_logarithm_is_a_whole_number(num_buckets, max_distance, x64):
    exact, count = num_buckets // 2, num_buckets - num_buckets // 2
    for distance in range(exact, 2 * max_distance):
        # The largest m with (max / exact)^(m / count) <= distance / exact.
        m = max(m for m in range(count) if max_distance**m * exact ** (count - m) <= distance**count)
        with jax.enable_x64(x64):
            found = positions.relative_buckets(
                -distance, num_buckets=num_buckets, max_distance=max_distance, bidirectional=False
            )
        assert found == exact + m, distance


def test_the_bucket_of_distance_64_is_that_of_t5():
    for x64 in (False, True):
        with jax.enable_x64(x64):
            assert positions.relative_buckets(64) == 30 and positions.relative_buckets(-64) == 14
            assert positions.relative_buckets(np.int64(2**40)) == 31


def test_a_fraction_of_numpy_in_16_bits_is_taken():
    assert positions.rotary(jnp.ones((2, 384)), jnp.array([0, 1]), fraction=np.float16(0.5)).shape == (2, 384)


@pytest.mark.parametrize("width, fraction, turned", [(50, 0.58, 28), (100, 0.58, 58), (100, 0.29, 28), (10, 0.6, 6)])
def test_a_fraction_of_the_width_that_is_whole_is_taken_whole(width, fraction, turned):
    x = positions.rotary(jnp.ones((2, width)), jnp.array([0, 1]), fraction=fraction)
    assert np.count_nonzero(x[1] != 1) == turned
