"""Decoding: greedy is the argmax again and again, a beam finds what an exhaustive search finds."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attn.nn.transformer import Transformer, TransformerSettings
from attn.studies.lengths.evaluation import EndGiven
from attn.tasks.examples import PAD, decoder_input, padded
from attn.tasks.vocabulary import Symbols
from attn.training.decoding import beam_search, confirmed, decode, greedy

VOCABULARY = Symbols(3)  # 6 tokens
SOURCES = jnp.array(  # all of 1 to 3 symbols
    padded([[*s, VOCABULARY.end] for n in (1, 2, 3) for s in itertools.product((1, 2, 3), repeat=n)])
)
ROOM = 4  # of the longest; a source of n symbols has room for n + 1


@pytest.fixture(scope="module")
def model() -> Transformer:
    settings = TransformerSettings(width=12, num_heads=2, feed_forward_width=16)
    model = Transformer(VOCABULARY.size, settings, nnx.Rngs(4))
    # Untrained logits are nearly even: larger ones make some answers much likelier than others.
    model.output.kernel[...] = 4 * model.output.kernel[...]
    return model


def log_probability(model, source, answer):
    """Of the tokens of an answer, which may be padded; padding is never written inside."""
    logits = model(source, decoder_input(answer, VOCABULARY.begin)).at[:, PAD].set(-jnp.inf)
    each = jax.nn.log_softmax(logits)[jnp.arange(len(answer)), answer]
    return jnp.where(answer != PAD, each, 0).sum()


def room(source) -> int:
    """Tokens that an answer may take."""
    return int((source != PAD).sum())


def all_answers(room):
    """Every answer that fits: up to an end token, or as many tokens as there is room for."""
    inside = [token for token in range(1, VOCABULARY.size) if token != VOCABULARY.end]
    for length in range(room):
        yield from ((*answer, VOCABULARY.end) for answer in itertools.product(inside, repeat=length))
    yield from itertools.product(inside, repeat=room)


def test_greedy_takes_the_likeliest_token_again_and_again(model):
    answers = jax.jit(lambda: greedy(model, VOCABULARY, SOURCES))()
    logits_of = jax.jit(lambda source, answer: model(source, decoder_input(answer, VOCABULARY.begin)))
    for source, answer in zip(SOURCES, answers):
        right = []
        while len(right) < room(source) and VOCABULARY.end not in right:
            logits = logits_of(source, jnp.array(right + [PAD] * (ROOM - len(right))))
            right.append(int(logits[len(right), 1:].argmax()) + 1)  # never padding
        assert answer.tolist() == right + [PAD] * (ROOM - len(right))


def test_a_beam_wide_enough_finds_the_likeliest_of_all_answers(model):
    answers = jax.jit(lambda: beam_search(model, VOCABULARY, SOURCES, 200))()
    scored = jax.jit(jax.vmap(lambda source, answer: log_probability(model, source, answer), (None, 0)))
    for source, found in zip(SOURCES, answers):
        every = list(all_answers(room(source)))
        scores = np.asarray(scored(source, jnp.array([answer + (PAD,) * (ROOM - len(answer)) for answer in every])))
        best = every[int(scores.argmax())]
        assert found.tolist() == [*best, *[PAD] * (ROOM - len(best))]


@pytest.mark.nightly
def test_a_wider_beam_never_finds_a_less_likely_answer_here_and_some_likelier(model):
    found = [jax.jit(lambda w=w: decode(model, VOCABULARY, SOURCES, w))() for w in (1, 2, 200)]
    scores = np.array([[float(log_probability(model, s, a)) for s, a in zip(SOURCES, rows)] for rows in found])
    assert (scores[2] >= scores[1] - 1e-5).all() and (scores[2] >= scores[0] - 1e-5).all()
    assert (scores[2] > scores[0] + 1e-3).any()  # greedy is not always best, or nothing would be tested


def test_a_beam_of_one_is_greedy(model):
    one = jax.jit(lambda: beam_search(model, VOCABULARY, SOURCES, 1))()
    np.testing.assert_array_equal(one, jax.jit(lambda: greedy(model, VOCABULARY, SOURCES))())


@pytest.mark.parametrize("width", [pytest.param(1, marks=pytest.mark.nightly), 3])
def test_answers_do_not_depend_on_the_rest_of_the_batch(model, width):
    answer = jax.jit(lambda sources: decode(model, VOCABULARY, sources, width))
    together = answer(SOURCES)
    for source, answered in zip(SOURCES, together):
        [alone] = answer(source[None, : room(source)])
        np.testing.assert_array_equal(answered[: room(source)], alone)
        assert (answered[room(source) :] == PAD).all()


def test_empty_sources_that_fill_up_a_batch_are_not_answered(model):
    for width in (1, 3):
        answers = jax.jit(lambda sources, w=width: decode(model, VOCABULARY, sources, w))(0 * SOURCES)
        assert (answers == PAD).all()


def test_with_its_length_given_an_answer_ends_there_and_nowhere_else(model):
    answers = jax.jit(lambda: greedy(EndGiven(model, VOCABULARY.end), VOCABULARY, SOURCES))()
    for source, answer in zip(SOURCES, answers):
        last = room(source) - 1
        assert answer[last] == VOCABULARY.end and (answer[:last] != VOCABULARY.end).all()
        assert (answer[last + 1 :] == PAD).all()


@pytest.mark.parametrize("end_given", [False, True])
def test_one_pass_confirms_what_greedy_writes_and_nothing_else(model, end_given):
    model = EndGiven(model, VOCABULARY.end) if end_given else model
    write = jax.jit(lambda: greedy(model, VOCABULARY, SOURCES))
    check = jax.jit(lambda answers: confirmed(model, VOCABULARY, SOURCES, answers))
    answers = write()
    assert check(answers).all()
    for place in range(ROOM):
        others = jnp.where(answers[:, place] == 1, 2, 1)
        changed = jnp.where(answers[:, place] == PAD, PAD, others)
        np.testing.assert_array_equal(
            check(answers.at[:, place].set(changed)), answers[:, place] == PAD, err_msg=str(place)
        )
