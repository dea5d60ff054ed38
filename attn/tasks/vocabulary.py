"""Vocabularies: names of tokens, conversion between text and tokens, and limits of answers' lengths."""

import bisect
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable
from typing import NamedTuple

from attn.settings import checked
from attn.tasks.examples import PAD, Tokens
from attn.tasks.rules import RULES, Rule


class InputError(ValueError):
    """An input that is not allowed; the message is one line for the user."""


class Vocabulary:
    """The tokens: 0 is padding, 1 to `count` are symbols or pieces of text, then begin and end.

    Attributes:
      continues: whether answers continue their sources, so that a model learns both as one string.
    """

    count: int
    continues = False

    @property
    def begin(self) -> int:
        return self.count + 1

    @property
    def end(self) -> int:
        return self.count + 2

    @property
    def source_end(self) -> int:
        """The token after a source: the end token, or the begin token of the answer that continues it."""
        return self.begin if self.continues else self.end

    def capacity(self, length: int) -> int:
        """Return T: the greatest number of tokens of an answer to a source of `length` tokens, its end included.

        This sizes the arrays of decoding. A model does not get it as input; see `answer_length`.
        """
        raise NotImplementedError

    def answer_length(self, length: int) -> int | None:
        """Return the number of tokens of every answer to a source of `length` tokens, its end included.

        None if it depends on the data: a model then must not get it in training, since it is unknown in decoding.
        """
        return None

    def names(self, tokens: Tokens) -> list[str]:
        """Return the name of each token: of a piece its text, with invisible characters escaped, else its purpose."""
        special = {PAD: "pad", self.begin: "begin", self.end: "end", self.end + 1: "unknown"}
        return [special.get(token) or self._name(token) for token in map(int, tokens)]

    def write(self, tokens: Tokens, side: str = "target") -> str:
        """Return the tokens of a target, or of a source, as text, up to the end token if there is one."""
        return self._join(before(self.source_end if side == "source" else self.end, tokens), side)


@dataclasses.dataclass(frozen=True)
class Symbols(Vocabulary):
    """Symbols 1, 2, ..., written as whole numbers separated by spaces.

    Args:
      count: their number.
      rule: the rule of the answers, which limits their lengths.
    """

    count: int
    rule: Rule = RULES["copy"]

    @property
    def size(self) -> int:
        """Number of tokens: symbols, padding, begin and end."""
        return self.count + 3

    @property
    def continues(self) -> bool:
        return self.rule.continues

    def capacity(self, length: int) -> int:
        return self.rule.most_symbols(length) + 1

    def answer_length(self, length: int) -> int | None:
        # The length of a string without a source would reveal where its answer begins.
        return self.capacity(length) if self.rule.fixed_length and not self.continues else None

    @checked()
    def read(self, text: str, side: str = "source") -> list[int]:
        """Return the symbols that a text names, a source or a "target".

        Raises:
          InputError: an empty text, or a word that is not a symbol.
        """
        words = text.split()
        if not words:
            raise InputError(f"empty input; give symbols 1..{self.count} separated by spaces")
        for word in words:
            # Only ASCII digits: `int` also accepts "1_0" and digits of other scripts.
            if not (word.isascii() and word.isdigit() and len(word) < 10 and 1 <= int(word) <= self.count):
                shown = word if len(word) <= 20 else word[:20] + "..."
                raise InputError(f"unknown symbol {shown!r}; symbols are whole numbers 1..{self.count}")
        return [int(word) for word in words]

    def describe(self) -> str:
        """Return a line about the vocabulary."""
        return f"{self.count} symbols, 1 to {self.count}; {self.size} tokens with padding, begin and end"

    def _name(self, symbol: int) -> str:
        return str(symbol)

    def _join(self, tokens: list[int], side: str) -> str:
        return " ".join(self.names(tokens))


class Tokenizer(NamedTuple):
    """A way to split text into pieces, and to join them again."""

    split: Callable[[str], list[str]]
    join: Callable[[Iterable[str]], str]


UNREADABLE = "\ufffd"  # written for a token without a text


def _bytes_of(piece: str) -> bytes:
    """Return the byte that a piece stands for; of a piece that is not a byte, its UTF-8."""
    return piece.encode("latin-1") if len(piece) == 1 and piece <= "\xff" else piece.encode()


# A new kind of token is one line.
TOKENIZERS = {
    "characters": Tokenizer(list, "".join),
    "words": Tokenizer(str.split, " ".join),
    # A byte is the character of the same number, so that it is a piece of text like the others.
    "bytes": Tokenizer(
        lambda text: list(text.encode(errors="surrogatepass").decode("latin-1")),
        lambda pieces: b"".join(map(_bytes_of, pieces)).decode(errors="replace"),
    ),
}


