"""The tape: all of an answer in one pass, over the source and as many empty cells."""

import jax.numpy as jnp
import numpy as np
import pytest
from model_cases import LENGTH, SOURCE, TARGET, VOCABULARY, make, run

from attn.mechanisms import LengthUnknown, Rows
from attn.studies.mechanisms import TapeExample, _from_end, _from_start
from attn.studies.tape import Tape


def test_no_symbol_of_the_answer_reads_another():
    model = make("tape")
    np.testing.assert_array_equal(run(model), run(model, inputs=TARGET[::-1]))


def test_the_end_comes_where_the_length_says():
    logits = run(make("tape"), inputs=jnp.concatenate([TARGET, TARGET]))
    assert (logits[LENGTH - 1 :].argmax(-1) == VOCABULARY - 1).all()
    assert np.ptp(logits[: LENGTH - 1], axis=0).min() > 0


@pytest.fixture
def passed(monkeypatch):
    """The tapes that models run on, and their rows."""
    seen = []
    whole = Tape.run
    monkeypatch.setattr(
        Tape, "run", lambda model, tape, rows, *rest: seen.append((tape, rows)) or whole(model, tape, rows, *rest)
    )
    return seen


def test_cells_stand_after_the_source_and_ends_and_padding_nowhere(passed):
    make("tape", mechanism="sinusoidal")(SOURCE, TARGET, answer_length=LENGTH)
    [(tape, rows)] = passed
    symbols, cell = SOURCE[: int((SOURCE != 0).sum()) - 1], VOCABULARY - 2
    np.testing.assert_array_equal(tape[: len(symbols) + LENGTH - 1], [*symbols, *[cell] * (LENGTH - 1)])
    assert not tape[len(symbols) + LENGTH - 1 :].any()
    # Most mechanisms count through it.
    np.testing.assert_array_equal(rows.position, np.arange(len(tape)))
    assert rows.length == len(symbols) + LENGTH - 1


def test_source_and_answer_are_counted_each_from_its_own_ends_where_ends_count():
    symbols, cells = jnp.array(3), jnp.array(4)
    example = TapeExample(symbols + 1, cells + 1, symbols + cells, symbols=symbols, cells=cells)
    rows = Rows(jnp.arange(8), total=symbols + cells, example=example)
    np.testing.assert_array_equal(_from_start(rows)[: symbols + cells], [0, 1, 2, 0, 1, 2, 3])
    np.testing.assert_array_equal(_from_end(rows)[: symbols + cells], [2, 1, 0, 3, 2, 1, 0])
    np.testing.assert_array_equal(_from_end(rows, symbols=True), _from_end(rows))


def test_the_example_of_a_tape_holds_its_symbols_and_cells(passed):
    make("tape", mechanism="anchored")(SOURCE, TARGET, answer_length=LENGTH)
    [(_, rows)] = passed
    example = rows.example
    assert (example.source_length, example.answer_length, example.symbols, example.cells) == (5, LENGTH, 4, LENGTH - 1)
    assert example.num_positions == 4 + LENGTH - 1


def test_the_length_must_be_given():
    model = make("tape")
    with pytest.raises(LengthUnknown, match="the length of the answer"):
        model(SOURCE, TARGET)
