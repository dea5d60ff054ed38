"""Optimizers: what they hold, what a step of theirs is, and the rate at which it is taken."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from attn.training.config import from_mapping
from attn.training.optimizers import Matrices, learning_rate, matrix_shape, optimizer, packing
from attn.training.state import build_model

MODEL = {"width": 12, "num_heads": 3, "head_width": 2, "feed_forward_width": 10}
MODELS = {
    "transformer": MODEL,
    "learned": MODEL | {"mechanism": "learned(40)"},
    "lstm": {"name": "lstm", "width": 6, "attention": "additive"},
    "gru": {"name": "gru", "width": 6},
    "encoder_only": MODEL | {"name": "encoder_only", "mechanism": "transformer_xl"},
}


def parameters(config) -> nnx.State:
    return nnx.state(build_model(config, config.task.vocabulary, nnx.Rngs(0)), nnx.Param)


@pytest.mark.some(3)
@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("model", MODELS)
def test_packing_and_unpacking_changes_nothing(model, name):
    config = from_mapping({"model": MODELS[model], "optimizer": {"name": name}})
    params = parameters(config)
    pack, unpack = packing(config.optimizer, params)
    back = unpack(pack(params))
    assert jax.tree.structure(back) == jax.tree.structure(params)
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(params)):
        np.testing.assert_array_equal(a, b)


def test_muon_holds_the_matrices_between_hidden_layers():
    config = from_mapping({"model": MODELS["learned"], "optimizer": {"name": "muon"}})
    params = parameters(config)
    packed = packing(config.optimizer, params).pack(params)
    # Self, own and cross attention have three matrices into the heads and one out of them; two feed-forward layers.
    assert {name: stack.shape for name, stack in packed.stacks.items()} == {
        "12 to 6": (9, 12, 6),
        "6 to 12": (3, 6, 12),
        "12 to 10": (2, 12, 10),
        "10 to 12": (2, 10, 12),
    }
    every = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert packed.rest.size == every - sum(stack.size for stack in packed.stacks.values())
    for name in ("source_embed.embedding", "output.kernel", "table"):
        assert matrix_shape(name, (19, 12)) is None


def test_heads_are_side_by_side_in_their_matrix():
    """x W_Q, heads after one another, is x times the matrix; so is the sum over heads of W_O."""
    rng = np.random.default_rng(0)
    x, W_Q, W_O = rng.normal(size=(4, 12)), rng.normal(size=(12, 3, 2)), rng.normal(size=(3, 2, 12))
    heads = np.einsum("td,dnh->tnh", x, W_Q)
    np.testing.assert_allclose(heads.reshape(4, 6), x @ W_Q.reshape(matrix_shape("W_Q", W_Q.shape)))
    out = np.einsum("tnh,nhd->td", heads, W_O)
    np.testing.assert_allclose(out, heads.reshape(4, 6) @ W_O.reshape(matrix_shape("W_O", W_O.shape)))


def orthogonalized(matrix: np.ndarray) -> np.ndarray:
    """The quintic Newton-Schulz iteration of Jordan et al. 2024, in float64."""
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = wide / np.linalg.norm(wide)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x if matrix.shape[0] <= matrix.shape[1] else x.T


def test_steps_of_muon_are_those_written_out_for_each_matrix_alone():
    config = from_mapping(
        {
            "model": MODEL,
            "optimizer": {"name": "muon", "momentum": 0.8, "weight_decay": 0.1, "learning_rate": 0.05, "clip_norm": 1e9}
            | {"rest_learning_rate": 0.02, "warmup_fraction": 0.5, "decay": "none", "beta1": 0.7, "beta2": 0.9},
            "training": {"steps": 8},
        }
    )
    params, steps = parameters(config), optimizer(config.optimizer, 8)
    pack, unpack = packing(config.optimizer, params)
    rng = np.random.default_rng(0)
    gradients = [jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), params) for _ in range(2)]
    packed = pack(params)
    state = steps.init(packed)
    rest = optax.nadamw(lambda count: 0.02 * (count + 1) / 4, b1=0.7, b2=0.9, weight_decay=0.0)
    others, others_state = packed.rest, rest.init(packed.rest)
    for gradient in gradients:
        updates, state = steps.update(pack(gradient), state, packed)
        packed = optax.apply_updates(packed, updates)
        update, others_state = rest.update(pack(gradient).rest, others_state, others)
        others = others + update
    np.testing.assert_allclose(packed.rest, others, rtol=1e-6, atol=1e-7)
    assert isinstance(packed, Matrices)

    found = dict(nnx.to_flat_state(unpack(packed)))
    first, second = (dict(nnx.to_flat_state(gradient)) for gradient in gradients)
    compared = 0
    for path, leaf in nnx.to_flat_state(params):
        if (shape := matrix_shape(".".join(map(str, path)), leaf[...].shape)) is None:
            continue
        matrix = np.asarray(leaf[...], np.float64).reshape(shape)
        momentum = np.zeros(shape)
        for k, gradient in enumerate((first, second), start=1):
            g = np.asarray(gradient[path][...], np.float64).reshape(shape)
            momentum = 0.8 * momentum + 0.2 * g
            # The means are divided by the weights they hold, the one of the next step where Nesterov looks ahead.
            ahead = 0.8 * momentum / (1 - 0.8 ** (k + 1)) + 0.2 * g / (1 - 0.8**k)
            step = orthogonalized(ahead) * max(1, shape[1] / shape[0]) ** 0.5
            matrix = matrix - 0.05 * k / 4 * (step + 0.1 * matrix)
        np.testing.assert_allclose(np.asarray(found[path][...]).reshape(shape), matrix, rtol=1e-4, atol=1e-5)
        compared += 1
    assert compared == 16


@pytest.mark.parametrize("decay", ["cosine", "linear", "inverse", "none"])
@pytest.mark.parametrize(("steps", "fraction"), [(10, 0.1), (1, 0.5), (3, 0.0), (100, 0.05)])
def test_every_update_is_an_update(decay, steps, fraction):
    config = from_mapping({"optimizer": {"decay": decay, "warmup_fraction": fraction}, "training": {"steps": steps}})
    rate = learning_rate(config.optimizer, steps)
    assert all(0 < float(rate(count)) < 1.000001 * config.optimizer.learning_rate for count in range(steps))


def test_the_learning_rate_warms_up_and_decays():
    def rates(decay, *counts):
        config = from_mapping({"optimizer": {"learning_rate": 2.0, "warmup_fraction": 0.2, "decay": decay}})
        rate = learning_rate(config.optimizer, 100)
        return [round(float(rate(count)), 4) for count in counts]

    for decay in ("cosine", "linear", "inverse", "none"):
        assert rates(decay, 0, 9, 19) == [0.1, 1, 2]  # 1/20, 10/20 and 20/20 of the rate
    assert rates("cosine", 60, 100) == [1, 0]
    assert rates("linear", 60, 80, 100) == [1, 0.5, 0]
    assert rates("inverse", 20, 40, 80, 180) == [2, 1, 0.5, 0.2222]
    assert rates("none", 60, 1000) == [2, 2]
