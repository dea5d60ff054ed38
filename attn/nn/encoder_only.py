"""An encoder-only Transformer: it writes the answer in one pass, each token where one of the source stands.

Source: the encoder of Vaswani et al. 2017, section 3.1; an output per token of the source: Devlin et al. 2019.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from attn.functional import masks
from attn.mechanisms.mechanism import build_shared, max_positions
from attn.mechanisms.registry import TEXT, parse
from attn.mechanisms.rows import Count, Example, Rows, rows
from attn.nn.attention import Sides
from attn.nn.block import BlockSettings, Stack, dropout, layer
from attn.nn.model import PAD, Cache, Model, Weights, split
from attn.settings import between, setting


@dataclasses.dataclass(frozen=True)
class EncoderOnlySettings(BlockSettings):
    """Settings of the encoder-only Transformer.

    Attributes:
      num_layers: L.
      mechanism: of its attention.
    """

    num_layers: int = setting(2, between(1, 1_000))
    mechanism: str = setting("sinusoidal", TEXT)


class EncoderOnly(Model):
    """An encoder-only Transformer, for answers that are no longer than their sources.

    Token t of the answer is predicted at token t of the source, all of them at once: none depends on another.

    Args:
      vocabulary: V, the number of tokens; token 0 is padding.
      settings: sizes and kinds.
      rngs: keys for the initial parameters.
    """

    settings = EncoderOnlySettings
    reads_answer = False
    maps = (("encoder", "source", "source"),)

    def __init__(self, vocabulary: int, settings: EncoderOnlySettings, rngs: nnx.Rngs):
        self.rate, self.dtype, self.width = settings.dropout, jnp.dtype(settings.dtype), settings.width
        self.add_embeddings(vocabulary, settings.width, tied=True, dtype=self.dtype, rngs=rngs)
        mechanism = parse(settings.mechanism)
        shared = build_shared([mechanism], layer(settings, "encoder"), rngs)
        self.stack = Stack(settings, settings.num_layers, (mechanism, "encoder"), shared=shared, rngs=rngs)
        self.stack.add_norm(settings, rngs)
        self.add_output(vocabulary, settings.width, tied=settings.tied_embeddings, dtype=self.dtype, rngs=rngs)

    @classmethod
    def max_positions(cls, settings: EncoderOnlySettings) -> int | None:
        return max_positions([parse(settings.mechanism)])

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
        """Compute the logits of all tokens of the answer; the cache holds them."""
        length = jnp.sum(source != PAD)
        example = Example(length, answer_length, length, key)
        own = rows(len(source), total=length, example=example)
        x, weights = self.run(source, own, length, shift, return_weights)
        return Cache(0, self.logits(x), (), example), {"encoder": weights} if return_weights else None

    def run(self, tokens: Int[Array, "S"], own: Rows, length: Count, shift, return_weights: bool):
        """Run the stack on tokens of which the first `length` are visible; return its output and the weights."""
        key = own.example.key
        *_, dropout_key = split(key, len(self.stack.blocks) + 1)
        x = self.source_embed(tokens) + self.stack.added(own)
        x = x if shift is None else x + shift
        x = dropout(x.astype(self.dtype), self.rate, dropout_key)
        sides = Sides(own, own, masks.padding(length))
        x, _, (weights, _) = self.stack(x, sides, key=key, return_weights=return_weights)
        return x, weights

    def extend(
        self, tokens: Int[Array, "T"], cache: Cache, *, key: Array | None = None, return_weights: bool = False
    ) -> tuple[Float[Array, "T V"], Cache, Weights | None]:
        """Look up the next T logits; the tokens are not read."""
        logits = jax.lax.dynamic_slice_in_dim(cache.own, cache.index, len(tokens))
        return logits, cache._replace(index=cache.index + len(tokens)), {} if return_weights else None
