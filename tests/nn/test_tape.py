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


def test_cells_stand_after_the_source_and_padding_nowhere():
    """With places added, a cell's logits depend on how many symbols stand before it; ends and padding do not count."""
    model = make("tape", positions="sinusoidal")
    other_end = SOURCE.at[4].set(2)  # the end token of the source, which is left out of the tape
    np.testing.assert_array_equal(run(model, other_end), run(model))
    shorter = jnp.array([3, 1, 4, 9, 0, 0, 0])
    assert np.abs(run(model, shorter)[:4] - run(model)[:4]).max() > 1e-3


def test_by_part_source_and_answer_are_counted_each_from_its_own_ends():
    encoding, symbols, cells = ENCODINGS["anchored"], jnp.array(3), jnp.array(4)
    index, length = Tape._counted(encoding, 8, symbols, cells)
    side = encoding.side(index, length, None)
    np.testing.assert_array_equal(side.from_start()[: symbols + cells], [0, 1, 2, 0, 1, 2, 3])
    np.testing.assert_array_equal(side.from_end()[: symbols + cells], [2, 1, 0, 3, 2, 1, 0])
    through = Tape._counted(ENCODINGS["rotary"], 8, symbols, cells)
    np.testing.assert_array_equal(through[0], np.arange(8))
    assert through[1] == symbols + cells


def test_the_length_must_be_given():
    model = make("tape")
    with pytest.raises(ValueError, match="target_length"):
        model(SOURCE, TARGET)
