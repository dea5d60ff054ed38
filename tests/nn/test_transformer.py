"""The Transformer: what its parts may see, and that its ways of running agree."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from model_cases import SIZES, SOURCE, TARGET, VOCABULARY, encode, make, run

from attn.functional import masks
from attn.nn.encodings import ENCODINGS
from attn.nn.places import Places, Side
from attn.nn.variants import VARIANTS, Variant


def test_padding_is_out_of_reach_by_its_gradient():
    model = make()

    def read(values):
        layer = model.encoder[0].attention
        length = jnp.sum(SOURCE != 0)
        side = Side(jnp.arange(len(SOURCE)), length, None)
        places = Places(side, side, jnp.full(len(SOURCE), length))
        out, _ = layer(values, layer.keys_values(values, side), places=places, mask=masks.padding(length))
        return out[:5]

    values = jax.random.normal(jax.random.key(0), (len(SOURCE), SIZES["transformer"]["width"]))
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


def test_the_decoder_attends_to_no_token_to_come():
    _, weights = run(make(), return_weights=True)
    assert (np.triu(weights.decoder, 1) == 0).all()


def test_a_variant_sees_positions_from_the_start_in_full_and_in_cached_decoding(monkeypatch):
    lean = Variant(score=lambda s, i, j: s - 0.7 * jnp.abs(i - j), mask=lambda i, j: jnp.abs(i - j) < 3, scale=0.5)
    monkeypatch.setitem(VARIANTS, "lean", lean)
    model = make(variant="lean")
    full, weights = run(model, return_weights=True)
    for some in weights:
        far = np.abs(np.subtract.outer(*map(np.arange, some.shape[2:]))) >= 3
        assert far.any() and (some[..., far] == 0).all()
    assert np.abs(full - run(make())).max() > 1e-2

    @jax.jit
    def in_two_parts():
        memory, _ = model.encode(SOURCE)
        cache = model.start(memory, jnp.sum(SOURCE != 0), len(TARGET))
        first, cache, _ = model.decode(TARGET[:3], cache)
        return jnp.concatenate([first, model.decode(TARGET[3:], cache)[0]])

    np.testing.assert_allclose(in_two_parts(), full, atol=2e-5)


def test_an_explicit_head_width_need_not_divide_the_width():
    model = make(num_heads=7, head_width=4)
    assert run(model).shape == (5, VOCABULARY)
    assert model.encoder[0].attention.W_Q.shape == (30, 7, 4)


def test_a_new_encoding_is_one_record(monkeypatch):
    ramp = dataclasses.replace(
        ENCODINGS["none"], add=lambda side, width, table: side.index[:, None] * jnp.linspace(-1, 1, width)
    )
    monkeypatch.setitem(ENCODINGS, "ramp", ramp)
    assert np.abs(run(make(positions="ramp")) - run(make(positions="none"))).max() > 1e-3
