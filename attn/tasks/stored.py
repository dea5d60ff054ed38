"""Examples that are there once and for all: in buckets of like lengths, in an order that (seed, step) decides."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from attn.tasks.examples import PAD, Example, Questions, padded
from attn.tasks.settings import LENGTHS, SEED, between, checked
from attn.tasks.vocabulary import InputError, Vocabulary

_ENOUGH = 0.22  # share of padding below which another bucket, one more program to compile, is not worth it
_MOST_BUCKETS = 24
_CANDIDATES = 20  # widths of a side that a bucket may have: as many by quantiles, and as many by geometric steps


class Origin(NamedTuple):
    """Where a part of the data was read from, and the SHA-256 of what was there."""

    path: str
    digest: str


class StackedBatches(NamedTuple):
    """The batches of some steps: for each the number of its bucket, and its examples, padded to the widest bucket."""

    bucket: Int[np.ndarray, "K"]
    examples: Example


@dataclasses.dataclass(frozen=True, eq=False)
class Batches:
    """The batches of a run: each of one bucket, and decided by (seed, step) alone.

    In an epoch every example comes once, in an order of its own. A bucket's batches are of one size, as near to B as
    shares its examples out evenly; where they do not come out even, a few examples, fewer than there are batches,
    come twice.

    Args:
      buckets: examples `[n S], [n T]` of one width each.
      batch_size: B, the most examples of a batch.
      seed: of the order.
    """

    buckets: tuple[Example, ...]
    batch_size: int
    seed: int

    @functools.cached_property
    def counts(self) -> tuple[int, ...]:
        """How many batches of each bucket an epoch has."""
        return tuple(-(-len(bucket.source) // self.batch_size) for bucket in self.buckets)

    @functools.cached_property
    def sizes(self) -> tuple[int, ...]:
        """How many examples a batch of each bucket has."""
        return tuple(-(-len(bucket.source) // count) for bucket, count in zip(self.buckets, self.counts))

    @property
    def steps_per_epoch(self) -> int:
        """Batches of an epoch."""
        return sum(self.counts)

    def __repr__(self) -> str:
        return f"{self.steps_per_epoch:,} batches an epoch of up to {self.batch_size:,} examples, seed {self.seed}"

    @checked(step=between(0))
    def at(self, step: int) -> tuple[int, Example]:
        """The number of the bucket and the batch `[b S], [b T]` of a step."""
        epoch, place = divmod(step, self.steps_per_epoch)
        number, rows = self._epoch(epoch)[place]
        return number, Example(*(tokens[rows] for tokens in self.buckets[number]))

    def stacked(self, step: int, until: int, count: int, devices: int = 1) -> StackedBatches:
        """The batches from `step` up to `until`, and as many empty ones as make them `count`.

        They have as many rows as the largest batch, grouped by device. Of a batch that has fewer examples, every device
        gets as many, at the beginning of its rows.
        """
        each = -(-max(self.sizes) // devices)  # rows per device
        widths = (max(tokens.shape[1] for tokens in side) for side in zip(*self.buckets))
        buckets = np.zeros(count, np.int32)
        examples = Example(*(np.full((count, each * devices, width), PAD, np.int32) for width in widths))
        for place, (number, batch) in enumerate(map(self.at, range(step, until))):
            buckets[place] = number
            device, row = np.divmod(np.arange(self.sizes[number]), -(-self.sizes[number] // devices))
            rows = device * each + row
            for room, tokens in zip(examples, batch):
                room[place, rows, : tokens.shape[1]] = tokens
        return StackedBatches(buckets, examples)

    def _epoch(self, epoch: int) -> list[tuple[int, np.ndarray]]:
        """The batches of an epoch in their order: (number of the bucket, rows `[b]` in it)."""
        return _shuffled(tuple(len(bucket.source) for bucket in self.buckets), self.counts, self.seed, epoch)


@functools.lru_cache(maxsize=2)
def _shuffled(totals: tuple[int, ...], counts: tuple[int, ...], seed: int, epoch: int) -> list[tuple[int, np.ndarray]]:
    """For buckets of so many examples and so many batches: each batch's bucket and rows, in the epoch's order."""
    rng = np.random.default_rng([seed, epoch])
    batches = []
    for number, (total, count) in enumerate(zip(totals, counts)):
        rows = np.resize(rng.permutation(total), -(-total // count) * count)
        batches += [(number, some) for some in rows.reshape(count, -1)]
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
      origins: of what was read, by the name of the part; two with the same digests are the same data.
    """

    name: str
    vocabulary: Vocabulary
    training: tuple[Example, ...]
    parts: dict[str, Questions]
    about: tuple[str, ...]
    origins: dict[str, Origin]

    def __repr__(self) -> str:
        return "\n".join([f"{self.name}, stored", *self.describe()])

    @property
    def longest_source(self) -> int:
        """S: tokens of the longest source to train on, to validate or to test with, its end included."""
        return max(self.longest_question, *(bucket.source.shape[1] for bucket in self.training))

    @property
    def longest_question(self) -> int:
        """S: tokens of the longest source to validate or to test with, its end included."""
        return max(self.parts[part].sources.shape[1] for part in ("validation", "test"))

    @property
    def padding(self) -> float:
        """Share of an epoch's tokens that are padding."""
        return padding_share(self.training)

    @checked(batch_size=between(1), seed=SEED)
    def batches(self, batch_size: int, seed: int) -> Batches:
        """What to train on, step by step."""
        return Batches(self.training, batch_size, seed)

    @checked(total=between(1), seed=SEED)
    def questions(self, part: str, total: int | None, seed: int) -> Questions:
        """Questions of a part: `total` of them, drawn by the seed, or all."""
        questions = self.part(part)
        count = len(questions.lengths)
        if total is None or total >= count:
            return questions
        return questions.chosen(np.sort(np.random.default_rng(seed).permutation(count)[:total]))

    @checked(lengths=LENGTHS, each=between(1), seed=SEED)
    def questions_of_each_length(self, part: str, lengths: Sequence[int], each: int, seed: int) -> Questions:
        """Up to `each` questions of a part for each length of the source.

        Raises:
          InputError: the part has none of these lengths.
        """
        questions = self.part(part)
        order = np.random.default_rng(seed).permutation(len(questions.lengths))
        rows = np.concatenate([order[questions.lengths[order] == length][:each] for length in sorted(set(lengths))])
        if not len(rows):
            raise InputError(f"no source of {part} has such a length; theirs are {_span(questions.lengths)}")
        return questions.chosen(np.sort(rows))

    @checked()
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
        buckets = f"{len(self.training)} bucket{'s' if len(self.training) > 1 else ''} of source + target tokens"
        return [*self.about, f"{buckets} ({shapes}): {self.padding:.1%} padding"]


