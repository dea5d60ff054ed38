"""An encoder that predicts its answer in one pass: the source on a tape, empty cells after it, no decoder.

Its training batches have one length each: `config.data.source = "one_length"`, see `attn.studies.batches`.

Source: Deletang et al. 2023, section 4; Ruoss et al. 2023, section 4.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

import attn.studies.batches  # noqa: F401  registers "one_length"
from attn.mechanisms.rows import Count, known, rows
from attn.nn.encoder_only import EncoderOnly
from attn.nn.model import PAD, Cache, Weights
from attn.nn.models import register
from attn.studies.mechanisms import TapeExample

_END_LOGIT = 30.0  # logit of the end token after the last cell, whose position is given


@register("tape")
class Tape(EncoderOnly):
    """A Transformer's encoder over x_1 ... x_n and one empty cell per symbol of the answer.

    The outputs at the empty cells are the logits of the answer's symbols, all at once: no symbol depends on another.
    The length of the answer is given, so its end is not predicted. An empty cell is the begin token.

    Args:
      vocabulary: V, the number of tokens; token 0 is padding, the last two are begin and end.
      settings, rngs: as of `EncoderOnly`, without tied embeddings.
    """

    maps = ()

    @classmethod
    def max_answer(cls, source: int) -> None:
        return None

    @classmethod
    def num_positions(cls, source: int, answer: int) -> int:
        return source + answer

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
        """Run the encoder; the cache holds the logits of all tokens of the answer.

        Raises:
          LengthUnknown: the answer's length is not given.
        """
        source_length = jnp.sum(source != PAD)
        symbols, cells = source_length - 1, known(answer_length) - 1  # without the end tokens
        size = len(source) + capacity
        index, wide_source = jnp.arange(size), jnp.pad(source, (0, capacity))
        tape = jnp.where(index < symbols, wide_source, jnp.where(index < symbols + cells, self.vocabulary - 2, PAD))
        if shift is not None:
            shift = jnp.where((index < symbols)[:, None], jnp.pad(shift, ((0, capacity), (0, 0))), 0)
        length = symbols + cells
        example = TapeExample(source_length, answer_length, length, key, symbols=symbols, cells=cells)
        out, _ = self.run(tape, rows(size, total=length, example=example), length, shift, False)
        logits = self.logits(out[jnp.minimum(symbols + jnp.arange(capacity), size - 1)])
        end = _END_LOGIT * jax.nn.one_hot(self.vocabulary - 1, self.vocabulary)
        logits = jnp.where((jnp.arange(capacity) < cells)[:, None], logits, end)
        return Cache(0, logits, (), example), {} if return_weights else None
