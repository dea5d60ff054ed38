"""Greedy decoding of pretrained models, with the key/value cache."""

import functools
import pathlib
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from attn.pretrained.files import FileError
from attn.pretrained.foundation import Decoder
from attn.settings import between, error_message

_ROUND = 64  # capacities are multiples of it, so that another length seldom compiles another program


class GreedySettings(NamedTuple):
    """The settings of greedy decoding in a model's files.

    Attributes:
      end: tokens after which an answer has ended.
      pad: fills the rest of an answer that has ended.
      start: the first token of an encoder-decoder's answer.
      first: token that an encoder-decoder must write first; None for any.
      last: token that must be written last if nothing has ended before; None for any.
      never: tokens that are not written.
      min_length, min_new_tokens: an answer does not end before it has so many tokens, the prompt or the start token
        included, or not.
      repetition_penalty: logits of tokens that are there already are divided by it, or multiplied if negative.
      no_repeat: number of tokens that must not come in the same order twice; 0 for any.
      left_out: settings that are not implemented.
    """

    end: tuple[int, ...]
    pad: int
    start: int | None = None
    first: int | None = None
    last: int | None = None
    never: tuple[int, ...] = ()
    min_length: int = 0
    min_new_tokens: int = 0
    repetition_penalty: float = 1.0
    no_repeat: int = 0
    left_out: tuple[str, ...] = ()

    def tokens(self) -> list[int]:
        """Return all tokens that are named."""
        single = [each for each in (self.start, self.first, self.last) if each is not None]
        return [*self.end, self.pad, *single, *self.never]


# Settings of the library transformers that change greedy decoding, and their values that change nothing.
_NOT_IMPLEMENTED = {
    "encoder_repetition_penalty": 1,
    "encoder_no_repeat_ngram_size": 0,
    "begin_suppress_tokens": [],
    "sequence_bias": {},
    "exponential_decay_length_penalty": 0,
}


def greedy_settings(config: Mapping, path: pathlib.Path) -> GreedySettings:
    """Return what generation_config.json, or without it config.json, says.

    Raises:
      FileError: a token is not a number.
    """

    def tokens(name: str) -> tuple[int, ...]:
        return _tokens(name, config.get(name), path)

    def one(name: str) -> int | None:
        return next(iter(tokens(name)), None)

    def number(name: str) -> int:
        given = config.get(name)
        if message := error_message(int, given or 0, between(0, 1_000_000)):
            raise FileError(f"{path}: key {name!r}: {message}")
        return int(given or 0)

    words = config.get("bad_words_ids") or []
    if not isinstance(words, list) or not all(isinstance(each, list) for each in words):
        raise FileError(f"{path}: key 'bad_words_ids': got {words!r:.80}, must be a list of lists of tokens")
    single = {token for each in words if len(each) == 1 for token in _tokens("bad_words_ids", each, path)}
    left_out = [name for name, value in _NOT_IMPLEMENTED.items() if config.get(name) not in (None, value)]
    left_out += ["bad_words_ids of several tokens"] * any(len(each) > 1 for each in words)
    penalty = config.get("repetition_penalty") or 1.0
    if not isinstance(penalty, int | float) or not penalty > 0:
        raise FileError(f"{path}: key 'repetition_penalty': got {penalty!r:.80}, must be a number greater than 0")
    end, pad, start = tokens("eos_token_id"), one("pad_token_id"), one("decoder_start_token_id")
    return GreedySettings(
        end,
        pad if pad is not None else end[0] if end else 0,
        start if start is not None else one("bos_token_id"),
        one("forced_bos_token_id"),
        one("forced_eos_token_id"),
        tuple(sorted(single | set(tokens("suppress_tokens")))),
        number("min_length"),
        number("min_new_tokens"),
        float(penalty),
        number("no_repeat_ngram_size"),
        tuple(left_out),
    )


def _tokens(name: str, given, path: pathlib.Path) -> tuple[int, ...]:
    """Return the tokens that a key names: none, one, or a list."""
    given = [] if given is None else given if isinstance(given, list) else [given]
    if not all(isinstance(each, int) and not isinstance(each, bool) and abs(each) < 2**31 for each in given):
        raise FileError(f"{path}: key {name!r}: got {given!r:.80}, must be a token or a list of tokens")
    return tuple(given)


