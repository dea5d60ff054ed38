"""A vision Transformer: patches of a picture and a class token in, the class of the picture out.

Source: Dosovitskiy et al. 2021, section 3.1.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from attn.functional import masks
from attn.mechanisms.rows import Count, Example, rows
from attn.nn.attention import Sides
from attn.nn.encoder_only import EncoderOnly
from attn.nn.model import PAD, Cache, Weights
from attn.nn.one_stack import OneStackSettings
from attn.settings import between, setting

_CERTAIN = 30.0  # a logit beside which exp(0) is nothing


@dataclasses.dataclass(frozen=True)
class VisionTransformerSettings(OneStackSettings):
    """Settings of the vision Transformer.

    Attributes:
      patch_size: P, the numbers of a patch: its pixels, times the channels.
    """

    patch_size: int = setting(9, between(1, 1_000_000))


class VisionTransformer(EncoderOnly):
    """A vision Transformer.

    As a source of tokens, a picture is a string of black-and-white patches: the token of a patch is 1 + the number
    whose binary digits are its P pixels, the first pixel in the lowest digit. The end token is the class token, at
    whose output the class is predicted: the first and only symbol of the answer.

    Args:
      vocabulary: V, the number of classes, or of tokens if the source is one of tokens.
      settings: sizes and kinds.
      rngs: keys for the initial parameters.
    """

    settings = VisionTransformerSettings

    def __init__(self, vocabulary: int, settings: VisionTransformerSettings, rngs: nnx.Rngs):
        if settings.tied_embeddings:
            raise ValueError("tied_embeddings: got True, must be False: patches have no embeddings of tokens to tie")
        self.patch_size = settings.patch_size
        super().__init__(vocabulary, settings, rngs)

    def make_embeddings(self, vocabulary: int, width: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        """Make the linear map of patches and the vector of the class token."""
        self.patch = nnx.Linear(self.patch_size, width, dtype=dtype, rngs=rngs)
        self.class_token = nnx.Param(nnx.initializers.normal(width**-0.5)(rngs.params(), (width,)))

    @classmethod
    def max_answer(cls, source: int) -> int:
        return 2

    def source_vectors(self, source: Int[Array, "S"]) -> Float[Array, "S E"]:
        """Return the vectors of the patches, and of the class token in place of the end token."""
        is_class = jnp.arange(len(source)) == jnp.sum(source != PAD) - 1
        class_token = self.class_token[...].astype(self.dtype)
        return jnp.where(is_class[:, None], class_token, self.patch(self.pixels(source).astype(self.dtype)))

    def pixels(self, source: Int[Array, "S"]) -> Int[Array, "S P"]:
        """Return the pixels of patches, 0 or 1."""
        return (source[:, None] - 1) >> jnp.arange(self.patch_size) & 1

    def picture(self, source: Int[Array, "S"]) -> Int[Array, "h w"] | None:
        """Return the picture of which these are the patches, without the class token; None if it is not a square."""
        height, side = math.isqrt(len(source)), math.isqrt(self.patch_size)
        if (height**2, side**2) != (len(source), self.patch_size):
            return None
        pixels = self.pixels(source).reshape(height, height, side, side)
        return pixels.swapaxes(1, 2).reshape(height * side, height * side)

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
        """Compute the logits of the class, and of the end after it; the cache holds them."""
        length = jnp.sum(source != PAD)
        example = Example(length, answer_length, length, key)
        own = rows(len(source), total=length, example=example)
        x = self.embed(source, own, key, shift)
        sides = Sides(own, own, masks.padding(length))
        x, _, (weights, _) = self.stack(x, sides, key=key, return_weights=return_weights)
        of_class = self.logits(x[length - 1][None])  # [1 V]
        # After the class the answer ends, which is certain, so that it adds nothing to the loss.
        end = _CERTAIN * jax.nn.one_hot(jnp.full(capacity, self.vocabulary - 1), self.vocabulary, dtype=of_class.dtype)
        cache = Cache(0, jnp.concatenate([of_class, end])[:capacity], (), example)
        return cache, {"encoder": weights} if return_weights else None
