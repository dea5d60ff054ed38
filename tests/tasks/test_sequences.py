"""Tasks: right answers, honest hold-out, pure functions of a key."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from right_answers import RIGHT

from attn.tasks.examples import PAD, Example, decoder_input
from attn.tasks.generated import Generated, distinct_strings
from attn.tasks.held_out import is_held_out
from attn.tasks.rules import RULES
from attn.tasks.sequences import Task


def draw(task: Task, number: int, *, held_out=False, seed=0):
    keys = jax.random.split(jax.random.key(seed), number)
    return jax.jit(jax.vmap(lambda key: task.sample(key, held_out=held_out)))(keys)


def lengths_of(batch: Example) -> np.ndarray:
    """Symbols of each source: all but its end token."""
    return np.asarray((batch.source != PAD).sum(1) - 1)


def test_every_rule_has_its_right_answers():
    assert set(RIGHT) == {name for name in RULES if RULES[name].source is None}  # the others: test_structured.py


SOURCES = [name for name in RIGHT if not RULES[name].continues]  # those whose examples have one


@pytest.mark.some(3)
@pytest.mark.parametrize("name", SOURCES)
def test_examples_are_right_ended_and_padded(name):
    task = Task(name, symbols=5, min_length=2, max_length=7)
    batch, vocabulary = draw(task, 200), task.vocabulary
    lengths = lengths_of(batch)
    for source, target, length in zip(*map(np.asarray, batch), lengths):
        symbols = source[:length].tolist()
        assert set(symbols) <= set(range(1, 6))
        assert source.tolist() == symbols + [vocabulary.end] + [0] * (7 - length)
        right = [*RIGHT[name](symbols, 5), vocabulary.end]
        assert target.tolist() == right + [0] * (vocabulary.capacity(7) - len(right))
        assert decoder_input(jnp.asarray(target), vocabulary.begin).tolist() == [vocabulary.begin, *target[:-1]]
    assert set(lengths_of(batch)) == set(range(2, 8))


def test_an_answer_that_continues_its_source_is_one_string_with_it():
    task = Task("palindrome", symbols=5, min_length=2, max_length=7)
    begin, end = task.vocabulary.begin, task.vocabulary.end
    examples, strings = draw(task, 300), set()
    assert examples.source.shape == (300, 1) and (examples.source == PAD).all()
    for target in examples.target.tolist():
        symbols = target[: target.index(begin)]
        strings.add(tuple(symbols))
        string = [*symbols, begin, *symbols[::-1], end]
        assert set(symbols) <= set(range(1, 6)) and target == string + [PAD] * (16 - len(string))
    assert {len(string) for string in strings} == set(range(2, 8))
    questions = Generated(task).questions("test", 300, seed=0)
    for source, length, target in zip(questions.sources.tolist(), questions.lengths, questions.targets.tolist()):
        symbols = source[:length]
        assert source == [*symbols, begin] + [PAD] * (7 - length)
        assert target == [*symbols[::-1], end] + [PAD] * (7 - length)
        assert is_held_out(np.array([symbols]), 5)[0] and tuple(symbols) not in strings


@pytest.mark.parametrize("held_out", [False, True])
def test_samples_are_of_the_wanted_part(held_out):
    task = Task(symbols=3, max_length=5)
    batch = draw(task, 2_000, held_out=held_out)
    symbols = np.where(np.asarray(batch.source) <= 3, batch.source, 0)
    assert (is_held_out(symbols, 3) == held_out).all()
    assert set(lengths_of(batch)) == set(range(1, 6))


def test_no_string_of_the_evaluation_is_ever_sampled_for_training():
    task = Task(symbols=2, max_length=6)
    batch = draw(task, 4_000)
    trained = {tuple(s[:n]) for s, n in zip(np.asarray(batch.source), lengths_of(batch))}
    strings, lengths = distinct_strings(task, range(1, 7), 1_000, seed=0)
    evaluated = {tuple(s[:n]) for s, n in zip(strings, lengths)}
    assert trained.isdisjoint(evaluated)
    everything = {s for n in range(1, 7) for s in itertools.product((1, 2), repeat=n)}
    assert trained | evaluated == everything  # and nothing is lost between the two


@pytest.mark.parametrize("symbols", [2, 3, 7, 16, 30])
def test_both_parts_occur_at_every_length(symbols):
    for length in range(1, 5 if symbols < 16 else 4):
        strings = np.array(list(itertools.product(range(1, symbols + 1), repeat=length)))
        fraction = is_held_out(strings, symbols).mean()
        # One residue of the first symbol modulo min(V, 10), for any continuation.
        assert 0 < fraction < 1
        assert abs(fraction - 1 / min(symbols, 10)) < 0.05


def test_the_hash_depends_on_every_symbol_and_not_on_padding_or_library():
    rng = np.random.default_rng(0)
    strings = rng.integers(1, 17, (3_000, 9))
    held = is_held_out(strings, 16)
    np.testing.assert_array_equal(held, is_held_out(jnp.asarray(strings), 16))
    np.testing.assert_array_equal(held, is_held_out(np.pad(strings, ((0, 0), (0, 11))), 16))
    for place in range(9):
        changed = strings.copy()
        changed[:, place] = changed[:, place] % 16 + 1
        assert 0.1 < (is_held_out(changed, 16) != held).mean() < 0.3  # 0.18 if independent
    same_symbols = strings[:, ::-1]
    assert (is_held_out(same_symbols, 16) != held).any()


def test_sampling_is_a_pure_function_of_the_key():
    task = Task()
    for one, same, other in zip(draw(task, 8, seed=1), draw(task, 8, seed=1), draw(task, 8, seed=2)):
        np.testing.assert_array_equal(one, same)
        assert (one != other).any()


def test_evaluated_strings_are_distinct_and_of_every_length():
    strings, lengths = distinct_strings(Task(), range(1, 33), 10_000, seed=0)
    assert len(strings) == len(np.unique(strings, axis=0)) == 10_000
    assert is_held_out(strings, 16).all()
    assert ((strings > 0).sum(1) == lengths).all()
    counts = np.bincount(lengths)[1:]
    assert (counts > 0).all()
    # Lengths 1 and 2 give all they have, the rest share evenly.
    for length in (1, 2):
        every = np.array(list(itertools.product(range(1, 17), repeat=length)))
        assert counts[length - 1] == is_held_out(every, 16).sum()
    assert counts[2:].max() - counts[2:].min() <= 1


def test_fewer_strings_than_asked_for_are_all_of_them():
    strings, lengths = distinct_strings(Task(symbols=2), [1, 2, 3], 1_000, seed=0)
    assert len(strings) == 1 + 2 + 4
    assert np.bincount(lengths).tolist() == [0, 1, 2, 4]


def test_questions_of_each_length_come_in_equal_numbers():
    lengths = Generated(Task()).questions_of_each_length("test", [4, 50, 7], 20, seed=3).lengths
    assert {n: int((lengths == n).sum()) for n in (4, 7, 50)} == {4: 20, 7: 20, 50: 20}


@pytest.mark.parametrize("name", SOURCES)
def test_questions_accept_what_is_right(name):
    task = Task(name, symbols=5, min_length=2, max_length=6)
    questions = Generated(task).questions("test", 100, seed=0)
    for source, length, target in zip(questions.sources, questions.lengths, questions.targets):
        symbols = source[:length].tolist()
        assert source.tolist() == [*symbols, task.vocabulary.end] + [0] * (6 - length)
        right = [*RIGHT[name](symbols, 5), task.vocabulary.end]
        assert target.tolist() == right + [0] * (task.vocabulary.capacity(6) - len(right))
    assert questions.source_rows.tolist() == list(range(100))


@pytest.mark.parametrize("symbols", [2, 3, 6, 16])
def test_validation_and_test_share_no_string_whatever_their_seeds(symbols):
    data, drawn = Generated(Task(symbols=symbols, max_length=10)), {"test": set(), "validation": set()}
    for part, strings in drawn.items():
        for seed in (0, 1):
            questions = data.questions(part, 3_000, seed)
            strings |= {tuple(row[:n]) for row, n in zip(questions.sources.tolist(), questions.lengths)}
        questions = data.questions_of_each_length(part, [8, 9, 30], 50, seed=2)  # also longer than in training
        strings |= {tuple(row[:n]) for row, n in zip(questions.sources.tolist(), questions.lengths)}
    assert drawn["test"].isdisjoint(drawn["validation"])
    every = [np.array(list(itertools.product(range(1, symbols + 1), repeat=n))) for n in range(1, 4)]
    held_out = {tuple(row) for strings in every for row in strings[is_held_out(strings, symbols)].tolist()}
    # Short lengths have few held-out strings: all of them are test, and validation has none of theirs.
    short = [n for n in (1, 2, 3) if symbols**n // min(symbols, 10) < 100]
    assert {row for row in held_out if len(row) in short} <= drawn["test"]
    assert {len(row) for row in drawn["validation"]}.isdisjoint(short)


def test_a_task_of_short_strings_has_none_for_validation():
    data = Generated(Task(symbols=2, max_length=7))
    assert len(data.questions("validation", 100, seed=0).lengths) == 0
    assert len(data.questions("test", 1_000, seed=0).lengths) == 2**7 - 1  # a half of the strings of 1 to 7
