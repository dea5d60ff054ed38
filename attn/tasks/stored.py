"""Examples in memory, in buckets of similar lengths; their order is a function of (seed, step)."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from attn.settings import LENGTHS, SEED, between, checked
from attn.tasks.examples import PAD, Bucket, Example, Questions, padded
from attn.tasks.vocabulary import InputError, Vocabulary

_ENOUGH = 0.22  # fraction of padding below which another bucket, one more program to compile, is not worthwhile
_MOST_BUCKETS = 24
_CANDIDATES = 20  # possible widths of sources, and of targets: these many by quantiles, and as many by geometric steps


class Origin(NamedTuple):
    """The file or folder that a part of the data was read from, and the SHA-256 of its content."""

    path: str
    digest: str


class StackedBatches(NamedTuple):
    """The batches of K steps: the number of each batch's bucket, and its examples, padded to the widest bucket."""

    bucket: Int[np.ndarray, "K"]
    examples: Example


@dataclasses.dataclass(frozen=True, eq=False)
class Batches:
    """The batches of a run: each is from one bucket, and a function of (seed, step).

    In an epoch every example comes once, in an order that depends on the epoch. All batches of a bucket have one size,
    at most B. If the examples cannot be divided evenly, a few of them, fewer than there are batches, come twice.

    Args:
      examples: `[n S], [n T]`, in buckets of one width each.
      batch_size: B, the greatest number of examples per batch.
      seed: of the order.
    """

    examples: tuple[Example, ...]
    batch_size: int
    seed: int

    @functools.cached_property
    def counts(self) -> tuple[int, ...]:
        """Batches per epoch of each bucket."""
        return tuple(-(-len(bucket.source) // self.batch_size) for bucket in self.examples)

    @functools.cached_property
    def sizes(self) -> tuple[int, ...]:
        """Examples per batch of each bucket."""
        return tuple(-(-len(bucket.source) // count) for bucket, count in zip(self.examples, self.counts))

    @property
    def buckets(self) -> tuple[Bucket, ...]:
        """The shapes of batches."""
        widths = ((bucket.source.shape[1], bucket.target.shape[1]) for bucket in self.examples)
        return tuple(Bucket(size, *both) for size, both in zip(self.sizes, widths))

    @property
    def steps_per_epoch(self) -> int:
        """Batches per epoch."""
        return sum(self.counts)

    def __repr__(self) -> str:
        return f"{self.steps_per_epoch:,} batches per epoch of up to {self.batch_size:,} examples, seed {self.seed}"

    @checked(step=between(0))
    def batch(self, step: int) -> tuple[int, Example]:
        """Return the number of the bucket and the batch `[b S], [b T]` of a step."""
        epoch, index = divmod(step, self.steps_per_epoch)
        totals = tuple(len(bucket.source) for bucket in self.examples)
        number, rows = _shuffled(totals, self.counts, self.seed, epoch)[index]
        return number, Example(*(tokens[rows] for tokens in self.examples[number]))

    def stacked(self, step: int, until: int, count: int, devices: int = 1) -> StackedBatches:
        """Return the batches of steps [step, until), padded with empty batches to `count`.

        They have as many rows as the largest batch, grouped by device. The examples of a smaller batch are divided
        evenly over the devices and stand at the beginning of each device's rows.
        """
        rows_per_device = -(-max(self.sizes) // devices)
        widths = (max(tokens.shape[1] for tokens in side) for side in zip(*self.examples))
        buckets = np.zeros(count, np.int32)
        examples = Example(*(np.full((count, rows_per_device * devices, width), PAD, np.int32) for width in widths))
        for index, (number, batch) in enumerate(map(self.batch, range(step, until))):
            buckets[index] = number
            device, row = np.divmod(np.arange(self.sizes[number]), -(-self.sizes[number] // devices))
            rows = device * rows_per_device + row
            for stacked, tokens in zip(examples, batch):
                stacked[index, rows, : tokens.shape[1]] = tokens
        return StackedBatches(buckets, examples)


@functools.lru_cache(maxsize=2)
def _shuffled(totals: tuple[int, ...], counts: tuple[int, ...], seed: int, epoch: int) -> list[tuple[int, np.ndarray]]:
    """Return the bucket and the rows `[b]` of each batch, in the order of the epoch.

    `totals` and `counts` are the numbers of examples and of batches of each bucket.
    """
    rng = np.random.default_rng([seed, epoch])
    batches = []
    for number, (total, count) in enumerate(zip(totals, counts)):
        # `resize` repeats the first examples to fill the last batch.
        rows = np.resize(rng.permutation(total), -(-total // count) * count)
        batches += [(number, batch) for batch in rows.reshape(count, -1)]
    return [batches[k] for k in rng.permutation(len(batches))]


@dataclasses.dataclass(frozen=True, eq=False)
class Stored:
    """Data in memory.

    Args:
      name: the name of the data.
      vocabulary: the tokens.
      training: the training examples, in buckets.
      parts: questions by the name of their part; "validation" and "test" are required.
      about: lines that describe the files.
      origins: where each part was read from; data with the same digests are the same.
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
        """S: tokens of the longest source for training, validation or test, its end included."""
        return max(self.longest_question, *(bucket.source.shape[1] for bucket in self.training))

    @property
    def longest_question(self) -> int:
        """S: tokens of the longest source for validation or test, its end included."""
        return max(self.parts[part].sources.shape[1] for part in ("validation", "test"))

    @property
    def padding(self) -> float:
        """Fraction of an epoch's tokens that are padding."""
        tokens = [array for bucket in self.training for array in bucket]
        return 1 - sum(int((array != PAD).sum()) for array in tokens) / sum(array.size for array in tokens)

    @checked(batch_size=between(1), seed=SEED)
    def batches(self, batch_size: int, seed: int) -> Batches:
        """Return the training batches."""
        return Batches(self.training, batch_size, seed)

    @checked(total=between(1), seed=SEED)
    def questions(self, part: str, total: int | None, seed: int) -> Questions:
        """Return `total` questions of a part, drawn by the seed, or all of them."""
        questions = self.part(part)
        count = len(questions.lengths)
        if total is None or total >= count:
            return questions
        return questions.chosen(np.sort(np.random.default_rng(seed).permutation(count)[:total]))

    @checked(lengths=LENGTHS, each=between(1), seed=SEED)
    def questions_of_each_length(self, part: str, lengths: Sequence[int], each: int, seed: int) -> Questions:
        """Return up to `each` questions of a part per length of the source.

        Raises:
          InputError: the part has none of these lengths.
        """
        questions = self.part(part)
        order = np.random.default_rng(seed).permutation(len(questions.lengths))
        rows = np.concatenate([order[questions.lengths[order] == length][:each] for length in sorted(set(lengths))])
        if not len(rows):
            least, most = questions.lengths.min(), questions.lengths.max()
            raise InputError(f"no source of {part} has one of these lengths; theirs are {least} to {most}")
        return questions.chosen(np.sort(rows))

    @checked()
    def part(self, name: str) -> Questions:
        """Return the questions of a part.

        Raises:
          InputError: the part does not exist.
        """
        if name not in self.parts:
            raise InputError(f"part {name!r} does not exist; the parts are {', '.join(self.parts)}")
        return self.parts[name]

    def describe(self) -> list[str]:
        """Return lines about the data."""
        shapes = ", ".join(f"{b.source.shape[1]}+{b.target.shape[1]}" for b in self.training)
        buckets = f"{len(self.training)} bucket{'s' if len(self.training) > 1 else ''} of source + target tokens"
        return [*self.about, f"{buckets} ({shapes}): {self.padding:.1%} padding"]


def in_buckets(sources: Sequence[Sequence[int]], targets: Sequence[Sequence[int]]) -> tuple[Example, ...]:
    """Return examples in few buckets with low padding, each as wide as its longest source and longest target.

    A source and its target may differ in length, so a bucket is a pair of widths, and an example goes into the smallest
    bucket that holds it. The bucket that saves most padding is added; then other buckets are exchanged while that saves
    more. This is repeated until the padding is low enough, or until there are too many buckets.

    Args:
      sources, targets: tokens of each example, the end token included.
    """
    lengths = np.array([list(map(len, sources)), list(map(len, targets))])
    bucket = _choose_buckets(lengths)
    rows = [np.flatnonzero(bucket == number) for number in np.unique(bucket)]
    return tuple(Example(padded([sources[k] for k in each]), padded([targets[k] for k in each])) for each in rows)


def _choose_buckets(lengths: Int[np.ndarray, "2 n"]) -> Int[np.ndarray, "n"]:
    """Return the number of each example's bucket.

    This is the k-median problem (facilities serve customers), solved greedily and by exchange.
    """
    widths = [_candidate_widths(side) for side in lengths]
    pairs = np.stack([axis.ravel() for axis in np.meshgrid(*widths, indexing="ij")])  # [2 C], the possible buckets
    # Examples that fit into the same candidates are one customer, identified by their smallest candidate.
    smallest = np.ravel_multi_index([np.searchsorted(w, side) for w, side in zip(widths, lengths)], [*map(len, widths)])
    customers, customer, count = np.unique(smallest, return_inverse=True, return_counts=True)
    fits = (pairs[:, :, None] >= pairs[:, None, customers]).all(0)
    tokens = np.where(fits, pairs.sum(0)[:, None], np.inf)  # [C customers], per example in that bucket

    def with_one_more(chosen: list[int]) -> tuple[int, float]:
        """Return the candidate that saves most in addition to the chosen ones, and the total of tokens with it."""
        totals = np.minimum(tokens, tokens[chosen].min(0)) @ count
        return int(totals.argmin()), float(totals.min())

    chosen = [pairs.shape[1] - 1]  # the widest candidate, which holds every example
    total = float(tokens[chosen[0]] @ count)
    while 1 - lengths.sum() / total > _ENOUGH and len(chosen) < _MOST_BUCKETS:
        added, total = with_one_more(chosen)
        chosen.append(added)
        kept = 1  # number of buckets in a row that no exchange improves
        while kept < len(chosen):
            widest, first, *others = chosen  # all but the widest take turns
            exchanged, new_total = with_one_more([widest, *others])
            if new_total < total:
                chosen, total, kept = [widest, *others, exchanged], new_total, 1
            else:
                chosen, kept = [widest, *others, first], kept + 1
    return tokens[chosen].argmin(0)[customer]


def _candidate_widths(lengths: Int[np.ndarray, "n"]) -> Int[np.ndarray, "k"]:
    """Return some of the lengths, the longest included: quantiles for common ones, geometric steps for rare ones."""
    distinct = np.unique(lengths)
    if len(distinct) <= 2 * _CANDIDATES:
        return distinct
    common = np.quantile(lengths, np.linspace(0, 1, _CANDIDATES), method="higher")
    rare = np.searchsorted(distinct, np.geomspace(distinct[0], distinct[-1], _CANDIDATES).round())
    return np.unique([*common, *distinct[rare]])
