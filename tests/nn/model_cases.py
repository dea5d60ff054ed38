"""Small models of every kind, and how to run them compiled."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from attn.nn.encoder_decoder import EncoderDecoder
from attn.nn.models import MODELS

VOCABULARY, SOURCE, TARGET = 11, jnp.array([3, 1, 4, 5, 9, 0, 0]), jnp.array([8, 2, 7, 1, 10])
LENGTH = 5  # of the target
SIZES = {
    "transformer": dict(width=30, num_heads=5, num_encoder_layers=2, num_decoder_layers=2, feed_forward_width=22),
    "lstm": dict(width=22, num_layers=2),
    "gru": dict(width=22, num_layers=2),
    "tape": dict(width=30, num_heads=5, num_layers=2, feed_forward_width=22),
}


def make(name: str = "transformer", **settings) -> EncoderDecoder:
    return MODELS[name](VOCABULARY, **(SIZES[name] | settings), rngs=nnx.Rngs(7))


def run(model: EncoderDecoder, source=SOURCE, target=TARGET, **options):
    """The model's logits (and weights), compiled once for all tests; the target has a length of its own."""
    return _run(*nnx.split(model), source, target, jnp.asarray(LENGTH), **options)


@functools.partial(jax.jit, static_argnames=("graphdef", "return_weights"))
def _run(graphdef, state, source, target, target_length, key=None, shift=None, return_weights=False):
    options = {"key": key, "shift": shift, "return_weights": return_weights}
    return nnx.merge(graphdef, state)(source, target, target_length=target_length, **options)


def start(model: EncoderDecoder, source=SOURCE):
    """A cache for decoding TARGET, compiled."""
    return _start(*nnx.split(model), source, jnp.asarray(LENGTH))


@functools.partial(jax.jit, static_argnames="graphdef")
def _start(graphdef, state, source, length):
    model = nnx.merge(graphdef, state)
    memory, _ = model.encode(source, target_length=length)
    return model.start(memory, jnp.sum(source != 0), len(TARGET), target_length=length)


def encode(model: EncoderDecoder, source):
    """What the decoder is given of a source, compiled."""
    graphdef, state = nnx.split(model)
    return jax.jit(lambda state, source: nnx.merge(graphdef, state).encode(source, target_length=LENGTH)[0])(
        state, source
    )
