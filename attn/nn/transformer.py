"""The encoder-decoder Transformer, written for one example; batches come from `jax.vmap`.

Source: Vaswani et al. 2017, section 3.
"""

import dataclasses

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from attn.functional import masks
from attn.mechanisms.mechanism import build_shared, having, max_positions, parts
from attn.mechanisms.registry import TEXT, parse, terms
from attn.mechanisms.rows import Count, Example, Rows, rows
from attn.nn.attention import Sides
from attn.nn.block import BlockSettings, Memory, Stack, layer
from attn.nn.ends import Bottom
from attn.nn.model import PAD, Cache, Model, Weights, split
from attn.settings import between, setting

_LAYERS = between(1, 1_000)


@dataclasses.dataclass(frozen=True)
class Mechanisms:
    """The mechanism of each kind of attention, as `attn.mechanisms.parse` reads it.

    Attributes:
      encoder, decoder: of the self-attention.
      cross: of the attention from the answer to the source.
    """

    encoder: str = setting("sinusoidal", TEXT)
    decoder: str = setting("sinusoidal", TEXT)
    cross: str = setting("none", TEXT)

    @classmethod
    def named(cls, text: str) -> "Mechanisms":
        """Use one mechanism for all attention, but its parts that change the embeddings only for self-attention.

        Those are added at the bottom of both stacks already.
        """
        parse(text)  # so that an error message shows the whole text, not one term
        cross = [term for term in terms(text) if not any(having(parts(parse(term)), "embedding"))]
        return cls(text, text, " + ".join(cross) or "none")


@dataclasses.dataclass(frozen=True)
class TransformerSettings(BlockSettings):
    """Settings of the encoder-decoder Transformer.

    Attributes:
      num_encoder_layers, num_decoder_layers: L of each stack.
      num_decoder_heads, decoder_feed_forward_width: N and F of the decoder; None for those of the encoder.
      mechanism: of each kind of attention, or one text for all of them.
    """

    num_encoder_layers: int = setting(1, _LAYERS)
    num_decoder_layers: int = setting(1, _LAYERS)
    num_decoder_heads: int | None = setting(None, between(1, 65_536))
    decoder_feed_forward_width: int | None = setting(None, between(1, 65_536))
    mechanism: Mechanisms = dataclasses.field(default_factory=Mechanisms)

    @property
    def mechanisms(self):
        """The mechanisms of the encoder, of the decoder's self-attention and of the cross-attention."""
        return tuple(map(parse, dataclasses.astuple(self.mechanism)))

    @property
    def of_decoder(self) -> "TransformerSettings":
        """The settings with the sizes of the decoder."""
        num_heads = self.num_decoder_heads or self.num_heads
        hidden = self.decoder_feed_forward_width or self.feed_forward_width
        return dataclasses.replace(self, num_heads=num_heads, feed_forward_width=hidden)


