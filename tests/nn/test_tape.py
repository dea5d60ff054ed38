"""The tape: all of an answer in one pass, over the source and as many empty cells."""

import jax.numpy as jnp
import numpy as np
import pytest
from model_cases import LENGTH, SOURCE, TARGET, VOCABULARY, make, run

from attn.nn.encodings import ENCODINGS
from attn.nn.tape import Tape


def test_no_symbol_of_the_answer_reads_another():
    model = make("tape")
    np.testing.assert_array_equal(run(model), run(model, target=TARGET[::-1]))


def test_the_end_comes_where_the_length_says():
    logits = run(make("tape"), target=jnp.concatenate([TARGET, TARGET]))
    assert (logits[LENGTH - 1 :].argmax(-1) == VOCABULARY - 1).all()
    assert np.ptp(logits[: LENGTH - 1], axis=0).min() > 0


def test_cells_stand_after_the_source_and_ends_and_padding_nowhere(monkeypatch):
    seen = []
    passing = Tape._pass
    monkeypatch.setattr(Tape, "_pass", lambda model, tape, *rest: seen.append(tape) or passing(model, tape, *rest))
    make("tape", positions="sinusoidal")(SOURCE, TARGET, target_length=LENGTH)
    [tape] = seen
    symbols, cell = SOURCE[: int((SOURCE != 0).sum()) - 1], VOCABULARY - 2
    np.testing.assert_array_equal(tape[: len(symbols) + LENGTH - 1], [*symbols, *[cell] * (LENGTH - 1)])
    assert not tape[len(symbols) + LENGTH - 1 :].any()


def test_by_part_source_and_answer_are_counted_each_from_its_own_ends():
    symbols, cells = jnp.array(3), jnp.array(4)
    side = Tape._side(ENCODINGS["anchored"], 8, symbols, cells, None)
    np.testing.assert_array_equal(side.from_start()[: symbols + cells], [0, 1, 2, 0, 1, 2, 3])
    np.testing.assert_array_equal(side.from_end()[: symbols + cells], [2, 1, 0, 3, 2, 1, 0])
    np.testing.assert_array_equal(side.from_last_symbol(), side.from_end())
    through = Tape._side(ENCODINGS["rotary"], 8, symbols, cells, None)
    np.testing.assert_array_equal(through.index, np.arange(8))
    assert through.length == symbols + cells


def test_the_length_must_be_given():
    model = make("tape")
    with pytest.raises(ValueError, match="target_length"):
        model(SOURCE, TARGET)
