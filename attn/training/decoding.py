"""Autoregressive decoding with a key/value cache, greedy or with a beam.

The number of tokens of an answer is limited by the vocabulary and the length of its source, not by the batch.
Decoding stops as soon as every answer of the batch has ended.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from attn.nn.model import Cache, Model
from attn.tasks.examples import PAD, decoder_input
from attn.tasks.vocabulary import Vocabulary

# Every example has its own keys and values, but all share the index, so that writing there stays a slice.
_OF_EXAMPLES = Cache(index=None, own=0, memory=0, example=0)
_OF_BEAMS = Cache(index=None, own=0, memory=None, example=None)


def decode(model: Model, vocabulary: Vocabulary, sources: Int[Array, "B S"], beam_width: int = 1) -> Int[Array, "B T"]:
    """Decode greedily, or with a beam that is wider than 1; see the two functions below."""
    if beam_width == 1:
        return greedy(model, vocabulary, sources)
    return beam_search(model, vocabulary, sources, beam_width)


def greedy(model: Model, vocabulary: Vocabulary, sources: Int[Array, "B S"]) -> Int[Array, "B T"]:
    """Decode greedily: the most likely token, fed back, until the end token.

    Args:
      model: any.
      vocabulary: for the begin and end tokens, and for how many tokens an answer may take.
      sources: `[B S]` tokens; one that is padding alone is not answered.

    Returns:
      `[B T]` tokens: the answer, its end token, padding.
    """
    most = _most_tokens(vocabulary, sources)
    extend = jax.vmap(model.extend, in_axes=(0, _OF_EXAMPLES), out_axes=(0, _OF_EXAMPLES, None))

    def step(state):
        written, token, ended, answers, cache = state
        logits, cache, _ = extend(token[:, None], cache)
        token = jnp.where(ended, PAD, _most_likely(logits[:, 0]))
        ended |= (token == vocabulary.end) | (written + 1 >= most)
        return written + 1, token, ended, answers.at[:, written].set(token), cache

    def unfinished(state):
        return ~state[2].all()

    batch, room = len(sources), vocabulary.capacity(sources.shape[1] - 1)
    token = jnp.full(batch, vocabulary.begin, sources.dtype)
    answers = jnp.full((batch, room), PAD, sources.dtype)
    state = (jnp.int32(0), token, most == 0, answers, _start(model, vocabulary, sources, room))
    return jax.lax.while_loop(unfinished, step, state)[3]


def confirmed(
    model: Model, vocabulary: Vocabulary, sources: Int[Array, "B S"], targets: Int[Array, "B T"]
) -> Bool[Array, "B"]:
    """Return whether `greedy` would write exactly these answers, in one pass instead of token by token.

    Where each token of an answer is the most likely after those before it, greedy decoding writes the first, therefore
    the second, and so on to the end; where one is not, it departs there.

    Args:
      model, vocabulary, sources: as of `greedy`.
      targets: `[B T]` tokens of the answers, with their end tokens, padded.

    Source: the answer is a draft that the model checks, as in speculative decoding: Leviathan et al. 2023, section 2.
    """

    def one(source, target, length):
        written = _most_likely(model(source, decoder_input(target, vocabulary.begin), answer_length=length))
        return jnp.all((written == target) | (target == PAD))

    return jax.vmap(one)(prompts(vocabulary, sources), targets, _answer_lengths(vocabulary, sources))


def margins(
    model: Model, vocabulary: Vocabulary, sources: Int[Array, "B S"], targets: Int[Array, "B T"]
) -> Float[Array, "B"]:
    """Return the margins of these answers, in one pass: the least that a correct token's logit is above all others.

    Below 0 it writes another answer; m above means that every token is at least exp(m) times as likely as the next.

    Args:
      model, vocabulary, sources, targets: as of `confirmed`.
    """

    def one(source, target, length):
        logits = _unpadded(model(source, decoder_input(target, vocabulary.begin), answer_length=length))
        right = jax.nn.one_hot(target, vocabulary.size, dtype=bool)
        lead = jnp.max(logits, -1, where=right, initial=-jnp.inf) - jnp.max(logits, -1, where=~right, initial=-jnp.inf)
        return jnp.min(lead, where=target != PAD, initial=jnp.inf)

    return jax.vmap(one)(prompts(vocabulary, sources), targets, _answer_lengths(vocabulary, sources))


def beam_search(model: Model, vocabulary: Vocabulary, sources: Int[Array, "B S"], width: int) -> Int[Array, "B T"]:
    """Decode with a beam: keep, at every step, the W most likely beginnings of answers.

    The score of an answer is the log-probability of its tokens. It can only fall, so that a search is over when its
    best answer has ended.

    Args:
      model, vocabulary, sources: as of `greedy`.
      width: W, how many beginnings are kept; 1 is greedy decoding.

    Returns:
      `[B T]` tokens: the answer, its end token, padding.

    Source: Sutskever et al. 2014, section 3.2.
    """
    extend = jax.vmap(model.extend, in_axes=(0, _OF_BEAMS), out_axes=(0, _OF_BEAMS, None))
    extend = jax.vmap(extend, in_axes=(0, _OF_EXAMPLES), out_axes=(0, _OF_EXAMPLES, None))
    choose = jax.vmap(lambda rows, chosen: rows[chosen])  # for each example, some of its W rows
    most = _most_tokens(vocabulary, sources)
    padding = jnp.full(vocabulary.size, -jnp.inf).at[PAD].set(0.0)

    def step(state):
        written, scores, token, ended, answers, cache = state
        logits, cache, _ = extend(token[..., None], cache)
        likely = jax.nn.log_softmax(_unpadded(logits[:, :, 0]))
        # An answer that has ended goes on with padding alone, for nothing.
        likely = scores[..., None] + jnp.where(ended[..., None], padding, likely)
        scores, best = jax.lax.top_k(likely.reshape(len(sources), -1), width)
        beam, token = best // vocabulary.size, (best % vocabulary.size).astype(token.dtype)
        ended, answers, own = jax.tree.map(lambda rows: choose(rows, beam), (ended, answers, cache.own))
        answers = answers.at[:, :, written].set(token)
        ended |= (token == vocabulary.end) | (written + 1 >= most)[:, None]
        return written + 1, scores, token, ended, answers, cache._replace(own=own)

    def unfinished(state):
        return ~state[3][:, 0].all()

    shape, room = (len(sources), width), vocabulary.capacity(sources.shape[1] - 1)
    cache = _start(model, vocabulary, sources, room)
    cache = cache._replace(own=jax.tree.map(lambda x: jnp.repeat(x[:, None], width, axis=1), cache.own))
    state = (
        jnp.int32(0),
        jnp.full(shape, -jnp.inf).at[:, 0].set(0.0),  # at first there is one beginning, the empty one
        jnp.full(shape, vocabulary.begin, sources.dtype),
        jnp.broadcast_to((most == 0)[:, None], shape),
        jnp.full((*shape, room), PAD, sources.dtype),
        cache,
    )
    return jax.lax.while_loop(unfinished, step, state)[4][:, 0]


def prompts(vocabulary: Vocabulary, sources: Int[Array, "*B S"]) -> Int[Array, "*B S"]:
    """Return what a model reads before the begin token of the answer: the sources.

    Where the answer continues its source, both were learned as one string after a begin token. So the begin token that
    ends the source, which decoding feeds first, moves to its beginning.
    """
    if not vocabulary.continues:
        return sources
    first = jnp.where(sources[..., :1] == PAD, PAD, vocabulary.begin)
    return jnp.concatenate([first, jnp.where(sources == vocabulary.begin, PAD, sources)[..., :-1]], axis=-1)


def _most_tokens(vocabulary: Vocabulary, sources: Int[Array, "B S"]) -> Int[Array, "B"]:
    """Return how many tokens each answer may take, its end included."""
    by_length = jnp.array([0, *map(vocabulary.capacity, range(sources.shape[1]))])  # by tokens of the source
    return by_length[jnp.sum(sources != PAD, axis=1)]


def _most_likely(logits: Float[Array, "*B V"]) -> Int[Array, "*B"]:
    return jnp.argmax(_unpadded(logits), axis=-1).astype(jnp.int32)


def _unpadded(logits: Float[Array, "*B V"]) -> Float[Array, "*B V"]:
    """Return logits by which an answer that has not ended is not padded."""
    return logits.at[..., PAD].set(-jnp.inf)


def _answer_lengths(vocabulary: Vocabulary, sources: Int[Array, "B S"]) -> Int[Array, "B"] | None:
    """Return the lengths of the answers; None where they are not known."""
    return None if vocabulary.answer_length(1) is None else _most_tokens(vocabulary, sources)


def _start(model: Model, vocabulary: Vocabulary, sources: Int[Array, "B S"], capacity: int) -> Cache:
    """Make the caches of a batch, before the first token."""

    def start(source, length):
        cache, _ = model.start(source, capacity, answer_length=length)
        return cache._replace(index=jnp.asarray(cache.index, jnp.int32))

    return jax.vmap(start, out_axes=_OF_EXAMPLES)(prompts(vocabulary, sources), _answer_lengths(vocabulary, sources))
