"""Batches from memory: full, every example once an epoch, and decided by (seed, step) alone."""

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
    assert 1 < len(buckets) <= 12
    seen = np.concatenate([bucket.source[:, 0] for bucket in buckets])
    assert sorted(seen) == list(range(1, 1_001))
    for bucket in buckets:
        for tokens, side in zip(bucket, (0, 1)):
            own = lengths[tokens[:, 0] - 1, side]
            np.testing.assert_array_equal((tokens != PAD).sum(1), own)
            assert tokens.shape[1] == own.max()


@pytest.mark.parametrize("size", [1, 2, 63])
def test_few_examples_and_equal_lengths_do(size):
    buckets = in_buckets([[7, 7]] * size, [[8]] * size)
    assert [bucket.source.shape for bucket in buckets] == [(size, 2)]


def test_an_epoch_has_every_example_once_but_for_filling_up():
    buckets, _ = numbered(500)
    batches = Batches(buckets, 16, seed=3)
    for epoch in range(2):
        seen, filled = collections.Counter(), 0
        for step in range(epoch * batches.steps_per_epoch, (epoch + 1) * batches.steps_per_epoch):
            number, examples = batches.at(step)
            assert examples.source.shape == (16, buckets[number].source.shape[1])
            np.testing.assert_array_equal(examples.source[:, 0], examples.target[:, 0])
            seen.update(examples.source[:, 0].tolist())
        filled = sum(seen.values()) - 500
        assert set(seen) == set(range(1, 501))
        assert filled == sum(-len(bucket.source) % 16 for bucket in buckets)


def test_a_batch_larger_than_the_data_repeats_them():
    [bucket] = in_buckets([[1], [2], [3]], [[1], [2], [3]])
    _, examples = Batches((bucket,), 8, seed=0).at(5)
    counts = np.bincount(examples.source[:, 0])[1:]
    assert sorted(counts) == [2, 3, 3]


def test_a_step_is_a_pure_function_of_seed_and_step():
    buckets, _ = numbered(500)
    forward = [Batches(buckets, 16, seed=3).at(step) for step in range(100)]
    backward = [Batches(buckets, 16, seed=3).at(step) for step in reversed(range(100))][::-1]
    for (one, a), (other, b) in zip(forward, backward):
        assert one == other
        np.testing.assert_array_equal(a.source, b.source)
    reseeded = [Batches(buckets, 16, seed=4).at(step) for step in range(100)]
    assert any(one != other for (one, _), (other, _) in zip(forward, reseeded))
    per_epoch = Batches(buckets, 16, seed=3).steps_per_epoch
    assert any(forward[k][0] != forward[k + per_epoch][0] for k in range(100 - per_epoch))


def test_stacked_batches_are_those_of_the_steps():
    buckets, _ = numbered(500)
    batches = Batches(buckets, 16, seed=3)
    stacked = batches.stacked(7, 12, 8)
    assert stacked.examples.source.shape[:2] == (8, 16)
    for place, step in enumerate(range(7, 12)):
        number, examples = batches.at(step)
        assert stacked.bucket[place] == number
        for room, tokens in zip(stacked.examples, examples):
            np.testing.assert_array_equal(room[place, :, : tokens.shape[1]], tokens)
            assert (room[place, :, tokens.shape[1] :] == PAD).all()
    assert all((room[5:] == PAD).all() for room in stacked.examples)
