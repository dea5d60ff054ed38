"""What every model takes and gives, so that training, decoding and inspection need not know which one it is.

Source: Sutskever et al. 2014, section 2; Cho et al. 2014, section 2.2.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

PAD = 0  # the token that fills up sources and targets


class Cache(NamedTuple):
    """What decoding keeps between calls.

    Attributes:
      position: how many target tokens have been read.
      own: what the decoder keeps of the target so far: keys and values with room for the rest, or states.
      memory: what it reads of the encoded source.
      source_length: how many of the memory's rows hold something.
      target_length: how many tokens the target will have, its end token included; None where it is not known.
      drawn: positions of the places of source and target; see `attn.nn.encodings.draw`.
    """

    position: int | Int[Array, ""]
    own: Any
    memory: Any
    source_length: Int[Array, ""]
    target_length: int | Int[Array, ""] | None = None
    drawn: Int[Array, "R"] | None = None


class Weights(NamedTuple):
    """Attention weights of every layer and head, `[L N T S]`: the encoder's, the decoder's own, and cross.

    A kind of attention that a model does not have has no layers, L = 0.
    """

    encoder: Float[Array, "L N S S"]
    decoder: Float[Array, "L N T T"]
    cross: Float[Array, "L N T S"]


class EncoderDecoder(nnx.Module):
    """A model that reads a source, then writes a target token by token; written for one example.

    A subclass has three methods:

        encode(source [S], target_length=, key=, return_weights=, shift=) -> (memory, the encoder's weights or None)
        start(memory, source_length, room, target_length=, key=) -> Cache, ready for `room` target tokens
        decode(target [T], cache, key=, return_weights=) -> (logits [T V], Cache, (own, cross) weights or None)

    `decode` reads the next T tokens of the target and tells what comes after each. `shift` `[S D]`, added to the
    embeddings of the source, is something to differentiate by. `start` is given the `target_length` and the `key` that
    `encode` was.

    `needs_length` says whether its kind must always be told the target's length, `reads_target` whether what it writes
    next hangs on the target's tokens.

    Its `__init__` calls `add_embeddings` and `add_output`; with tied embeddings one matrix serves source, target and
    output.
    """

    needs_length = False
    reads_target = True

    @staticmethod
    def places(source: int, target: int) -> int:
        """How many places must be told apart for a source and a target of so many tokens, ends included."""
        return max(source, target)

    def add_embeddings(self, vocabulary: int, width: int, *, tied: bool, dtype: jnp.dtype, rngs: nnx.Rngs):
        """Make the embeddings `[V D]` of source and target."""

        def embed():
            init = nnx.initializers.normal(width**-0.5)
            return nnx.Embed(vocabulary, width, embedding_init=init, dtype=dtype, rngs=rngs)

        self.source_embed = embed()
        self.target_embed = None if tied else embed()

    def add_output(self, vocabulary: int, width: int, *, tied: bool, dtype: jnp.dtype, rngs: nnx.Rngs):
        """Make the matrix `[D V]` of the logits."""
        self.output = None if tied else nnx.Linear(width, vocabulary, use_bias=False, dtype=dtype, rngs=rngs)

    @property
    def written_embed(self) -> nnx.Embed:
        """The embedding of the target's tokens."""
        return self.source_embed if self.target_embed is None else self.target_embed

    def logits(self, x: Float[Array, "T D"]) -> Float[Array, "T V"]:
        """The logits, in float32, of what the decoder puts out."""
        return (self.written_embed.attend(x) if self.output is None else self.output(x)).astype(jnp.float32)

    def __call__(
        self,
        source: Int[Array, "S"],
        target: Int[Array, "T"],
        *,
        target_length: int | Int[Array, ""] | None = None,
        key: Array | None = None,
        return_weights: bool = False,
        shift: Float[Array, "S D"] | None = None,
    ) -> Float[Array, "T V"] | tuple[Float[Array, "T V"], Weights]:
        """Logits of the token after each target token, given the source and the target up to there.

        Args:
          source: `[S]` tokens, padded at the end.
          target: `[T]` tokens, the begin token first.
          target_length: tokens of the whole target, its end token included, for encodings that count from there.
          key: random key for dropout and for drawn positions; None at test.
          return_weights: also return the attention weights of every layer and head.
          shift: `[S D]`, added to the embeddings of the source.
        """
        keys = split(key, 2)
        both = dict(target_length=target_length, key=keys[0])
        memory, encoder_weights = self.encode(source, **both, return_weights=return_weights, shift=shift)
        cache = self.start(memory, jnp.sum(source != PAD), len(target), **both)
        logits, _, decoder_weights = self.decode(target, cache, key=keys[1], return_weights=return_weights)
        return (logits, Weights(encoder_weights, *decoder_weights)) if return_weights else logits


def split(key: Array | None, num: int) -> list[Array | None]:
    """`num` keys from one, or as many Nones from None."""
    return [None] * num if key is None else list(jax.random.split(key, num))
