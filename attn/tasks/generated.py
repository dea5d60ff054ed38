"""Generated examples: unlimited training examples, and distinct held-out strings of every length for evaluation."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from attn.settings import LENGTHS, SEED, between, checked
from attn.tasks.examples import Bucket, Example, Questions, example_keys
from attn.tasks.held_out import is_for_validation, is_held_out
from attn.tasks.sequences import Task
from attn.tasks.vocabulary import InputError, Symbols

_ENUMERABLE = 1 << 19  # lengths with up to this many strings are enumerated, others are drawn from
_DRAWN = 1 << 22  # symbols that are drawn at a time
_FEW = 100  # held-out strings of a length; if there are fewer, all are for test and none for validation
_Belongs = Callable[[np.ndarray, int], np.ndarray]  # (strings [k n] of one length, V) -> [k] bool: is in a part


@dataclasses.dataclass(frozen=True)
class DrawnBatches:
    """The batches of a run on a task; each is a function of (seed, step).

    Args:
      data: the data that they are drawn from.
      batch_size: B, the examples per batch.
      seed: of the run.
    """

    data: "Generated" = dataclasses.field(repr=False)
    batch_size: int
    seed: int

    @functools.cached_property
    def buckets(self) -> tuple[Bucket, ...]:
        """The shapes of batches: one, as wide as the longest source and the longest target."""
        return (bucket_of(self.data.sample, self.batch_size),)

    def draw(self, step: int | Int[Array, ""]) -> tuple[Int[Array, ""], Callable[[Array], Example]]:
        """Return the number of a step's bucket, and the function that draws an example from its key."""
        return jnp.int32(0), self.data.sample

    @checked(step=between(0, 2**31 - 1))
    def batch(self, step: int) -> tuple[int, Example]:
        """Return the number of the bucket and the batch `[B S], [B T]` of a step."""
        number, examples = _drawn(self, np.int32(step))
        bucket = self.buckets[int(number)]
        return int(number), Example(examples.source[:, : bucket.source], examples.target[:, : bucket.target])


@functools.partial(jax.jit, static_argnums=0)
def _drawn(batches: DrawnBatches, step: Int[Array, ""]) -> tuple[Array, Example]:
    number, sample = batches.draw(step)
    keys, _ = example_keys(batches.seed, step, jnp.arange(batches.batch_size))
    return number, jax.vmap(sample)(keys)


def bucket_of(sample: Callable[[Array], Example], batch_size: int) -> Bucket:
    """Return the shape of batches of examples drawn by `sample`; nothing is computed."""
    return Bucket(batch_size, *(tokens.shape[0] for tokens in jax.eval_shape(sample, jax.random.key(0))))


@dataclasses.dataclass(frozen=True, repr=False)
class Generated:
    """The data of a task, generated when needed."""

    task: Task

    def __repr__(self) -> str:
        return "\n".join([f"{self.name}, generated", *self.describe()])

    @property
    def name(self) -> str:
        return self.task.name

    @property
    def vocabulary(self) -> Symbols:
        return self.task.vocabulary

    @property
    def longest_source(self) -> int:
        """S: tokens of the longest source, its end included."""
        return self.task.max_length + 1

    @property
    def longest_question(self) -> int:
        """S: tokens of the longest source for validation or test, its end included."""
        return self.longest_source

    def sample(self, key: Array) -> Example:
        """Draw one training example, a pure function of the key."""
        return self.task.sample(key)

    @checked(batch_size=between(1), seed=SEED)
    def batches(self, batch_size: int, seed: int) -> DrawnBatches:
        """Return the training batches."""
        return DrawnBatches(self, batch_size, seed)

    @checked(total=between(1), seed=SEED)
    def questions(self, part: str, total: int, seed: int) -> Questions:
        """Draw held-out strings of all lengths of the task, equally many of each if there are enough.

        Args:
          part: "test" or "validation". No string is in both, for any seeds. Lengths with few strings have none for
            validation; if all lengths are so short, there are no questions.
          total: number of strings; there are fewer if the lengths have no more.
          seed: of the draw.

        Raises:
          InputError: the part does not exist.
        """
        lengths = range(self.task.min_length, self.task.max_length + 1)
        return self.task.questions(*distinct_strings(self.task, lengths, total, seed, _belongs(part)))

    @checked(lengths=LENGTHS, each=between(1), seed=SEED)
    def questions_of_each_length(self, part: str, lengths: Sequence[int], each: int, seed: int) -> Questions:
        """Draw up to `each` held-out strings per length; lengths outside of the task's are allowed.

        Raises:
          InputError: the part does not exist.
        """
        drawn = [distinct_strings(self.task, [n], each, seed, _belongs(part)) for n in sorted(set(lengths))]
        width = self.task.rule.num_drawn(max(lengths))
        strings = [np.pad(strings, ((0, 0), (0, width - strings.shape[1]))) for strings, _ in drawn]
        return self.task.questions(np.concatenate(strings), np.concatenate([lengths for _, lengths in drawn]))

    def has_validation(self, length: int) -> bool:
        """Return whether strings of a length have a validation part, without computing anything in JAX."""
        return len(distinct_strings(self.task, [length], 1, 0, _is_validation)[0]) > 0

    def describe(self) -> list[str]:
        """Return lines about the data."""
        task = self.task
        return [f"{task.name}: strings of {task.min_length} to {task.max_length} symbols, drawn as they are needed"]


