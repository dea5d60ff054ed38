"""The mechanisms: the scores of each against its formula in float64, alone and combined, and in cached decoding."""

import jax.numpy as jnp
import numpy as np
import pytest
from layers import DRAWN, D, H, N, S, T, attention, check, inputs, positions, read, sides, steps

import attn
from attn import mechanisms
from attn.mechanisms import HeadParam, Mechanism, of

SCALE = H**-0.5


def test_none_is_the_equation():
    found = read(mechanisms.none())
    check(found.scores, found.content * SCALE)


@pytest.mark.parametrize(("mechanism", "scale"), [(mechanisms.unscaled(), 1.0), (mechanisms.scaled(0.7), 0.7)])
def test_the_scale_is_that_of_the_last_that_has_one(mechanism, scale):
    found = read(mechanism)
    check(found.scores, found.content * scale)
    check(read(mechanisms.scaled(3.0) + mechanism + mechanisms.none()).scores, found.content * scale)


def test_softcap_bounds_the_scores():
    found = read(mechanisms.softcap(0.5))
    check(found.scores, 0.5 * np.tanh(found.content * SCALE / 0.5))


def test_a_window_hides_what_is_far():
    i, j = positions()
    found = read(mechanisms.window(2, 1))
    check(found.scores, np.where((j >= i - 2) & (j <= i + 1), found.content * SCALE, -np.inf))


def test_qk_norm_divides_by_the_root_mean_square_and_multiplies_by_gains():
    gains = {name: np.random.default_rng(1).normal(size=H) for name in ("query_gain", "key_gain")}
    found = read(mechanisms.qk_norm(), gains)
    q, k = (x / np.sqrt((x**2).mean(-1, keepdims=True)) for x in (found.query, found.key))
    check(found.scores, np.einsum("tnh,snh->nts", q * gains["query_gain"], k * gains["key_gain"]) * SCALE)
    first = attention(mechanisms.qk_norm()).mechanism[0]
    assert (first.query_gain[...] == 1).all() and (first.key_gain[...] == 1).all()


def rotated(x, t, base, fraction, factor):
    """Features in pairs as complex numbers, each turned by its own angle per position."""
    half = int(fraction * H) // 2
    pairs = x[..., :half] + 1j * x[..., half : 2 * half]
    pairs = pairs * np.exp(1j * t[:, None, None] / factor / base ** (np.arange(half) / half))
    return np.concatenate([pairs.real, pairs.imag, x[..., 2 * half :]], -1)


@pytest.mark.parametrize("drawn", [None, DRAWN])
@pytest.mark.parametrize("settings", [(10_000.0, 1.0, 1.0), (50.0, 0.67, 3.0)])
def test_rotary_rotates_queries_and_keys(settings, drawn):
    found, (i, j) = read(mechanisms.rotary(*settings), drawn=drawn), positions(drawn)
    q, k = rotated(found.query, i[:, 0], *settings), rotated(found.key, j[0], *settings)
    check(found.scores, np.einsum("tnh,snh->nts", q, k) * SCALE)


def waves(t, base=10_000.0):
    angles = np.asarray(t)[..., None] / base ** (np.arange(0, D, 2) / D)
    return np.stack([np.sin(angles), np.cos(angles)], -1).reshape(*np.shape(t), D)


@pytest.mark.parametrize("drawn", [None, DRAWN])
@pytest.mark.parametrize("name", ["sinusoidal", "learned"])
def test_what_is_added_goes_into_queries_and_keys_and_not_into_values(name, drawn):
    table = np.random.default_rng(1).normal(size=(60, D))
    layer = attention(
        *(mechanisms.sinusoidal(100.0), {}) if name == "sinusoidal" else (mechanisms.learned(60), {"table": table})
    )
    at = sides(drawn)
    [part], (x, m), (i, j) = layer.mechanism, inputs(), positions(drawn)
    rows = (waves(t, 100.0) if name == "sinusoidal" else table[t] for t in (i[:, 0], j[0]))
    to_query, to_key = (part.embedding(each) for each in (at.q, at.k))
    expected_to_query, expected_to_key = rows
    np.testing.assert_allclose(to_query, expected_to_query, atol=2e-5)
    np.testing.assert_allclose(to_key, expected_to_key, atol=2e-5)

    memory = layer.keys_values(m, at.k, to_key)
    np.testing.assert_array_equal(memory.value, layer.keys_values(m, at.k).value)
    _, weights = layer(x, memory, at, to_query, return_weights=True)
    q, k = (
        np.einsum("td,dnh->tnh", np.asarray(each, np.float64), np.asarray(W[...], np.float64))
        for each, W in ((x + expected_to_query, layer.W_Q), (m + expected_to_key, layer.W_K))
    )
    check(np.log(np.asarray(weights, np.float64)), np.einsum("tnh,snh->nts", q, k) * SCALE)


