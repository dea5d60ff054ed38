"""Examples made on the fly: any number to train on, and distinct held-out strings of every length to be judged on."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from attn.tasks.examples import Example, Questions, example_keys
from attn.tasks.sequences import Task, is_for_validation, is_held_out
from attn.tasks.settings import LENGTHS, SEED, between, checked
from attn.tasks.vocabulary import InputError, Symbols

_ENUMERABLE = 1 << 19  # strings of a length: up to here all are listed, beyond here they are drawn
_DRAWN = 1 << 22  # symbols at a time
_FEW = 100  # held-out strings of a length: fewer are not divided, and are all test


@dataclasses.dataclass(frozen=True)
class DrawnBatches:
    """The batches of a run on a task, each decided by (seed, step) alone.

    Args:
      sample: `key -> example`.
      batch_size: B, the examples of a batch.
      seed: of the run.
    """

    sample: Callable[[Array], Example] = dataclasses.field(repr=False)
    batch_size: int
    seed: int

    @checked(step=between(0, 2**31 - 1))
    def at(self, step: int) -> tuple[int, Example]:
        """0, as they are all of one bucket, and the batch `[B S], [B T]` of a step."""
        keys, _ = example_keys(self.seed, step, jnp.arange(self.batch_size))
        return 0, _drawn(self.sample, keys)


@functools.partial(jax.jit, static_argnums=0)
def _drawn(sample: Callable, keys: Array) -> Example:
    return jax.vmap(sample)(keys)


@dataclasses.dataclass(frozen=True, repr=False)
class Generated:
    """What a task asks for, drawn when it is needed.

    Args:
      task: which symbols, which lengths, and what is asked.
    """

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
        """One example to train on: a pure function of the key."""
        return self.task.sample(key)

    @checked(batch_size=between(1), seed=SEED)
    def batches(self, batch_size: int, seed: int) -> DrawnBatches:
        """What to train on, step by step."""
        return DrawnBatches(self.sample, batch_size, seed)

    @checked(total=between(1), seed=SEED)
    def questions(self, part: str, total: int, seed: int) -> Questions:
        """Held-out strings of all lengths of the task, shared out evenly.

        Args:
          part: "test" or "validation". No string is in both, whatever the seeds. Lengths with few strings have none
            for validation; if all lengths are so short, nothing comes back.
          total: how many; fewer come back where the lengths hold no more.
          seed: of the draw.

        Raises:
          InputError: no such part.
        """
        lengths = range(self.task.min_length, self.task.max_length + 1)
        return ask(self.task, *distinct_strings(self.task, lengths, total, seed, _rule_of(part)))

    @checked(lengths=LENGTHS, each=between(1), seed=SEED)
    def questions_of_each_length(self, part: str, lengths: Sequence[int], each: int, seed: int) -> Questions:
        """Up to `each` held-out strings of each length, which need not be lengths of the task.

        Raises:
          InputError: no such part.
        """
        widest, belongs = max(lengths), _rule_of(part)
        of_each = [distinct_strings(self.task, [length], each, seed, belongs) for length in sorted(set(lengths))]
        strings = [np.pad(strings, ((0, 0), (0, widest - strings.shape[1]))) for strings, _ in of_each]
        return ask(self.task, np.concatenate(strings), np.concatenate([lengths for _, lengths in of_each]))

    def describe(self) -> list[str]:
        """What there is to learn, in lines for people."""
        task = self.task
        return [f"{task.name}: strings of {task.min_length} to {task.max_length} symbols, drawn as they are needed"]


def _rule_of(part: str) -> Callable[[np.ndarray, int], np.ndarray]:
    """The rule by which strings `[k n]` of one length belong to a part."""
    if part not in _RULES:
        raise InputError(f"no part {part!r}; the parts are {', '.join(_RULES)}")
    return _RULES[part]


def _is_validation(strings: Int[np.ndarray, "k n"], num_symbols: int) -> Bool[np.ndarray, "k"]:
    """A half of the held-out strings, but none of a length that has few."""
    of_this_length = num_symbols ** min(strings.shape[-1], 20)  # 20 suffices, and longer powers are large numbers
    return is_for_validation(strings, num_symbols) & (of_this_length >= _FEW * min(num_symbols, 10))


def _is_test(strings: Int[np.ndarray, "k n"], num_symbols: int) -> Bool[np.ndarray, "k"]:
    return is_held_out(strings, num_symbols) & ~_is_validation(strings, num_symbols)


_RULES = {"test": _is_test, "validation": _is_validation}


def ask(task: Task, strings: Int[np.ndarray, "B n"], lengths: Int[np.ndarray, "B"]) -> Questions:
    """Questions of strings, each with its one right answer."""
    source, target = task.example(strings.astype(np.int32), lengths)
    return Questions(source, lengths, target, np.arange(len(strings)))


def distinct_strings(
    task: Task,
    lengths: Sequence[int],
    total: int,
    seed: int,
    belongs: Callable[[np.ndarray, int], np.ndarray] = is_held_out,
) -> tuple[Int[np.ndarray, "B n"], Int[np.ndarray, "B"]]:
    """Distinct strings of a part, shared out evenly over the lengths.

    Short lengths have few strings: they give all they have, and the longer ones make up for them.

    Args:
      task: whose symbols to use.
      lengths: the lengths of the strings, in symbols.
      total: how many strings; fewer come back where the lengths hold no more.
      seed: of the choice.
      belongs: `(strings [k n], num_symbols) -> [k]`, which strings are of the part.

    Returns:
      (strings `[B n]`, padded with 0 to the greatest length, and their lengths `[B]`).
    """
    chosen, left = [], total
    for k, length in enumerate(sorted(lengths)):
        wanted = left // (len(lengths) - k)
        strings = _of_length(task.symbols, length, wanted, np.random.default_rng([seed, length]), belongs)
        chosen.append(np.pad(strings, ((0, 0), (0, max(lengths) - length))))
        left -= len(strings)
    return np.concatenate(chosen), np.repeat(sorted(lengths), [len(strings) for strings in chosen])


def _of_length(num_symbols: int, length: int, wanted: int, rng: np.random.Generator, belongs) -> np.ndarray:
    """Up to `wanted` distinct strings `[k n]` of one length, in random order."""
    if num_symbols**length <= max(_ENUMERABLE, 40 * wanted):
        strings = np.stack(np.unravel_index(np.arange(num_symbols**length), (num_symbols,) * length), axis=-1) + 1
        strings = strings[belongs(strings, num_symbols)]
        return rng.permutation(strings)[:wanted]
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
