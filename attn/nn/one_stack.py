"""The base of models with one stack of blocks and one mechanism: one embedding, one stack, one output."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from attn.mechanisms.mechanism import build_shared, max_positions
from attn.mechanisms.registry import TEXT, parse
from attn.mechanisms.rows import Rows
from attn.nn.block import BlockSettings, Stack, dropout, layer
from attn.nn.model import Model, split
from attn.settings import between, setting


@dataclasses.dataclass(frozen=True)
class OneStackSettings(BlockSettings):
    """Settings of models with one stack.

    Attributes:
      num_layers: L.
      mechanism: of the attention.
    """

    num_layers: int = setting(2, between(1, 1_000))
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
        self.rate, self.dtype, self.width = settings.dropout, jnp.dtype(settings.dtype), settings.width
        self.add_embeddings(vocabulary, settings.width, tied=True, dtype=self.dtype, rngs=rngs)
        mechanism = parse(settings.mechanism)
        shared = build_shared([(mechanism, layer(settings, self.kind))], rngs)
        self.stack = Stack(settings, settings.num_layers, (mechanism, self.kind), shared=shared, rngs=rngs)
        self.stack.add_norm(settings, rngs)
        self.add_output(vocabulary, settings.width, tied=settings.tied_embeddings, dtype=self.dtype, rngs=rngs)

    @classmethod
    def max_positions(cls, settings: OneStackSettings) -> int | None:
        return max_positions([parse(settings.mechanism)])

    def embed(
        self, tokens: Int[Array, "T"], rows: Rows, key: Array | None, shift: Float[Array, "T D"] | None
    ) -> Float[Array, "T D"]:
        """Compute the input of the stack; `key` is the stack's, of which the last part is for the dropout here."""
        *_, key = split(key, len(self.stack.blocks) + 1)
        x = (self.source_embed(tokens) + self.stack.added(rows)).astype(self.dtype)
        x = dropout(x, self.rate, key)
        return x if shift is None else x + shift
