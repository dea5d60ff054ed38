"""Taps change what a model computes, wherever it is computed, and nothing of its code or parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType
from model_cases import SOURCE, TARGET, extend, make, run, start

from attn.inspection.edits import Ablate, EditWeights, Head, Keep
from attn.mechanisms.mechanism import Layer
from attn.mechanisms.registry import parse
from attn.mechanisms.rows import Example, rows
from attn.nn.attention import Attention, Sides
from attn.nn.sharding import MODEL, SEQUENCE
from attn.nn.taps import Site, Taps, stacks, tapped

OF_BLOCKS = ["transformer", "decoder_only", "encoder_only", "vision_transformer", "tape"]


def with_tap(model, tap):
    graphdef, params = nnx.split(model, nnx.Param)
    return nnx.merge(tapped(graphdef, params, tap), params)


def all_heads_of_layer(model, layer):
    kinds = {stack.kind for stack in stacks(model)} | {"cross"}
    return frozenset(Head(kind, layer, head) for kind in kinds for head in (0, 3))


@pytest.mark.parametrize("to", ["zero", "mean"])
@pytest.mark.parametrize("name", OF_BLOCKS)
def test_decoding_token_by_token_equals_the_full_pass(name, to):
    model = make(name)
    changed = with_tap(model, Ablate(all_heads_of_layer(model, 0), to))
    full = run(changed)
    assert jnp.abs(full - run(model)).max() > 1e-3
    cache, logits = start(changed), []
    for token in TARGET:
        each, cache = extend(changed, token[None], cache)
        logits.append(each[0])
    np.testing.assert_allclose(jnp.stack(logits), full, atol=1e-5)


@pytest.mark.parametrize("mechanism", ["sinusoidal", "alibi", "window(left=1, right=1)", "softcap(2)"])
def test_mean_weights_are_equal_over_all_that_a_query_may_attend_to(mechanism):
    """A score moves weights, a mask hides keys: only the mask counts."""
    model = make("encoder_only", mechanism=mechanism)
    kind, all_heads = "encoder", frozenset(Head("encoder", 1, head) for head in range(5))
    _, weights = run(with_tap(model, Ablate(all_heads, "mean")), return_weights=True)
    length = int(jnp.sum(SOURCE != 0))
    i, j = np.arange(len(SOURCE))[:, None], np.arange(len(SOURCE))
    visible = np.broadcast_to(j < length, (len(SOURCE), len(SOURCE)))
    visible = visible & (np.abs(i - j) <= 1) if "window" in mechanism else visible
    expected = visible / np.maximum(visible.sum(1, keepdims=True), 1)
    np.testing.assert_allclose(weights[kind][1], np.broadcast_to(expected, weights[kind][1].shape), atol=1e-6)
    assert np.abs(weights[kind][0] - expected).max() > 0.01  # the other layer's are its own


def test_an_output_is_the_weighted_sum_of_values_that_is_computed_by_hand():
    layer = Layer("encoder", 10, 4, 3, 3**-0.5, jnp.dtype("float32"), 2)
    attention = Attention(parse("none"), layer, implementation="auto", shared={}, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    x, memory, weights = rng.normal(size=(5, 10)), rng.normal(size=(7, 10)), rng.normal(size=(4, 5, 7))
    sides = Sides(*(rows(n, total=None, example=Example(n)) for n in (5, 7)), None)
    kv = attention.keys_values(jnp.asarray(memory, jnp.float32), sides.k)
    taps = Taps(weights=lambda old, context: jnp.asarray(weights, old.dtype))
    found, used = attention(jnp.asarray(x, jnp.float32), kv, sides, taps=taps, return_weights=True)
    W_V, W_O = (np.asarray(each[...], np.float64) for each in (attention.W_V, attention.W_O))
    expected = sum(weights[n] @ (memory @ W_V[:, n // 2]) @ W_O[n] for n in range(4))  # two heads per group
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(used, weights, atol=1e-6)


def test_layers_that_share_their_parameters_are_different_sites():
    model = make("encoder_only", num_layers=3, distinct_layers=1)
    _, usual = run(model, return_weights=True)
    heads = frozenset(Head("encoder", 1, head) for head in range(5))
    _, weights = run(with_tap(model, Ablate(heads, "zero")), return_weights=True)
    np.testing.assert_array_equal(weights["encoder"][0], usual["encoder"][0])
    assert (weights["encoder"][1] == 0).all() and (weights["encoder"][2].sum(-1) > 0.99).any()


def test_every_site_is_there_once_in_its_shape():
    keep = Keep(lambda site: True)
    changed = with_tap(make("transformer"), keep)
    jax.eval_shape(lambda: changed(SOURCE, TARGET))
    S, T = len(SOURCE), len(TARGET)
    shapes = {"encoder": (5, S, S), "decoder": (5, T, T), "cross": (5, T, S)}
    expected = {Site("weights", kind, layer): shape for kind, shape in shapes.items() for layer in (0, 1)}
    expected |= {Site("heads", kind, layer): (T, N, 6) for kind, (N, T, _) in shapes.items() for layer in (0, 1)}
    sizes = {"encoder": S, "decoder": T}
    expected |= {Site("hidden", kind, layer): (size, 30) for kind, size in sizes.items() for layer in (0, 1)}
    assert {site: value.shape for site, value in keep.values.items()} == expected


def test_equal_taps_are_equal_structures_and_the_model_stays_as_it_is():
    model = make("decoder_only")
    before, params = nnx.split(model, nnx.Param)
    one, same, other = (tapped(before, params, Ablate(frozenset({Head("decoder", 0, n)}), "zero")) for n in (1, 1, 2))
    assert one == same and hash(one) == hash(same) and one != other and one != before
    assert nnx.split(model, nnx.Param)[0] == before == nnx.split(make("decoder_only"), nnx.Param)[0]


def test_taps_are_applied_one_after_another():
    model = make("encoder_only")
    doubled = with_tap(model, EditWeights(lambda kind, layer, weights: 2 * weights))
    both = with_tap(doubled, EditWeights(lambda kind, layer, weights: weights + 1))
    usual, found = (run(each, return_weights=True)[1]["encoder"] for each in (model, both))
    np.testing.assert_allclose(found[0], 2 * usual[0] + 1, atol=1e-6)


@pytest.mark.parametrize("to", ["zero", "mean"])
@pytest.mark.parametrize("axis", [MODEL, SEQUENCE])
def test_a_mesh_that_divides_the_model_changes_nothing(axis, to):
    model = make("transformer", num_encoder_layers=1, num_decoder_layers=1, num_heads=4)
    heads = frozenset(Head(kind, 0, head) for kind in ("encoder", "cross", "decoder") for head in (0, 3))
    graphdef, params = nnx.split(with_tap(model, Ablate(heads, to)), nnx.Param)

    def logits(params):
        return nnx.merge(graphdef, params)(SOURCE, TARGET)

    expected = jax.jit(logits)(params)
    assert jnp.abs(expected - run(model)).max() > 1e-3
    with jax.set_mesh(jax.make_mesh((2,), (axis,), axis_types=(AxisType.Auto,))):
        np.testing.assert_allclose(jax.jit(logits)(params), expected, atol=1e-5)


def test_changed_weights_do_not_go_with_dropout():
    model = with_tap(make("encoder_only", dropout=0.1), EditWeights(lambda kind, layer, weights: weights))
    with pytest.raises(ValueError, match="weights: a change does not go with dropout"):
        run(model, key=jax.random.key(0))
