"""Generated examples: any number to train on, and distinct held-out strings of every length to evaluate on."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from attn.settings import LENGTHS, SEED, between, checked
from attn.tasks.examples import Bucket, Example, Questions, example_keys
from attn.tasks.sequences import Task, is_for_validation, is_held_out
from attn.tasks.vocabulary import InputError, Symbols

_ENUMERABLE = 1 << 19  # strings of a length: up to here all are listed, beyond here they are drawn
_DRAWN = 1 << 22  # symbols at a time
_FEW = 100  # held-out strings of a length: fewer are not divided, and are all test
_Belongs = Callable[[np.ndarray, int], np.ndarray]  # (strings [k n] of one length, V) -> [k], which are of a part


@dataclasses.dataclass(frozen=True)
class DrawnBatches:
    """The batches of a run on a task, each a function of (seed, step).

    Args:
      data: the data that they are drawn from.
      batch_size: B, the examples per batch.
      seed: the run's.
    """

    data: "Generated" = dataclasses.field(repr=False)
    batch_size: int
    seed: int

    @property
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
    """The data of a task, drawn as they are needed."""

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
        """S: tokens of the longest source to validate or to test with, its end included."""
        return self.longest_source

    def sample(self, key: Array) -> Example:
        """Draw one example to train on: a pure function of the key."""
        return self.task.sample(key)

    @checked(batch_size=between(1), seed=SEED)
    def batches(self, batch_size: int, seed: int) -> DrawnBatches:
        """Return the batches to train on."""
        return DrawnBatches(self, batch_size, seed)

    @checked(total=between(1), seed=SEED)
    def questions(self, part: str, total: int, seed: int) -> Questions:
        """Draw held-out strings of all lengths of the task, as many of each where there are enough.

        Args:
          part: "test" or "validation". No string is in both, whatever the seeds. Lengths with few strings have none
            for validation; if all lengths are so short, there are no questions.
          total: how many; there are fewer where the lengths hold no more.
          seed: of the draw.

        Raises:
          InputError: the part does not exist.
        """
        lengths = range(self.task.min_length, self.task.max_length + 1)
        return self.task.questions(*distinct_strings(self.task, lengths, total, seed, _belongs(part)))

    @checked(lengths=LENGTHS, each=between(1), seed=SEED)
    def questions_of_each_length(self, part: str, lengths: Sequence[int], each: int, seed: int) -> Questions:
        """Draw up to `each` held-out strings per length; the lengths need not be the task's.

        Raises:
          InputError: the part does not exist.
        """
        drawn = [distinct_strings(self.task, [n], each, seed, _belongs(part)) for n in sorted(set(lengths))]
        strings = [np.pad(strings, ((0, 0), (0, max(lengths) - strings.shape[1]))) for strings, _ in drawn]
        return self.task.questions(np.concatenate(strings), np.concatenate([lengths for _, lengths in drawn]))

    def has_validation(self, length: int) -> bool:
        """Return whether strings of a length have a validation part; nothing is computed by JAX."""
        return len(distinct_strings(self.task, [length], 1, 0, _is_validation)[0]) > 0

    def describe(self) -> list[str]:
        """Return lines about the data."""
        task = self.task
        return [f"{task.name}: strings of {task.min_length} to {task.max_length} symbols, drawn as they are needed"]


def _is_validation(strings: Int[np.ndarray, "k n"], num_symbols: int) -> Bool[np.ndarray, "k"]:
    """Return which strings are for validation: half of the held-out ones, but none of a length that has few."""
    of_this_length = num_symbols ** min(strings.shape[-1], 20)  # 20 suffices, and longer powers are large numbers
    return is_for_validation(strings, num_symbols) & (of_this_length >= _FEW * min(num_symbols, 10))


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
    """Draw distinct strings of a part, as many of each length where there are enough.

    Short lengths have few strings: they give all they have, and the longer ones make up for them.

    Args:
      task: whose symbols to use.
      lengths: the lengths of the strings, in symbols.
      total: how many strings; there are fewer where the lengths hold no more.
      seed: of the choice.
      belongs: `(strings [k n], num_symbols) -> [k]`, which strings are of the part.

    Returns:
      (strings `[B n]`, padded with 0 to the greatest length, and their lengths `[B]`).
    """
    chosen, left = [], total
    for k, length in enumerate(sorted(lengths)):
        wanted = left // (len(lengths) - k)
        strings = _strings_of_length(task.symbols, length, wanted, np.random.default_rng([seed, length]), belongs)
        chosen.append(np.pad(strings, ((0, 0), (0, max(lengths) - length))))
        left -= len(strings)
    return np.concatenate(chosen), np.repeat(sorted(lengths), [len(strings) for strings in chosen])


def _strings_of_length(num_symbols: int, length: int, wanted: int, rng: np.random.Generator, belongs: _Belongs):
    """Draw up to `wanted` distinct strings `[k n]` of one length, in random order."""
    if num_symbols**length <= max(_ENUMERABLE, 40 * wanted):
        strings = np.stack(np.unravel_index(np.arange(num_symbols**length), (num_symbols,) * length), axis=-1) + 1
        return rng.permutation(strings[belongs(strings, num_symbols)])[:wanted]
    at_a_time = min(20 * wanted, max(1, _DRAWN // length))
    found = np.empty((0, length), np.int32)
    while len(found) < wanted:
        some = [found]
        while sum(map(len, some)) < wanted:
            drawn = rng.integers(1, num_symbols + 1, size=(at_a_time, length))
            some.append(drawn[belongs(drawn, num_symbols)].astype(np.int32))
        found = np.concatenate(some)
        _, first = np.unique(found, axis=0, return_index=True)
        found = found[np.sort(first)]
    return found[:wanted]
