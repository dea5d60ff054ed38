"""The measures of the claims about reading the source, compared with independent truths."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attn
from attn import interventions
from attn.runs import Run
from attn.studies.probes import answers_after_another, answers_without, held_out, source_maps, teacher_forced, untrained
from attn.studies.walkthrough import access, reading
from attn.tasks.examples import decoder_input


@pytest.fixture(scope="module")
def run(copy_run) -> Run:
    return attn.load(copy_run)


@pytest.fixture(scope="module")
def new_run() -> Run:
    """An untrained run of two layers, whose answers and weights differ from input to input."""
    sizes = dict(num_encoder_layers=2, num_decoder_layers=2, width=24, num_heads=4, feed_forward_width=20)
    run = untrained({"task": {"name": "reverse", "symbols": 6, "max_length": 6}, "model": sizes})
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: x + 0.3 * rng.normal(size=x.shape).astype(np.float32), run.params)
    return dataclasses.replace(run, params=params)


def test_the_chance_of_an_order_is_the_share_of_orders_that_are_equal():
    for string in ("a", "aa", "ab", "aab", "abca", "aabbc"):
        equal = [order == tuple(string) for order in itertools.permutations(string)]
        np.testing.assert_allclose(access.order_chance([*string]), np.mean(equal))


def test_strings_count_from_the_length_at_which_their_order_is_luck(monkeypatch):
    """Over all strings of two symbols: the mean chance is 1, 3/4, 1/2, 5/16, ..., (n + 1) / 2^n."""
    means = [np.mean([access.order_chance(each) for each in itertools.product("ab", repeat=n)]) for n in range(1, 9)]
    np.testing.assert_allclose(means, [(n + 1) / 2**n for n in range(1, 9)])
    for n, most in ((2, 0.8), (3, 0.5), (4, 0.49), (8, 0.04)):
        monkeypatch.setattr(access, "_CHANCE", most)
        assert access.shortest_beyond_chance(2) == n
    monkeypatch.undo()
    assert access.shortest_beyond_chance(16) == 7


@pytest.mark.parametrize("t", [0, 2])
def test_one_pass_gives_the_gradients_of_every_step(new_run, t):
    """The gradients of the logit of one step alone, by an intervention, give the same row."""
    questions = held_out(new_run, 4, 2)
    maps = teacher_forced(source_maps, new_run, questions)
    for row, (source, target) in enumerate(zip(questions.sources, questions.targets)):
        text, answer = (" ".join(map(str, each[:4])) for each in (source, target))
        slopes = interventions.weight_gradients(new_run, text, loss=lambda logits: -logits[t].max(), answer=answer)
        read = decoder_input(jnp.asarray(target), new_run.vocabulary.begin)
        weights = new_run.model(jnp.asarray(source), read, return_weights=True)[1]["cross"]
        expected = np.maximum(0, -slopes["cross"][-1, :, t] * np.asarray(weights[-1, :, t])).mean(0)
        assert expected.max() > 1e-3
        np.testing.assert_allclose(maps["gradients"][row, t], expected, atol=1e-5)
        np.testing.assert_allclose(maps["argmax"][row, t], weights[-1, :, t].mean(0), atol=1e-6)
        np.testing.assert_allclose(maps["largest"][row, t], weights[-1, :, t].max(0), atol=1e-6)


def test_another_symbol_is_read_at_one_step_alone(new_run):
    questions = held_out(new_run, 4, 20)
    found = teacher_forced(answers_after_another, new_run, questions)
    changed = 0
    for row, (source, target) in enumerate(zip(questions.sources, questions.targets)):
        read = decoder_input(jnp.asarray(target), new_run.vocabulary.begin)
        for t in (1, 3):
            other = read.at[t].set(2 if read[t] == 1 else read[t] - 1)
            logits = new_run.model(jnp.asarray(source), other)
            assert found[row, t] == logits[t].argmax()
            changed += int(logits[t].argmax() != new_run.model(jnp.asarray(source), read)[t].argmax())
    assert changed > 0


def test_values_are_averaged_by_the_distance_from_the_true_source():
    rng, n = np.random.default_rng(0), 4
    values, true = rng.normal(size=(3, n, n + 1)), np.arange(n)[::-1]
    found = dict(reading._by_distance(values, true))
    assert [*found] == [-2, -1, 0, 1, 2]
    for distance, mean in found.items():
        cells = [values[b, t, true[t] + distance] for b in range(3) for t in range(n) if 0 <= true[t] + distance < n]
        np.testing.assert_allclose(mean, np.mean(cells))


def test_what_maps_name_and_what_changes_are_counted_symbol_by_symbol(run):
    """The run copies, so that the true source of symbol t is t, and the symbol answered before it t - 1."""
    n = run.config.task.max_length
    result, questions = reading.pointing(run, n, 20), held_out(run, n, 20)
    maps = teacher_forced(source_maps, run, questions)
    _, answers, hidden = teacher_forced(answers_without, run, questions)
    another = teacher_forced(answers_after_another, run, questions)
    cells = [(b, t) for b in range(20) for t in range(n)]
    for name, each in maps.items():
        named = [int(np.argmax(each[cell])) for cell in cells]
        right = np.mean([j == t for (_, t), j in zip(cells, named)])
        np.testing.assert_allclose(result[f"{name}_is_true_source"], right)
        if name != "largest":
            changed = np.mean([hidden[b, j, t] != answers[b, t] for (b, t), j in zip(cells, named)])
            np.testing.assert_allclose(result[f"changed_without_{name}"], changed)
        if name == "argmax":
            before = np.mean([j == t - 1 for (_, t), j in zip(cells, named)])
            np.testing.assert_allclose(result["argmax_is_symbol_before"], before)
    read = [another[cell] != answers[cell] for cell in cells if cell[1] > 0]
    np.testing.assert_allclose(result["changed_by_symbol_read"], np.mean(read))
    assert result["rollout_is_true_source"] > 0.8 and result["changed_without_rollout"] > 0.5
