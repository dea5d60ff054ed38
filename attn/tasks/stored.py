"""Examples that are there once and for all: in buckets of like lengths, in an order that (seed, step) decides."""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from attn.tasks.examples import PAD, Example, Questions, padded
from attn.tasks.vocabulary import InputError, Vocabulary

_ENOUGH = 0.2  # share of padding below which another bucket, one more program to compile, is not worth it
_MOST_BUCKETS = 12
_FEWEST_EXAMPLES = 64  # in a bucket, unless that is more than a twelfth of all: few would come too often
_CANDIDATES = 128  # places between which the borders of buckets are chosen


class StackedBatches(NamedTuple):
    """The batches of some steps: for each the number of its bucket, and its examples, padded to the widest bucket."""

    bucket: Int[np.ndarray, "K"]
    examples: Example


@dataclasses.dataclass(frozen=True, eq=False)
class Batches:
    """The batches of a run: at every step full, of one bucket, and decided by (seed, step) alone.

    In an epoch every example comes once, in an order of its own; a bucket's last batch is filled up with some that
    come twice.

    Args:
      buckets: examples `[n S], [n T]` of one width each.
      batch_size: B.
      seed: of the order.
    """

    buckets: tuple[Example, ...]
    batch_size: int
    seed: int

    @functools.cached_property
    def steps_per_epoch(self) -> int:
        """Batches of an epoch."""
        return sum(-(-len(bucket.source) // self.batch_size) for bucket in self.buckets)

    def at(self, step: int) -> tuple[int, Example]:
        """The number of the bucket and the batch `[B S], [B T]` of a step."""
        epoch, place = divmod(step, self.steps_per_epoch)
        sizes = tuple(len(bucket.source) for bucket in self.buckets)
        number, rows = _epoch(sizes, self.batch_size, self.seed, epoch)[place]
        return number, Example(*(tokens[rows] for tokens in self.buckets[number]))

    def stacked(self, step: int, until: int, count: int) -> StackedBatches:
        """The batches from `step` up to `until`, and as many empty ones as make them `count`."""
        widths = (max(tokens.shape[1] for tokens in side) for side in zip(*self.buckets))
        buckets = np.zeros(count, np.int32)
        examples = Example(*(np.full((count, self.batch_size, width), PAD, np.int32) for width in widths))
        for place, (number, batch) in enumerate(map(self.at, range(step, until))):
            buckets[place] = number
            for room, tokens in zip(examples, batch):
                room[place, :, : tokens.shape[1]] = tokens
        return StackedBatches(buckets, examples)


@functools.lru_cache(maxsize=2)
def _epoch(sizes: tuple[int, ...], batch_size: int, seed: int, epoch: int) -> list[tuple[int, np.ndarray]]:
    """The batches of an epoch in their order: (number of the bucket, rows `[B]` in it)."""
    rng = np.random.default_rng([seed, epoch])
    batches = []
    for number, size in enumerate(sizes):
        rows = np.resize(rng.permutation(size), -(-size // batch_size) * batch_size)
        batches += [(number, some) for some in rows.reshape(-1, batch_size)]
    return [batches[k] for k in rng.permutation(len(batches))]


@dataclasses.dataclass(frozen=True, eq=False)
class Stored:
    """What is learnt from examples in memory.

    Args:
      name: of the data.
      vocabulary: between text and tokens.
      training: the examples to train on, in buckets.
      parts: questions by the name of their part, "validation" and "test" among them.
      about: what was read, in lines for people.
      files: names and SHA-256 digests of the files that were read.
    """

    name: str
    vocabulary: Vocabulary
    training: tuple[Example, ...]
    parts: dict[str, Questions]
    about: tuple[str, ...]
    files: dict[str, str] = dataclasses.field(default_factory=dict)

    def __repr__(self) -> str:
        return "\n".join([f"{self.name}, stored", *self.describe()])

    @property
    def longest_source(self) -> int:
        """S: tokens of the longest source to train on, to validate or to test with, its end included."""
        asked = [self.parts[part].sources for part in ("validation", "test")]
        return max(sources.shape[1] for sources in (*(bucket.source for bucket in self.training), *asked))

    @property
    def padding(self) -> float:
        """Share of an epoch's tokens that are padding."""
        return padding_share(self.training)

    def batches(self, batch_size: int, seed: int) -> Batches:
        """What to train on, step by step."""
        return Batches(self.training, batch_size, seed)

    def questions(self, part: str, total: int | None, seed: int) -> Questions:
        """Questions of a part: `total` of them, drawn by the seed, or all."""
        questions = self.part(part)
        count = len(questions.lengths)
        if total is None or total >= count:
            return questions
        return questions.chosen(np.sort(np.random.default_rng(seed).permutation(count)[:total]))

    def questions_of_each_length(self, part: str, lengths: Sequence[int], each: int, seed: int) -> Questions:
        """Up to `each` questions of a part for each length of the source.

        Raises:
          InputError: the part has none of these lengths.
        """
        questions = self.part(part)
        order = np.random.default_rng(seed).permutation(len(questions.lengths))
        rows = np.concatenate([order[questions.lengths[order] == length][:each] for length in lengths])
        if not len(rows):
            raise InputError(f"no source of {part} has such a length; theirs are {_span(questions.lengths)}")
        return questions.chosen(np.sort(rows))

    def part(self, name: str) -> Questions:
        """The questions of a part.

        Raises:
          InputError: no such part.
        """
        if name not in self.parts:
            raise InputError(f"no part {name!r}; the parts are {', '.join(self.parts)}")
        return self.parts[name]

    def describe(self) -> list[str]:
        """What there is to learn, in lines for people."""
        shapes = ", ".join(f"{b.source.shape[1]}+{b.target.shape[1]}" for b in self.training)
        return [
            *self.about,
            f"{len(self.training)} buckets of source + target tokens ({shapes}): {self.padding:.1%} padding",
        ]


def in_buckets(sources: Sequence[Sequence[int]], targets: Sequence[Sequence[int]]) -> tuple[Example, ...]:
    """Examples in as few buckets of like lengths as keep padding low.

    Examples are put in the order of max(source / mean source, target / mean target), and this order is cut so that
    the padded tokens are fewest: by dynamic programming over the cuts, for 1, 2, ... buckets, until the padding is
    low enough or one more bucket would be too many.

    Args:
      sources, targets: tokens of each example, the end token included.
    """
    s = np.fromiter(map(len, sources), np.int64, len(sources))
    t = np.fromiter(map(len, targets), np.int64, len(targets))
    key = np.maximum(s / s.mean(), t / t.mean())
    order = np.argsort(key, kind="stable")
    cuts = _cuts(s[order], t[order], key[order])
    parts = [order[first:last] for first, last in itertools.pairwise(cuts)]
    return tuple(Example(padded([sources[k] for k in part]), padded([targets[k] for k in part])) for part in parts)


def _cuts(s: Int[np.ndarray, "n"], t: Int[np.ndarray, "n"], key: np.ndarray) -> list[int]:
    """Where to cut the order into buckets, from 0 to n."""
    ends = np.flatnonzero(np.append(key[1:] != key[:-1], True)) + 1  # like examples stay together
    ends = np.unique(ends[np.linspace(0, len(ends) - 1, _CANDIDATES).round().astype(int)])
    places = np.append(0, ends)
    longest = np.stack([np.maximum.reduceat(x, places[:-1]) for x in (s, t)])  # between neighbouring places
    fewest = min(_FEWEST_EXAMPLES, max(1, len(s) // _MOST_BUCKETS))
    cost = np.full((len(places), len(places)), np.inf)  # padded tokens of a bucket from one place to another
    for i in range(len(places) - 1):
        sizes = places[i + 1 :] - places[i]
        widths = np.maximum.accumulate(longest[:, i:], axis=1).sum(0)
        cost[i, i + 1 :] = np.where(sizes >= fewest, widths * sizes, np.inf)
    best, came_from = cost[0], []  # fewest padded tokens up to each place
    while 1 - (s.sum() + t.sum()) / best[-1] > _ENOUGH and len(came_from) + 1 < _MOST_BUCKETS:
        through = best[:, None] + cost
        if through.min(0)[-1] >= best[-1]:
            break
        came_from.append(through.argmin(0))
        best = through.min(0)
    cuts = [len(places) - 1]
    for choice in reversed(came_from):
        cuts.append(choice[cuts[-1]])
    return [0, *places[cuts[::-1]].tolist()]


def padding_share(buckets: Sequence[Example]) -> float:
    """The share of all tokens that are padding."""
    tokens = sum(array.size for bucket in buckets for array in bucket)
    return 1 - sum(int((array != PAD).sum()) for bucket in buckets for array in bucket) / tokens


def _span(lengths: np.ndarray) -> str:
    return f"{lengths.min()} to {lengths.max()}"
