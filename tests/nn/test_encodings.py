"""Position encodings: the scores of each against its formula in float64, and what all of them promise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attn
from attn.nn.encodings import ENCODINGS, Positions, anchored, draw, log_scaled, randomized
from attn.nn.places import Places, Side

T, S, N, H, D = 5, 7, 4, 6, 22
FIRST, LENGTH, SOURCE_LENGTH = 3, 11, 6  # of the first query; of the target; of the source
DRAWN = np.sort(np.random.default_rng(0).permutation(60)[:20])


def places(drawn=None) -> Places:
    drawn = None if drawn is None else jnp.asarray(drawn)
    queries = Side(FIRST + jnp.arange(T), jnp.asarray(LENGTH), drawn)
    return Places(queries, Side(jnp.arange(S), jnp.asarray(SOURCE_LENGTH), drawn), jnp.full(T, SOURCE_LENGTH))


def scores(encoding, learned, drawn=None):
    """What the encoding makes of the scaled scores, `[N T S]`, read off the weights; and query and key."""
    query, key = (jax.random.normal(jax.random.key(seed), (n, N, H)) for seed, n in ((1, T), (2, S)))
    learned = {name: jnp.asarray(value) for name, value in learned.items()}
    score = encoding.score(learned, query, key, places(drawn))
    weights = attn.multi_head_attention_weights(query, key, score=score)
    return np.log(np.asarray(weights, np.float64)), np.asarray(query, np.float64), np.asarray(key, np.float64)


def check(found, expected):
    """Scores are known up to a number a row, which the softmax takes away."""
    found, expected = (x - x.max(axis=-1, keepdims=True) for x in (found, expected))
    seen = expected > -12  # below, a weight has no digits left beside the others
    assert seen.mean() > 0.3
    np.testing.assert_allclose(found[seen], expected[seen], atol=2e-4)


def content(query, key):
    return np.einsum("tnh,snh->nts", query, key) / np.sqrt(H)


def steps(drawn=None):
    """j - i, or the drawn distance of so many steps."""
    far = np.arange(S)[None, :] - (FIRST + np.arange(T))[:, None]
    if drawn is None:
        return far
    return np.sign(far) * np.where(far == 0, 0, 1 + drawn[np.abs(far) - 1])


def from_ends(end_tokens=0):
    """Where the keys and the queries of each head stand: counted from the start or from the end, all four kinds."""
    j, t = np.arange(S)[None, :], (FIRST + np.arange(T))[:, None]
    last, final = SOURCE_LENGTH - end_tokens - 1, LENGTH - end_tokens - 1
    return [(j, t), (last - j, t), (j, final - t), (last - j, final - t)]


def test_anchored_is_a_distance_to_a_moving_place_from_all_four_ends():
    slope, shift = np.array([0.5, 0.7, 0.3, 0.9]), np.array([0.0, 1.2, -0.4, 2.0])
    learned = {"slope": np.log(np.expm1(slope)), "shift": shift}
    found, query, key = scores(ENCODINGS["anchored"], learned)
    bias = [-slope[n] * np.abs(idx - tau - shift[n]) for n, (idx, tau) in enumerate(from_ends())]
    check(found, content(query, key) + np.stack(bias))


@pytest.mark.parametrize("name", ["anchored", "anchored_to_source", "anchored_once"])
def test_anchored_starts_as_a_sharp_pointer(name):
    learned = ENCODINGS[name].parameters(jax.random.key(0), D, N, H)
    np.testing.assert_allclose(jax.nn.softplus(learned["slope"]), 3.0, rtol=1e-6)
    np.testing.assert_array_equal(learned["shift"], 0.0)


def test_the_ablations_of_anchored_take_one_thing_away():
    soft = ENCODINGS["anchored_soft"].parameters(jax.random.key(0), D, N, H)
    np.testing.assert_allclose(jax.nn.softplus(soft["slope"]), attn.positions.alibi_slopes(N), rtol=1e-5)
    assert set(ENCODINGS["anchored_frozen"].parameters(jax.random.key(0), D, N, H)) == {"shift"}
    assert set(ENCODINGS["anchored_unshifted"].parameters(jax.random.key(0), D, N, H)) == {"slope"}
    assert not ENCODINGS["anchored_to_source"].queries_from_end and ENCODINGS["anchored"].queries_from_end
    fixed = anchored(frozen=True, shift=False)
    assert fixed.parameters is None
    found, *_ = scores(fixed, {})
    learned = {"slope": np.full(N, np.log(np.expm1(3.0))), "shift": np.zeros(N)}
    check(found, scores(ENCODINGS["anchored"], learned)[0])


@pytest.mark.parametrize("drawn", [None, DRAWN])
def test_alibi_prefers_near_keys_and_tells_sides_apart(drawn):
    encoding = ENCODINGS["alibi"] if drawn is None else randomized(ENCODINGS["alibi"])
    found, query, key = scores(encoding, {}, drawn)
    slopes = np.array([2.0 ** (-8 * n / N) for n in range(1, N + 1)])[:, None, None]
    # Up to a number a row, half a step is added behind the query, as published encoders have it.
    far = -np.abs(steps(drawn)) + 0.5 * (steps(drawn) < 0)
    check(found, content(query, key) + slopes * far)


@pytest.mark.parametrize("drawn", [None, DRAWN])
def test_t5_looks_up_a_bucket(drawn):
    table = np.random.default_rng(1).normal(size=(N, 32))
    found, query, key = scores(ENCODINGS["t5"], {"table": table}, drawn)
    buckets = np.asarray(attn.positions.relative_buckets(jnp.asarray(steps(drawn))))
    check(found, content(query, key) + table[:, buckets])


def test_anchored_t5_looks_up_a_bucket_of_the_distance_from_all_four_ends():
    table = np.random.default_rng(1).normal(size=(N, 32))
    found, query, key = scores(ENCODINGS["anchored_t5"], {"table": table})
    buckets = [attn.positions.relative_buckets(jnp.asarray(idx - tau), max_distance=16) for idx, tau in from_ends()]
    bias = np.stack([of_head[np.asarray(each)] for of_head, each in zip(table, buckets)])
    check(found, (content(query, key) + bias) * np.log(1 + SOURCE_LENGTH))


def test_line_is_a_distance_to_a_place_that_moves_evenly():
    line = np.array([[1.0, 0.0, 0.0], [-1.0, 1.0, -1.0], [0.3, 0.2, 2.0], [0.0, 0.5, 0.0]])
    slope = np.array([0.5, 0.7, 0.3, 0.9])
    found, query, key = scores(ENCODINGS["line"], {"line": line / 4, "slope": np.log(np.expm1(slope)) / 4})
    j, t = np.arange(S)[None, :], (FIRST + np.arange(T))[:, None]
    bias = [-each * np.abs(j - (a * t + b * SOURCE_LENGTH + c)) for each, (a, b, c) in zip(slope, line)]
    check(found, content(query, key) + np.stack(bias))


@pytest.mark.parametrize("drawn", [None, DRAWN])
def test_shaw_adds_a_row_to_the_key(drawn):
    table = np.random.default_rng(1).normal(size=(33, H))
    found, query, key = scores(ENCODINGS["shaw"], {"table": table}, drawn)
    rows = table[np.clip(steps(drawn), -16, 16) + 16]  # [T S H]
    check(found, content(query, key) + np.einsum("tnh,tsh->nts", query, rows) / np.sqrt(H))


@pytest.mark.parametrize("drawn", [None, DRAWN])
def test_transformer_xl_is_its_four_terms(drawn):
    rng = np.random.default_rng(1)
    learned = {
        "relative": rng.normal(size=(D, N, H)) * D**-0.5,
        "u": rng.normal(size=(N, H)),
        "v": rng.normal(size=(N, H)),
    }
    found, query, key = scores(ENCODINGS["transformer_xl"], learned, drawn)
    angles = steps(drawn)[..., None] / 10_000 ** (np.arange(0, D, 2) / D)
    waves = np.stack([np.sin(angles), np.cos(angles)], -1).reshape(T, S, D)
    relative = np.einsum("tsd,dnh->tsnh", waves, learned["relative"])
    terms = np.einsum("tnh,snh->nts", query + learned["u"], key) + np.einsum(
        "tnh,tsnh->nts", query + learned["v"], relative
    )
    check(found, terms / np.sqrt(H))


def test_log_scaling_multiplies_scores_by_the_logarithm_of_the_keys():
    found, query, key = scores(log_scaled(ENCODINGS["none"]), {})
    check(found, content(query, key) * np.log(1 + SOURCE_LENGTH))


def test_anchored_rotary_sees_equal_distances_from_either_end_symbol():
    """Of a head that counts from some ends, scores of equal contents depend on the distance of idx and tau alone."""
    encoding = ENCODINGS["anchored_rotary"]
    x, y = (jax.random.normal(jax.random.key(seed), (1, N, H)) for seed in (0, 1))
    place = places(DRAWN)
    query = encoding.turn(jnp.broadcast_to(x, (T, N, H)), place.queries)
    key = encoding.turn_keys(jnp.broadcast_to(y, (S, N, H)), place.keys)
    found = np.einsum("tnh,snh->nts", query, key)
    symbols = SOURCE_LENGTH - 1
    for head, (idx, tau) in zip(found, from_ends(end_tokens=1)):
        idx = idx[:, :symbols]
        for distance in np.unique(DRAWN[idx] - DRAWN[tau]):
            assert np.ptp(head[:, :symbols][DRAWN[idx] - DRAWN[tau] == distance]) < 1e-4
        assert np.ptp(head) > 0.1


def test_a_name_stands_for_all_attention_but_rows_are_added_once():
    assert Positions.named("rotary").by_kind() == dict(encoder="rotary", decoder="rotary", cross="rotary")
    assert Positions.named("sinusoidal").by_kind() == dict(encoder="sinusoidal", decoder="sinusoidal", cross="none")


def test_drawn_positions_are_even_at_test_and_random_in_training():
    settings = Positions(range=100)
    even = np.asarray(draw(settings, jnp.asarray(12), None))
    assert set(np.diff(even[:12])) <= {7, 8} and even.min() >= 0 and even.max() == 99
    np.testing.assert_array_equal(draw(settings, jnp.asarray(100), None), np.arange(100))
    random = np.stack([draw(settings, jnp.asarray(12), jax.random.key(seed))[:12] for seed in range(50)])
    error = random.std(axis=0) / 50**0.5
    assert (np.abs(random.mean(axis=0) - even[:12]) < 4 * error + 1).all()  # rounded down by less than 1
    assert (np.diff(random) > 0).all() and random.min() >= 0 and random.max() < 100
    assert len(np.unique(random)) > 95
    fixed = Positions(range=100, at_test="random")
    np.testing.assert_array_equal(draw(fixed, jnp.asarray(12), None), draw(fixed, jnp.asarray(12), None))
    assert (np.diff(np.asarray(draw(fixed, jnp.asarray(12), None))[:12]) > 0).all()


def test_every_encoding_says_what_it_builds_in():
    assert all(encoding.builds_in for encoding in ENCODINGS.values())
