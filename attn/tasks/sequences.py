"""Tasks on strings of symbols: copy, reverse, sort, add and others, as pure functions of a key.

Symbols are the tokens 1..V; the begin token is V + 1, the end token V + 2 and padding is 0. A source is the
symbols and an end token; a target is the answer and an end token; both are padded to the task's longest.

A task never trains on held-out strings: `is_held_out` decides by a hash of the string, and the sampler redraws.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, UInt32

from attn.functional.hashing import mix
from attn.tasks.examples import PAD, DataError, Example, Questions, as_one_text
from attn.tasks.rules import RULES, Rule
from attn.tasks.vocabulary import Symbols

_BLOCK = 1 << 16  # symbols of the strings whose answers are computed at a time


@dataclasses.dataclass(frozen=True)
class Task:
    """A task: a rule with its symbols and lengths.

    Args:
      name: a key of `RULES`.
      symbols: V >= 2, the number of different symbols.
      min_length, max_length: of the source in symbols, both included.
    """

    name: str = "reverse"
    symbols: int = 16
    min_length: int = 1
    max_length: int = 32

    @property
    def rule(self) -> Rule:
        return RULES[self.name]

    @property
    def vocabulary(self) -> Symbols:
        """The task's tokens."""
        return Symbols(self.symbols, self.rule)

    def sample(self, key: Array, *, held_out: bool = False, length: Int[Array, ""] | None = None) -> Example:
        """Draw one example: a uniform length unless `length` is given, then uniform symbols.

        Symbols are redrawn until the string is held out, or until it is not, as `held_out` says.
        """
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
        """Draw a uniform length of a source."""
        return jax.random.randint(key, (), self.min_length, self.max_length + 1)

    def example(self, symbols: Int[Array, "n"], length: Int[Array, ""]) -> Example:
        """Return the example of one string, padded with 0 to the widths of the longest source and answer.

        If the answer continues its source, the example is one string without a source; see `as_one_text`.
        """
        source, target, _ = _pair(self.vocabulary, symbols, length)
        return as_one_text(Example(source, target)) if self.rule.continues else Example(source, target)

    def questions(self, strings: Int[np.ndarray, "B n"], lengths: Int[np.ndarray, "B"]) -> Questions:
        """Return the questions of strings padded with 0, each with its one accepted answer.

        If the answer continues its source, the sources are prefixes of strings: the symbols and a begin token.

        Raises:
          DataError: an answer of the rule has a wrong length or wrong symbols.
        """
        (count, width), vocabulary = strings.shape, self.vocabulary
        # Few shapes, so that few programs are compiled: a power of two wide, in blocks of equally many rows.
        wide = 1 << max(width - 1, 0).bit_length()
        rows = max(1, _BLOCK // wide)
        missing = rows - count % rows
        strings = np.pad(strings.astype(np.int32), ((0, missing), (0, wide - width)))
        padded_lengths = np.pad(lengths.astype(np.int32), (0, missing))
        blocks = []
        for start in range(0, count + missing, rows):
            block = jax.device_put((strings[start : start + rows], padded_lengths[start : start + rows]), _cpu())
            blocks.append(jax.device_get(_pairs(vocabulary, *block)))
        sources, targets, counts = (np.concatenate(each)[:count] for each in zip(*blocks))
        targets = targets[:, : vocabulary.capacity(width)]
        self._check_answers(strings[:count], lengths, targets, counts)
        return Questions(sources[:, : width + 1], lengths, targets, np.arange(count))

    def _check_answers(self, strings, lengths, targets, counts):
        """Check the lengths and symbols of answers, which tracing a rule cannot check."""
        most = np.array([self.rule.most_symbols(n) for n in range(int(lengths.max(initial=0)) + 1)])[lengths]
        wrong = (counts != most) if self.rule.fixed_length else (counts < 0) | (counts > most)
        answered = np.arange(targets.shape[1]) < counts[:, None]
        wrong |= (answered & ((targets < 1) | (targets > self.symbols))).any(1)
        for row in np.flatnonzero(wrong)[:1]:
            expected = f"{'' if self.rule.fixed_length else 'at most '}{most[row]} symbols 1..{self.symbols}"
            answer = f"{targets[row][answered[row]].tolist()}, of length {counts[row]}"
            source = strings[row, : lengths[row]].tolist()
            raise DataError(f"rule {self.name!r}: the answer to {source} is {answer}; must have {expected}")


def _pair(vocabulary: Symbols, symbols: Int[Array, "n"], length: Int[Array, ""]) -> tuple[Array, Array, Array]:
    """Return source `[n + 1]` and answer `[T]` of a string, with their end tokens, and the answer's symbols."""

    def with_end(tokens, count, end, width):
        t = jnp.arange(width)
        tokens = jnp.pad(tokens, (0, max(0, width - len(tokens))))[:width]
        return jnp.where(t < count, tokens, jnp.where(t == count, end, PAD)).astype(symbols.dtype)

    answer, count = vocabulary.rule.answer(symbols, length, vocabulary.count)
    source = with_end(symbols, length, vocabulary.source_end, len(symbols) + 1)
    return source, with_end(answer, count, vocabulary.end, vocabulary.capacity(len(symbols))), jnp.asarray(count)


@functools.partial(jax.jit, static_argnums=0)
def _pairs(vocabulary: Symbols, strings: Int[Array, "B n"], lengths: Int[Array, "B"]) -> tuple[Array, Array, Array]:
    return jax.vmap(functools.partial(_pair, vocabulary))(strings, lengths)


def _cpu() -> jax.Device:
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS has no cpu
        return jax.local_devices()[0]


def is_held_out(
    symbols: Int[Array | np.ndarray, "*B n"], num_symbols: int
) -> Bool[Array | np.ndarray | np.bool_, "*B"]:
    """Return whether a string is held out for evaluation, by a hash of the string.

    All symbols but the first are hashed together with their positions; then one residue of the first symbol, modulo
    m = min(V, 10), is held out. So about 1/m of the strings are held out. With every continuation, and so
    at every length, some first symbols are held out and some are not.

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
    """Return whether a string is for validation; one more bit of the hash divides held-out strings from those for test.

    Args:
      symbols, num_symbols: as of `is_held_out`.
    """
    return is_held_out(symbols, num_symbols) & (mix(hash_of(symbols)) % 2 == 1)


def hash_of(symbols: Int[Array | np.ndarray, "*B n"]) -> UInt32[Array | np.ndarray | np.generic, "*B"]:
    """Return a hash of the symbols together with their positions; padding does not matter."""
    symbols = symbols.astype(np.uint32)
    positions = np.arange(1, symbols.shape[-1] + 1, dtype=np.uint32) * np.uint32(0x9E3779B9)
    return (mix(symbols + positions) * (symbols != PAD)).sum(-1, dtype=np.uint32)