class Transformer(Model):
    """The encoder-decoder Transformer.

    Args:
      vocabulary: V, the number of tokens; token 0 is padding.
      settings: sizes and kinds.
      rngs: keys for the initial parameters.

    Source: Vaswani et al. 2017, section 3.
    """

    settings = TransformerSettings
    maps = (("cross", "answer", "source"), ("decoder", "answer", "answer"), ("encoder", "source", "source"))

    def __init__(self, vocabulary: int, settings: TransformerSettings, rngs: nnx.Rngs):
        D, style, options = settings.width, settings.choices, dict(dtype=jnp.dtype(settings.dtype), rngs=rngs)
        self.add_embeddings(vocabulary, D, tied=settings.tied_embeddings, **options)
        encoder, decoder, cross = settings.mechanisms
        layers = [
            (encoder, layer(settings, "encoder")),
            *((each, layer(settings.of_decoder, kind)) for each, kind in ((decoder, "decoder"), (cross, "cross"))),
        ]
        shared = dict(shared=build_shared(layers, rngs), rngs=rngs)
        self.encoder = Stack(settings, settings.num_encoder_layers, (encoder, "encoder"), **shared)
        self.decoder = Stack(settings.of_decoder, settings.num_decoder_layers, (decoder, "decoder"), cross, **shared)
        self.encoder.add_norm(settings, rngs)
        self.decoder.add_norm(settings, rngs)
        self.source_bottom, self.answer_bottom = (
            Bottom(style, D, None, rate=settings.dropout, **options) for _ in range(2)
        )
        self.add_output(vocabulary, D, tied=settings.tied_embeddings, style=style, **options)

    @classmethod
    def max_positions(cls, settings: TransformerSettings) -> int | None:
        return max_positions(settings.mechanisms)

    def embed_source(
        self,
        tokens: Int[Array, "S"],
        rows: Rows,
        key: Array | None = None,
        shift: Float[Array, "S D"] | None = None,
    ) -> Float[Array, "S D"]:
        """Compute the input of the encoder; `key` is the encoder's, of which the last part is for the dropout here."""
        *_, key = split(key, len(self.encoder.blocks) + 1)
        vectors = self.source_vectors(tokens) if shift is None else self.source_vectors(tokens) + shift
        return self.source_bottom(vectors, self.encoder.added(rows), key)

    def embed_answer(self, tokens: Int[Array, "T"], rows: Rows, key: Array | None = None) -> Float[Array, "T D"]:
        """Compute the input of the decoder; `key` is as in `embed_source`."""
        *_, key = split(key, len(self.decoder.blocks) + 1)
        return self.answer_bottom(self.embedding_of_answer()(tokens), self.decoder.added(rows), key)

    def encode(
        self,
        source: Int[Array, "S"],
        sides: Sides,
        *,
        key: Array | None = None,
        return_weights: bool = False,
        shift: Float[Array, "S D"] | None = None,
    ) -> tuple[Float[Array, "S D"], Float[Array, "L N S S"] | None]:
        """Encode the source; also return the encoder's attention weights if `return_weights`.

        Args:
          source: `[S]` tokens.
          sides: rows of the source, as queries and as keys, and the mask of its padding.
          key: random key for dropout.
          return_weights: also return the attention weights.
          shift: `[S D]`, added to the embeddings.
        """
        x = self.embed_source(source, sides.q, key, shift)
        x, _, (weights, _) = self.encoder(x, sides, key=key, return_weights=return_weights)
        return x, weights

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
        """Encode the source and make a cache for an answer of up to `capacity` tokens."""
        length = jnp.sum(source != PAD)
        num_positions = None if answer_length is None else jnp.maximum(length, answer_length)
        example = Example(length, answer_length, num_positions, key)
        of_source = _source_rows(len(source), example)
        sides = Sides(of_source, of_source, masks.padding(length))
        encoded, weights = self.encode(source, sides, key=key, return_weights=return_weights, shift=shift)
        cache = Cache(0, self.decoder.cache(capacity), self.decoder.memory(encoded, of_source), example)
        return cache, {"encoder": weights} if return_weights else None

    def extend(
        self, tokens: Int[Array, "T"], cache: Cache, *, key: Array | None = None, return_weights: bool = False
    ) -> tuple[Float[Array, "T V"], Cache, Weights | None]:
        """Read the next T tokens of the answer and predict the token after each."""
        index, example, (capacity, *_) = cache.index, cache.example, cache.own[0].key.shape
        q = rows(len(tokens), start=index, total=example.answer_length, example=example)
        k = rows(capacity, total=example.answer_length, example=example)
        of_source = _source_rows(len(cache.memory[0].key), example)
        sides = Sides(q, k, masks.causal(offset=index)), Sides(q, of_source, masks.padding(example.source_length))
        x, cache, weights = self.decode(tokens, *sides, cache, key=key, return_weights=return_weights)
        return self.logits(x), cache, weights

    def decode(
        self,
        tokens: Int[Array, "T"],
        sides: Sides,
        to_source: Sides,
        cache: Cache,
        *,
        key: Array | None = None,
        return_weights: bool = False,
    ) -> tuple[Float[Array, "T D"], Cache, Weights | None]:
        """Read the next T tokens of the answer.

        Args:
          tokens: `[T]`.
          sides: rows of these tokens and of the cache, and the mask of the self-attention.
          to_source: rows of these tokens and of the source, and the mask of the cross-attention.
          cache: of the answer so far.
          key: random key for dropout.
          return_weights: also return the attention weights.

        Returns:
          (the stack's output, the cache after these tokens, attention weights or None).
        """
        x = self.embed_answer(tokens, sides.q, key)
        memory = Memory(cache.memory, to_source, self.decoder.cross_added(to_source.q))
        options = dict(key=key, return_weights=return_weights)
        x, own, (weights, cross) = self.decoder(x, sides, cache=(cache.own, cache.index), memory=memory, **options)
        cache = cache._replace(index=cache.index + len(tokens), own=own)
        return x, cache, {"decoder": weights, "cross": cross} if return_weights else None


def _source_rows(count: int, example: Example) -> Rows:
    return rows(count, total=example.source_length, example=example)
