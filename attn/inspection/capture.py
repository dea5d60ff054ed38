"""What a trained model looks at while it answers: attention weights or influence, with the tokens they belong to."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from attn.inspection.influence import influence
from attn.nn.encoder_decoder import Weights
from attn.tasks.examples import PAD, Tokens, decoder_input
from attn.tasks.vocabulary import Vocabulary


class Maps(NamedTuple):
    """Attention weights of one answer, cut to its length, with names for the rows and columns.

    Attributes:
      weights: `[L N S S]`, `[L N T T]` and `[L N T S]`.
      influence: `[T S]`, of a model without attention instead: see `attn.inspection.influence`.
      source: names of the S source tokens.
      read: names of the T tokens that the decoder read, the begin token first.
      written: names of the T tokens that it wrote after each.
    """

    weights: Weights
    influence: Float[np.ndarray, "T S"] | None
    source: list[str]
    read: list[str]
    written: list[str]


def capture(model: nnx.Module, vocabulary: Vocabulary, source: Tokens, answer: Int[Array | np.ndarray, "T"]) -> Maps:
    """Look at the attention weights of an answer.

    Args:
      model: a trained model.
      vocabulary: for the tokens' meaning.
      source: `[n]` tokens, without an end token.
      answer: `[T]` tokens that the model wrote, its end token included; padding is cut off.
    """
    answer = jnp.asarray(answer)[: max(1, int(np.sum(np.asarray(answer) != PAD)))]
    read = decoder_input(answer, vocabulary.begin)
    source = jnp.asarray([*source, vocabulary.end])
    graphdef, params = nnx.split(model, nnx.Param)

    @jax.jit
    def look(params):
        model = nnx.merge(graphdef, params)
        weights = model(source, read, target_length=len(read), return_weights=True)[1]
        blind = not any(map(len, weights))
        return weights, influence(model, source, read, jnp.arange(len(read))) if blind else None

    source_names, read_names, written_names = (vocabulary.names(tokens) for tokens in (source, read, answer))
    return Maps(*jax.device_get(look(params)), source=source_names, read=read_names, written=written_names)
