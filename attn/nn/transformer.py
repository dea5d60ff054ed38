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
from attn.nn.block import BlockSettings, Memory, Stack, dropout, layer
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
      mechanism: of each kind of attention, or one text for all of them.
    """

    num_encoder_layers: int = setting(1, _LAYERS)
    num_decoder_layers: int = setting(1, _LAYERS)
    mechanism: Mechanisms = dataclasses.field(default_factory=Mechanisms)

    @property
    def mechanisms(self):
        """The mechanisms of the encoder, of the decoder's self-attention and of the cross-attention."""
        return tuple(map(parse, dataclasses.astuple(self.mechanism)))


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
        self.rate, self.dtype = settings.dropout, jnp.dtype(settings.dtype)
        vocabulary_options = dict(tied=settings.tied_embeddings, dtype=self.dtype, rngs=rngs)
        self.add_embeddings(vocabulary, settings.width, **vocabulary_options)
        encoder, decoder, cross = settings.mechanisms
        layers = [
            (each, layer(settings, kind)) for each, kind in zip(settings.mechanisms, ("encoder", "decoder", "cross"))
        ]
        options = dict(shared=build_shared(layers, rngs), rngs=rngs)
        self.encoder = Stack(settings, settings.num_encoder_layers, (encoder, "encoder"), **options)
        self.decoder = Stack(settings, settings.num_decoder_layers, (decoder, "decoder"), cross, **options)
        self.encoder.add_norm(settings, rngs)
        self.decoder.add_norm(settings, rngs)
        self.add_output(vocabulary, settings.width, **vocabulary_options)

    @classmethod
    def max_positions(cls, settings: TransformerSettings) -> int | None:
        return max_positions(settings.mechanisms)

    def encode(
        self,
        source: Int[Array, "S"],
        example: Example,
        *,
        return_weights: bool = False,
        shift: Float[Array, "S D"] | None = None,
    ) -> tuple[Float[Array, "S D"], Float[Array, "L N S S"] | None]:
        """Encode the source; also return the encoder's attention weights if `return_weights`."""
        *_, key = split(example.key, len(self.encoder.blocks) + 1)
        source_rows = _source_rows(len(source), example)
        x = self._embed(self.source_embed, source, self.encoder.added(source_rows), key)
        x = x if shift is None else x + shift
        sides = Sides(source_rows, source_rows, masks.padding(example.source_length))
        x, _, (weights, _) = self.encoder(x, sides, key=example.key, return_weights=return_weights)
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
        encoded, weights = self.encode(source, example, return_weights=return_weights, shift=shift)
        memory = self.decoder.memory(encoded, _source_rows(len(source), example))
        cache = Cache(0, self.decoder.cache(capacity), memory, example)
        return cache, {"encoder": weights} if return_weights else None

    def extend(
        self, tokens: Int[Array, "T"], cache: Cache, *, key: Array | None = None, return_weights: bool = False
    ) -> tuple[Float[Array, "T V"], Cache, Weights | None]:
        """Read the next T tokens of the answer and predict the token after each."""
        *_, dropout_key = split(key, len(self.decoder.blocks) + 1)
        index, example, (capacity, *_) = cache.index, cache.example, cache.own[0].key.shape
        q = rows(len(tokens), start=index, total=example.answer_length, example=example)
        k = rows(capacity, total=example.answer_length, example=example)
        source = _source_rows(len(cache.memory[0].key), example)
        to_source = Sides(q, source, masks.padding(example.source_length))
        x = self._embed(self.embedding_of_answer(), tokens, self.decoder.added(q), dropout_key)
        x, self_kv, (weights, cross) = self.decoder(
            x,
            Sides(q, k, masks.causal(offset=index)),
            cache=(cache.own, index),
            memory=Memory(cache.memory, to_source, self.decoder.cross_added(q)),
            key=key,
            return_weights=return_weights,
        )
        cache = cache._replace(index=index + len(tokens), own=self_kv)
        return self.logits(x), cache, {"decoder": weights, "cross": cross} if return_weights else None

    def _embed(self, embed: nnx.Embed, tokens, added, key) -> Float[Array, "T D"]:
        # Not multiplied by sqrt(D), unlike in section 3.4: positions stand out next to small embeddings.
        return dropout((embed(tokens) + added).astype(self.dtype), self.rate, key)


def _source_rows(count: int, example: Example) -> Rows:
    return rows(count, total=example.source_length, example=example)
