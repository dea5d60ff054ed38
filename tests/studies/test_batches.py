"""Batches of one length each: which lengths they have, and their shapes."""

import jax
import numpy as np
import pytest

from attn.studies.batches import OneLength, ShortStrings
from attn.tasks import Task

TASK = Task("reverse", symbols=4, min_length=3, max_length=12)


@pytest.mark.parametrize(("source", "power"), [(OneLength, 0), (ShortStrings, 0.5)])
def test_lengths_have_the_probabilities_that_are_named(source, power):
    """P(n) is the integral of x^-power from n to n + 1, up to a constant."""
    drawn = np.asarray(jax.vmap(source(TASK).draw_length)(jax.random.split(jax.random.key(0), 20_000)))
    x = np.arange(3, 14.0)
    expected = np.diff(x ** (1 - power))
    counts = np.bincount(drawn, minlength=13)
    assert counts[:3].sum() == 0 and len(counts) == 13
    np.testing.assert_allclose(counts[3:] / 20_000, expected / expected.sum(), atol=0.01)


@pytest.mark.parametrize("source", [OneLength, ShortStrings])
def test_a_batch_has_one_length_and_the_next_shape_that_holds_it(source):
    batches = source(TASK).batches(5, seed=0)
    widths = [bucket.source for bucket in batches.buckets]
    assert widths == [4, 7, 10, 13]  # symbols and the end token
    seen = set()
    for step in range(20):
        number, batch = batches.batch(step)
        lengths = (batch.source != 0).sum(1)
        assert len(set(lengths.tolist())) == 1 and batch.source.shape == (5, widths[number])
        assert lengths[0] <= widths[number] and (number == 0 or lengths[0] > widths[number - 1])
        seen.add(int(lengths[0]))
    assert len(seen) > 4