def test_padding_before_a_prompt_does_not_look_up_a_row_that_is_not_there():
    [part] = attention(mechanisms.learned(9)).mechanism
    assert np.isfinite(part.embedding(mechanisms.Rows(jnp.arange(4), start=-3))).all()


def test_a_grid_adds_the_vectors_of_row_and_column_and_has_one_more_for_the_token_after_it():
    [part] = attention(mechanisms.learned_grid(2, 3)).mechanism
    rows, columns = np.asarray(part.rows[...]), np.asarray(part.columns[...])
    assert (rows.shape, columns.shape, part.max_positions) == ((3, D), (3, D), 7)
    expected = [*(rows[y] + columns[x] for y in range(2) for x in range(3)), rows[2]]
    added = part.embedding(mechanisms.Rows(jnp.arange(10), start=-1))
    np.testing.assert_allclose(added[1:8], expected, atol=1e-6)
    np.testing.assert_array_equal(added[0], added[1])  # padding before a prompt
    np.testing.assert_array_equal(added[8:], added[7:9])


@pytest.mark.parametrize("drawn", [None, DRAWN])
def test_alibi_prefers_near_keys_and_tells_sides_apart(drawn):
    found = read(mechanisms.alibi(), drawn=drawn)
    slopes = np.array([2.0 ** (-8 * n / N) for n in range(1, N + 1)])[:, None, None]
    # Up to a number per row, half a step is added behind the query, as in published encoders.
    far = -np.abs(steps(drawn)) + 0.5 * (steps(drawn) < 0)
    check(found.scores, found.content * SCALE + slopes * far)


@pytest.mark.parametrize("drawn", [None, DRAWN])
@pytest.mark.parametrize("settings", [{}, {"num_buckets": 8, "max_distance": 4}])
def test_t5_looks_up_a_bucket(drawn, settings):
    table = np.random.default_rng(1).normal(size=(N, settings.get("num_buckets", 32)))
    found = read(mechanisms.t5(**settings), {"table": table}, drawn)
    buckets = np.asarray(attn.positions.relative_buckets(jnp.asarray(steps(drawn)), **settings))
    check(found.scores, found.content * SCALE + table[:, buckets])


# Their own terms are scaled as the others are.
SCALES = [(mechanisms.none(), SCALE), (mechanisms.unscaled(), 1.0), (mechanisms.scaled(0.7), 0.7)]
in_every_scale = pytest.mark.parametrize(("other", "scale"), SCALES, ids=["none", "unscaled", "scaled"])


@in_every_scale
@pytest.mark.parametrize("clip", [16, 2])
@pytest.mark.parametrize("drawn", [None, DRAWN])
def test_shaw_adds_a_row_to_the_key(drawn, clip, other, scale):
    table = np.random.default_rng(1).normal(size=(2 * clip + 1, H))
    found = read(mechanisms.shaw(clip) + other, {"table": table}, drawn)
    rows = table[np.clip(steps(drawn), -clip, clip) + clip]  # [T S H]
    check(found.scores, (found.content + np.einsum("tnh,tsh->nts", found.query, rows)) * scale)


@in_every_scale
@pytest.mark.parametrize("drawn", [None, DRAWN])
def test_transformer_xl_is_its_four_terms(drawn, other, scale):
    rng = np.random.default_rng(1)
    relative, u, v = rng.normal(size=(N, D, H)) * D**-0.5, rng.normal(size=(N, H)), rng.normal(size=(N, H))
    found = read(other + mechanisms.transformer_xl(), {"relative": relative, "u": u, "v": v}, drawn)
    R = np.einsum("tsd,ndh->tsnh", waves(steps(drawn)), relative)
    terms = np.einsum("tnh,snh->nts", found.query + u, found.key) + np.einsum("tnh,tsnh->nts", found.query + v, R)
    check(found.scores, terms * scale)


