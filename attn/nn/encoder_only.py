"""An encoder-only Transformer: it predicts the whole answer in one pass, token t at token t of the source.

Source: the encoder of Vaswani et al. 2017, section 3.1; an output per token of the source: Devlin et al. 2019.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from attn.functional import masks
from attn.mechanisms.rows import Count, Example, Rows, rows
from attn.nn.attention import Sides
from attn.nn.model import PAD, Cache, Weights
from attn.nn.one_stack import OneStack


class EncoderOnly(OneStack):
    """An encoder-only Transformer, for answers that are no longer than their sources.

    All tokens of the answer are predicted at once, so none depends on another. The arguments are those of `OneStack`.
    """

    kind = "encoder"
    reads_answer = False
    maps = (("encoder", "source", "source"),)

    @classmethod
    def max_answer(cls, source: int) -> int:
        return source

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
        source_rows = rows(len(source), total=length, example=example)
        x, weights = self.run(source, source_rows, length, shift, return_weights)
        # Beyond the source no token is predicted: the answer ends.
        end = jax.nn.one_hot(jnp.full(max(0, capacity - len(source)), self.vocabulary - 1), self.vocabulary)
        cache = Cache(0, jnp.concatenate([self.logits(x), end]), (), example)
        return cache, {"encoder": weights} if return_weights else None

    def run(self, tokens: Int[Array, "S"], token_rows: Rows, length: Count, shift, return_weights: bool):
        """Run the stack on tokens of which the first `length` are visible; return its output and the weights."""
        key, sides = token_rows.example.key, Sides(token_rows, token_rows, masks.padding(length))
        x = self.embed(tokens, token_rows, key, shift)
        x, _, (weights, _) = self.stack(x, sides, key=key, return_weights=return_weights)
        return x, weights

    def extend(
        self, tokens: Int[Array, "T"], cache: Cache, *, key: Array | None = None, return_weights: bool = False
    ) -> tuple[Float[Array, "T V"], Cache, Weights | None]:
        """Look up the next T logits; the tokens are not read."""
        logits = jax.lax.dynamic_slice_in_dim(cache.own, cache.index, len(tokens))
        return logits, cache._replace(index=cache.index + len(tokens)), {} if return_weights else None
