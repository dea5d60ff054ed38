"""Positions in functions of them are those of the text, in training and in cached decoding; masks stay masks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from layers import FIRST, S, T, attention, sides
from model_cases import SOURCE, TARGET, extend, make, run, start

import attn
from attn import mechanisms
from attn.functional import masks
from attn.mechanisms import Mechanism, of
from attn.nn.departures import Departures


class ramp(Mechanism):
    """Added to embeddings."""

    def setup(self, layer, rngs):
        self.width = layer.width

    def embedding(self, rows):
        return rows.position[:, None] * jnp.linspace(-1, 1, self.width)


class in_order(Mechanism):
    """Functions of rows."""

    def score(self, q, k):
        factor = jnp.cos(q.position)
        return lambda s, q, k: s * factor[q.row] - 0.1 * (q.head + 1) * k.position

    def mask(self, q, k):
        return lambda q, k: k.position != q.position - 2


SLOPES = jnp.array([0.1, 0.2, 0.3, 0.4, 0.5])  # of the five heads of the small models
WRITTEN = {
    "score": of(score=lambda s, i, j: s * jnp.cos(0.3 * i + j)),
    "distance": of(score=lambda s, i, j: s - 0.7 * jnp.abs(i - j)),
    "lean": of(score=lambda s, i, j: s - 0.7 * jnp.abs(i - j), mask=lambda i, j: jnp.abs(i - j) < 3, scale=0.5),
    "per_head": of(score=attn.per_head(attn.scores.alibi(SLOPES))),
    "table": of(score=attn.scores.relative_bias(jnp.sin(jnp.arange(41.0)))),
    "near": of(mask=attn.masks.sliding_window(2, 0)),
    "odd": of(mask=lambda i, j: (i + 2 * j) % 3 != 2),
    "in_order": in_order,
    "ramp": ramp,
}


@pytest.fixture(autouse=True)
def known(monkeypatch):
    """The mechanisms above are known by their names."""
    for name, mechanism in WRITTEN.items():
        monkeypatch.setitem(mechanisms.MECHANISMS, name, mechanism)


@pytest.mark.some(9)
@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("kind", ["transformer", "decoder_only"])
def test_positions_are_those_of_the_text_in_cached_decoding_too(kind, name):
    """Row numbers in their place would train, and decode something else without an error."""
    model = make(kind, mechanism=f"sinusoidal + {name}")
    full = run(model)
    cache, rows = start(model), []
    for token in TARGET:
        row, cache = extend(model, token[None], cache)
        rows.append(row[0])
    np.testing.assert_allclose(np.stack(rows), full, atol=2e-5)
    first, cache = extend(model, TARGET[:3], start(model, capacity=len(TARGET) + 4))
    np.testing.assert_allclose(np.concatenate([first, extend(model, TARGET[3:], cache)[0]]), full, atol=2e-5)
    assert np.abs(full - run(make(kind))).max() > 1e-3


def test_a_mask_of_positions_holds_in_all_attention():
    _, weights = run(make(mechanism="lean"), return_weights=True)
    for some in weights.values():
        far = np.abs(np.subtract.outer(*map(np.arange, some.shape[2:]))) >= 3
        assert far.any() and (some[..., far] == 0).all()


def test_a_window_hides_the_same_pairs_in_cached_decoding_of_a_padded_prompt():
    graphdef, state = nnx.split(make("decoder_only", mechanism="window(2, 0)", num_layers=1))
    length, padding = np.count_nonzero(SOURCE), np.count_nonzero(SOURCE == 0)

    @jax.jit
    def step(token, cache):
        return nnx.merge(graphdef, state).extend(token, cache, return_weights=True)[1:]

    cache = start(nnx.merge(graphdef, state), capacity=8)  # its index is traced below
    for number, token in enumerate(TARGET):
        cache, weights = step(token[None], cache)
        seen = (np.asarray(weights["decoder"]) > 0).all(axis=(0, 1, 2))
        row = padding + length + number  # of the array, in which the padding stands first
        np.testing.assert_array_equal(np.flatnonzero(seen), [row - 2, row - 1, row])


def looked_at(visible, rows, columns) -> tuple[np.ndarray, np.ndarray]:
    """(some, every) of each block `[q k]`, pair by pair."""
    pairs = visible[rows[:, None, :, None], columns[None, :, None, :]]
    return pairs.any(axis=(2, 3)), pairs.all(axis=(2, 3))


ROWS, COLUMNS = np.array([[0, 1], [2, 3], [4, 4]]), np.array([[0, 1, 2], [3, 4, 5], [6, 6, 6]])


def mask_of(mechanism, first):
    """Return the mask of a causal layer whose first query stands at `first`."""
    where = sides(first=first)._replace(mask=masks.causal(offset=first))
    return Departures(attention(mechanism).mechanism, where, jnp.arange(1)).mask().resolve(T, S)


@pytest.mark.parametrize("mechanism", [mechanisms.window(2, 1), of(mask=masks.sliding_window(2, 1))])
def test_the_blocks_that_a_window_hides_are_known_before_anything_runs(mechanism):
    traced = []
    jax.jit(lambda x: traced.extend(mask_of(mechanism, FIRST).bounds(ROWS, COLUMNS)) or x)(0.0)
    assert len(traced) == 2 and all(isinstance(bound, np.ndarray) for bound in traced)
    i, j = FIRST + np.arange(T)[:, None], np.arange(S)[None, :]
    some, every = looked_at((j >= i - 2) & (j <= i), ROWS, COLUMNS)
    assert not some.all()
    np.testing.assert_array_equal(traced[0], some)
    np.testing.assert_array_equal(traced[1], every)


@pytest.mark.parametrize("mechanism", [mechanisms.window(2, 1), of(mask=masks.sliding_window(2, 1))])
def test_the_blocks_that_a_window_hides_are_found_without_a_look_at_every_pair(mechanism):
    """In cached decoding, where the position of the first query is traced."""

    def found(first, mechanism=mechanism):
        mask = mask_of(mechanism, first)
        bounds = (jnp.broadcast_to(bound, (len(ROWS), len(COLUMNS))) for bound in mask.bounds(ROWS, COLUMNS))
        return *bounds, mask(np.arange(T)[:, None], np.arange(S)[None, :])

    for first in (0, 2, 6, 20):
        some, every, visible = jax.jit(found)(first)
        i, j = first + np.arange(T)[:, None], np.arange(S)[None, :]
        np.testing.assert_array_equal(visible, (j >= i - 2) & (j <= i))
        for bound, pairs in zip((some, every), looked_at(np.asarray(visible), ROWS, COLUMNS)):
            np.testing.assert_array_equal(bound, pairs)
    assert "scan" not in str(jax.make_jaxpr(found)(3))
    plain = of(mask=lambda i, j: (j >= i - 2) & (j <= i + 1))  # nothing is known of it, so every pair is looked at
    assert "scan" in str(jax.make_jaxpr(lambda first: found(first, plain))(3))
