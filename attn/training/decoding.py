"""Autoregressive decoding with a key/value cache, greedy or with a beam.

The vocabulary and the length of the source limit the number of tokens of an answer, independently of the batch.
Decoding stops as soon as every answer of the batch has ended.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from attn.nn.model import Cache, Model
from attn.tasks.examples import PAD, decoder_input
from attn.tasks.vocabulary import Vocabulary

# Axes for `jax.vmap`. All examples share the index, so that writing into the cache stays a slice, not a scatter.
_EXAMPLE_AXES = Cache(index=None, own=0, memory=0, example=0)
_BEAM_AXES = Cache(index=None, own=0, memory=None, example=None)


def decode(model: Model, vocabulary: Vocabulary, sources: Int[Array, "B S"], beam_width: int = 1) -> Int[Array, "B T"]:
    """Decode by `greedy`, or by `beam_search` if the beam is wider than 1."""
    if beam_width == 1:
        return greedy(model, vocabulary, sources)
    return beam_search(model, vocabulary, sources, beam_width)


def greedy(model: Model, vocabulary: Vocabulary, sources: Int[Array, "B S"]) -> Int[Array, "B T"]:
    """Decode greedily: choose the most likely token and feed it back, until the end token.

    Args:
      model: any model.
      vocabulary: gives the begin and end tokens, and the largest number of tokens of an answer.
      sources: `[B S]` tokens; a row of padding only gets no answer.

    Returns:
      `[B T]` tokens: the answer, its end token, padding.
    """
    max_tokens = _max_tokens(vocabulary, sources)  # [B]
    extend = jax.vmap(model.extend, in_axes=(0, _EXAMPLE_AXES), out_axes=(0, _EXAMPLE_AXES, None))

    def step(state):
        position, token, ended, answers, cache = state
        logits, cache, _ = extend(token[:, None], cache)  # [B 1 V]
        token = jnp.where(ended, PAD, _most_likely(logits[:, 0]))
        ended |= (token == vocabulary.end) | (position + 1 >= max_tokens)
        return position + 1, token, ended, answers.at[:, position].set(token), cache

    def unfinished(state):
        _, _, ended, _, _ = state
        return ~ended.all()

    batch, capacity = len(sources), vocabulary.capacity(sources.shape[1] - 1)
    token = jnp.full(batch, vocabulary.begin, sources.dtype)
    answers = jnp.full((batch, capacity), PAD, sources.dtype)
    state = (jnp.int32(0), token, max_tokens == 0, answers, _start(model, vocabulary, sources, capacity))
    return jax.lax.while_loop(unfinished, step, state)[3]


def confirmed(
    model: Model, vocabulary: Vocabulary, sources: Int[Array, "B S"], targets: Int[Array, "B T"]
) -> Bool[Array, "B"]:
    """Return whether `greedy` would write exactly these answers, in one pass instead of token by token.

    If each token of an answer is the most likely one after those before it, greedy decoding writes the first, therefore
    the second, and so on to the end. If a token is not, greedy decoding writes another one there.

    Args:
      model, vocabulary, sources: as in `greedy`.
      targets: `[B T]` tokens of the answers, with their end tokens, padded.

    Source: the answer is a draft that the model checks, as in speculative decoding: Leviathan et al. 2023, section 2.
    """

    def one(source, target, length):
        predicted = _most_likely(model(source, decoder_input(target, vocabulary.begin), answer_length=length))
        return jnp.all((predicted == target) | (target == PAD))

    return jax.vmap(one)(prompts(vocabulary, sources), targets, _answer_lengths(vocabulary, sources))


def margins(
    model: Model, vocabulary: Vocabulary, sources: Int[Array, "B S"], targets: Int[Array, "B T"]
) -> Float[Array, "B"]:
    """Return the margin of each answer, in one pass: its correct token's smallest lead in logits over all other tokens.

    With a margin below 0 greedy decoding writes another answer. With a margin m every correct token is at least exp(m)
    times as likely as any other.

    Args:
      model, vocabulary, sources, targets: as in `confirmed`.
    """

    def one(source, target, length):
        logits = _without_padding(model(source, decoder_input(target, vocabulary.begin), answer_length=length))
        right = jax.nn.one_hot(target, vocabulary.size, dtype=bool)  # [T V]
        lead = jnp.max(logits, -1, where=right, initial=-jnp.inf) - jnp.max(logits, -1, where=~right, initial=-jnp.inf)
        return jnp.min(lead, where=target != PAD, initial=jnp.inf)

    return jax.vmap(one)(prompts(vocabulary, sources), targets, _answer_lengths(vocabulary, sources))


def beam_search(model: Model, vocabulary: Vocabulary, sources: Int[Array, "B S"], width: int) -> Int[Array, "B T"]:
    """Decode with a beam: at every step keep the W most likely hypotheses, which are prefixes of answers.

    The score of a hypothesis is the log-probability of its tokens. It can only fall, so the search ends when the best
    hypothesis has ended.

    Args:
      model, vocabulary, sources: as in `greedy`.
      width: W, the number of hypotheses that are kept; 1 is greedy decoding.

    Returns:
      `[B T]` tokens: the answer, its end token, padding.

    Source: Sutskever et al. 2014, section 3.2.
    """
    extend = jax.vmap(model.extend, in_axes=(0, _BEAM_AXES), out_axes=(0, _BEAM_AXES, None))
    extend = jax.vmap(extend, in_axes=(0, _EXAMPLE_AXES), out_axes=(0, _EXAMPLE_AXES, None))
    select = jax.vmap(lambda rows, indices: rows[indices])  # for each example, some of its W rows
    max_tokens = _max_tokens(vocabulary, sources)  # [B]
    only_padding = jnp.full(vocabulary.size, -jnp.inf).at[PAD].set(0.0)  # [V]

    def step(state):
        position, scores, token, ended, answers, cache = state
        logits, cache, _ = extend(token[..., None], cache)  # [B W 1 V]
        log_probs = jax.nn.log_softmax(_without_padding(logits[:, :, 0]))  # [B W V]
        # A hypothesis that has ended continues with padding only, which leaves its score as it is.
        candidates = scores[..., None] + jnp.where(ended[..., None], only_padding, log_probs)
        scores, best = jax.lax.top_k(candidates.reshape(len(sources), -1), width)  # [B W], both
        parent, token = best // vocabulary.size, (best % vocabulary.size).astype(token.dtype)
        ended, answers, own = jax.tree.map(lambda rows: select(rows, parent), (ended, answers, cache.own))
        answers = answers.at[:, :, position].set(token)
        ended |= (token == vocabulary.end) | (position + 1 >= max_tokens)[:, None]
        return position + 1, scores, token, ended, answers, cache._replace(own=own)

    def unfinished(state):
        _, _, _, ended, _, _ = state
        return ~ended[:, 0].all()  # `top_k` sorts: the best hypothesis is the first

    shape, capacity = (len(sources), width), vocabulary.capacity(sources.shape[1] - 1)
    cache = _start(model, vocabulary, sources, capacity)
    cache = cache._replace(own=jax.tree.map(lambda x: jnp.repeat(x[:, None], width, axis=1), cache.own))
    state = (
        jnp.int32(0),
        jnp.full(shape, -jnp.inf).at[:, 0].set(0.0),  # at first there is one hypothesis, the empty one
        jnp.full(shape, vocabulary.begin, sources.dtype),
        jnp.broadcast_to((max_tokens == 0)[:, None], shape),
        jnp.full((*shape, capacity), PAD, sources.dtype),
        cache,
    )
    return jax.lax.while_loop(unfinished, step, state)[4][:, 0]


def prompts(vocabulary: Vocabulary, sources: Int[Array, "*B S"]) -> Int[Array, "*B S"]:
    """Return the tokens that a model reads before the begin token of the answer: in most tasks the sources.

    If the answer continues its source, both were learned as one string after a begin token. So the begin token that
    ends the source, which decoding feeds first, moves to the beginning.
    """
    if not vocabulary.continues:
        return sources
    first = jnp.where(sources[..., :1] == PAD, PAD, vocabulary.begin)
    return jnp.concatenate([first, jnp.where(sources == vocabulary.begin, PAD, sources)[..., :-1]], axis=-1)


def _max_tokens(vocabulary: Vocabulary, sources: Int[Array, "B S"]) -> Int[Array, "B"]:
    """Return the largest number of tokens of each answer, its end token included; 0 for an empty source."""
    by_length = jnp.array([0, *map(vocabulary.capacity, range(sources.shape[1]))])  # by tokens of the source with end
    return by_length[jnp.sum(sources != PAD, axis=1)]


def _most_likely(logits: Float[Array, "*B V"]) -> Int[Array, "*B"]:
    return jnp.argmax(_without_padding(logits), axis=-1).astype(jnp.int32)


def _without_padding(logits: Float[Array, "*B V"]) -> Float[Array, "*B V"]:
    """Return logits that exclude padding, which must not be written before an answer has ended."""
    return logits.at[..., PAD].set(-jnp.inf)


def _answer_lengths(vocabulary: Vocabulary, sources: Int[Array, "B S"]) -> Int[Array, "B"] | None:
    """Return the lengths of the answers; None if they are not known before decoding."""
    return None if vocabulary.answer_length(1) is None else _max_tokens(vocabulary, sources)


def _start(model: Model, vocabulary: Vocabulary, sources: Int[Array, "B S"], capacity: int) -> Cache:
    """Make the caches of a batch: encode the prompts, before the first token is decoded."""

    def start(source, length):
        cache, _ = model.start(source, capacity, answer_length=length)
        return cache._replace(index=jnp.asarray(cache.index, jnp.int32))

    return jax.vmap(start, out_axes=_EXAMPLE_AXES)(prompts(vocabulary, sources), _answer_lengths(vocabulary, sources))
