"""Batches from memory: every example once per epoch, as a function of (seed, step)."""

import collections

import numpy as np
import pytest

from attn.tasks.examples import PAD
from attn.tasks.stored import Batches, in_buckets


def numbered(sizes, seed=0):
    """Examples of random lengths whose first token tells which one it is, in buckets."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 30, (sizes, 2))
    sources = [[k + 1] * s for k, (s, _) in enumerate(lengths)]
    return in_buckets(sources, [[k + 1] * t for k, (_, t) in enumerate(lengths)]), lengths


def test_buckets_hold_every_example_once_as_wide_as_the_longest():
    buckets, lengths = numbered(1_000)
    assert 1 < len(buckets) <= 24
    seen = np.concatenate([bucket.source[:, 0] for bucket in buckets])
    assert sorted(seen) == list(range(1, 1_001))
    for bucket in buckets:
        for tokens, side in zip(bucket, (0, 1)):
            expected = lengths[tokens[:, 0] - 1, side]
            np.testing.assert_array_equal((tokens != PAD).sum(1), expected)
            assert tokens.shape[1] == expected.max()


@pytest.mark.parametrize("size", [1, 2, 63])
def test_few_examples_and_equal_lengths_do(size):
    buckets = in_buckets([[7, 7]] * size, [[8]] * size)
    assert [bucket.source.shape for bucket in buckets] == [(size, 2)]


def test_a_bucket_is_the_smallest_that_holds_the_example():
    buckets, lengths = numbered(1_000)
    widths = np.array([[tokens.shape[1] for tokens in bucket] for bucket in buckets])
    for number, bucket in enumerate(buckets):
        expected = lengths[bucket.source[:, 0] - 1]
        fits = (widths >= expected[:, None]).all(2)
        assert (np.where(fits, widths.sum(1), 1_000).min(1) == widths[number].sum()).all()


def test_a_long_example_is_alone():
    lengths = [*np.random.default_rng(0).integers(5, 12, 300), 900]
    buckets = in_buckets([[1] * n for n in lengths], [[1] * n for n in lengths])
    assert [len(bucket.source) for bucket in buckets if bucket.source.shape[1] == 900] == [1]
    assert max(bucket.source.shape[1] for bucket in buckets if bucket.source.shape[1] < 900) == 11


def test_an_epoch_has_every_example_once_but_for_filling_up():
    buckets, _ = numbered(500)
    batches = Batches(buckets, 16, seed=3)
    for epoch in range(2):
        seen, steps = collections.Counter(), collections.Counter()
        for step in range(epoch * batches.steps_per_epoch, (epoch + 1) * batches.steps_per_epoch):
            number, examples = batches.batch(step)
            assert examples.source.shape == (batches.sizes[number], buckets[number].source.shape[1])
            np.testing.assert_array_equal(examples.source[:, 0], examples.target[:, 0])
            seen.update(examples.source[:, 0].tolist())
            steps[number] += 1
        assert set(seen) == set(range(1, 501))
        assert max(seen.values()) <= 2
        for number, bucket in enumerate(buckets):
            drawn = sum(seen[example] for example in bucket.source[:, 0].tolist())
            assert drawn - len(bucket.source) < steps[number]  # fewer come twice than there are batches


@pytest.mark.parametrize(
    ("examples", "most", "sizes"),
    [(3, 8, [3]), (8, 8, [8] * 1), (9, 8, [5] * 2), (17, 8, [6] * 3), (160, 8, [8] * 20), (1, 64, [1])],
)
def test_batches_of_a_bucket_are_of_one_size_with_hardly_an_example_twice(examples, most, sizes):
    buckets = in_buckets([[k + 1] for k in range(examples)], [[1]] * examples)
    batches = Batches(buckets, most, seed=0)
    assert [len(batches.batch(step)[1].source) for step in range(batches.steps_per_epoch)] == sizes


def test_a_step_is_a_pure_function_of_seed_and_step():
    buckets, _ = numbered(500)
    forward = [Batches(buckets, 16, seed=3).batch(step) for step in range(100)]
    backward = [Batches(buckets, 16, seed=3).batch(step) for step in reversed(range(100))][::-1]
    for (one, a), (other, b) in zip(forward, backward):
        assert one == other
        np.testing.assert_array_equal(a.source, b.source)
    reseeded = [Batches(buckets, 16, seed=4).batch(step) for step in range(100)]
    assert any(one != other for (one, _), (other, _) in zip(forward, reseeded))
    per_epoch = Batches(buckets, 16, seed=3).steps_per_epoch
    assert any(forward[k][0] != forward[k + per_epoch][0] for k in range(100 - per_epoch))


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_stacked_batches_are_those_of_the_steps_divided_over_devices(devices):
    buckets, _ = numbered(500)
    batches = Batches(buckets, 16, seed=3)
    assert len(set(batches.sizes)) > 1
    stacked = batches.stacked(7, 20, 16, devices)
    assert stacked.examples.source.shape[:2] == (16, 16)
    for place, step in enumerate(range(7, 20)):
        number, examples = batches.batch(step)
        assert stacked.bucket[place] == number
        for wide, tokens in zip(stacked.examples, examples):
            each = -(-len(tokens) // devices)
            rows = wide[place].reshape(devices, 16 // devices, -1)
            assert (rows[:, each:] == PAD).all()
            flat = rows[:, :each].reshape(devices * each, -1)
            np.testing.assert_array_equal(flat[: len(tokens), : tokens.shape[1]], tokens)
            assert (flat[len(tokens) :] == PAD).all() and (flat[:, tokens.shape[1] :] == PAD).all()
    assert all((wide[13:] == PAD).all() for wide in stacked.examples)


@pytest.mark.parametrize("devices", [1, 2, 4])
def test_stacked_batches_are_no_larger_than_the_examples(devices):
    """However large a batch may be: rows are those of the largest batch, filled up to the devices."""
    buckets, _ = numbered(108)
    batches = Batches(buckets, 100_000, seed=0)
    stacked = batches.stacked(0, 5, 7, devices)
    rows = stacked.examples.source.shape[1]
    assert 0 <= rows - max(len(bucket.source) for bucket in buckets) < devices and rows % devices == 0
    for place in range(5):
        number, expected = batches.batch(place)
        each = -(-len(expected.source) // devices)
        by_device = stacked.examples.source[place].reshape(devices, rows // devices, -1)
        found = by_device[:, :each].reshape(devices * each, -1)
        width = expected.source.shape[1]
        np.testing.assert_array_equal(found[: len(expected.source), :width], expected.source)
        assert stacked.bucket[place] == number and (found[len(expected.source) :] == PAD).all()
        assert (by_device[:, each:] == PAD).all()
