"""Small models of every kind, and how to run them compiled."""

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
    """The model's logits (and weights), compiled; the target has a length of its own."""
    graphdef, state = nnx.split(model)
    length = jnp.asarray(LENGTH)
    return jax.jit(lambda state: nnx.merge(graphdef, state)(source, target, target_length=length, **options))(state)


def start(model: EncoderDecoder, source=SOURCE):
    """A cache for decoding TARGET."""
    length = jnp.asarray(LENGTH)
    memory, _ = model.encode(source, target_length=length)
    return model.start(memory, jnp.sum(source != 0), len(TARGET), target_length=length)


def encode(model: EncoderDecoder, source):
    """What the decoder is given of a source, compiled."""
    graphdef, state = nnx.split(model)
    return jax.jit(lambda state, source: nnx.merge(graphdef, state).encode(source, target_length=LENGTH)[0])(
        state, source
    )
