"""A decoder-only model with the source as prefix, from the package's blocks."""

import dataclasses

import jax.numpy as jnp

from attn import masks, mechanisms
from attn.mechanisms.rows import Example, rows
from attn.nn.attention import Sides
from attn.nn.block import BlockSettings, Stack, dropout
from attn.nn.model import PAD, Cache, Model, split
from attn.nn.models import register


@dataclasses.dataclass(frozen=True)
class Settings(BlockSettings):
    num_layers: int = 2
    mechanism: str = "rotary"


@register("causal_model")
class CausalModel(Model):
    settings, maps = Settings, (("decoder", "answer", "both"),)

    def __init__(self, vocabulary, settings, rngs):
        self.rate, ends = settings.dropout, dict(tied=True, dtype=jnp.dtype(settings.dtype), rngs=rngs)
        self.add_embeddings(vocabulary, settings.width, **ends)
        mechanism = mechanisms.parse(settings.mechanism), "decoder"
        self.stack = Stack(settings, settings.num_layers, mechanism, shared={}, rngs=rngs)
        self.stack.add_norm(settings, rngs)
        self.add_output(vocabulary, settings.width, **ends)

    @classmethod
    def text_refusal(cls, settings):
        return None  # it learns texts without a source too

    def start(self, source, capacity, *, answer_length=None, key=None, return_weights=False, shift=None):
        length = jnp.sum(source != PAD)
        padding = len(source) - length  # moved before the source
        cache = self.stack.cache(len(source) + capacity)
        cache = Cache(0, cache, padding, Example(length, answer_length, None, key))
        shift = 0.0 if shift is None else jnp.roll(shift, padding, axis=0)
        return self._read(jnp.roll(source, padding), cache, key, False, shift)[1:]

    def extend(self, tokens, cache, *, key=None, return_weights=False):
        x, cache, weights = self._read(tokens, cache, key, return_weights)
        return self.logits(x), cache, weights

    def _read(self, tokens, cache, key, return_weights, shift=0.0):
        index, padding = cache.index, cache.memory
        q = rows(len(tokens), start=index - padding, total=None, example=cache.example)
        k = rows(len(cache.own[0].key), start=-padding, total=None, example=cache.example)
        sides = Sides(q, k, masks.causal(offset=index) & ~masks.prefix(padding))
        *_, embedding_key = split(key, len(self.stack.blocks) + 1)
        x = dropout(self.source_embed(tokens) + self.stack.added(q), self.rate, embedding_key) + shift
        options = dict(cache=(cache.own, index), key=key, return_weights=return_weights)
        x, own, (weights, _) = self.stack(x, sides, **options)
        cache = cache._replace(index=index + len(tokens), own=own)
        return x, cache, {"decoder": weights} if return_weights else {}
