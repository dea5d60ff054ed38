"""The mechanisms of the studies: the scores of each against its formula in float64, and how positions are drawn."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from layers import (
    DRAWN,
    EXAMPLE,
    LENGTH,
    SOURCE_LENGTH,
    H,
    N,
    S,
    T,
    attention,
    check,
    positions,
    read,
    read_layer,
    sides,
)

import attn
from attn import mechanisms
from attn.mechanisms import LengthUnknown, of
from attn.studies.mechanisms import anchored, anchored_rotary, anchored_t5, draw, line, log_length, randomized

SCALE = H**-0.5


def inverse_softplus(x):
    return np.log(np.expm1(x))


def from_ends(end_tokens=0):
    """Positions of the keys and the queries for each head, counted from the start or from the end, all four kinds."""
    t, j = positions()
    last, final = SOURCE_LENGTH - end_tokens - 1, LENGTH - end_tokens - 1
    return [(j, t), (last - j, t), (j, final - t), (last - j, final - t)]


def test_anchored_is_a_distance_to_a_moving_position_from_all_four_ends():
    slope, c = np.array([0.5, 0.7, 0.3, 0.9]), np.array([0.0, 1.2, -0.4, 2.0])
    found = read(anchored(), {"slope": inverse_softplus(slope), "c": c})
    bias = [-slope[n] * np.abs(idx - tau - c[n]) for n, (idx, tau) in enumerate(from_ends())]
    check(found.scores, found.content * SCALE + np.stack(bias))


@pytest.mark.parametrize("settings", [dict(queries=False), dict(keys=False, queries=False), dict(keys=False)])
def test_anchored_may_count_from_the_start_alone(settings):
    t, j = positions()
    from_end = {"keys": True, "queries": True} | settings
    counts = [(idx if from_end["keys"] else j, tau if from_end["queries"] else t) for idx, tau in from_ends()]
    found = read(anchored(**settings), {"slope": np.full(N, inverse_softplus(0.5))})
    check(found.scores, found.content * SCALE - 0.5 * np.stack([np.abs(idx - tau) for idx, tau in counts]))


def test_counted_from_the_start_the_length_of_the_answer_is_not_read():
    at = sides()
    at = at._replace(q=dataclasses.replace(at.q, total=None))
    for pointer in (anchored(queries=False), anchored(keys=False, queries=False)):
        np.testing.assert_array_equal(read_layer(attention(pointer), at).scores, read(pointer).scores)
    for pointer in (anchored(), anchored_t5(), anchored_rotary()):
        with pytest.raises(LengthUnknown):
            read_layer(attention(pointer), at)


@pytest.mark.parametrize("settings", [{}, dict(queries=False), dict(keys=False, queries=False)])
def test_anchored_starts_as_a_sharp_pointer(settings):
    [part] = attention(anchored(**settings)).mechanism
    np.testing.assert_allclose(jax.nn.softplus(part.slope[...]), 3.0, rtol=1e-6)
    np.testing.assert_array_equal(part.c[...], 0.0)


def test_the_ablations_of_anchored_take_one_thing_away():
    [soft] = attention(anchored(soft=True)).mechanism
    np.testing.assert_allclose(jax.nn.softplus(soft.slope[...]), attn.positions.alibi_slopes(N), rtol=1e-5)
    [frozen], [unshifted] = (attention(each).mechanism for each in (anchored(frozen=True), anchored(shift=False)))
    assert hasattr(frozen, "c") and not hasattr(frozen, "slope")
    assert hasattr(unshifted, "slope") and not hasattr(unshifted, "c")
    found = read(anchored(frozen=True, shift=False))
    bias = np.stack([-3.0 * np.abs(idx - tau) for idx, tau in from_ends()])
    check(found.scores, found.content * SCALE + bias)
    slopes = 2.0 ** (-8 * np.arange(1, N + 1) / N)
    found = read(anchored(frozen=True, shift=False, soft=True))
    check(found.scores, found.content * SCALE + slopes[:, None, None] * bias / 3)


def test_anchored_t5_looks_up_a_bucket_of_the_distance_from_all_four_ends():
    table = np.random.default_rng(1).normal(size=(N, 32))
    found = read(anchored_t5() + log_length(), {"table": table})
    buckets = [attn.positions.relative_buckets(jnp.asarray(idx - tau), max_distance=16) for idx, tau in from_ends()]
    bias = np.stack([of_head[np.asarray(each)] for of_head, each in zip(table, buckets)])
    check(found.scores, (found.content * SCALE + bias) * np.log(1 + SOURCE_LENGTH))


def test_line_is_a_distance_to_a_position_that_moves_evenly():
    lines = np.array([[1.0, 0.0, 0.0], [-1.0, 1.0, -1.0], [0.3, 0.2, 2.0], [0.0, 0.5, 0.0]])
    slope = np.array([0.5, 0.7, 0.3, 0.9])
    found = read(line(), {"line": lines / 4, "slope": inverse_softplus(slope) / 4})
    t, j = positions()
    bias = [-each * np.abs(j - (a * t + b * SOURCE_LENGTH + c)) for each, (a, b, c) in zip(slope, lines)]
    check(found.scores, found.content * SCALE + np.stack(bias))


def test_line_does_not_round_long_texts_in_bfloat16():
    """From 256 on, bfloat16 has no odd numbers, and from 2,048 on it counts by sixteens."""
    first, length = 4_995, 4_999
    lines = np.array([[1.0, -1.0, 5.0], [1.0, -1.0, 7.0], [-1.0, 1.0, 3.0], [0.5, -0.5, 3.0]])
    layer = attention(line(), {"line": lines / 4, "slope": np.full(N, inverse_softplus(0.9) / 4)}, dtype=jnp.bfloat16)
    layer.W_Q[...] = jnp.zeros_like(layer.W_Q[...])  # scores are 0, so nothing but the lines is rounded
    found = read_layer(layer, sides(first=first, source_length=length))
    t, j = (first + np.arange(T, dtype=np.float64))[:, None], np.arange(S)[None, :]
    bias = [-0.9 * np.abs(j - (a * t + b * length + c)) for a, b, c in lines]
    check(found.scores, np.stack(bias), 0.02)  # of the weights, which are rounded to bfloat16


@pytest.mark.parametrize("kind", ["encoder", "decoder", "cross"])
def test_log_scaling_multiplies_scores_by_the_logarithm_of_the_keys(kind):
    found = read(log_length(), kind=kind)
    visible = positions()[0] + 1 if kind == "decoder" else SOURCE_LENGTH
    check(found.scores, found.content * SCALE * np.log(1 + visible))


def test_anchored_rotary_sees_equal_distances_from_either_end_symbol():
    """Of a head that counts from some ends, scores of equal contents depend on the distance of idx and tau alone."""
    layer, at = attention(anchored_rotary()), sides(DRAWN)
    x, y = (
        jnp.broadcast_to(jax.random.normal(jax.random.key(n), (1, N, H)), (rows, N, H)) for n, rows in ((0, T), (1, S))
    )
    query, key = layer._apply_mechanism("query", x, at.q), layer._apply_mechanism("key", y, at.k)
    found = np.einsum("tnh,snh->nts", query, key)
    symbols = SOURCE_LENGTH - 1
    for head, (idx, tau) in zip(found, from_ends(end_tokens=1)):
        idx = idx[:, :symbols]
        for distance in np.unique(DRAWN[idx] - DRAWN[tau]):
            assert np.ptp(head[:, :symbols][DRAWN[idx] - DRAWN[tau] == distance]) < 1e-4
        assert np.ptp(head) > 0.1


DRAWABLE = {
    "rotary": mechanisms.rotary(),
    "alibi": mechanisms.alibi(),
    "transformer_xl": mechanisms.transformer_xl(),
    "anchored_rotary": anchored_rotary(),
    "a score of positions": of(score=lambda s, i, j: s - 0.05 * jnp.abs(i - j)),
    "a score of ours": of(score=attn.scores.alibi(0.05)),
    "a mask of ours": of(mask=attn.masks.sliding_window(30, 10)),
    "a mask of positions": of(mask=lambda i, j: (i - j) % 2 == 0),
    "softcap": mechanisms.softcap(0.5),
}


@pytest.mark.parametrize("name", DRAWABLE)
def test_randomized_is_the_other_mechanism_at_drawn_positions(name):
    """All of them, not only those of the package: rows and positions are the drawn ones in every function."""
    inner = DRAWABLE[name]
    even = draw(100, EXAMPLE.num_positions, None, at_test="spaced")
    alone = at_positions(inner, np.asarray(even)) if name.startswith("a ") else read(inner, drawn=even).scores
    np.testing.assert_allclose(read(randomized(inner, range=100)).scores, alone, atol=1e-5)
    assert name == "softcap" or not np.allclose(read(inner).scores, alone, atol=1e-2)


def at_positions(inner, table):
    """Scores where row n stands at table[n], by hand."""
    found = read(mechanisms.none())
    i, j = positions(table)
    s = found.content * SCALE
    if inner.has("score"):
        s = s - 0.05 * np.abs(i - j)
    elif "window" in str(inner.function()):
        s = np.where((j >= i - 30) & (j <= i + 10), s, -np.inf)
    else:
        s = np.where((i - j) % 2 == 0, s, -np.inf)
    return s - np.log(np.exp(s).sum(-1, keepdims=True))


def test_randomized_refuses_what_cannot_be_drawn():
    for settings, message in [
        (dict(inner=mechanisms.learned(9)), "learned.* distinguishes 9 positions, must distinguish range = 2048"),
        (dict(inner=mechanisms.rotary(), range=1), "range must lie in"),
        (dict(inner=mechanisms.rotary(), range=50_000), "range must lie in"),
        (dict(inner=mechanisms.rotary(), at_test="even"), "at_test must be 'spaced' or 'random', got 'even'"),
    ]:
        with pytest.raises(ValueError, match=message):
            randomized(**settings)
    assert randomized(mechanisms.learned(64), range=64).max_positions == 64


def test_drawn_positions_are_even_at_test_and_random_in_training():
    even = np.asarray(draw(100, jnp.asarray(12), None, at_test="spaced"))
    assert set(np.diff(even[:12])) <= {7, 8} and even.min() >= 0 and even.max() == 99
    np.testing.assert_array_equal(draw(100, jnp.asarray(100), None, at_test="spaced"), np.arange(100))
    drawn = lambda key: np.asarray(draw(100, jnp.asarray(12), key, at_test="spaced"))[:12]  # noqa: E731
    random = np.stack([drawn(jax.random.key(seed)) for seed in range(50)])
    error = random.std(axis=0) / 50**0.5
    assert (np.abs(random.mean(axis=0) - even[:12]) < 4 * error + 1).all()  # rounded down by less than 1
    assert (np.diff(random) > 0).all() and random.min() >= 0 and random.max() < 100
    assert len(np.unique(random)) > 95
    fixed, again = (draw(100, jnp.asarray(12), None, at_test="random") for _ in range(2))
    np.testing.assert_array_equal(fixed, again)
    assert (np.diff(np.asarray(fixed)[:12]) > 0).all() and (np.asarray(fixed)[:12] != even[:12]).any()
