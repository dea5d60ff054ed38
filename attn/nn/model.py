"""The interface of models, so that training, decoding and inspection work with all of them.

Source: Sutskever et al. 2014, section 2; Cho et al. 2014, section 2.2.
"""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from attn.mechanisms.rows import Example
from attn.nn.ends import LogitsTransform
from attn.nn.style import PLAIN, Style
from attn.settings import between, one_of, setting

PAD = 0  # the token that pads sources and answers

Weights = dict[str, Float[Array, "_ _ _ _"]]  # [L N rows columns], by the names of `Model.maps`


@dataclasses.dataclass(frozen=True)
class ModelSettings:
    """Base of the settings of models.

    Attributes:
      name: a key of `attn.nn.models.MODELS`.
      width: D.
      dropout: its rate.
      tied_embeddings: use one matrix for all embeddings and the output.
      dtype: of the computation; parameters are float32.
    """

    name: str = ""
    width: int = setting(64, between(1, 65_536))
    dropout: float = setting(0.0, between(0, 1, open_high=True))
    tied_embeddings: bool = False
    dtype: str = setting("float32", one_of(("float32", "bfloat16")))


class Cache(NamedTuple):
    """The state of a model between calls.

    Attributes:
      index: number of tokens read so far, with those of the prompt if it is in the cache; the same for all examples.
      own: the text so far: self-attention keys and values with a capacity, or recurrent states.
      memory: what else `start` keeps for `extend`: the encoded source, or the number of padding rows before a prompt.
      example: its lengths and random key.
    """

    index: int | Int[Array, ""]
    own: Any
    memory: Any
    example: Example


class Model(nnx.Module):
    """A model that reads a source, then writes an answer token by token; written for one example.

    A subclass has settings, a frozen dataclass, and two methods:

        start(source [S], capacity, answer_length=, key=, return_weights=, shift=) -> (Cache, weights or None)
        extend(tokens [T], cache, key=, return_weights=) -> (logits [T V], Cache, weights or None)

    `start` makes a cache for an answer of up to `capacity` tokens. `extend` reads the next T tokens of the answer and
    predicts the token after each. `shift` `[S D]` is added to the embeddings of the source: differentiate with respect
    to it to get gradients by source token.

    Its `__init__(vocabulary, settings, rngs)` calls `add_embeddings` and `add_output`; with tied embeddings one matrix
    serves source, answer and output.

    Attributes:
      settings: the class of its settings.
      reads_answer: whether its predictions depend on the tokens of the answer.
      maps: names of its attention maps, and the text of their rows and of their columns: "source", "answer" or "both".
    """

    settings: ClassVar[type]
    reads_answer: ClassVar[bool] = True
    maps: ClassVar[tuple[tuple[str, str, str], ...]] = ()

    @classmethod
    def max_positions(cls, settings) -> int | None:
        """Return the number of positions that its mechanisms can distinguish; None for any number."""
        return None

    @classmethod
    def num_positions(cls, source: int, answer: int) -> int:
        """Return the number of positions that a source and an answer of these many tokens need, end tokens included."""
        return max(source, answer)

    @classmethod
    def max_answer(cls, source: int) -> int | None:
        """Return the largest number of tokens of an answer to a source of these many tokens; None for any number."""
        return None

    @classmethod
    def text_refusal(cls, settings) -> str | None:
        """Return why it cannot learn texts without a source, such as a language model's, in words; None if it can."""
        return "it does not read source and answer as one text"

    def add_embeddings(self, vocabulary: int, width: int, *, tied: bool, dtype: jnp.dtype, rngs: nnx.Rngs):
        """Make the embeddings `[V E]` of source and answer."""

        def embed():
            init = nnx.initializers.normal(width**-0.5)
            return nnx.Embed(vocabulary, width, embedding_init=init, dtype=dtype, rngs=rngs)

        self.source_embed = embed()
        self.answer_embed = None if tied else embed()

    def add_output(
        self,
        vocabulary: int,
        width: int,
        *,
        tied: bool,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
        style: Style = PLAIN,
        embedding_width: int | None = None,
    ):
        """Make the matrix `[E V]` of the logits, and what the style adds to it.

        Args:
          vocabulary, width: V and D.
          tied: the matrix is that of the embeddings.
          dtype: of the computation.
          rngs: keys for the initial parameters.
          style: whether there is a transformation before the matrix, a bias and a scale.
          embedding_width: E, the width after the transformation; None for D.
        """
        self.logits_width = E = embedding_width or width
        options = dict(dtype=dtype, rngs=rngs)
        self.output = None if tied else nnx.Linear(E, vocabulary, use_bias=False, **options)
        self.logits_transform = LogitsTransform(style, width, E, **options) if style.logits_transform else None
        self.logits_bias = nnx.Param(jnp.zeros(vocabulary)) if style.logits_bias else None
        self.logits_scale = width**-0.5 if style.logits_scale else None

    def picture(self, source: Int[Array, "n"]) -> Int[Array, "height width"] | None:
        """Return the picture that a source without its end token stands for; None if it is a text."""
        return None

    def source_vectors(self, source: Int[Array, "S"]) -> Float[Array, "S E"]:
        """Return the embeddings of the source's tokens, to which `shift` is added."""
        return self.source_embed(source)

    def embedding_of_answer(self) -> nnx.Embed:
        """Return the embedding of the answer's tokens."""
        return self.source_embed if self.answer_embed is None else self.answer_embed

    def logits(self, x: Float[Array, "T D"]) -> Float[Array, "T V"]:
        """Compute the logits of the last layer's output in the model's dtype; return them in float32 or wider."""
        x = x if self.logits_transform is None else self.logits_transform(x)
        if x.shape[-1] != self.logits_width:
            raise ValueError(
                f"embedding_width: got {self.logits_width}, which is not width = {x.shape[-1]}: logits then need a "
                "style with logits_transform, such as bert"
            )
        x = x if self.logits_scale is None else x * self.logits_scale
        logits = self.embedding_of_answer().attend(x) if self.output is None else self.output(x)
        logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        return logits if self.logits_bias is None else logits + self.logits_bias[...]

    def __call__(
        self,
        source: Int[Array, "S"],
        inputs: Int[Array, "T"],
        *,
        answer_length: int | Int[Array, ""] | None = None,
        key: Array | None = None,
        return_weights: bool = False,
        shift: Float[Array, "S D"] | None = None,
    ) -> Float[Array, "T V"] | tuple[Float[Array, "T V"], Weights]:
        """Compute the logits of the token after each token of the answer, given the source and the answer so far.

        Args:
          source: `[S]` tokens, padded at the end.
          inputs: `[T]` tokens of the answer, the begin token first.
          answer_length: number of tokens of the whole answer, its end token included, for mechanisms that count from
            the end.
          key: random key for dropout and randomized positions; None outside of training.
          return_weights: also return the attention weights of every layer and head.
          shift: `[S D]`, added to the embeddings of the source.
        """
        keys = split(key, 2)
        options = dict(key=keys[0], return_weights=return_weights, shift=shift)
        cache, source_weights = self.start(source, len(inputs), answer_length=answer_length, **options)
        logits, _, answer_weights = self.extend(inputs, cache, key=keys[1], return_weights=return_weights)
        return (logits, source_weights | answer_weights) if return_weights else logits


def split(key: Array | None, num: int) -> list[Array | None]:
    """Split a key into `num`; without a key, return `num` times None."""
    return [None] * num if key is None else list(jax.random.split(key, num))
