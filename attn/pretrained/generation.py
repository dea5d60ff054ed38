"""Greedy decoding of pretrained models, with the key/value cache."""

import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Int

from attn.pretrained.foundation import Decoder

_ROUND = 64  # capacities are multiples of it, so that another length seldom compiles another program


class Ends(NamedTuple):
    """The tokens that begin and end an answer.

    Attributes:
      end: tokens after which an answer has ended.
      pad: fills the rest of an answer that has ended.
      start: the first token of an encoder-decoder's answer.
      first, last: tokens that the first and the last written one are forced to be; None to leave them.
    """

    end: tuple[int, ...]
    pad: int
    start: int | None = None
    first: int | None = None
    last: int | None = None


def ends_of(config: Mapping) -> Ends:
    """Return the tokens that config.json, or generation_config.json over it, names."""
    end = config.get("eos_token_id")
    end = tuple(end) if isinstance(end, list) else () if end is None else (end,)
    pad = config.get("pad_token_id")
    start = config.get("decoder_start_token_id")
    return Ends(
        end,
        pad if pad is not None else end[0] if end else 0,
        start if start is not None else config.get("bos_token_id"),
        config.get("forced_bos_token_id"),
        config.get("forced_eos_token_id"),
    )


@functools.partial(jax.jit, static_argnames=("graphdef", "ends", "room"))
def decode(
    graphdef: nnx.GraphDef,
    params: nnx.State,
    input_ids: Int[Array, "B T"],
    attention_mask: Bool[Array, "B T"],
    max_new_tokens: Int[Array, ""],
    *,
    ends: Ends,
    room: int,
) -> tuple[Int[Array, "B room"], Int[Array, ""]]:
    """Write the most probable token again and again, until all answers have ended or are long enough.

    Args:
      graphdef, params: of a `Decoder` or `EncoderDecoder`.
      input_ids, attention_mask: prompts padded at the front, or sources.
      max_new_tokens: the number of tokens to write at most.
      ends: tokens of beginning and end.
      room: at least `max_new_tokens`.

    Returns:
      (new tokens, padded, and their number: that of the longest answer).
    """
    model = nnx.merge(graphdef, params)
    B, T = input_ids.shape
    written = jnp.full((B, room), ends.pad, input_ids.dtype)
    if isinstance(model, Decoder):
        logits, state = jax.vmap(lambda ids, mask: model.prefill(ids, mask, T + room))(input_ids, attention_mask)
        first = T
    else:
        state = jax.vmap(lambda ids, mask: model.prefill(ids, mask, room + 1))(input_ids, attention_mask)
        start = jnp.full((B,), ends.start, input_ids.dtype)
        logits, state = jax.vmap(model.step, in_axes=(0, None, 0))(start, jnp.int32(0), state)
        first = 1

    def is_end(token):
        return jnp.isin(token, jnp.array(ends.end, token.dtype)) if ends.end else jnp.zeros(token.shape, bool)

    def choose(logits, count, ended):
        token = jnp.argmax(logits, axis=-1).astype(input_ids.dtype)
        if ends.first is not None:
            token = jnp.where(count == 0, ends.first, token)
        if ends.last is not None:
            token = jnp.where(count == max_new_tokens - 1, ends.last, token)
        return jnp.where(ended, ends.pad, token)

    def is_running(carry):
        _, _, _, count, ended = carry
        return (count < max_new_tokens) & ~ended.all()

    def write(carry):
        logits, state, written, count, ended = carry
        token = choose(logits, count, ended)
        written = jax.lax.dynamic_update_slice_in_dim(written, token[:, None], count, axis=1)
        logits, state = jax.vmap(model.step, in_axes=(0, None, 0))(token, first + count, state)
        return logits, state, written, count + 1, ended | is_end(token)

    carry = logits, state, written, jnp.int32(0), jnp.zeros(B, bool)
    _, _, written, count, _ = jax.lax.while_loop(is_running, write, carry)
    return written, count


def rounded(count: int) -> int:
    """Return the capacity for this many tokens."""
    return -(-count // _ROUND) * _ROUND
