"""What a trained model looks at while it answers: its attention weights, with the tokens they belong to."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int

from attn.nn.transformer import Weights
from attn.tasks.sequences import PAD, Symbols, Task
from attn.tasks.vocabulary import names


class Maps(NamedTuple):
    """Attention weights of one answer, cut to its length, with names for the rows and columns.

    Attributes:
      weights: `[L N S S]`, `[L N T T]` and `[L N T S]`.
      source: names of the S source tokens.
      read: names of the T tokens that the decoder read, the begin token first.
      written: names of the T tokens that it wrote after each.
    """

    weights: Weights
    source: list[str]
    read: list[str]
    written: list[str]


def capture(model: nnx.Module, task: Task, symbols: Symbols, answer: Int[Array | np.ndarray, "T"]) -> Maps:
    """Look at the attention weights of an answer.

    Args:
      model: a trained model.
      task: for the tokens' meaning.
      symbols: `[n]` symbols.
      answer: `[T]` tokens that the model wrote, its end token included; padding is cut off.
    """
    answer = jnp.asarray(answer)[: max(1, int(np.sum(np.asarray(answer) != PAD)))]
    read = task.decoder_input(answer)
    source = task.source(jnp.asarray(symbols), jnp.asarray(len(symbols)), len(symbols) + 1)
    graphdef, params = nnx.split(model, nnx.Param)
    look = jax.jit(lambda params: nnx.merge(graphdef, params)(source, read, return_weights=True)[1])
    weights = jax.device_get(look(params))
    return Maps(weights, source=names(task, source), read=names(task, read), written=names(task, answer))
