"""Tasks on sequences of symbols: copy, reverse, duplicate, as pure functions of a key.

Symbols are the tokens 1..V; the begin token is V + 1, the end token V + 2 and padding is 0. A source is the
symbols and an end token; a target is the answer and an end token; both are padded to the task's longest.

A task never trains on held-out strings: `held_out` decides by a hash of the string, and the sampler redraws.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from attn.functional.hashing import mix

PAD = 0
Symbols = Int[Array | np.ndarray, "n"]
Length = Int[Array, ""] | int | np.integer


class Example(NamedTuple):
    """One source and its target, each ended and padded; the length counts symbols of the source."""

    source: Int[Array, "S"]
    target: Int[Array, "T"]
    length: Int[Array, ""]


@dataclasses.dataclass(frozen=True)
class Kind:
    """What is asked: for a source of n symbols, target symbol t is source symbol `index(t, n)`.

    Attributes:
      index: `(t, n) -> position in the source`.
      times: the target has `times` n symbols.
    """

    index: Callable
    times: int = 1


# A new task of this kind is one line.
KINDS = {
    "copy": Kind(lambda t, n: t),
    "reverse": Kind(lambda t, n: n - 1 - t),
    "duplicate": Kind(lambda t, n: t % n, times=2),
}


@dataclasses.dataclass(frozen=True)
class Task:
    """A kind of sequence task with its symbols and lengths.

    Args:
      name: a key of `KINDS`.
      symbols: V >= 2, how many different symbols.
      min_length, max_length: of the source in symbols, both included.
    """

    name: str = "reverse"
    symbols: int = 16
    min_length: int = 1
    max_length: int = 32

    @property
    def kind(self) -> Kind:
        return KINDS[self.name]

    @property
    def begin(self) -> int:
        return self.symbols + 1

    @property
    def end(self) -> int:
        return self.symbols + 2

    @property
    def vocabulary(self) -> int:
        """Number of tokens: symbols, padding, begin and end."""
        return self.symbols + 3

    @property
    def target_length(self) -> int:
        """T: tokens of the longest target, its end included."""
        return self.kind.times * self.max_length + 1

    def sample(self, key: Array, *, held_out: bool = False) -> Example:
        """Draw one example: a uniform length, then uniform symbols, redrawn until they are of the wanted part."""
        length_key, key = jax.random.split(key)
        length = jax.random.randint(length_key, (), self.min_length, self.max_length + 1)

        def draw(key):
            symbols = jax.random.randint(key, (self.max_length,), 1, self.symbols + 1)
            return jnp.where(jnp.arange(self.max_length) < length, symbols, PAD)

        def redraw(state):
            key = jax.random.fold_in(state[0], 1)
            return key, draw(key)

        def unwanted(state):
            return is_held_out(state[1], self.symbols) != held_out

        _, symbols = jax.lax.while_loop(unwanted, redraw, (key, draw(key)))
        return self.example(symbols, length)

    def example(self, symbols: Symbols, length: Length) -> Example:
        """The example that asks for the answer to `symbols`, of which the first `length` count."""
        return Example(
            source=self.source(symbols, length, self.max_length + 1),
            target=self.answer(symbols, length, self.target_length),
            length=length,
        )

    def source(self, symbols: Symbols, length: Length, size: int) -> Int[Array, "size"]:
        """Symbols, end token, padding: `[size]` tokens."""
        return self._ended(jnp.arange(size), symbols, length, lambda j, n: j, length)

    def answer(self, symbols: Symbols, length: Length, size: int) -> Int[Array, "size"]:
        """The right answer, end token, padding: `[size]` tokens."""
        return self._ended(jnp.arange(size), symbols, length, self.kind.index, self.kind.times * length)

    def _ended(self, t, symbols, n, index, total):
        token = jnp.asarray(symbols)[jnp.clip(index(t, jnp.maximum(n, 1)), 0, len(symbols) - 1)]
        return jnp.where(t < total, token, jnp.where(t == total, self.end, PAD))

    def decoder_input(self, target: Int[Array, "T"]) -> Int[Array, "T"]:
        """What the decoder reads to predict `target`: the begin token, then the target without its last."""
        return jnp.concatenate([jnp.full((1,), self.begin, target.dtype), target[:-1]])


def is_held_out(
    symbols: Int[Array | np.ndarray, "*B n"], num_symbols: int
) -> Bool[Array | np.ndarray | np.bool_, "*B"]:
    """Whether a string is kept for evaluation, by a hash of the string.

    All symbols but the first are hashed together with their places; then one residue of the first symbol, modulo
    m = min(V, 10), is held out. So about 1/m of the strings are, and for every continuation (hence at every length)
    some first symbols are held out and some are not.

    Args:
      symbols: `[... n]` symbols 1..V, padded with 0; of JAX or of NumPy. Padding does not matter.
      num_symbols: V >= 2.
    """
    modulus = np.uint32(min(num_symbols, 10))
    first, rest = symbols[..., 0].astype(np.uint32), symbols[..., 1:].astype(np.uint32)
    places = np.arange(1, symbols.shape[-1], dtype=np.uint32) * np.uint32(0x9E3779B9)
    hashed = (mix(rest + places) * (rest != PAD)).sum(-1, dtype=np.uint32)
    return (mix(hashed) % modulus + first) % modulus == 0
