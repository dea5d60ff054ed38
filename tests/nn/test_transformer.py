"""The Transformer: what its parts may see, and that its ways of running agree."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attn.functional import masks
from attn.nn.encodings import ENCODINGS
from attn.nn.transformer import Transformer

VOCABULARY, SOURCE, TARGET = 11, jnp.array([3, 1, 4, 5, 9, 0, 0]), jnp.array([8, 2, 7, 1, 10])
SIZES = dict(width=30, num_heads=5, num_encoder_layers=2, num_decoder_layers=2, feed_forward_width=22)
VARIANTS = [
    pytest.param({"positions": name, "norm": norm, "tied_embeddings": tied}, id=f"{name}-{norm}-tied{tied}")
    for name, norm, tied in [
        ("sinusoidal", "pre", False),
        ("sinusoidal", "post", True),
        ("learned", "pre", True),
        ("rotary", "post", False),
        ("none", "pre", False),
    ]
]


def make(**settings) -> Transformer:
    return Transformer(VOCABULARY, **(SIZES | settings), rngs=nnx.Rngs(7))


def run(model: Transformer, source=SOURCE, target=TARGET, **options):
    """The model's logits (and weights), compiled."""
    graphdef, state = nnx.split(model)
    return jax.jit(lambda state: nnx.merge(graphdef, state)(source, target, **options))(state)


def encode(model: Transformer, source):
    graphdef, state = nnx.split(model)
    return jax.jit(lambda state, source: nnx.merge(graphdef, state).encode(source)[0])(state, source)


def test_the_variants_above_cover_every_encoding():
    assert {variant.values[0]["positions"] for variant in VARIANTS} == set(ENCODINGS)


@pytest.mark.parametrize("settings", VARIANTS)
def test_cached_decoding_equals_full_decoding_token_for_token(settings):
    model = make(**settings)
    full = run(model)
    memory, _ = model.encode(SOURCE)
    cache = model.start(memory, jnp.sum(SOURCE != 0), len(TARGET))
    step = jax.jit(lambda token, cache: model.decode(token, cache)[:2])
    cache = cache._replace(position=jnp.asarray(0))
    logits = []
    for token in TARGET:
        row, cache = step(token[None], cache)
        logits.append(row[0])
    np.testing.assert_allclose(np.stack(logits), full, atol=2e-5)
    np.testing.assert_array_equal(np.stack(logits).argmax(-1), full.argmax(-1))


@pytest.mark.parametrize("settings", VARIANTS)
def test_decoder_is_causal_by_its_gradient(settings):
    model = make(**(settings | {"tied_embeddings": False}))
    graphdef, table, rest = nnx.split(model, nnx.PathContains("target_embed"), ...)

    def logits(table):
        return nnx.merge(graphdef, table, rest)(SOURCE, TARGET)

    # The tokens of the target differ, so each one's row of the table is felt at its own place and after.
    [jacobian] = jax.tree.leaves(jax.jit(jax.jacrev(logits))(table))  # [T V V D]
    reach = np.abs(jacobian).max(axis=(1, 3))[:, TARGET]
    assert (reach[np.triu_indices(len(TARGET), 1)] == 0).all()
    assert (reach[np.tril_indices(len(TARGET))] > 0).all()


@pytest.mark.parametrize("settings", VARIANTS)
def test_padding_of_the_source_changes_nothing(settings):
    model = make(**settings)
    longer = jnp.concatenate([SOURCE, jnp.zeros(4, SOURCE.dtype)])
    np.testing.assert_allclose(run(model, longer), run(model), atol=2e-5)


def test_padding_is_out_of_reach_by_its_gradient():
    model = make()

    def read(values):
        layer = model.encoder[0].attention
        memory = layer.keys_values(values, jnp.arange(len(SOURCE)))
        out, _ = layer(values, memory, positions=jnp.arange(len(SOURCE)), mask=masks.padding(jnp.sum(SOURCE != 0)))
        return out[:5]

    values = jax.random.normal(jax.random.key(0), (len(SOURCE), SIZES["width"]))
    reach = np.abs(jax.jacobian(read)(values)).max(axis=(0, 1, 3))
    assert (reach[5:] == 0).all()
    assert (reach[:5] > 0).all()


def test_without_positions_the_encoder_is_permutation_equivariant():
    tokens = jnp.array([3, 1, 4, 1, 5, 9, 2])
    order = jnp.array([6, 2, 0, 5, 1, 3, 4])
    model = make(positions="none")
    np.testing.assert_allclose(encode(model, tokens[order]), encode(model, tokens)[order], atol=1e-5)
    ordered = make(positions="sinusoidal")
    assert np.abs(encode(ordered, tokens[order]) - encode(ordered, tokens)[order]).max() > 1e-2


@pytest.mark.parametrize("settings", VARIANTS)
def test_asking_for_weights_changes_no_logit_and_rows_sum_to_one(settings):
    model = make(**settings)
    logits, weights = run(model, return_weights=True)
    np.testing.assert_array_equal(logits, run(model))
    assert weights.encoder.shape == (2, 5, 7, 7)
    assert weights.decoder.shape == (2, 5, 5, 5)
    assert weights.cross.shape == (2, 5, 5, 7)
    for some in weights:
        np.testing.assert_allclose(some.sum(-1), 1, atol=1e-5)
    assert (weights.cross[..., 5:] == 0).all()
    assert (np.triu(weights.decoder, 1) == 0).all()


def test_dropout_comes_from_its_key_alone():
    model = make(dropout=0.3)
    one, same, other = (run(model, key=jax.random.key(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - other).max() > 1e-3
    np.testing.assert_array_equal(run(model), run(make()))


def test_bfloat16_computes_in_bfloat16_with_float32_parameters():
    half = make(dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(half, nnx.Param))} == {jnp.dtype("float32")}
    assert encode(half, SOURCE).dtype == jnp.bfloat16
    np.testing.assert_allclose(run(half), run(make()), atol=0.15)


def test_an_explicit_head_width_need_not_divide_the_width():
    model = make(num_heads=7, head_width=4)
    assert run(model).shape == (5, VOCABULARY)
    assert model.encoder[0].attention.W_Q.shape == (30, 7, 4)


def test_tied_embeddings_share_one_matrix():
    count = lambda model: sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))  # noqa: E731
    assert count(make()) - count(make(tied_embeddings=True)) == 2 * VOCABULARY * 30


def test_every_parameter_gets_a_gradient():
    graphdef, params = nnx.split(make(positions="learned", max_length=7), nnx.Param)

    def loss(params):
        return jnp.sum(jax.nn.log_softmax(nnx.merge(graphdef, params)(SOURCE, TARGET))[:, 3])

    zero = [
        jax.tree_util.keystr(path)
        for path, leaf in jax.tree_util.tree_leaves_with_path(jax.grad(loss)(params))
        if not np.abs(leaf).max() > 1e-8
    ]
    assert zero == []


def test_a_new_encoding_is_one_record(monkeypatch):
    ramp = dataclasses.replace(ENCODINGS["none"], add=lambda at, width, table: at[:, None] * jnp.linspace(-1, 1, width))
    monkeypatch.setitem(ENCODINGS, "ramp", ramp)
    assert np.abs(run(make(positions="ramp")) - run(make(positions="none"))).max() > 1e-3
