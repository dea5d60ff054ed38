"""Tasks on strings of symbols: copy, reverse, sort, add and others, as pure functions of a key.

Strings of the symbols 1..V are drawn; the source is the string, or what the rule makes of it. Symbols are the tokens
1, 2, ... up to the vocabulary's count; then come the begin token and the end token, and padding is 0. A source is
followed by an end token, and so is an answer; both are padded to the task's longest.

A task never trains on held-out strings: `is_held_out` decides by a hash of the string, and the sampler redraws.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from attn.tasks.examples import PAD, DataError, Example, Questions, as_one_text
from attn.tasks.held_out import is_held_out
from attn.tasks.rules import RULES, Rule
from attn.tasks.vocabulary import Symbols

_BLOCK = 1 << 16  # symbols of the strings whose answers are computed at a time


@dataclasses.dataclass(frozen=True)
class Task:
    """A task: a rule with its symbols and lengths.

    Args:
      name: a key of `RULES`.
      symbols: V >= 2, the number of different symbols of the strings that are drawn.
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
        return Symbols(self.rule.alphabet(self.symbols), self.rule)

    def sample(self, key: Array, *, held_out: bool = False, length: Int[Array, ""] | None = None) -> Example:
        """Draw one example: a uniform length of the source unless `length` is given, then uniform symbols.

        Symbols are redrawn until the string is held out, or until it is not, as `held_out` says.
        """
        length_key, key = jax.random.split(key)
        length = self.draw_length(length_key) if length is None else length
        counts = [self.rule.num_drawn(n) for n in range(self.max_length + 1)]
        count = length if self.rule.source is None else jnp.array(counts)[length]

        def draw(key):
            symbols = jax.random.randint(key, (counts[-1],), 1, self.symbols + 1)
            return jnp.where(jnp.arange(counts[-1]) < count, symbols, PAD)

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

    def example(self, symbols: Int[Array, "d"], length: Int[Array, ""]) -> Example:
        """Return the example of one string, padded with 0 to the widths of the longest source and answer.

        `length` is that of the source, which is the string's unless the rule makes the source.
        If the answer continues its source, the example is one string without a source; see `as_one_text`.
        """
        width = len(symbols) if self.rule.source is None else self.max_length
        source, target, _ = _pair(self.vocabulary, self.symbols, width, symbols, length)
        return as_one_text(Example(source, target)) if self.rule.continues else Example(source, target)

    def questions(self, strings: Int[np.ndarray, "B d"], lengths: Int[np.ndarray, "B"]) -> Questions:
        """Return the questions of strings padded with 0, each with its one accepted answer; `lengths` are of sources.

        If the answer continues its source, the sources are prefixes of strings: the symbols and a begin token.

        Raises:
          DataError: a source or an answer of the rule has a wrong length or wrong symbols.
        """
        count, vocabulary = len(strings), self.vocabulary
        width = strings.shape[1] if self.rule.source is None else int(lengths.max(initial=0))  # of the sources
        # Few shapes, so that few programs are compiled: a power of two wide, in blocks of equally many rows.
        wide = 1 << max(strings.shape[1] - 1, width - 1, 0).bit_length()
        rows = max(1, _BLOCK // wide)
        missing = rows - count % rows
        strings = np.pad(strings.astype(np.int32), ((0, missing), (0, wide - strings.shape[1])))
        padded_lengths = np.pad(lengths.astype(np.int32), (0, missing))
        blocks = []
        for start in range(0, count + missing, rows):
            block = jax.device_put((strings[start : start + rows], padded_lengths[start : start + rows]), _cpu())
            blocks.append(jax.device_get(_pairs(vocabulary, self.symbols, wide, *block)))
        sources, targets, counts = (np.concatenate(each)[:count] for each in zip(*blocks))
        sources, targets = sources[:, : width + 1], targets[:, : vocabulary.capacity(width)]
        self._check_sources(sources, lengths)
        self._check_answers(sources, lengths, targets, counts)
        return Questions(sources, lengths, targets, np.arange(count))

    def true_sources(self, source: Int[np.ndarray, "n"]) -> Int[np.ndarray, "m"] | None:
        """Return per symbol of the answer the position of the source's symbol that it is; None if the rule has none.

        Args:
          source: symbols without an end token.
        """
        rule, length = self.rule, len(source)
        if rule.true_sources is None:
            return None
        true = rule.true_sources(jnp.asarray(source), jnp.asarray(length), self.symbols)
        count = rule.answer(jnp.asarray(source), jnp.asarray(length), self.symbols)[1]
        return np.asarray(true)[: int(count)]

    def _check_sources(self, sources, lengths):
        """Check the symbols of sources, which tracing a rule cannot check."""
        symbols = self.vocabulary.count
        is_symbol = np.arange(sources.shape[1]) < lengths[:, None]
        wrong = (is_symbol & ((sources < 1) | (sources > symbols))).any(1)
        for row in np.flatnonzero(wrong)[:1]:
            source = sources[row, : lengths[row]].tolist()
            raise DataError(f"rule {self.name!r}: a source is {source}; must have {lengths[row]} symbols 1..{symbols}")

    def _check_answers(self, sources, lengths, targets, counts):
        """Check the lengths and symbols of answers, which tracing a rule cannot check."""
        symbols = self.vocabulary.count
        most = np.array([self.rule.most_symbols(n) for n in range(int(lengths.max(initial=0)) + 1)])[lengths]
        wrong = (counts != most) if self.rule.fixed_length else (counts < 0) | (counts > most)
        answered = np.arange(targets.shape[1]) < counts[:, None]
        wrong |= (answered & ((targets < 1) | (targets > symbols))).any(1)
        for row in np.flatnonzero(wrong)[:1]:
            expected = f"{'' if self.rule.fixed_length else 'at most '}{most[row]} symbols 1..{symbols}"
            answer = f"{targets[row][answered[row]].tolist()}, of length {counts[row]}"
            source = sources[row, : lengths[row]].tolist()
            raise DataError(f"rule {self.name!r}: the answer to {source} is {answer}; must have {expected}")


def _pair(
    vocabulary: Symbols, num_symbols: int, width: int, symbols: Int[Array, "d"], length: Int[Array, ""]
) -> tuple[Array, Array, Array]:
    """Return source `[width + 1]` and answer `[T]` of a string, with their end tokens, and the answer's symbols."""

    def with_end(tokens, count, end, width):
        t = jnp.arange(width)
        tokens = jnp.pad(tokens, (0, max(0, width - len(tokens))))[:width]
        return jnp.where(t < count, tokens, jnp.where(t == count, end, PAD)).astype(symbols.dtype)

    rule = vocabulary.rule
    answer, count = rule.answer(symbols, length, num_symbols)
    source = symbols if rule.source is None else rule.source(symbols, length, num_symbols)
    source = with_end(source, length, vocabulary.source_end, width + 1)
    return source, with_end(answer, count, vocabulary.end, vocabulary.capacity(width)), jnp.asarray(count)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _pairs(
    vocabulary: Symbols, num_symbols: int, width: int, strings: Int[Array, "B d"], lengths: Int[Array, "B"]
) -> tuple[Array, Array, Array]:
    return jax.vmap(functools.partial(_pair, vocabulary, num_symbols, width))(strings, lengths)


def _cpu() -> jax.Device:
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS has no cpu
        return jax.local_devices()[0]
