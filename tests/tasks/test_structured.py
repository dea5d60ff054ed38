"""Sources that a rule makes: masked strings and pictures, beside plain Python and NumPy."""

import itertools

import jax
import numpy as np
import pytest
from right_answers import interleaved, restored

from attn.tasks.generated import Generated, distinct_strings
from attn.tasks.held_out import is_held_out
from attn.tasks.sequences import Task
from attn.tasks.structured import GLYPHS

FILL, DIGIT = (
    Task("fill", symbols=3, min_length=1, max_length=7),
    Task("digit", symbols=16, min_length=16, max_length=16),
)


def every_string(symbols: int, length: int) -> np.ndarray:
    return np.array(list(itertools.product(range(1, symbols + 1), repeat=length)))


def questions_of(task: Task, strings: np.ndarray, length: int):
    return task.questions(strings, np.full(len(strings), length))


@pytest.fixture(scope="module")
def pictures() -> tuple[np.ndarray, np.ndarray]:
    """Pictures `[B 12 12]` of drawn strings, and their digits."""
    questions = questions_of(DIGIT, np.random.default_rng(0).integers(1, 17, (20_000, 16)), 16)
    return pixels(questions.sources[:, :16]), questions.targets[:, 0] - 1


def pixels(sources: np.ndarray) -> np.ndarray:
    """The pictures `[B 12 12]` of symbols, one bit at a time."""
    out = np.zeros((len(sources), 12, 12), int)
    for patch, y, x in itertools.product(range(16), range(3), range(3)):
        out[:, 3 * (patch // 4) + y, 3 * (patch % 4) + x] = (sources[:, patch] - 1) // 2 ** (3 * y + x) % 2
    return out


@pytest.mark.parametrize("symbols", [2, 10])
def test_masked_symbols_are_restored_by_their_neighbours(symbols):
    task = Task("fill", symbols, max_length=9)
    data, mask = Generated(task), symbols + 1
    questions = data.questions("test", 1_000, seed=0)
    masks = 0
    for source, length, target in zip(questions.sources.tolist(), questions.lengths, questions.targets.tolist()):
        assert source[length] == target[length] == task.vocabulary.end
        assert target[:length] == restored(source[:length], symbols)
        assert mask not in (source[0], source[length - 1]) and set(target[:length]) <= set(range(1, mask))
        assert all(a == b for a, b in zip(source, target) if a != mask)
        masks += source.count(mask)
    possible = ((questions.lengths - 1) // 2).sum()
    assert 0.45 < masks / possible < 0.55


@pytest.mark.parametrize("length", [3, 5, 7])
def test_neither_side_alone_tells_anything_of_a_masked_symbol(length):
    """Of all strings, those with one context to the left, or to the right, have every symbol equally often."""
    targets = questions_of(FILL, every_string(3, length // 2 + 1), length).targets[:, :length]
    for place in range(1, length, 2):
        for side in (slice(0, place), slice(place + 1, None)):
            counts = {}
            for row in targets:
                counts.setdefault(tuple(row[side]), np.zeros(3, int))[row[place] - 1] += 1
            assert all((each == each[0]).all() and each[0] > 0 for each in counts.values())
        both = {tuple(np.delete(row, place)) for row in targets}
        assert len(both) == len(targets)  # both sides tell it


@pytest.mark.parametrize(
    ("place", "side"), [(1, slice(0, 1)), (3, slice(0, 3)), (21, slice(22, 25)), (23, slice(24, 25))]
)
def test_the_masks_themselves_do_not_give_a_masked_symbol_away(place, side):
    """In the sources, with their masks, every symbol is equally frequent with every context on one side."""
    task = Task("fill", symbols=4, max_length=25)
    strings = np.random.default_rng(0).integers(1, 5, (60_000, 13))
    questions = questions_of(task, strings, 25)
    masked = questions.sources[:, place] == 5
    _, context = np.unique(questions.sources[masked][:, side], axis=0, return_inverse=True)
    counts = np.zeros((context.max() + 1, 4))
    np.add.at(counts, (context, questions.targets[masked, place] - 1), 1)
    expected, degrees = counts.sum(1, keepdims=True) / 4, 3 * len(counts)
    assert masked.mean() == pytest.approx(0.5, abs=0.02) and expected.min() > 40
    assert ((counts - expected) ** 2 / expected).sum() < degrees + 4 * (2 * degrees) ** 0.5


@pytest.mark.parametrize("task", [FILL, Task("fill", symbols=2, max_length=8)])
def test_different_strings_have_different_sources_so_that_no_held_out_source_is_trained_on(task):
    for length in range(1, task.max_length + 1):
        sources = questions_of(task, every_string(task.symbols, length // 2 + 1), length).sources
        assert len(np.unique(sources, axis=0)) == task.symbols ** (length // 2 + 1)
    batch = jax.jit(jax.vmap(task.sample))(jax.random.split(jax.random.key(0), 3_000))
    trained = {tuple(source) for source in np.asarray(batch.source).tolist()}
    for part in ("test", "validation"):
        questions = Generated(task).questions(part, 200, seed=0)
        assert trained.isdisjoint(map(tuple, questions.sources.tolist()))
    lengths = set((np.asarray(batch.source) != 0).sum(1) - 1)
    assert lengths == set(range(1, task.max_length + 1))


def test_lengths_are_those_of_sources_where_fewer_symbols_are_drawn():
    questions = Generated(FILL).questions_of_each_length("test", [4, 30], 10, seed=0)
    assert sorted(set(questions.lengths)) == [4, 30]
    assert ((questions.sources != 0).sum(1) == questions.lengths + 1).all()
    strings, lengths = distinct_strings(FILL, [4, 30], 20, seed=0)
    assert ((strings > 0).sum(1) == lengths // 2 + 1).all() and is_held_out(strings, 3).all()


def test_pictures_are_digits_anywhere_with_some_inverted_pixels(pictures):
    drawn, digits = pictures
    # [B 10 4 6]: pixels that differ from each glyph at each place; the right digit's nearest is the nearest of all.
    height, width = GLYPHS.shape[1:]
    differing = np.stack(
        [
            [
                (drawn[:2_000] != np.pad(glyph, ((y, 12 - height - y), (x, 12 - width - x)))).sum((1, 2))
                for y, x in itertools.product(range(13 - height), range(13 - width))
            ]
            for glyph in GLYPHS
        ]
    )  # [10 24 B]
    nearest = differing.min(1)  # [10 B]
    np.testing.assert_array_equal(nearest.argmin(0), digits[:2_000])
    assert 0.9 / 16 < nearest.min(0).mean() / 144 < 1.1 / 16
    places = np.bincount(differing.min(0).argmin(0), minlength=24)
    assert places.min() > 40  # of 83 on average


def test_every_digit_is_equally_frequent(pictures):
    counts = np.bincount(pictures[1], minlength=10)
    assert ((counts - 2_000) ** 2 / 2_000).sum() < 28  # chi-square of 9 degrees: below 28 with probability 0.999


def test_held_out_pictures_are_not_among_those_of_training():
    batch = jax.jit(jax.vmap(DIGIT.sample))(jax.random.split(jax.random.key(0), 20_000))
    trained = {tuple(source) for source in np.asarray(batch.source).tolist()}
    assert len(trained) == 20_000
    assert trained.isdisjoint(map(tuple, Generated(DIGIT).questions("test", 5_000, seed=0).sources.tolist()))


def test_fewer_patches_are_the_beginning_of_a_picture_and_more_have_no_ink():
    string = np.arange(1, 41)[None] % 16 + 1
    few, many = questions_of(DIGIT, string[:, :7], 7), questions_of(DIGIT, string, 40)
    assert few.sources[0].tolist()[7] == DIGIT.vocabulary.end and (few.sources[0, :7] <= 512).all()
    below = many.sources[0, 16:40] - 1
    assert sum(number.bit_count() for number in below.tolist()) / (24 * 9) < 0.15  # noise alone


def test_a_string_is_its_drawn_symbols_with_the_sums_of_neighbours_between_them():
    assert interleaved([3, 9, 4, 6], 10) == [3, 2, 9, 3, 4, 10, 6]
    for length in range(1, 9):
        strings = every_string(3, length // 2 + 1)
        targets = questions_of(FILL, strings, length).targets[:, :length].tolist()
        assert targets == [interleaved(string, 3)[:length] for string in strings.tolist()]


def test_masks_and_patches_can_be_typed():
    assert Task("fill", symbols=10).vocabulary.read("3 11 4") == [3, 11, 4]
    assert DIGIT.vocabulary.read("1 512") == [1, 512]
