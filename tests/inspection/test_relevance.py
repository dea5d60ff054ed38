"""Rollout and gradient-weighted maps, beside NumPy in float64 from the formulas."""

import jax
import numpy as np
import pytest

from attn.inspection.relevance import gradient_weighted, rollout, rollout_to_source


def softmax(rng, *shape):
    exponentials = np.exp(rng.normal(size=shape))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize("num_layers", [0, 1, 3])
def test_rollout_is_the_product_of_the_layers(num_layers):
    weights = softmax(np.random.default_rng(0), num_layers, 2, 5, 5)
    expected = np.eye(5)
    for layer in weights:
        expected = (0.5 * layer.mean(0) + 0.5 * np.eye(5)) @ expected
    with jax.enable_x64(True):
        found = np.asarray(rollout(weights))
    np.testing.assert_allclose(found, expected, atol=1e-12)
    np.testing.assert_allclose(found.sum(-1), 1, atol=1e-12)


def test_rollout_to_the_source_is_that_of_one_text_of_source_and_answer():
    """Each sublayer is one step from all tokens, of source and answer, to all tokens; the others stay as they are."""
    rng, (S, T) = np.random.default_rng(1), (5, 3)
    encoder, decoder, cross = softmax(rng, 3, 2, S, S), softmax(rng, 2, 4, T, T), softmax(rng, 2, 4, T, S)
    shares = np.eye(S + T)

    def step(rows, columns, weights):
        matrix = np.eye(S + T)
        matrix[rows] /= 2
        matrix[rows, columns] += weights.mean(0) / 2
        return matrix

    source, answer = slice(0, S), slice(S, S + T)
    for layer in encoder:
        shares = step(source, source, layer) @ shares
    for own, read in zip(decoder, cross):
        shares = step(answer, source, read) @ step(answer, answer, own) @ shares
    with jax.enable_x64(True):
        found = np.asarray(rollout_to_source(encoder, decoder, cross))
    np.testing.assert_allclose(found, shares[answer, source], atol=1e-12)
    np.testing.assert_allclose(shares.sum(-1), 1, atol=1e-12)


@pytest.mark.parametrize("layers", [(), (2,)], ids=["one layer", "layers"])
def test_weights_times_gradients_are_averaged_where_positive(layers):
    rng, (N, T, S) = np.random.default_rng(2), (3, 2, 5)
    weights, gradients = softmax(rng, *layers, N, T, S), rng.normal(size=(*layers, N, T, S))
    with jax.enable_x64(True):
        found = np.asarray(gradient_weighted(weights, gradients))
    assert found.shape == (*layers, T, S)
    for index in np.ndindex(*found.shape):
        *layer, t, s = index
        products = [weights[(*layer, n, t, s)] * gradients[(*layer, n, t, s)] for n in range(N)]
        np.testing.assert_allclose(found[index], sum(max(0, product) for product in products) / N, atol=1e-12)


def test_rollout_names_the_source_of_a_run_that_copies(run):
    weights = run.look("3 1 4 1 5").weights
    shares = rollout_to_source(*(weights[name] for name in ("encoder", "decoder", "cross")))
    np.testing.assert_array_equal(shares[:5, :5].argmax(-1), np.arange(5))
