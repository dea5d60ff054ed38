"""Examples for training and questions for evaluation, as plain arrays of tokens.

A source and a target are tokens with an end token after them, padded with 0.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

PAD = 0  # the token that pads sources and targets
EXAMPLES = 1  # folded into a run's key to draw its examples
Tokens = Int[Array | np.ndarray, "n"] | Sequence[int]


class DataError(ValueError):
    """Data that a model cannot be trained on; the message is one line for the user."""


class Example(NamedTuple):
    """A source and its target, for one example, or for a batch with a leading axis B.

    A string without a source, as of a language model, has a source of one padding token.
    """

    source: Int[Array | np.ndarray, "*B S"]
    target: Int[Array | np.ndarray, "*B T"]


class Bucket(NamedTuple):
    """The shape of a batch: the number of examples, and the widths of their sources and targets."""

    size: int
    source: int
    target: int


class Questions(NamedTuple):
    """Sources to answer, or prefixes to continue, each with one or more accepted answers.

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


def as_one_text(example: Example) -> Example:
    """Return source and answer as one string without a source: its target is the source with the answer after it.

    So the string is the symbols, a begin token, the answer and an end token. The begin token marks the start of the
    answer, so that there is one right continuation.
    """
    source, target = example
    string = jnp.pad(source, (0, len(target)))  # [S+T]
    string = jax.lax.dynamic_update_slice(string, target, (jnp.sum(source != PAD),))
    return Example(jnp.full(1, PAD, source.dtype), string)


def example_keys(seed: int, step: int | Int[Array, ""], numbers: Int[Array, "B"]) -> tuple[Array, Array]:
    """Return two random keys `[B]` for the examples of a step, by their numbers: to draw them, and for dropout."""
    step_key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), EXAMPLES), step)
    keys = jax.vmap(lambda number: jax.random.fold_in(step_key, number))(numbers)
    return tuple(jax.vmap(jax.random.split, out_axes=1)(keys))


def decoder_input(target: Int[Array, "T"], begin: int) -> Int[Array, "T"]:
    """Return the decoder's input for predicting `target`: the begin token, then the target without its last token."""
    return jnp.concatenate([jnp.full((1,), begin, target.dtype), target[:-1]])


def with_replaced(tokens: Int[Array, "T"], key: Array, rate: float, vocabulary_size: int) -> Int[Array, "T"]:
    """Return a decoder's input with each token but the first replaced by a random one with probability `rate`.

    A model then does not rely on correct tokens. Source: Bengio et al. 2015, who replace by the model's predictions.
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
