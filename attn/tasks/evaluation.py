"""The strings a model is judged on: held out by their hash, distinct, of every length."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from attn.tasks.sequences import Task, is_held_out

_ENUMERABLE = 1 << 19  # strings of a length: up to here all are listed, beyond here they are drawn


def held_out_strings(
    task: Task, lengths: Sequence[int], total: int, seed: int
) -> tuple[Int[np.ndarray, "B n"], Int[np.ndarray, "B"]]:
    """Distinct held-out strings, shared out evenly over the lengths.

    Short lengths have few strings: they give all they have, and the longer ones make up for them.

    Args:
      task: whose symbols to use.
      lengths: the lengths of the strings, in symbols.
      total: how many strings; fewer come back where the lengths hold no more.
      seed: of the choice.

    Returns:
      (strings `[B n]`, padded with 0 to the greatest length, and their lengths `[B]`).
    """
    chosen, left = [], total
    for k, length in enumerate(sorted(lengths)):
        wanted = left // (len(lengths) - k)
        strings = _of_length(task.symbols, length, wanted, np.random.default_rng([seed, length]))
        chosen.append(np.pad(strings, ((0, 0), (0, max(lengths) - length))))
        left -= len(strings)
    return np.concatenate(chosen), np.repeat(sorted(lengths), [len(strings) for strings in chosen])


def strings_of_each_length(
    task: Task, lengths: Sequence[int], each: int, seed: int
) -> tuple[Int[np.ndarray, "B n"], Int[np.ndarray, "B"]]:
    """Up to `each` distinct held-out strings of each length, as `held_out_strings` returns them."""
    per_length = [held_out_strings(task, [length], each, seed) for length in sorted(set(lengths))]
    widest = max(lengths)
    strings = [np.pad(symbols, ((0, 0), (0, widest - symbols.shape[1]))) for symbols, _ in per_length]
    return np.concatenate(strings), np.concatenate([lengths for _, lengths in per_length])


def _of_length(num_symbols: int, length: int, wanted: int, rng: np.random.Generator) -> Int[np.ndarray, "k n"]:
    """Up to `wanted` distinct held-out strings of one length, in random order."""
    if num_symbols**length <= max(_ENUMERABLE, 40 * wanted):
        strings = np.stack(np.unravel_index(np.arange(num_symbols**length), (num_symbols,) * length), axis=-1) + 1
        strings = strings[is_held_out(strings, num_symbols)]
        return rng.permutation(strings)[:wanted]
    found = np.empty((0, length), np.int64)
    while len(found) < wanted:
        drawn = rng.integers(1, num_symbols + 1, size=(20 * wanted, length))
        found = np.concatenate([found, drawn[is_held_out(drawn, num_symbols)]])
        _, first = np.unique(found, axis=0, return_index=True)
        found = found[np.sort(first)]
    return found[:wanted]
