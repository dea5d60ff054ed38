"""What a trained model looks at while it answers: its attention weights, with the tokens they belong to."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attn.nn.transformer import Weights
from attn.tasks.sequences import PAD, Symbols, Task
from attn.tasks.vocabulary import names
from attn.training.decoding import greedy


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


def capture(model: nnx.Module, task: Task, symbols: Symbols) -> Maps:
    """Answer freely, then look at the attention weights of that answer.

    Args:
      model: a trained model.
      task: for the tokens' meaning, and how long an answer may be.
      symbols: `[n]` symbols.
    """
    n = len(symbols)
    graphdef, params = nnx.split(model, nnx.Param)
    source = task.source(jnp.asarray(symbols), jnp.asarray(n), n + 1)

    @jax.jit
    def look(params, source):
        model = nnx.merge(graphdef, params)
        answer = greedy(model, task, source, task.kind.times * n + 1)
        read = task.decoder_input(answer)
        return answer, read, model(source, read, return_weights=True)[1]

    answer, read, weights = jax.device_get(look(params, source))
    count = max(1, int(np.sum(answer != PAD)))
    encoder, decoder, cross = weights
    return Maps(
        Weights(encoder, decoder[:, :, :count, :count], cross[:, :, :count]),
        source=names(task, source),
        read=names(task, read[:count]),
        written=names(task, answer[:count]),
    )