def in_buckets(sources: Sequence[Sequence[int]], targets: Sequence[Sequence[int]]) -> tuple[Example, ...]:
    """Examples in as few buckets as keep padding low, each as wide as its longest source and its longest target.

    Sources need not be as long as their targets are, so that a bucket is a pair of widths, and an example goes into
    the bucket of fewest tokens that holds it. Which pairs: one after another that which saves most padding, the
    others then moved as long as that saves more; until the padding is low enough, or there are too many.

    Args:
      sources, targets: tokens of each example, the end token included.
    """
    lengths = np.array([list(map(len, sources)), list(map(len, targets))])
    bucket = _choose_buckets(lengths)
    rows = [np.flatnonzero(bucket == number) for number in np.unique(bucket)]
    return tuple(Example(padded([sources[k] for k in some]), padded([targets[k] for k in some])) for some in rows)


def _choose_buckets(lengths: Int[np.ndarray, "2 n"]) -> Int[np.ndarray, "n"]:
    """The bucket of each example, as a number.

    This is the k-median problem, of places that serve customers, and it is solved greedily and by exchange.
    """
    widths = [_candidate_widths(side) for side in lengths]
    pairs = np.stack([axis.ravel() for axis in np.meshgrid(*widths, indexing="ij")])  # [2 c], what a bucket may be
    # Examples that fit the same candidates are one customer, known by the smallest candidate that holds them.
    smallest = np.ravel_multi_index([np.searchsorted(w, side) for w, side in zip(widths, lengths)], [*map(len, widths)])
    customers, customer, count = np.unique(smallest, return_inverse=True, return_counts=True)
    fits = (pairs[:, :, None] >= pairs[:, None, customers]).all(0)
    tokens = np.where(fits, pairs.sum(0)[:, None], np.inf)  # [c customers]: what one example takes in a bucket

    def with_one_more(chosen: list[int]) -> tuple[int, float]:
        """The candidate that helps the chosen most, and the tokens in all with it."""
        totals = np.minimum(tokens, tokens[chosen].min(0)) @ count
        return int(totals.argmin()), float(totals.min())

    chosen = [pairs.shape[1] - 1]  # the widest, which holds every example
    total = float(tokens[chosen[0]] @ count)
    while 1 - lengths.sum() / total > _ENOUGH and len(chosen) < _MOST_BUCKETS:
        added, total = with_one_more(chosen)
        chosen.append(added)
        kept = 1  # how many in a row have stayed where they are
        while kept < len(chosen):
            widest, first, *others = chosen  # each in turn
            moved, now = with_one_more([widest, *others])
            if now < total:
                chosen, total, kept = [widest, *others, moved], now, 1
            else:
                chosen, kept = [widest, *others, first], kept + 1
    return tokens[chosen].argmin(0)[customer]


def _candidate_widths(lengths: Int[np.ndarray, "n"]) -> Int[np.ndarray, "k"]:
    """Some of the lengths that occur, the longest among them: those of common examples, and those of rare long ones."""
    distinct = np.unique(lengths)
    if len(distinct) <= 2 * _CANDIDATES:
        return distinct
    common = np.quantile(lengths, np.linspace(0, 1, _CANDIDATES), method="higher")
    rare = np.searchsorted(distinct, np.geomspace(distinct[0], distinct[-1], _CANDIDATES).round())
    return np.unique([*common, *distinct[rare]])


def padding_share(buckets: Sequence[Example]) -> float:
    """The share of all tokens that are padding."""
    tokens = sum(array.size for bucket in buckets for array in bucket)
    return 1 - sum(int((array != PAD).sum()) for bucket in buckets for array in bucket) / tokens


def _span(lengths: np.ndarray) -> str:
    return f"{lengths.min()} to {lengths.max()}"
