"""A decoder-only Transformer: the source is a prefix, which the model continues with the answer.

Source: Liu et al. 2018; with a fully visible prefix: Raffel et al. 2020, section 3.2.1.
"""

import dataclasses

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from attn.functional import masks
from attn.mechanisms.rows import Count, Example, rows
from attn.nn.attention import Sides
from attn.nn.model import PAD, Cache, Weights
from attn.nn.one_stack import OneStack, OneStackSettings
from attn.settings import one_of, setting


@dataclasses.dataclass(frozen=True)
class DecoderOnlySettings(OneStackSettings):
    """Settings of the decoder-only Transformer.

    Attributes:
      prefix: "causal" if a token of the source attends only to those before it, "visible" if to the whole source.
    """

    prefix: str = setting("causal", one_of(("causal", "visible")))


class DecoderOnly(OneStack):
    """A decoder-only Transformer; its arguments are those of `OneStack`."""

    settings, kind = DecoderOnlySettings, "decoder"
    maps = (("decoder", "answer", "both"),)

    def __init__(self, vocabulary: int, settings: DecoderOnlySettings, rngs: nnx.Rngs):
        super().__init__(vocabulary, settings, rngs)
        self.prefix = settings.prefix

    @classmethod
    def num_positions(cls, source: int, answer: int) -> int:
        return source + answer

    @classmethod
    def text_refusal(cls, settings: DecoderOnlySettings) -> str | None:
        return None if settings.prefix == "causal" else "with prefix = 'visible' it would see what it has to predict"

    def start(
        self,
        source: Int[Array, "S"],
        capacity: int,
        *,
        answer_length: Count | None = None,
        key: Array | None = None,
        return_weights: bool = False,
        shift: Float[Array, "S D"] | None = None,
    ) -> tuple[Cache, Weights | None]:
        """Read the source into the cache; its padding moves to the front, so that the answer follows without a gap."""
        length, size = jnp.sum(source != PAD), len(source)
        padding = size - length
        total = None if answer_length is None else length + answer_length
        cache = Cache(0, self.stack.cache(size + capacity), padding, Example(length, answer_length, total, key))
        shift = None if shift is None else jnp.roll(shift, padding, axis=0)
        _, cache, _ = self._read(jnp.roll(source, padding), cache, key, shift=shift)
        return cache, {} if return_weights else None

    def extend(
        self, tokens: Int[Array, "T"], cache: Cache, *, key: Array | None = None, return_weights: bool = False
    ) -> tuple[Float[Array, "T V"], Cache, Weights | None]:
        """Read the next T tokens of the answer and predict the token after each."""
        x, cache, weights = self._read(tokens, cache, key, return_weights=return_weights)
        return self.logits(x), cache, {"decoder": weights} if return_weights else None

    def _read(self, tokens: Int[Array, "T"], cache: Cache, key, *, return_weights=False, shift=None):
        """Read T tokens of source or answer; return the stack's output, the cache after them, and the weights."""
        index, padding, example = cache.index, cache.memory, cache.example
        total = example.num_positions
        q = rows(len(tokens), start=index - padding, total=total, example=example)
        k = rows(len(cache.own[0].key), start=-padding, total=total, example=example)
        # Masks take row numbers of the cache, where the padding comes first; positions count from the first symbol.
        visible = masks.causal(offset=index)
        if self.prefix == "visible":
            visible = visible | masks.prefix(padding + example.source_length)
        x, sides = self.embed(tokens, q, key, shift), Sides(q, k, visible & ~masks.prefix(padding))
        x, own, (weights, _) = self.stack(x, sides, cache=(cache.own, index), key=key, return_weights=return_weights)
        return x, cache._replace(index=index + len(tokens), own=own), weights
