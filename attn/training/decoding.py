"""Answers: free-running greedy decoding with a cache of keys and values."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Int

from attn.tasks.sequences import PAD, Task


def greedy(model: nnx.Module, task: Task, source: Int[Array, "S"], room: int) -> Int[Array, "T"]:
    """The likeliest token again and again, each fed back, until the end token.

    Args:
      model: with `encode`, `start` and `decode`.
      task: for the begin and end tokens.
      source: `[S]` tokens.
      room: T, how many tokens at most.

    Returns:
      `[T]` tokens: the answer, its end token, padding.
    """
    memory, _ = model.encode(source)
    cache = model.start(memory, jnp.sum(source != PAD), room)
    cache = cache._replace(position=jnp.zeros((), jnp.int32))

    def step(carry, _):
        token, ended, cache = carry
        logits, cache, _ = model.decode(token[None], cache)
        token = jnp.where(ended, PAD, jnp.argmax(logits[0]).astype(token.dtype))
        return (token, ended | (token == task.end), cache), token

    begin = jnp.asarray(task.begin, source.dtype)
    _, answer = jax.lax.scan(step, (begin, jnp.zeros((), bool), cache), length=room)
    return answer
