"""Answers: free-running decoding with a cache of keys and values, greedy or with a beam.

An answer may take as many tokens as the vocabulary allows for a source of its length, whatever else is in the batch.
Decoding stops as soon as every answer of the batch has ended.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from attn.nn.encoder_decoder import Cache
from attn.tasks.examples import PAD, decoder_input
from attn.tasks.vocabulary import Vocabulary

# Every example has its own keys and values; the position is that of them all, so that writing there stays a slice.
_OF_EXAMPLES = Cache(position=None, own=0, memory=0, source_length=0, target_length=0, drawn=0)
_OF_BEAMS = Cache(position=None, own=0, memory=None, source_length=None)


def decode(
    model: nnx.Module, vocabulary: Vocabulary, sources: Int[Array, "B S"], beam_width: int = 1
) -> Int[Array, "B T"]:
    """Answer greedily, or with a beam that is wider than 1; see the two functions below."""
    if beam_width == 1:
        return greedy(model, vocabulary, sources)
    return beam_search(model, vocabulary, sources, beam_width)


def greedy(
    model: nnx.Module, vocabulary: Vocabulary, sources: Int[Array, "B S"], *, length_given: bool = False
) -> Int[Array, "B T"]:
    """The likeliest token again and again, each fed back, until the end token.

    Args:
      model: with `encode`, `start` and `decode`.
      vocabulary: for the begin and end tokens, and for how many tokens an answer may take.
      sources: `[B S]` tokens; one that is padding alone is not answered.
      length_given: let the end token come when as many tokens are written as an answer may take, and not before,
        whatever the model thinks of it.

    Returns:
      `[B T]` tokens: the answer, its end token, padding.
    """
    most = _most_tokens(vocabulary, sources)
    decode = jax.vmap(model.decode, in_axes=(0, _OF_EXAMPLES), out_axes=(0, _OF_EXAMPLES, None))

    def step(state):
        token, ended, answers, cache = state
        place = cache.position
        logits, cache, _ = decode(token[:, None], cache)
        last = place + 1 >= most
        token = jnp.where(ended, PAD, _likeliest(logits[:, 0], vocabulary, last if length_given else None))
        ended |= (token == vocabulary.end) | last
        return token, ended, answers.at[:, place].set(token), cache

    def unfinished(state):
        return ~state[1].all()

    batch, room = len(sources), vocabulary.room(sources.shape[1] - 1)
    token = jnp.full(batch, vocabulary.begin, sources.dtype)
    answers = jnp.full((batch, room), PAD, sources.dtype)
    state = (token, most == 0, answers, _start(model, sources, most, room))
    return jax.lax.while_loop(unfinished, step, state)[2]


def confirmed(
    model: nnx.Module,
    vocabulary: Vocabulary,
    sources: Int[Array, "B S"],
    targets: Int[Array, "B T"],
    *,
    length_given: bool = False,
) -> Bool[Array, "B"]:
    """Whether `greedy` would write these very answers, found in one pass instead of token by token.

    Where each token of an answer is the likeliest after those before it, greedy decoding writes the first, hence the
    second, and so on to the end; where one is not, it departs there.

    Args:
      model, vocabulary, sources, length_given: as of `greedy`.
      targets: `[B T]` tokens of the answers, with their end tokens, padded.

    Source: the answer is a draft that the model checks, as in speculative decoding: Leviathan et al. 2023, section 2.
    """

    def one(source, target, most):
        logits = model(source, decoder_input(target, vocabulary.begin), target_length=most)
        last = jnp.arange(1, len(target) + 1) >= most
        written = _likeliest(logits, vocabulary, last if length_given else None)
        return jnp.all((written == target) | (target == PAD))

    return jax.vmap(one)(sources, targets, _most_tokens(vocabulary, sources))


def margins(
    model: nnx.Module, vocabulary: Vocabulary, sources: Int[Array, "B S"], targets: Int[Array, "B T"]
) -> Float[Array, "B"]:
    """How surely `greedy` writes these answers, in one pass: the least that a token's logit is above all others.

    Below 0 it writes another answer; m above means that every token is at least exp(m) times as likely as the next.

    Args:
      model, vocabulary, sources, targets: as of `confirmed`.
    """

    def one(source, target, most):
        logits = _unpadded(model(source, decoder_input(target, vocabulary.begin), target_length=most))
        right = jax.nn.one_hot(target, vocabulary.size, dtype=bool)
        lead = jnp.max(logits, -1, where=right, initial=-jnp.inf) - jnp.max(logits, -1, where=~right, initial=-jnp.inf)
        return jnp.min(lead, where=target != PAD, initial=jnp.inf)

    return jax.vmap(one)(sources, targets, _most_tokens(vocabulary, sources))


def beam_search(model: nnx.Module, vocabulary: Vocabulary, sources: Int[Array, "B S"], width: int) -> Int[Array, "B T"]:
    """The likeliest answer that is found by keeping, at every step, the W likeliest beginnings of answers.

    The score of an answer is the log-probability of its tokens. It can only fall, so that a search is over when its
    best answer has ended.

    Args:
      model, vocabulary, sources: as of `greedy`.
      width: W, how many beginnings are kept; 1 is greedy decoding.

    Returns:
      `[B T]` tokens: the answer, its end token, padding.

    Source: Sutskever et al. 2014, section 3.2.
    """
    decode = jax.vmap(model.decode, in_axes=(0, _OF_BEAMS), out_axes=(0, _OF_BEAMS, None))
    decode = jax.vmap(decode, in_axes=(0, _OF_EXAMPLES), out_axes=(0, _OF_EXAMPLES, None))
    choose = jax.vmap(lambda rows, chosen: rows[chosen])  # for each example, some of its W rows
    most = _most_tokens(vocabulary, sources)
    padding = jnp.full(vocabulary.size, -jnp.inf).at[PAD].set(0.0)

    def step(state):
        scores, token, ended, answers, cache = state
        place = cache.position
        logits, cache, _ = decode(token[..., None], cache)
        likely = jax.nn.log_softmax(_unpadded(logits[:, :, 0]))
        # An answer that has ended goes on with padding alone, for nothing.
        likely = scores[..., None] + jnp.where(ended[..., None], padding, likely)
        scores, best = jax.lax.top_k(likely.reshape(len(sources), -1), width)
        beam, token = best // vocabulary.size, (best % vocabulary.size).astype(token.dtype)
        ended, answers, own = jax.tree.map(lambda rows: choose(rows, beam), (ended, answers, cache.own))
        answers = answers.at[:, :, place].set(token)
        ended |= (token == vocabulary.end) | (place + 1 >= most)[:, None]
        return scores, token, ended, answers, cache._replace(own=own)

    def unfinished(state):
        return ~state[2][:, 0].all()

    shape, room = (len(sources), width), vocabulary.room(sources.shape[1] - 1)
    cache = _start(model, sources, most, room)
    cache = cache._replace(own=jax.tree.map(lambda x: jnp.repeat(x[:, None], width, axis=1), cache.own))
    state = (
        jnp.full(shape, -jnp.inf).at[:, 0].set(0.0),  # at first there is one beginning, the empty one
        jnp.full(shape, vocabulary.begin, sources.dtype),
        jnp.broadcast_to((most == 0)[:, None], shape),
        jnp.full((*shape, room), PAD, sources.dtype),
        cache,
    )
    return jax.lax.while_loop(unfinished, step, state)[3][:, 0]


def _most_tokens(vocabulary: Vocabulary, sources: Int[Array, "B S"]) -> Int[Array, "B"]:
    """How many tokens each answer may take, its end included."""
    by_length = jnp.array([0, *map(vocabulary.room, range(sources.shape[1]))])  # by tokens of the source with its end
    return by_length[jnp.sum(sources != PAD, axis=1)]


def _likeliest(
    logits: Float[Array, "*B V"], vocabulary: Vocabulary, last: Bool[Array, "*B"] | None
) -> Int[Array, "*B"]:
    """The likeliest token; the end token where it is the `last` and nowhere else, if that is given."""
    logits = _unpadded(logits)
    if last is not None:
        logits = logits.at[..., vocabulary.end].set(jnp.where(last, jnp.inf, -jnp.inf))
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def _unpadded(logits: Float[Array, "*B V"]) -> Float[Array, "*B V"]:
    """Logits by which an answer that has not ended is not padded."""
    return logits.at[..., PAD].set(-jnp.inf)


def _start(model: nnx.Module, sources: Int[Array, "B S"], most: Int[Array, "B"], room: int) -> Cache:
    """The caches of a batch, before the first token; encodings that count from an answer's end are told `most`."""

    def start(source, length):
        memory, _ = model.encode(source, target_length=length)
        cache = model.start(memory, jnp.sum(source != PAD), room, target_length=length)
        return cache._replace(position=jnp.zeros((), jnp.int32))

    return jax.vmap(start, out_axes=_OF_EXAMPLES)(sources, most)
