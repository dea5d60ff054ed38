"""The base of models with one stack of blocks and one mechanism: one embedding, one stack, one output."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from attn.mechanisms.mechanism import build_shared, max_positions
from attn.mechanisms.registry import TEXT, parse
from attn.mechanisms.rows import Rows
from attn.nn.block import BlockSettings, Stack, layer
from attn.nn.ends import Bottom
from attn.nn.model import Model, split
from attn.settings import between, setting


@dataclasses.dataclass(frozen=True)
class OneStackSettings(BlockSettings):
    """Settings of models with one stack.

    Attributes:
      num_layers: L.
      distinct_layers: number of layers with parameters of their own, a divisor of L; each is used L / distinct_layers
        times in succession. None for L.
      embedding_width: E, the width of the embeddings, which are projected to D; None for D.
      mechanism: of the attention.
    """

    num_layers: int = setting(2, between(1, 1_000))
    distinct_layers: int | None = setting(None, between(1, 1_000))
    embedding_width: int | None = setting(None, between(1, 65_536))
    mechanism: str = setting("sinusoidal", TEXT)


class OneStack(Model):
    """Base of models with one stack.

    Args:
      vocabulary: V, the number of tokens; token 0 is padding.
      settings: sizes and kinds.
      rngs: keys for the initial parameters.

    Attributes:
      kind: of the attention: "encoder" or "decoder"; see `attn.mechanisms.mechanism.Layer`.
    """

    settings = OneStackSettings
    kind: ClassVar[str]

    def __init__(self, vocabulary: int, settings: OneStackSettings, rngs: nnx.Rngs):
        self.vocabulary = vocabulary
        self.dtype, self.width = jnp.dtype(settings.dtype), settings.width
        E, options = settings.embedding_width or settings.width, dict(dtype=self.dtype, rngs=rngs)
        self.embedding_width = E
        self.make_embeddings(vocabulary, E, **options)
        mechanism = parse(settings.mechanism)
        # What mechanisms add to the embeddings has their width.
        of_embeddings = dataclasses.replace(layer(settings, self.kind), width=E)
        shared = build_shared([(mechanism, of_embeddings)], rngs)
        self.stack = Stack(
            settings,
            settings.num_layers,
            (mechanism, self.kind),
            shared=shared,
            rngs=rngs,
            distinct=settings.distinct_layers,
        )
        self.stack.add_norm(settings, rngs)
        width = settings.width
        self.bottom = Bottom(settings.choices, width, settings.embedding_width, rate=settings.dropout, **options)
        tied = settings.tied_embeddings
        self.add_output(vocabulary, settings.width, tied=tied, style=settings.choices, embedding_width=E, **options)

    def make_embeddings(self, vocabulary: int, width: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        """Make the embeddings of the tokens."""
        self.add_embeddings(vocabulary, width, tied=True, dtype=dtype, rngs=rngs)

    @classmethod
    def max_positions(cls, settings: OneStackSettings) -> int | None:
        return max_positions([parse(settings.mechanism)])

    def embed(
        self, tokens: Int[Array, "T"], rows: Rows, key: Array | None = None, shift: Float[Array, "T E"] | None = None
    ) -> Float[Array, "T D"]:
        """Compute the input of the stack; `key` is the stack's, of which the last part is for the dropout here."""
        return self.embed_vectors(self.source_vectors(tokens), rows, key, shift)

    def embed_vectors(
        self,
        vectors: Float[Array, "T E"],
        rows: Rows,
        key: Array | None = None,
        shift: Float[Array, "T E"] | None = None,
    ) -> Float[Array, "T D"]:
        """Compute the input of the stack from the embeddings of tokens, or of what stands in their place."""
        *_, key = split(key, len(self.stack.blocks) + 1)
        vectors = vectors if shift is None else vectors + shift
        return self.bottom(vectors, self.stack.added(rows, self.embedding_width), key)