@functools.partial(jax.jit, static_argnames=("graphdef", "greedy", "capacity"))
def decode(
    graphdef: nnx.GraphDef,
    params: nnx.State,
    input_ids: Int[Array, "B T"],
    attention_mask: Bool[Array, "B T"],
    max_new_tokens: Int[Array, ""],
    *,
    greedy: GreedySettings,
    capacity: int,
) -> tuple[Int[Array, "B length"], Int[Array, ""]]:
    """Decode greedily, until all answers have ended or are long enough.

    Args:
      graphdef, params: of a `Decoder` or `EncoderDecoder`.
      input_ids, attention_mask: prompts padded at the front, or sources.
      max_new_tokens: the number of tokens to write at most.
      greedy: the settings.
      capacity: at least `max_new_tokens`.

    Returns:
      (prompts or start tokens with what was written, padded; the number of tokens of the longest).
    """
    model = nnx.merge(graphdef, params)
    B, T = input_ids.shape
    if isinstance(model, Decoder):
        before = input_ids
        logits, state = jax.vmap(lambda ids, mask: model.prefill(ids, mask, T + capacity))(input_ids, attention_mask)
    else:
        before = jnp.full((B, 1), greedy.start, input_ids.dtype)
        state = jax.vmap(lambda ids, mask: model.prefill(ids, mask, capacity + 1))(input_ids, attention_mask)
        logits, state = jax.vmap(model.step, in_axes=(0, None, 0))(before[:, 0], jnp.int32(0), state)
    first = before.shape[1]
    total = first + max_new_tokens
    tokens = jnp.pad(before, ((0, 0), (0, capacity)), constant_values=greedy.pad)
    if first > 1:  # the first token of a longer prompt is there already
        greedy = greedy._replace(first=None)

    def is_running(carry):
        _, _, position, ended = carry
        return (position < total) & ~ended.all()

    def write(carry, logits=None):
        state, tokens, position, ended = carry
        if logits is None:
            token = jax.lax.dynamic_index_in_dim(tokens, position - 1, axis=1, keepdims=False)
            logits, state = jax.vmap(model.step, in_axes=(0, None, 0))(token, position - 1, state)
        token = _choose(logits, tokens, position, position - first, total, greedy)
        token = jnp.where(ended, greedy.pad, token)
        tokens = jax.lax.dynamic_update_slice_in_dim(tokens, token[:, None], position, axis=1)
        return state, tokens, position + 1, ended | jnp.isin(token, jnp.array(greedy.end, token.dtype))

    # The prompt has given the logits of the first token already.
    carry = write((state, tokens, jnp.int32(first), jnp.zeros(B, bool)), logits)
    _, tokens, position, _ = jax.lax.while_loop(is_running, write, carry)
    return tokens, position


def _choose(
    logits: Float[Array, "B V"],
    tokens: Int[Array, "B length"],
    position: Int[Array, ""],
    count: Int[Array, ""],
    total: Int[Array, ""],
    greedy: GreedySettings,
) -> Int[Array, "B"]:
    """Return the most probable token of those that may be written at a position of the texts.

    Args:
      logits: of the next token.
      tokens: so far, of which the first `position` count.
      position: where the token is written.
      count: number of new tokens before it.
      total: number of tokens that the texts have at most.
      greedy: the settings.
    """
    if greedy.repetition_penalty != 1:
        lower = jnp.where(logits < 0, logits * greedy.repetition_penalty, logits / greedy.repetition_penalty)
        rows, is_written = jnp.arange(len(tokens))[:, None], jnp.arange(tokens.shape[1]) < position
        numbers = jnp.where(is_written, tokens, logits.shape[1])  # those beyond the vocabulary are dropped
        present = jnp.zeros(logits.shape, bool).at[rows, numbers].set(True, mode="drop")
        logits = jnp.where(present, lower, logits)
    if greedy.no_repeat:
        logits = jax.vmap(_without_repeats, in_axes=(0, 0, None, None))(logits, tokens, position, greedy.no_repeat)
    for token in greedy.never:
        logits = logits.at[:, token].set(-jnp.inf)
    too_short = (position < greedy.min_length) | (count < greedy.min_new_tokens)
    for token in greedy.end:
        logits = logits.at[:, token].set(jnp.where(too_short, -jnp.inf, logits[:, token]))
    token = jnp.argmax(logits, axis=-1).astype(tokens.dtype)
    token = token if greedy.first is None else jnp.where(count == 0, greedy.first, token)
    return token if greedy.last is None else jnp.where(position == total - 1, greedy.last, token)


def _without_repeats(
    logits: Float[Array, "V"], tokens: Int[Array, "length"], position: Int[Array, ""], n: int
) -> Float[Array, "V"]:
    """Hide the tokens that would repeat n tokens in succession."""
    start = jnp.arange(len(tokens) - n + 1)
    last = jax.lax.dynamic_slice_in_dim(tokens, position - n + 1, n - 1)  # the n - 1 tokens before the position
    windows = tokens[start[:, None] + jnp.arange(n)]  # [starts n]
    repeats = (windows[:, :-1] == last).all(axis=1) & (start + n <= position) & (position >= n - 1)
    return logits.at[jnp.where(repeats, windows[:, -1], len(logits))].set(-jnp.inf, mode="drop")


def rounded(count: int) -> int:
    """Return the capacity for this many tokens."""
    return -(-count // _ROUND) * _ROUND
