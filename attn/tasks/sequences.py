"""Tasks on sequences of symbols: copy, reverse, duplicate and the like, as pure functions of a key.

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
from jaxtyping import Array, Bool, Int, UInt32

from attn.functional.hashing import mix
from attn.tasks.examples import PAD, Example
from attn.tasks.vocabulary import Symbols


class Kind(NamedTuple):
    """What is asked: for a source of n symbols, target symbol t is source symbol `index(t, n)`, or made of two of them.

    Attributes:
      index: `(t, n) -> position in the source`.
      times: the target has `times` n symbols.
      also: `(t, n) -> position` of a second symbol; None for one alone.
      combine: `(first, second) -> symbol`, what is asked of two.
    """

    index: Callable
    times: int = 1
    also: Callable | None = None
    combine: Callable | None = None


# A new task of this kind is one line.
KINDS = {
    "copy": Kind(lambda t, n: t),
    "reverse": Kind(lambda t, n: n - 1 - t),
    "duplicate": Kind(lambda t, n: t % n, times=2),
    # Two relations at once, and which is which matters: the mirror image if it is odd, else the next symbol.
    "mirror_or_next": Kind(
        lambda t, n: n - 1 - t, also=lambda t, n: (t + 1) % n, combine=lambda a, b: a % 2 * a + (1 - a % 2) * b
    ),
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
    def vocabulary(self) -> Symbols:
        """Between text and the task's tokens."""
        return Symbols(self.symbols, self.kind.times)

    def sample(self, key: Array, *, held_out: bool = False, length: Int[Array, ""] | None = None) -> Example:
        """Draw one example: a uniform length, if none is given, then uniform symbols, redrawn until they are of the
        wanted part."""
        length_key, key = jax.random.split(key)
        length = self.draw_length(length_key) if length is None else length

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

    def draw_length(self, key: Array) -> Int[Array, ""]:
        """A uniform length of a source."""
        return jax.random.randint(key, (), self.min_length, self.max_length + 1)

    def example(self, symbols: Int[Array | np.ndarray, "*B n"], length: Int[Array | np.ndarray, "*B"]) -> Example:
        """The example that asks for the answer to `symbols`, of which the first `length` count.

        Of JAX or of NumPy; as wide as the symbols, so that any length fits.
        """
        width = symbols.shape[-1]
        source = self._ended(symbols, length, width + 1, Kind(lambda j, n: j))
        return Example(source, self._ended(symbols, length, self.vocabulary.room(width), self.kind))

    def _ended(self, symbols, length, size, kind: Kind):
        xp, n, times = symbols.__array_namespace__(), length[..., None], kind.times
        t = xp.broadcast_to(xp.arange(size), (*length.shape, size))

        def at(index):
            chosen = xp.clip(index(t, n), 0, symbols.shape[-1] - 1)
            return xp.take_along_axis(symbols, chosen, axis=-1)

        token = at(kind.index)
        if kind.also is not None:
            token = kind.combine(token, at(kind.also))
        end, pad = xp.asarray([self.vocabulary.end, PAD], dtype=symbols.dtype)
        return xp.where(t < times * n, token, xp.where(t == times * n, end, pad))


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
    first, rest = symbols[..., 0].astype(np.uint32), symbols[..., 1:]
    return (mix(hash_of(rest)) % modulus + first) % modulus == 0


def is_for_validation(
    symbols: Int[Array | np.ndarray, "*B n"], num_symbols: int
) -> Bool[Array | np.ndarray | np.bool_, "*B"]:
    """Whether a held-out string is for validation, by a further bit of its hash; the other held-out ones are test.

    Args:
      symbols, num_symbols: as of `is_held_out`.
    """
    return is_held_out(symbols, num_symbols) & (mix(hash_of(symbols)) % 2 == 1)


def hash_of(symbols: Int[Array | np.ndarray, "*B n"]) -> UInt32[Array | np.ndarray | np.generic, "*B"]:
    """A hash of the symbols together with their places; padding does not matter."""
    symbols = symbols.astype(np.uint32)
    places = np.arange(1, symbols.shape[-1] + 1, dtype=np.uint32) * np.uint32(0x9E3779B9)
    return (mix(symbols + places) * (symbols != PAD)).sum(-1, dtype=np.uint32)