def test_together_they_are_one_after_the_other():
    i, j = positions()
    found = read(mechanisms.rotary() + mechanisms.softcap(2.0))
    q, k = (rotated(x, t, 10_000.0, 1.0, 1.0) for x, t in ((found.query, i[:, 0]), (found.key, j[0])))
    check(found.scores, 2 * np.tanh(np.einsum("tnh,snh->nts", q, k) * SCALE / 2))

    far, content = 0.3 * np.abs(j - i), found.content * SCALE
    bias = of(score=attn.scores.alibi(0.3))
    check(read(mechanisms.softcap(0.5) + bias).scores, 0.5 * np.tanh(content / 0.5) - far)
    check(read(bias + mechanisms.softcap(0.5)).scores, 0.5 * np.tanh((content - far) / 0.5))


def test_of_functions_of_positions():
    i, j = positions()
    slopes = np.array([0.1, 0.2, 0.3, 0.4])
    distance = np.abs(j - i)
    table = np.random.default_rng(1).normal(size=21)
    for mechanism, change in [
        (of(score=attn.scores.alibi(0.3)), lambda s: s - 0.3 * distance),
        (of(score=attn.per_head(attn.scores.alibi(jnp.array(slopes)))), lambda s: s - slopes[:, None, None] * distance),
        (of(score=attn.per_head(attn.scores.alibi(slopes))), lambda s: s - slopes[:, None, None] * distance),
        (of(score=attn.scores.relative_bias(jnp.array(table))), lambda s: s + table[j - i + 10]),
        (of(score=lambda s, i, j: s * jnp.cos(i - 2 * j)), lambda s: s * np.cos(i - 2 * j)),
        (of(mask=attn.masks.sliding_window(2, 0)), lambda s: np.where((j >= i - 2) & (j <= i), s, -np.inf)),
        (of(mask=lambda i, j: (i + j) % 2 == 0), lambda s: np.where((i + j) % 2 == 0, s, -np.inf)),
        (of(), lambda s: s),
        (of(scale=0.9), lambda s: s / SCALE * 0.9),
        (
            of(mask=lambda i, j: j < 5, scale=0.9, score=lambda s, i, j: s - j),
            lambda s: np.where(j < 5, s / SCALE * 0.9 - j, -np.inf),
        ),
    ]:
        found = read(mechanism)
        check(found.scores, change(found.content * SCALE))
    for wrong in (dict(score=attn.masks.causal()), dict(mask=attn.scores.alibi(0.3)), dict(score=jnp.ones((T, S)))):
        with pytest.raises(TypeError):
            of(**wrong)


class temperature(Mechanism):
    """Scores times a learned number per head."""

    def setup(self, layer, rngs):
        self.log = HeadParam(jnp.zeros(layer.num_heads))

    def score(self, q, k):
        return lambda s, q, k: s * jnp.exp(self.log[...])


class ordered(Mechanism):
    """Uses all that rows tell of themselves."""

    def value(self, x, k):
        return x * (1 + k.head) * k.position[:, None]

    def mask(self, q, k):
        return lambda q, k: k.position != q.position - 2


def test_a_mechanism_sees_the_parameters_of_its_head():
    log = np.array([-0.3, 0.0, 0.5, 1.0])
    found = read(temperature() + mechanisms.alibi(), {"log": log})
    bias = read(mechanisms.alibi())
    check(found.scores - bias.scores, found.content * SCALE * (np.exp(log)[:, None, None] - 1))


def test_values_and_masks_are_functions_of_rows():
    layer, plain = attention(ordered()), attention(mechanisms.none())
    (_, m), at = inputs(), sides()
    value, before = (each.keys_values(m, at.k).value for each in (layer, plain))
    np.testing.assert_allclose(value, before * (1 + np.arange(N))[:, None] * np.arange(S)[:, None, None], rtol=1e-6)
    i, j = positions()
    found = read(ordered())
    check(found.scores, np.where(j != i - 2, found.content * SCALE, -np.inf))


class rows_for_numbers(Mechanism):
    """A mistake that is easily made: k - q in place of k.position - q.position."""

    function: str

    def score(self, q, k):
        return (lambda s, q, k: s - abs(q - k)) if self.function == "score" else None

    def mask(self, q, k):
        return (lambda q, k: k <= q) if self.function == "mask" else None


@pytest.mark.parametrize("function", ["score", "mask"])
def test_rows_are_not_numbers(function):
    with pytest.raises(TypeError, match=r"unsupported operand|not supported between"):
        read(rows_for_numbers(function))
