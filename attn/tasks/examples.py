"""Examples to learn from and questions to evaluate on, as plain arrays of tokens.

A source and a target are tokens with an end token after them, padded with 0.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

PAD = 0  # the token that fills up sources and targets
# A run's key is folded with these for its examples and for the lengths of batches: no random number is used twice.
_EXAMPLES, _LENGTHS = 1, 2
Tokens = Int[Array | np.ndarray, "n"] | Sequence[int]


class DataError(ValueError):
    """Data that cannot be learned from; the message is one line for the user."""


class Example(NamedTuple):
    """A source and its target, of one example or with the leading axis B of a batch.

    A string without a source, as of a language model, has a source of one padding token.
    """

    source: Int[Array | np.ndarray, "*B S"]
    target: Int[Array | np.ndarray, "*B T"]


class Questions(NamedTuple):
    """Sources to answer, or beginnings to continue, and the accepted answers of each: one, or several.

    Attributes:
      sources: `[B S]` tokens.
      lengths: `[B]`, tokens of each source without its end token.
      targets: `[A T]` tokens, the accepted answers. A token of -1 can never be written by a model.
      source_rows: `[A]`, the row of the source of each answer, in ascending order; every source has at least one.
    """

    sources: Int[np.ndarray, "B S"]
    lengths: Int[np.ndarray, "B"]
    targets: Int[np.ndarray, "A T"]
    source_rows: Int[np.ndarray, "A"]

    def chosen(self, rows: Sequence[int] | Int[np.ndarray, "k"]) -> "Questions":
        """Return the questions of these rows, given in ascending order."""
        kept = np.isin(self.source_rows, rows)
        renumbered = np.searchsorted(rows, self.source_rows[kept])
        return Questions(self.sources[rows], self.lengths[rows], self.targets[kept], renumbered)


def example_keys(seed: int, step: int | Int[Array, ""], numbers: Int[Array, "B"]) -> tuple[Array, Array]:
    """Return two random keys `[B]` per example of a step, given its number in the batch: to draw it, for dropout."""
    of_step = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), _EXAMPLES), step)
    keys = jax.vmap(lambda number: jax.random.fold_in(of_step, number))(numbers)
    return tuple(jax.vmap(jax.random.split, out_axes=1)(keys))


def length_key(seed: int, step: int | Int[Array, ""]) -> Array:
    """Return the random key of the length that all examples of a step share."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), _LENGTHS), step)


def decoder_input(target: Int[Array, "T"], begin: int) -> Int[Array, "T"]:
    """Return the decoder's input for predicting `target`: the begin token, then the target without its last token."""
    return jnp.concatenate([jnp.full((1,), begin, target.dtype), target[:-1]])


def with_replaced(tokens: Int[Array, "T"], key: Array, rate: float, vocabulary_size: int) -> Int[Array, "T"]:
    """Return a decoder's input with each token but the first replaced by a random one with probability `rate`.

    Source: Bengio et al. 2015, who replace them by the model's own answers, so that it does not rely on them.
    """
    where, values = jax.random.split(key)
    replaced = jax.random.bernoulli(where, rate, tokens.shape) & (jnp.arange(len(tokens)) > 0)
    return jnp.where(replaced, jax.random.randint(values, tokens.shape, PAD + 1, vocabulary_size, tokens.dtype), tokens)


def padded(rows: Sequence[Sequence[int] | np.ndarray]) -> Int[np.ndarray, "B T"]:
    """Return rows of tokens as one array, padded to the longest."""
    lengths = np.fromiter(map(len, rows), np.int64, len(rows))
    width = int(lengths.max(initial=0))
    out = np.full((len(rows), width), PAD, np.int32)
    out[np.arange(width) < lengths[:, None]] = np.fromiter(itertools.chain.from_iterable(rows), np.int32)
    return out
