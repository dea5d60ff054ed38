"""Positions: each encoding against its formula, and errors."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn import positions

T, N, H = 5, 3, 8


@pytest.mark.parametrize("width", [1, 2, 6, 7])
@pytest.mark.parametrize("base", [10_000.0, 100.0])
def test_sinusoidal_is_its_formula(width, base):
    times = [0, 1, 7, 100, 999]
    ours = positions.sinusoidal(jnp.array(times), width, base=base)
    assert ours.shape == (T, width) and ours.dtype == np.float32
    for row, t in enumerate(times):
        for d in range(width):
            angle = t / base ** ((d - d % 2) / width)
            expected = math.cos(angle) if d % 2 else math.sin(angle)
            # The power's exponent, up to log(base), is rounded, so the angle is off by that many eps and a few.
            assert float(ours[row, d]) == pytest.approx(expected, abs=2.0**-24 * (2 + angle * (4 + math.log(base))))


def test_sinusoidal_takes_real_positions_and_stays_float64():
    with jax.enable_x64(True):
        ours = positions.sinusoidal(jnp.array([0.5, 2.25]), 4)
        expected = [[f(t / 10_000 ** (m / 2)) for m in range(2) for f in (math.sin, math.cos)] for t in (0.5, 2.25)]
        assert ours.dtype == np.float64
        np.testing.assert_allclose(ours, expected, rtol=1e-14)


def turned(x, t, base, fraction, scale):
    """Pairs (m, m + R/2) as complex numbers, turned by t / (scale base^(2m/R))."""
    R = int(len(x) * fraction) // 2 * 2
    pairs = x[: R // 2] + 1j * x[R // 2 : R]
    pairs = pairs * np.exp(1j * t / scale * base ** (-2 * np.arange(R // 2) / max(R, 1)))
    return np.concatenate([pairs.real, pairs.imag, x[R:]])


@pytest.mark.parametrize("fraction", [1.0, 0.5, 0.4, 0.1])
@pytest.mark.parametrize("scale, base", [(1.0, 10_000.0), (4.0, 100.0)])
def test_rotary_is_its_formula(fraction, scale, base):
    x = np.random.default_rng(0).normal(size=(T, N, H))
    times = np.array([0, 1, 5, 30, 200])
    options = {"base": base, "fraction": fraction, "scale": scale}
    ours = positions.rotary(jnp.asarray(x, "float32"), jnp.array(times), **options)
    expected = [[turned(x[t, n], times[t], base, fraction, scale) for n in range(N)] for t in range(T)]
    np.testing.assert_allclose(ours, expected, atol=1e-4)
    one = positions.rotary(jnp.asarray(x[:, 0], "float32"), jnp.array(times), **options)
    np.testing.assert_allclose(one, ours[:, 0], rtol=1e-6, atol=1e-7)


def test_rotary_scores_depend_on_distances_alone():
    with jax.enable_x64(True):
        x, y = (jnp.array(np.random.default_rng(seed).normal(size=H)) for seed in (0, 1))
        times = jnp.array([0, 3, 11, 40, 200])
        q, k = (positions.rotary(jnp.broadcast_to(z, (T, H)), times) for z in (x, y))
        shifted = [positions.rotary(jnp.broadcast_to(z, (T, H)), times + 1000) for z in (x, y)]
        np.testing.assert_allclose(q @ k.T, shifted[0] @ shifted[1].T, atol=1e-10)
        assert np.ptp(np.asarray(q @ k.T)) > 0.1


def test_rotary_keeps_lengths_and_dtype():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(T, H)))
    ours = positions.rotary(x, jnp.arange(T))
    np.testing.assert_allclose(np.linalg.norm(ours, axis=1), np.linalg.norm(x, axis=1), rtol=1e-6)
    np.testing.assert_array_equal(ours[0], x[0])
    for dtype in ("bfloat16", "float16"):
        assert positions.rotary(x.astype(dtype), jnp.arange(T)).dtype == dtype


def test_rotary_scale_divides_the_positions():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(T, H)), "float32")
    np.testing.assert_allclose(
        positions.rotary(x, 4 * jnp.arange(T), scale=4.0), positions.rotary(x, jnp.arange(T)), rtol=1e-6, atol=1e-6
    )


def test_rotary_takes_frequencies_and_differentiates_them():
    x = np.random.default_rng(0).normal(size=(T, N, H))
    times, frequencies = np.array([0, 1, 5, 30, 200]), np.array([1.0, 0.31, 0.07])

    def rotated(frequencies):
        return positions.rotary(jnp.asarray(x), jnp.asarray(times), fraction=0.75, frequencies=frequencies)

    def rotated_sum(frequencies):
        return jnp.sum(jnp.sin(rotated(frequencies)))

    with jax.enable_x64(True):
        ours = jax.jit(rotated)(frequencies)
        pairs = (x[..., :3] + 1j * x[..., 3:6]) * np.exp(1j * times[:, None, None] * frequencies)
        np.testing.assert_allclose(ours, np.concatenate([pairs.real, pairs.imag, x[..., 6:]], axis=-1), rtol=1e-12)
        gradient = jax.grad(rotated_sum)(jnp.asarray(frequencies))
        for m in range(3):
            step = 1e-6 * np.eye(3)[m]
            slope = (rotated_sum(frequencies + step) - rotated_sum(frequencies - step)) / 2e-6
            np.testing.assert_allclose(gradient[m], slope, rtol=1e-6)


def test_rotary_with_the_usual_frequencies_is_rotary():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(T, H)), "bfloat16")
    usual = 10_000.0 ** (-np.arange(0, H, 2) / H)
    given = positions.rotary(x, jnp.arange(T), frequencies=jnp.asarray(usual, "float32"))
    assert given.dtype == x.dtype
    np.testing.assert_array_equal(given, positions.rotary(x, jnp.arange(T)))


@pytest.mark.parametrize("options", [{"base": 100.0}, {"scale": 2.0}, {"fraction": 0.5}])
def test_rotary_refuses_frequencies_beside_what_they_replace_or_of_another_width(options):
    with pytest.raises(ValueError, match="rotary: frequencies"):
        positions.rotary(jnp.ones((T, H)), jnp.arange(T), frequencies=jnp.ones(H // 2), **options)


def bucket(distance, num_buckets, max_distance, bidirectional):
    """Raffel et al. 2020, section 2.1, for one distance j - i, in exact arithmetic up to a logarithm."""
    start = 0
    if bidirectional:
        num_buckets //= 2
        start = num_buckets if distance > 0 else 0
        distance = abs(distance)
    else:
        distance = max(-distance, 0)
    exact = num_buckets // 2
    if distance < exact:
        return start + distance
    bucket = exact
    # Bucket exact + n starts at exact (max_distance / exact)^(n / (num_buckets - exact)).
    while bucket < num_buckets - 1:
        steps = num_buckets - exact
        if distance**steps * exact ** (bucket + 1 - exact) < exact**steps * max_distance ** (bucket + 1 - exact):
            break
        bucket += 1
    return start + bucket


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("num_buckets, max_distance", [(32, 128), (32, 512), (8, 20), (4, 3), (64, 256)])
def test_relative_buckets_are_the_papers(num_buckets, max_distance, bidirectional):
    distances = np.arange(-600, 601)
    options = {"num_buckets": num_buckets, "max_distance": max_distance, "bidirectional": bidirectional}
    ours = positions.relative_buckets(jnp.array(distances), **options)
    expected = [bucket(int(d), num_buckets, max_distance, bidirectional) for d in distances]
    np.testing.assert_array_equal(ours, expected)
    assert ours.min() >= 0 and ours.max() < num_buckets


def test_relative_buckets_are_symmetric_and_shared_when_far():
    distances = jnp.arange(1, 1000)
    behind, ahead = positions.relative_buckets(-distances), positions.relative_buckets(distances)
    np.testing.assert_array_equal(ahead - behind, 16)
    assert len(set(np.asarray(behind[127:]))) == 1 and np.all(np.diff(behind) >= 0)
    np.testing.assert_array_equal(positions.relative_buckets(distances, bidirectional=False), 0)


@pytest.mark.parametrize(
    "options", [{"num_buckets": 2}, {"num_buckets": 1, "bidirectional": False}, {"max_distance": 8}]
)
def test_buckets_that_cannot_be_are_refused(options):
    with pytest.raises(ValueError, match=r"num_buckets .* max_distance"):
        positions.relative_buckets(jnp.arange(3), **options)


@pytest.mark.parametrize("distance", [64.0, jnp.arange(3.0), np.float32(2)])
def test_relative_buckets_are_of_integers(untyped, distance):
    with pytest.raises(TypeError, match="distance must be integer, got float"):
        positions.relative_buckets(distance)


def test_alibi_slopes_of_eight_heads_are_the_papers():
    np.testing.assert_array_equal(
        positions.alibi_slopes(8), [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256]
    )


@pytest.mark.parametrize("heads", [1, 3, 12, 16])
def test_alibi_slopes_are_geometric(heads):
    np.testing.assert_allclose(
        positions.alibi_slopes(heads), [2 ** (-8 * n / heads) for n in range(1, heads + 1)], rtol=1e-6
    )


@pytest.mark.parametrize("length, max_length", [(1, 1), (5, 5), (5, 50), (20, 23)])
def test_randomized_positions_are_distinct_sorted_and_in_range(length, max_length):
    keys = jax.random.split(jax.random.key(0), 50)
    for drawn in np.asarray(jax.jit(jax.vmap(lambda key: positions.randomized(key, length, max_length)))(keys)):
        assert drawn.shape == (length,) and np.issubdtype(drawn.dtype, np.integer)
        assert np.all(np.diff(drawn) > 0) and drawn[0] >= 0 and drawn[-1] < max_length


def test_randomized_positions_reach_everything_evenly():
    keys = jax.random.split(jax.random.key(0), 2000)
    drawn = jax.jit(jax.vmap(lambda key: positions.randomized(key, 3, 10)))(keys)
    counts = np.bincount(np.asarray(drawn).ravel(), minlength=10)
    assert np.all(np.abs(counts - 600) < 5 * np.sqrt(2000 * 0.3 * 0.7))


def test_of_randomized_positions_every_subset_is_as_likely():
    keys = jax.random.split(jax.random.key(1), 5_000)
    drawn = jax.jit(jax.vmap(lambda key: positions.randomized(key, 3, 5)))(keys)
    subsets, counts = np.unique(np.asarray(drawn), axis=0, return_counts=True)
    assert len(subsets) == 10
    assert np.all(np.abs(counts - 500) < 5 * np.sqrt(5_000 * 0.1 * 0.9))


@pytest.mark.parametrize("count", [0, 1, 4, 6])
def test_randomized_positions_after_those_that_are_wanted_stand_at_the_end(count):
    draw = jax.jit(jax.vmap(lambda key, count: positions.randomized(key, 6, 50, count=count), (0, None)))
    for drawn in np.asarray(draw(jax.random.split(jax.random.key(0), 50), jnp.asarray(count))):
        assert np.all(np.diff(drawn[:count]) > 0) and np.all(drawn[count:] == 49)


def test_learned_positions_are_rows_of_the_table():
    table = jnp.arange(6.0).reshape(3, 2)
    np.testing.assert_array_equal(positions.learned(jnp.array([2, 0, 2]), table), [[4, 5], [0, 1], [4, 5]])
    gradient = jax.grad(lambda table: positions.learned(jnp.array([2, 0, 2]), table).sum())(table)
    np.testing.assert_array_equal(gradient, [[1, 1], [0, 0], [2, 2]])


@pytest.mark.parametrize("position", [3, 100, -1, -3, -100])
def test_learned_positions_beyond_the_table_are_nan(position):
    row = positions.learned(jnp.array([1, position]), jnp.arange(6.0).reshape(3, 2))
    np.testing.assert_array_equal(row[0], [2, 3])
    assert np.all(np.isnan(row[1]))


def test_none_is_zero():
    np.testing.assert_array_equal(positions.none(jnp.arange(T), 3), np.zeros((T, 3)))


def test_bad_arguments_are_explained(untyped):
    matrix, x = jnp.ones((2, 2)), jnp.ones((T, H))
    for call in (
        lambda: positions.sinusoidal(matrix, 4),
        lambda: positions.learned(matrix.astype(int), matrix),
        lambda: positions.none(matrix, 4),
        lambda: positions.rotary(x, matrix),
    ):
        with pytest.raises(ValueError, match=r"positions must have shape \[T\]"):
            call()
    with pytest.raises(ValueError, match="width"):
        positions.sinusoidal(jnp.arange(T), 0)
    with pytest.raises(ValueError, match="differ in length"):
        positions.rotary(x, jnp.arange(T + 1))
    with pytest.raises(ValueError, match="num_heads"):
        positions.alibi_slopes(0)
    for length in (0, -1, 6):
        with pytest.raises(ValueError, match="length"):
            positions.randomized(jax.random.key(0), length, 5)


@pytest.mark.parametrize("options", [{"fraction": 0.0}, {"fraction": 1.5}, {"scale": 0.0}, {"scale": -1.0}])
def test_rotary_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        positions.rotary(jnp.ones((T, H)), jnp.arange(T), **options)