def is_tokenizer(tokens: str) -> bool:
    """Return whether `tokens` names one tokenizer for both sides, or two as SOURCE:TARGET."""
    names = tokens.split(":")
    return len(names) <= 2 and set(names) <= set(TOKENIZERS)


@dataclasses.dataclass(frozen=True)
class Pieces(Vocabulary):
    """Pieces of text: characters, words or bytes.

    Args:
      pieces: token k is `pieces[k - 1]`.
      source, target: keys of `TOKENIZERS`, for each side.
      longest_targets: of the training pairs, in pieces, with rising lengths: (length of a source, length of the longest
        target of sources up to that length). The last is of the longest source.
    """

    pieces: tuple[str, ...]
    source: str
    target: str
    longest_targets: tuple[tuple[int, int], ...]

    def __post_init__(self):
        if not is_tokenizer(f"{self.source}:{self.target}"):
            names = f"{self.source!r} and {self.target!r}"
            raise ValueError(f"source and target: got {names}, must be of {', '.join(TOKENIZERS)}")
        if not all(isinstance(piece, str) for piece in self.pieces):
            raise ValueError("pieces: must all be text")
        if len(self._tokens) < len(self.pieces):
            twice = next(piece for k, piece in enumerate(self.pieces) if piece in self.pieces[:k])
            raise ValueError(f"pieces: got {twice!r} twice, must have each once")
        if not self.longest_targets:
            raise ValueError("longest_targets: got none, must have the longest source")
        lengths, targets = zip(*self.longest_targets)
        if lengths[0] < 1 or targets[0] < 1 or list(lengths) != sorted(set(lengths)):
            raise ValueError(f"longest_targets: got {self.longest_targets[:3]}, must have rising lengths from 1 on")

    @property
    def count(self) -> int:
        return len(self.pieces)

    @property
    def unknown(self) -> int:
        """The token of every piece that is not in the vocabulary."""
        return self.count + 3

    @property
    def size(self) -> int:
        """Number of tokens: pieces, padding, begin, end and unknown."""
        return self.count + 4

    @property
    def longest_source(self) -> int:
        """Length of the longest source of the training pairs, in pieces."""
        return self.longest_targets[-1][0]

    def capacity(self, length: int) -> int:
        """Return T: the greatest number of tokens of an answer to a source of `length` pieces, its end included.

        This is the length of the longest target of training sources up to about twice as long. For a source longer than
        all of training, the longest target is scaled in proportion to the length.
        """
        longest_source, longest_target = self.longest_targets[-1]
        if length > longest_source:
            return -(-longest_target * length // longest_source) + 1
        fitting = bisect.bisect_right(self.longest_targets, 2 * length + 8, key=lambda step: step[0])
        return self.longest_targets[max(0, fitting - 1)][1] + 1

    @checked()
    def read(self, text: str, side: str = "source") -> list[int]:
        """Return the tokens of a source, or of a "target"; unknown pieces become the unknown token.

        Raises:
          InputError: an empty text.
        """
        tokens = getattr(self, side)
        pieces = TOKENIZERS[tokens].split(text)
        if not pieces:
            raise InputError(f"empty input; give a {side} in {tokens}")
        return self.encode(pieces)

    def unknown_pieces(self, text: str) -> list[str]:
        """Return the pieces of a source that are not in the vocabulary, each once."""
        return [piece for piece in dict.fromkeys(TOKENIZERS[self.source].split(text)) if piece not in self._tokens]

    def encode(self, pieces: Iterable[str]) -> list[int]:
        """Return the token of each piece."""
        return [self._tokens.get(piece, self.unknown) for piece in pieces]

    def describe(self) -> str:
        """Return a line about the vocabulary, with its first 200 pieces."""
        shown = " ".join(map(_visible, self.pieces[:200]))
        rest = f" ... and {self.count - 200:,} more" if self.count > 200 else ""
        tokens = " to ".join(dict.fromkeys((self.source, self.target)))
        return f"{self.count:,} {tokens}, {self.size:,} tokens with padding, begin, end and unknown: {shown}{rest}"

    @functools.cached_property
    def _tokens(self) -> dict[str, int]:
        return {piece: token for token, piece in enumerate(self.pieces, start=1)}

    def _name(self, token: int) -> str:
        return _visible(self.pieces[token - 1])

    def _join(self, tokens: list[int], side: str) -> str:
        pieces = [self.pieces[token - 1] if 1 <= token <= self.count else UNREADABLE for token in tokens]
        return TOKENIZERS[getattr(self, side)].join(pieces)


def before(end: int, tokens: Tokens) -> list[int]:
    """Return the tokens before the first `end`, or before the padding if there is none."""
    return list(itertools.takewhile(lambda token: token not in (end, PAD), map(int, tokens)))


def _visible(piece: str) -> str:
    return "␣" if piece == " " else piece if piece.isprintable() else piece.encode("unicode_escape").decode()
