"""Recurrent models: their cells beside Flax's, their attention beside NumPy in float64, and what padding may not do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from model_cases import SOURCE, TARGET, extend, make, run, start

from attn.nn.recurrent import GRU, LSTM, unroll

WIDTH, LENGTH = 7, 5


def noisy(module: nnx.Module) -> nnx.Module:
    """The module with random parameters everywhere, biases as well."""
    graphdef, params = nnx.split(module, nnx.Param)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(3), len(leaves))
    leaves = [jax.random.normal(key, leaf.shape) / 2 for key, leaf in zip(keys, leaves)]
    return nnx.merge(graphdef, jax.tree.unflatten(tree, leaves))


def flax_lstm(cell: LSTM) -> nnx.Module:
    peer = nnx.LSTMCell(WIDTH, WIDTH, rngs=nnx.Rngs(0))
    for gate, name in enumerate("ifgo"):
        getattr(peer, f"i{name}" if name != "f" else "if_").kernel[...] = cell.W_x[:, gate]
        getattr(peer, f"h{name}").kernel[...] = cell.W_h[:, gate]
        getattr(peer, f"h{name}").bias[...] = cell.b[gate]
    return peer


def flax_gru(cell: GRU) -> nnx.Module:
    peer = nnx.GRUCell(WIDTH, WIDTH, rngs=nnx.Rngs(0))
    peer.dense_i.kernel[...] = cell.W_x[...].reshape(WIDTH, -1)
    peer.dense_i.bias[...] = cell.b[...].reshape(-1)
    peer.dense_h.kernel[...] = cell.W_h[...].reshape(WIDTH, -1)
    return peer


def test_the_lstm_is_that_of_flax():
    cell = noisy(LSTM(WIDTH, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0)))
    x, hidden, memory = jax.random.normal(jax.random.key(1), (3, WIDTH))
    ours = cell(cell.project(x[None])[0], (hidden, memory))
    (their_memory, their_hidden), _ = flax_lstm(cell)((memory, hidden), x)
    np.testing.assert_allclose(ours, (their_hidden, their_memory), atol=1e-6)


def test_the_gru_is_that_of_flax():
    cell = noisy(GRU(WIDTH, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0)))
    cell.b_h[...] = jnp.zeros(WIDTH)  # which Flax's lacks
    x, hidden = jax.random.normal(jax.random.key(1), (2, WIDTH))
    [ours] = cell(cell.project(x[None])[0], (hidden,))
    theirs, _ = flax_gru(cell)(hidden, x)
    np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_the_forget_gate_begins_open():
    cell = LSTM(WIDTH, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(cell.b[...], np.eye(4)[1][:, None] * np.ones(WIDTH))


@pytest.mark.parametrize("kind", [LSTM, GRU])
def test_padding_does_not_change_the_state(kind):
    cell = noisy(kind(WIDTH, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0)))
    x = jax.random.normal(jax.random.key(1), (LENGTH + 3, WIDTH))
    hidden, state = unroll(cell, x[:LENGTH], cell.start(x))
    padded_hidden, padded_state = unroll(cell, x, cell.start(x), jnp.arange(LENGTH + 3) < LENGTH)
    np.testing.assert_array_equal(padded_hidden[:LENGTH], hidden)
    np.testing.assert_array_equal(padded_hidden[LENGTH:], jnp.broadcast_to(hidden[-1], (3, WIDTH)))
    np.testing.assert_array_equal(padded_state, state)


@pytest.mark.some(3)
@pytest.mark.parametrize("name", ["lstm", "gru"])
@pytest.mark.parametrize("attention", ["none", "additive", "multiplicative"])
def test_padding_is_out_of_reach_by_its_gradient(name, attention):
    model = make(name, attention=attention)
    graphdef, state = nnx.split(model)
    shift = jnp.zeros((len(SOURCE), 22))
    logits = lambda shift: nnx.merge(graphdef, state)(SOURCE, TARGET, shift=shift)  # noqa: E731
    reach = np.abs(jax.jit(jax.jacrev(logits))(shift)).max(axis=(0, 1, 3))
    assert (reach[5:] == 0).all()
    assert (reach[:5] > 0).all()


@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_without_attention_the_last_states_are_all_that_the_decoder_knows(name):
    model = make(name, attention="none")
    cache = start(model)
    assert jax.tree.leaves(cache.memory) == []
    assert [leaf.shape for leaf in jax.tree.leaves(cache.own)] == [(22,)] * 2 * len(cache.own[0])
    np.testing.assert_allclose(extend(model, TARGET, cache)[0], run(model), atol=2e-5)


def softmax(scores: np.ndarray) -> np.ndarray:
    e = np.exp(scores - scores.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def in_float64(module: nnx.Module) -> dict[str, np.ndarray]:
    """The matrices and biases by name."""
    named = nnx.to_flat_state(nnx.state(module, nnx.Param))
    return {".".join(map(str, path)): np.asarray(leaf[...], np.float64) for path, leaf in named}


def test_multiplicative_attention_is_its_equation():
    model = make("lstm", attention="multiplicative", num_layers=1)
    decoder, length = noisy(model.decoder), 5
    memory = jax.random.normal(jax.random.key(1), (7, 22))
    x = jax.random.normal(jax.random.key(2), (LENGTH, 22))
    cell = decoder.cells[0]
    out, _, weights = decoder(x, (cell.start(x),), decoder.read(memory), jnp.asarray(length), True)

    p, m = in_float64(decoder), np.asarray(memory, np.float64)[:length]
    hidden = np.asarray(unroll(cell, x, cell.start(x))[0], np.float64)
    right = softmax(hidden @ (m @ p["W_a.kernel"]).T)
    np.testing.assert_allclose(weights[:, :length], right, atol=1e-5)
    np.testing.assert_array_equal(weights[:, length:], 0)
    both = np.concatenate([right @ m, hidden], axis=-1)
    np.testing.assert_allclose(out, np.tanh(both @ p["W_c.kernel"] + p["W_c.bias"]), atol=1e-4)


def test_additive_attention_is_its_equation():
    model = make("gru", attention="additive", num_layers=1)
    decoder, length = noisy(model.decoder), 5
    memory = jax.random.normal(jax.random.key(1), (7, 22))
    x = jax.random.normal(jax.random.key(2), (LENGTH, 22))
    cell = decoder.cells[0]
    out, _, weights = decoder(x, (cell.start(x),), decoder.read(memory), jnp.asarray(length), True)

    p, m, state = in_float64(decoder), np.asarray(memory, np.float64)[:length], cell.start(x)
    for t in range(LENGTH):
        before = np.asarray(state[0], np.float64)
        seen = np.tanh(before @ p["W_a.kernel"] + m @ p["U_a.kernel"] + p["U_a.bias"])
        right = softmax((seen @ p["v.kernel"])[:, 0])
        np.testing.assert_allclose(weights[t, :length], right, atol=1e-5)
        context = right @ m
        inputs = cell.project(x[t : t + 1])[0] + (context @ p["C.kernel"]).reshape(3, 22)
        state = cell(inputs.astype(np.float32), state)
        both = np.concatenate([context, np.asarray(state[0], np.float64)])
        np.testing.assert_allclose(out[t], np.tanh(both @ p["W_c.kernel"] + p["W_c.bias"]), atol=1e-4)
    np.testing.assert_array_equal(weights[:, length:], 0)
