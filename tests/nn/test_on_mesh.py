"""A model that a mesh divides computes what one device computes, whatever its mechanism, and drops the same weights."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType
from model_cases import SOURCE, TARGET, make

from attn.functional import pallas_tpu, ring_heads
from attn.functional.implementations import IMPLEMENTATIONS
from attn.mechanisms import registry
from attn.mechanisms.mechanism import Mechanism
from attn.nn import sharding
from attn.nn.sharding import MODEL, PARAMETERS, RULES, SEQUENCE

MECHANISMS = (
    *("t5 + window(left=3, right=3)", "sinusoidal", "learned + softcap(20)", "rotary", "alibi", "shaw(clip=3)"),
    *("transformer_xl", "randomized(sinusoidal)"),
)


def on_mesh(axis: str):
    return jax.set_mesh(jax.make_mesh((2,), (axis,), axis_types=(AxisType.Auto,)))


def value_and_gradient(model, key=None):
    """The sum of weighted logits, in float64, and its gradient by every parameter."""
    graphdef, params = nnx.split(model, nnx.Param)
    params = jax.tree.map(lambda x: x.astype(jnp.float64), params)

    def value(params):
        logits = nnx.merge(graphdef, sharding.constrain_parameters(params))(SOURCE, TARGET, answer_length=5, key=key)
        return jnp.sum(jnp.sin(logits) * jnp.arange(1.0, logits.size + 1).reshape(logits.shape))

    return jax.jit(jax.value_and_grad(value))(params)


def check_same_on_mesh(axis: str, name: str = "transformer", *, rtol: float = 1e-9, **settings):
    layers = ("num_encoder_layers", "num_decoder_layers") if name == "transformer" else ("num_layers",)
    settings |= dict.fromkeys(layers, 1) | dict(num_heads=4, dtype="float64", dropout=0.3)
    with jax.enable_x64(True):
        model = make(name, **settings)
        alone, expected = value_and_gradient(model, jax.random.key(3))
        with on_mesh(axis):
            value, gradient = value_and_gradient(model, jax.random.key(3))
    np.testing.assert_allclose(value, alone, rtol=rtol)
    for x, y in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected)):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol)


@pytest.mark.some(2)
@pytest.mark.parametrize("mechanism", MECHANISMS)
@pytest.mark.parametrize("axis", [MODEL, SEQUENCE])
def test_every_mechanism_computes_the_same(axis, mechanism):
    check_same_on_mesh(axis, mechanism=mechanism)


@pytest.mark.nightly
@pytest.mark.parametrize("axis", [MODEL, SEQUENCE])
def test_norms_of_queries_and_keys_compute_the_same(axis):
    check_same_on_mesh(axis, mechanism="qk_norm", rtol=1e-5)  # it rounds to float32, whatever the dtype


@pytest.mark.some(2)
@pytest.mark.parametrize("name", ["decoder_only", "encoder_only", "vision_transformer", "tape"])
@pytest.mark.parametrize("axis", [MODEL, SEQUENCE])
def test_every_model_of_blocks_computes_the_same(axis, name):
    grouped = {"num_groups": 2, "style": "llama"} if name == "decoder_only" else {}
    check_same_on_mesh(axis, name, implementation="blockwise", **grouped)


def test_without_a_mesh_nothing_is_constrained():
    x = jnp.ones((4, 6))
    assert sharding.constrain(x, "tokens", "feed_forward") is x
    assert str(jax.make_jaxpr(lambda x: sharding.constrain(x, "tokens", "feed_forward"))(x)).count("sharding") == 0
    with on_mesh(MODEL):
        jaxpr = jax.make_jaxpr(lambda x: sharding.constrain(x, "tokens", "feed_forward"))(x)
    assert "sharding_constraint" in str(jaxpr)


def test_the_table_names_parameters_that_models_have():
    params = nnx.state(make("decoder_only", num_heads=4, num_groups=2, style="bert(gated=True)"), nnx.Param)
    mesh = jax.make_mesh((2,), (MODEL,), axis_types=(AxisType.Auto,))
    specs = {
        jax.tree_util.keystr(path, simple=True, separator="."): place.spec
        for path, place in jax.tree_util.tree_leaves_with_path(sharding.shardings(params, mesh))
    }
    for end, names in PARAMETERS.items():
        axes = tuple(RULES.get(name) for name in names)
        found = [tuple(spec) for path, spec in specs.items() if path.removesuffix(".value").endswith(f".{end}")]
        assert found == [axes] * 2, end  # one of each of the two layers
    divided = [path for path, spec in specs.items() if MODEL in spec]
    assert len(divided) == 2 * len(PARAMETERS)
    assert all(spec == jax.P() for path, spec in specs.items() if "norm" in path or "embed" in path)


def test_parameters_of_other_names_or_shapes_are_replicated():
    mesh = jax.make_mesh((2,), (MODEL,), axis_types=(AxisType.Auto,))
    own = {"mine": {"W": jnp.ones((4, 4)), "W_Q": jnp.ones((4, 4))}, "W_Q": jnp.ones((3, 4, 2))}
    places = sharding.shardings(own, mesh)
    assert places["mine"]["W"].spec == places["mine"]["W_Q"].spec == jax.P()
    assert places["W_Q"].spec == jax.P(None, MODEL, None)


LAYERS = {"transformer": ("num_encoder_layers", "num_decoder_layers"), "decoder_only": ("num_layers",)}


def gathered_or_sent(
    mechanism: str, *, name: str = "transformer", with_gradient: bool, **settings
) -> tuple[set[str], int]:
    """The shapes of all-gathers in the compiled program on two devices, and the number of messages between two."""
    model = make(name, mechanism=mechanism, **dict.fromkeys(LAYERS[name], 1), **settings)
    graphdef, params = nnx.split(model, nnx.Param)

    def value(params):
        logits = nnx.merge(graphdef, params)(SOURCE, TARGET, answer_length=5, key=jax.random.key(3))
        return jnp.sum(jnp.sin(logits))

    with on_mesh(SEQUENCE):
        call = jax.grad(value) if with_gradient else value
        text = jax.jit(call).lower(params).compile().as_text()
    return set(re.findall(r"= (\S+?)(?:\{\S*)? all-gather\(", text)), len(re.findall(r" collective-permute\(", text))


# Rows of source and answer, also with padding, and of both; heads; width.
KEYS = {f"f32[{rows},4,6]" for rows in (5, 6, 7, 8, 12)}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("with_gradient", [False, True])
def test_keys_and_values_travel_and_are_not_gathered(name, with_gradient):
    settings = {"name": name, "num_heads": 4, "head_width": 6, "dropout": 0.3}
    shapes, messages = gathered_or_sent("t5 + rotary", with_gradient=with_gradient, **settings)
    assert not shapes & KEYS
    # Each attention layer sends keys and values; backward again, and the gradients of both twice.
    layers = 3 if name == "transformer" else 1
    assert messages >= layers * (6 if with_gradient else 2)


@pytest.mark.parametrize(
    ("mechanism", "settings"),
    [("shaw(clip=3)", {}), ("rotary", {"implementation": "reference"})],
    ids=["a score made from vectors", "another implementation"],
)
def test_elsewhere_they_are_gathered(mechanism, settings):
    shapes, messages = gathered_or_sent(mechanism, with_gradient=False, num_heads=4, head_width=6, **settings)
    assert shapes & KEYS
    assert not messages


class factors(Mechanism):
    """A score with a parameter of all heads, which it reads through a function with a derivative of its own."""

    def setup(self, layer, rngs):
        self.log = nnx.Param(jnp.full(3, 0.1))

    def score(self, q, k):
        length = q.vectors.shape[0] + k.vectors.shape[0]  # reads a shape, but no vector
        return lambda s, q, k: s * jax.nn.softplus(self.log[...])[k.row % 3] + q.row / length


def test_a_mechanism_with_parameters_of_all_heads_travels_too(monkeypatch):
    monkeypatch.setitem(registry.MECHANISMS, "factors", factors)
    shapes, messages = gathered_or_sent("factors", with_gradient=True, num_heads=4, head_width=6)
    assert messages and not shapes & KEYS
    check_same_on_mesh(SEQUENCE, mechanism="factors")


def test_kernels_compute_the_parts_where_the_settings_name_them(monkeypatch):
    attend = functools.partial(pallas_tpu.attend, interpret=True, block_size=4, lanes=4)
    options = {"attend": attend, "unsupported_reason": lambda call: None, "backends": None}
    kernels = dataclasses.replace(IMPLEMENTATIONS["pallas_tpu"], **options)
    monkeypatch.setitem(IMPLEMENTATIONS, "pallas_tpu", kernels)
    check_same_on_mesh(SEQUENCE, mechanism="alibi + window(left=3, right=3)", implementation="pallas_tpu")
    with on_mesh(SEQUENCE):
        model = make(mechanism="rotary", num_heads=4, implementation="pallas_tpu")
        text = str(jax.make_jaxpr(lambda: model(SOURCE, TARGET, answer_length=5))())
    assert "ppermute" in text and "pallas_call" in text


def test_heads_that_take_turns_drop_the_same_weights_and_have_their_own_parameters(monkeypatch):
    monkeypatch.setattr(ring_heads, "TURN", 1)
    check_same_on_mesh(SEQUENCE, "decoder_only", mechanism="t5", num_groups=2)
