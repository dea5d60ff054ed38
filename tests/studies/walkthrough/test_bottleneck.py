"""The measures of the bottleneck, compared with independent truths, and what its checks decide."""

import jax.numpy as jnp
import numpy as np
import pytest

import attn
from attn.studies import probes
from attn.studies.walkthrough import bottleneck
from attn.studies.walkthrough.claims import verdict


@pytest.mark.parametrize(
    ("exact", "expected"),
    [
        ([1.0, 1.0, 0.0], 12.0),
        ([1.0, 0.75, 0.25], 12.0),
        ([1.0, 0.5, 0.25], 8.0),
        ([1.0, 0.6, 0.5], 16.0),  # never below
        ([0.4, 0.0, 0.0], 4.0),  # below from the start
        ([0.9, 0.2, 0.7], 4 + 4 * 0.4 / 0.7),  # the first time counts
    ],
)
def test_the_length_at_which_half_are_right_is_interpolated(exact, expected):
    assert bottleneck.half_length([4, 8, 16], exact) == pytest.approx(expected)


@pytest.fixture(scope="module")
def run(copy_run) -> attn.runs.Run:
    return attn.load(copy_run)


def test_the_likelihoods_are_those_of_the_correct_symbols(run):
    questions = probes.held_out(run, 4, 3)
    result = probes.teacher_forced(probes.log2_likelihoods, run, questions)
    assert result.shape == (3, 4)
    for source, target, likelihoods in zip(questions.sources, questions.targets, result):
        read = np.concatenate([[run.vocabulary.begin], target[:-1]])
        logits = np.asarray(run.model(jnp.asarray(source), jnp.asarray(read)), np.float64)
        odds = np.exp(logits - logits.max(-1, keepdims=True))
        expected = [np.log2(odds[t, target[t]] / odds[t].sum()) for t in range(4)]
        np.testing.assert_allclose(likelihoods, expected, atol=1e-4)


@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_the_last_state_is_all_that_a_decoder_without_attention_starts_from(name):
    settings = {"task": {"max_length": 6}, "model": {"name": name, "width": 8}}
    untrained = probes.untrained(settings)
    [state] = probes.teacher_forced(probes.last_state, untrained, probes.held_out(untrained, 5, 1))
    cache, _ = untrained.model.start(jnp.asarray(probes.held_out(untrained, 5, 1).sources[0]), 6)
    assert state.shape == (16 if name == "lstm" else 8,)
    np.testing.assert_allclose(state, np.concatenate([np.ravel(part) for part in cache.own[0]]), atol=1e-6)


def numbers(half: dict, held: dict) -> dict:
    """Return numbers in which everything is as the claim says, but for these lengths and bits, by model."""

    def run(name: str, place: int) -> dict:
        attention = name in ("LSTM with attention", "Transformer")
        return {
            "seed": 0,
            "exact_match": [1.0, 1.0] if attention else [1.0, 0.0],
            "half_length": 40.0 if attention else half[name][place],
            "answered_bits": [40.0, 80.0] if attention else [38.0, 50.0],
            "probed_bits": [] if name == "Transformer" else [held.get(name, [5, 9])[place]] * 2,
            "gradient_before": [1.0, 0.5, 1.0] if attention else [1.0, 0.5, 0.0],
            "gradient_after": [1.0, 0.5, 20.0] if attention else [1.0, 0.5, 1.0],
        }

    rows = [
        {
            "width": width,
            "models": {
                name: {"parameters": 100, "examples": 10, "width": width, "runs": [run(name, place)]}
                for name in ("LSTM", "GRU", "LSTM with attention", "Transformer")
            },
        }
        for place, width in enumerate((32, 64))
    ]
    longer = {"times": 4, "model": rows[0]["models"]["LSTM"]}
    return {"lengths": [8, 40], "probed": [20, 40], "bits": 2.0, "rows": rows, "longer": longer}


PROPORTIONAL = {"LSTM": [12.0, 24.0], "GRU": [10.0, 20.0]}


def test_states_that_hold_more_and_answer_more_in_proportion_pass():
    result = numbers(PROPORTIONAL, {"LSTM": [6.0, 12.0], "GRU": [5.0, 10.0]})
    assert verdict(bottleneck.check(result)) == "holds"
    assert len(bottleneck.tables(result)[0].rows) == 8 and bottleneck.draw(result).axes


@pytest.mark.parametrize(
    ("half", "held", "says"),
    [
        (
            {"LSTM": [12.0, 13.0], "GRU": [10.0, 20.0]},
            {"LSTM": [6.0, 6.5], "GRU": [5.0, 10.0]},
            "widest over narrowest",
        ),
        (PROPORTIONAL, {"LSTM": [6.0, 6.0], "GRU": [5.0, 10.0]}, "largest over smallest"),
    ],
)
def test_a_width_that_does_not_matter_or_not_in_proportion_fails(half, held, says):
    failed = [check.says for check in bottleneck.check(numbers(half, held)) if not check.holds()]
    assert failed and any(says in words for words in failed)


def test_bits_below_zero_are_not_in_proportion():
    result = numbers(PROPORTIONAL, {"LSTM": [-6.0, -12.0], "GRU": [-5.0, -10.0]})
    assert any("largest over smallest" in check.says for check in bottleneck.check(result) if not check.holds())


def test_a_length_that_grows_with_the_steps_fails():
    result = numbers(PROPORTIONAL, {"LSTM": [6.0, 12.0], "GRU": [5.0, 10.0]})
    [run] = result["longer"]["model"]["runs"]
    result["longer"]["model"] = {"runs": [{**run, "half_length": 20.0}]}
    assert [check.says for check in bottleneck.check(result) if not check.holds()] == [
        "length at which exact match is one half, LSTM of width 32, with 4 times the steps over as usual: the steps do "
        "not limit it"
    ]


def test_without_short_strings_the_claim_is_undecided():
    result = numbers(PROPORTIONAL, {"LSTM": [6.0, 12.0], "GRU": [5.0, 10.0]})
    result["rows"][0]["models"]["GRU"]["runs"][0]["exact_match"][0] = 0.98
    assert verdict(bottleneck.check(result)) == "undecided"
