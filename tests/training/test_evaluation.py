"""Metrics: every accepted answer counts, and the nearest is what errors are counted against."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh

from attn.nn.decoder_only import DecoderOnly, DecoderOnlySettings
from attn.tasks.examples import Questions, padded
from attn.tasks.generated import Generated
from attn.tasks.sequences import Task
from attn.tasks.vocabulary import Symbols
from attn.training import meshes
from attn.training.evaluation import Evaluator, build_programs, compare

VOCABULARY = Symbols(9)
END = VOCABULARY.end


def ended(*rows):
    return padded([[*row, END] for row in rows])


QUESTIONS = Questions(
    sources=ended([1, 1], [2, 2], [3]),
    lengths=np.array([2, 2, 1]),
    targets=ended([4, 5], [6, 7, 8, 9], [5, 5, 5], [1, 2, 3, 4]),
    source_rows=np.array([0, 0, 1, 2]),
)


def compared(*answers):
    return compare(QUESTIONS, padded(answers), VOCABULARY)


def test_any_accepted_answer_is_right():
    for right in ([4, 5, END], [6, 7, 8, 9, END]):
        overall = compared(right, [5, 5, 5, END], [1, 2, 3, 4, END]).overall()
        assert overall.exact_match == (3, 3)
        assert overall.error_rate.sum == 0
        assert overall.token_accuracy.sum == overall.token_accuracy.count == len(right) + 4 + 5


def test_errors_are_counted_against_the_nearest_answer():
    # 6 7 8 is one deletion from 6 7 8 9 and three edits from 4 5; 5 5 has lost a symbol; the third is right.
    metrics = compared([6, 7, 8, END], [5, 5, END], [1, 2, 3, 4, END])
    assert metrics.overall().exact_match == (1, 3)
    assert metrics.overall().error_rate == (1 + 1 + 0, 4 + 3 + 4)
    # At their places: 6 7 8 of 6 7 8 9 end; 5 5 of 5 5 5 end; all five.
    assert metrics.overall().token_accuracy == (3 + 2 + 5, 5 + 4 + 5)
    assert {n: row.exact_match for n, row in metrics.by_length()} == {1: (1, 1), 2: (0, 2)}


def test_an_answer_that_does_not_end_is_not_right():
    overall = compared([4, 5], [5, 5, 5, END], [1, 2, 3, 4, END]).overall()
    assert overall.exact_match == (2, 3)
    assert overall.error_rate.sum == 0
    assert overall.token_accuracy.sum == overall.token_accuracy.count - 1


def test_an_answer_may_be_longer_than_any_right_one():
    overall = compared([4, 5, *[1] * 10, END], [5, 5, 5, END], [1, 2, 3, 4, END]).overall()
    assert overall.error_rate.sum == 10
    assert overall.values()["error_rate"] == pytest.approx(10 / (2 + 3 + 4))


def test_what_no_model_can_write_is_never_right():
    impossible = QUESTIONS._replace(targets=np.where(QUESTIONS.targets == 5, -1, QUESTIONS.targets))
    unknown = VOCABULARY.size - 1
    answers = padded([[4, unknown, END], [unknown] * 3 + [END], [1, 2, 3, 4, END]])
    assert compare(impossible, answers, VOCABULARY).overall().exact_match == (1, 3)


@pytest.mark.parametrize("devices", [1, 2])
def test_the_loss_of_a_text_is_that_of_all_its_tokens_before_and_after_its_prompt(devices):
    """Against log-softmax in float64 of the logits of each whole string, one string at a time, without padding."""
    data = Generated(Task("palindrome", symbols=3, min_length=2, max_length=5))
    settings = DecoderOnlySettings("decoder_only", width=8, num_heads=2, feed_forward_width=8, num_layers=1)
    model = DecoderOnly(data.vocabulary.size, settings, nnx.Rngs(0))
    graphdef, params = nnx.split(model)
    mesh = Mesh(np.array(jax.devices()[:devices]), (meshes.DATA,))
    evaluator = Evaluator(data.vocabulary, mesh, {6: 4}, *build_programs(data.vocabulary, graphdef, mesh))
    questions = data.questions("test", 10, seed=0)
    found = evaluator.evaluate(meshes.replicate(params, mesh), questions).metrics

    begin, end, sums, counts = data.vocabulary.begin, data.vocabulary.end, np.zeros(6), np.zeros(6)
    logits_of = jax.jit(lambda text: model(jnp.zeros(1, int), text))
    for source, length in zip(questions.sources, questions.lengths):
        symbols = source[:length].tolist()
        string = [*symbols, begin, *symbols[::-1], end]
        logits = np.asarray(logits_of(jnp.array([begin, *string[:-1]])), np.float64)
        log_probability = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        sums[length] -= log_probability[np.arange(len(string)), string].sum()
        counts[length] += len(string)
    np.testing.assert_allclose(found.held_out_loss.sum, sums, rtol=1e-5)
    np.testing.assert_array_equal(found.held_out_loss.count, counts)
    assert found.overall().values()["held_out_loss"] == pytest.approx(sums.sum() / counts.sum(), rel=1e-5)


def test_answers_to_sources_have_no_loss_of_a_text():
    assert [*compared([4, 5, END], [5, 5, 5, END], [1, 2, 3, 4, END]).overall().values()] == [
        "exact_match",
        "token_accuracy",
        "error_rate",
    ]
