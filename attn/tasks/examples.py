"""What a model learns from and what it is judged on, as plain arrays of tokens.

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
# What a run's key is folded with for its examples and for lengths that batches share: no random number serves twice.
_EXAMPLES, _LENGTHS = 1, 2
Tokens = Int[Array | np.ndarray, "n"] | Sequence[int]


class DataError(ValueError):
    """Data that cannot be learnt from; the message is one line for the user."""


class Example(NamedTuple):
    """A source and its target; of one example, or with a leading axis B of a batch."""

    source: Int[Array | np.ndarray, "*B S"]
    target: Int[Array | np.ndarray, "*B T"]


class Questions(NamedTuple):
    """Sources to answer, and for each the answers that count as right: one, or several.

    Attributes:
      sources: `[B S]` tokens.
      lengths: `[B]`, tokens of each source without its end token.
      targets: `[A T]` tokens, the accepted answers. A token of -1 stands for one that no model can write.
      asked: `[A]`, the source that each of them answers, in ascending order; every source has one at least.
    """

    sources: Int[np.ndarray, "B S"]
    lengths: Int[np.ndarray, "B"]
    targets: Int[np.ndarray, "A T"]
    asked: Int[np.ndarray, "A"]

    def chosen(self, rows: Sequence[int] | Int[np.ndarray, "k"]) -> "Questions":
        """Some of the questions, by their numbers in ascending order."""
        kept = np.isin(self.asked, rows)
        asked = np.searchsorted(rows, self.asked[kept])
        return Questions(self.sources[rows], self.lengths[rows], self.targets[kept], asked)


def example_keys(seed: int, step: int | Int[Array, ""], numbers: Int[Array, "B"]) -> tuple[Array, Array]:
    """The random keys `[B]` of some examples of a step, by their numbers in its batch: to draw them, for dropout."""
    of_step = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), _EXAMPLES), step)
    keys = jax.vmap(lambda number: jax.random.fold_in(of_step, number))(numbers)
    return tuple(jax.vmap(jax.random.split, out_axes=1)(keys))


def length_key(seed: int, step: int | Int[Array, ""]) -> Array:
    """The random key of the length that all examples of a step share."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), _LENGTHS), step)


def decoder_input(target: Int[Array, "T"], begin: int) -> Int[Array, "T"]:
    """What the decoder reads to predict `target`: the begin token, then the target without its last."""
    return jnp.concatenate([jnp.full((1,), begin, target.dtype), target[:-1]])


def with_replaced(tokens: Int[Array, "T"], key: Array, share: float, vocabulary_size: int) -> Int[Array, "T"]:
    """Return a decoder's input in which a share of the tokens, never the first, are random ones.

    Source: Bengio et al. 2015, who replace them by the model's own answers, so that it does not rely on them.
    """
    which, what = jax.random.split(key)
    chosen = jax.random.bernoulli(which, share, tokens.shape) & (jnp.arange(len(tokens)) > 0)
    return jnp.where(chosen, jax.random.randint(what, tokens.shape, PAD + 1, vocabulary_size, tokens.dtype), tokens)


def padded(rows: Sequence[Sequence[int] | np.ndarray]) -> Int[np.ndarray, "B T"]:
    """Rows of tokens as one array, filled up with padding to the longest."""
    lengths = np.fromiter(map(len, rows), np.int64, len(rows))
    width = int(lengths.max(initial=0))
    out = np.full((len(rows), width), PAD, np.int32)
    out[np.arange(width) < lengths[:, None]] = np.fromiter(itertools.chain.from_iterable(rows), np.int32)
    return out