def _is_validation(strings: Int[np.ndarray, "k n"], num_symbols: int) -> Bool[np.ndarray, "k"]:
    """Return which strings are for validation: half of the held-out ones, but none of a length that has few."""
    total = num_symbols ** min(strings.shape[-1], 20)  # 2^20 is enough for the comparison; larger powers are slow
    return is_for_validation(strings, num_symbols) & (total >= _FEW * min(num_symbols, 10))


def _is_test(strings: Int[np.ndarray, "k n"], num_symbols: int) -> Bool[np.ndarray, "k"]:
    return is_held_out(strings, num_symbols) & ~_is_validation(strings, num_symbols)


_PARTS = {"test": _is_test, "validation": _is_validation}


def _belongs(part: str) -> _Belongs:
    if part not in _PARTS:
        raise InputError(f"part {part!r} does not exist; the parts are {', '.join(_PARTS)}")
    return _PARTS[part]


def distinct_strings(
    task: Task, lengths: Sequence[int], total: int, seed: int, belongs: _Belongs = is_held_out
) -> tuple[Int[np.ndarray, "B n"], Int[np.ndarray, "B"]]:
    """Draw distinct strings of a part, equally many for each length of their sources if there are enough.

    All strings of short lengths are used if those have too few; longer lengths then get more.

    Args:
      task: the symbols are those of this task.
      lengths: of the sources, in symbols.
      total: number of strings; there are fewer if the lengths have no more.
      seed: of the draw.
      belongs: `(strings [k n], num_symbols) -> [k]`, whether each string is in the part.

    Returns:
      (strings `[B d]`, padded with 0 to the longest, and the lengths `[B]` of their sources).
    """
    num_drawn = task.rule.num_drawn
    chosen, remaining = [], total
    for k, length in enumerate(sorted(lengths)):
        wanted, rng = remaining // (len(lengths) - k), np.random.default_rng([seed, length])
        strings = _strings_of_length(task.symbols, num_drawn(length), wanted, rng, belongs)
        chosen.append(np.pad(strings, ((0, 0), (0, num_drawn(max(lengths)) - strings.shape[1]))))
        remaining -= len(strings)
    return np.concatenate(chosen), np.repeat(sorted(lengths), [len(strings) for strings in chosen])


def _strings_of_length(num_symbols: int, length: int, wanted: int, rng: np.random.Generator, belongs: _Belongs):
    """Draw up to `wanted` distinct strings `[k n]` of one length, in random order."""
    if num_symbols**length <= max(_ENUMERABLE, 40 * wanted):
        strings = np.stack(np.unravel_index(np.arange(num_symbols**length), (num_symbols,) * length), axis=-1) + 1
        return rng.permutation(strings[belongs(strings, num_symbols)])[:wanted]
    rows = min(20 * wanted, max(1, _DRAWN // length))  # drawn at a time
    strings = np.empty((0, length), np.int32)
    while len(strings) < wanted:
        blocks = [strings]
        while sum(map(len, blocks)) < wanted:
            drawn = rng.integers(1, num_symbols + 1, size=(rows, length))
            blocks.append(drawn[belongs(drawn, num_symbols)].astype(np.int32))
        strings = np.concatenate(blocks)
        # Remove repeated strings; the others keep the order in which they were drawn.
        _, first = np.unique(strings, axis=0, return_index=True)
        strings = strings[np.sort(first)]
    return strings[:wanted]
