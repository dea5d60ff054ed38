"""Small models of every kind, and how to run them compiled."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

import attn.studies.tape  # noqa: F401  registers its model and mechanisms
from attn.nn.model import Model
from attn.nn.models import MODELS
from attn.nn.transformer import Mechanisms

VOCABULARY, SOURCE, TARGET = 11, jnp.array([3, 1, 4, 5, 9, 0, 0]), jnp.array([8, 2, 7, 1, 10])
LENGTH = 5  # of the answer
_BLOCKS = dict(width=30, num_heads=5, head_width=6, feed_forward_width=22)
_KNOWN = {
    "transformer": dict(num_encoder_layers=2, num_decoder_layers=2, **_BLOCKS),
    "decoder_only": dict(num_layers=2, **_BLOCKS),
    "encoder_only": dict(num_layers=2, **_BLOCKS),
    "vision_transformer": dict(num_layers=2, patch_size=4, **_BLOCKS),
    "lstm": dict(width=22, num_layers=2),
    "gru": dict(width=22, num_layers=2),
    "tape": dict(num_layers=2, **_BLOCKS),
}


def _fitting(name: str) -> dict:
    """The sizes of a model from outside of the package: those of the settings that it has."""
    return {size: value for size, value in (_KNOWN["tape"]).items() if size in settings_of(name)}


def settings_of(name: str) -> set[str]:
    """The names of a model's settings."""
    return {field.name for field in dataclasses.fields(MODELS[name].settings)}


SIZES = {name: _KNOWN[name] if name in _KNOWN else _fitting(name) for name in MODELS}


def make(name: str = "transformer", **settings) -> Model:
    """A model; one mechanism may stand for those of all attention."""
    if name == "transformer" and isinstance(settings.get("mechanism"), str):
        settings["mechanism"] = Mechanisms.named(settings["mechanism"])
    return MODELS[name](VOCABULARY, MODELS[name].settings(name, **(SIZES[name] | settings)), nnx.Rngs(7))


def run(model: Model, source=SOURCE, inputs=TARGET, **options):
    """The model's logits (and weights), compiled once for all tests; the answer has a length of its own."""
    return _run(*nnx.split(model), source, inputs, jnp.asarray(LENGTH), **options)


@functools.partial(jax.jit, static_argnames=("graphdef", "return_weights"))
def _run(graphdef, state, source, inputs, answer_length, key=None, shift=None, return_weights=False):
    options = {"key": key, "shift": shift, "return_weights": return_weights}
    return nnx.merge(graphdef, state)(source, inputs, answer_length=answer_length, **options)


def start(model: Model, source=SOURCE, capacity: int = len(TARGET)):
    """A cache for decoding TARGET, compiled."""
    cache = _start(*nnx.split(model), source, capacity, jnp.asarray(LENGTH))
    return cache._replace(index=jnp.asarray(cache.index))


@functools.partial(jax.jit, static_argnames=("graphdef", "capacity"))
def _start(graphdef, state, source, capacity, length):
    return nnx.merge(graphdef, state).start(source, capacity, answer_length=length)[0]


def extend(model: Model, tokens, cache):
    """The logits after some tokens, and the cache after them, compiled."""
    return _extend(*nnx.split(model), tokens, cache)


@functools.partial(jax.jit, static_argnames="graphdef")
def _extend(graphdef, state, tokens, cache):
    return nnx.merge(graphdef, state).extend(tokens, cache)[:2]
