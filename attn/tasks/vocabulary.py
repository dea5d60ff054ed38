"""Between text and tokens: what each token is called, how an input is read and an answer written.

Token 0 is padding, then come the symbols or pieces from 1 on, then the begin and end tokens.
"""

import bisect
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable
from typing import NamedTuple

from attn.tasks.examples import PAD, Tokens
from attn.tasks.settings import checked


class InputError(ValueError):
    """Text that is no input for the task; the message is one line for the user."""


@dataclasses.dataclass(frozen=True)
class Symbols:
    """Symbols 1..V, written as whole numbers separated by spaces.

    Args:
      count: V.
      times: an answer has `times` as many symbols as its source.
    """

    count: int
    times: int = 1

    @property
    def begin(self) -> int:
        return self.count + 1

    @property
    def end(self) -> int:
        return self.count + 2

    @property
    def size(self) -> int:
        """Number of tokens: symbols, padding, begin and end."""
        return self.count + 3

    def room(self, length: int) -> int:
        """T: tokens of an answer to a source of `length` symbols, its end included."""
        return self.times * length + 1

    @checked()
    def read(self, text: str) -> list[int]:
        """The symbols that a text names.

        Raises:
          InputError: nothing there, or a word that is no symbol.
        """
        words = text.split()
        if not words:
            raise InputError(f"empty input; give symbols 1..{self.count} separated by spaces")
        for word in words:
            # ASCII digits alone: `int` would take "1_0" and digits of other scripts as well.
            if not (word.isascii() and word.isdigit() and len(word) < 10 and 1 <= int(word) <= self.count):
                shown = word if len(word) <= 20 else word[:20] + "..."
                raise InputError(f"unknown symbol {shown!r}; symbols are whole numbers 1..{self.count}")
        return [int(word) for word in words]

    def names(self, tokens: Tokens) -> list[str]:
        """What each token is called: symbols by their number, the others by their purpose."""
        special = {PAD: "pad", self.begin: "begin", self.end: "end"}
        return [special.get(int(token), str(int(token))) for token in tokens]

    def write(self, tokens: Tokens, side: str = "target") -> str:
        """Tokens as text, up to the end token if there is one; the same for both sides."""
        return " ".join(self.names(before(self.end, tokens)))

    def shown(self) -> str:
        """The vocabulary in a line."""
        return f"{self.count} symbols, 1 to {self.count}; {self.size} tokens with padding, begin and end"


class Splitting(NamedTuple):
    """A way to take text apart, and to put it together again."""

    split: Callable[[str], list[str]]
    join: Callable[[Iterable[str]], str]


UNREADABLE = "\ufffd"  # what a token without text of its own is written as


def _bytes_of(piece: str) -> bytes:
    """The byte that a piece stands for; what stands for none, as a sign in its place, in UTF-8."""
    return piece.encode("latin-1") if len(piece) == 1 and piece <= "\xff" else piece.encode()


# A new kind of token is one line.
SPLITTINGS = {
    "characters": Splitting(list, "".join),
    "words": Splitting(str.split, " ".join),
    # A byte is the character of the same number, so that it is a piece of text as the others are.
    "bytes": Splitting(
        lambda text: list(text.encode(errors="surrogatepass").decode("latin-1")),
        lambda pieces: b"".join(map(_bytes_of, pieces)).decode(errors="replace"),
    ),
}


def is_splitting(tokens: str) -> bool:
    """Whether `tokens` names one splitting for both sides, or two as SOURCE:TARGET."""
    names = tokens.split(":")
    return len(names) <= 2 and set(names) <= set(SPLITTINGS)


@dataclasses.dataclass(frozen=True)
class Pieces:
    """Pieces of text: characters, words or bytes.

    Args:
      pieces: token k is `pieces[k - 1]`.
      source, target: keys of `SPLITTINGS`, how each side is taken apart.
      longest_targets: of the training pairs, in pieces, with rising lengths: (length of a source, length of the longest
        target of the sources that are no longer). The last is of the longest source.
    """

    pieces: tuple[str, ...]
    source: str
    target: str
    longest_targets: tuple[tuple[int, int], ...]

    def __post_init__(self):
        if not is_splitting(f"{self.source}:{self.target}"):
            names = f"{self.source!r} and {self.target!r}"
            raise ValueError(f"source and target: got {names}, must be of {', '.join(SPLITTINGS)}")
        if not all(isinstance(piece, str) for piece in self.pieces):
            raise ValueError("pieces: must all be text")
        if len(set(self.pieces)) < len(self.pieces):
            twice = next(piece for k, piece in enumerate(self.pieces) if piece in self.pieces[:k])
            raise ValueError(f"pieces: got {twice!r} twice, must have each once")
        if not self.longest_targets:
            raise ValueError("longest_targets: got none, must have the longest source")
        lengths, targets = zip(*self.longest_targets)
        if lengths[0] < 1 or targets[0] < 1 or list(lengths) != sorted(set(lengths)):
            raise ValueError(f"longest_targets: got {self.longest_targets[:3]}, must have rising lengths from 1 on")

    @property
    def begin(self) -> int:
        return len(self.pieces) + 1

    @property
    def end(self) -> int:
        return len(self.pieces) + 2

    @property
    def unknown(self) -> int:
        """The token of every piece that is not in the vocabulary."""
        return len(self.pieces) + 3

    @property
    def size(self) -> int:
        """Number of tokens: pieces, padding, begin, end and unknown."""
        return len(self.pieces) + 4

    @property
    def longest_source(self) -> int:
        """Of the training pairs, in pieces."""
        return self.longest_targets[-1][0]

    def room(self, length: int) -> int:
        """T: tokens that an answer to a source of `length` pieces may take, its end included.

        As many as the longest target of the training sources that are up to about twice as long. For a source longer
        than any of training, as many as for the longest, and proportionally more.
        """
        longest_source, longest_target = self.longest_targets[-1]
        if length > longest_source:
            return -(-longest_target * length // longest_source) + 1
        fitting = bisect.bisect_right(self.longest_targets, 2 * length + 8, key=lambda step: step[0])
        return self.longest_targets[max(0, fitting - 1)][1] + 1

    @checked()
    def read(self, text: str) -> list[int]:
        """The tokens of a source; pieces that are not in the vocabulary become the unknown token.

        Raises:
          InputError: nothing there.
        """
        pieces = SPLITTINGS[self.source].split(text)
        if not pieces:
            raise InputError(f"empty input; give a source in {self.source}")
        return self.encode(pieces)

    def unknown_pieces(self, text: str) -> list[str]:
        """The pieces of a source that are not in the vocabulary, each once."""
        return [piece for piece in dict.fromkeys(SPLITTINGS[self.source].split(text)) if piece not in self._tokens]

    def encode(self, pieces: Iterable[str]) -> list[int]:
        """The token of each piece."""
        return [self._tokens.get(piece, self.unknown) for piece in pieces]

    def names(self, tokens: Tokens) -> list[str]:
        """What each token is called: pieces by themselves, what cannot be seen by a sign, the others by purpose."""
        special = {PAD: "pad", self.begin: "begin", self.end: "end", self.unknown: "unknown"}
        return [special[token] if token in special else _visible(self.pieces[token - 1]) for token in map(int, tokens)]

    def write(self, tokens: Tokens, side: str = "target") -> str:
        """Tokens of a target, or of a source, as text, up to the end token if there is one."""
        inside = [int(token) for token in before(self.end, tokens)]
        pieces = [self.pieces[token - 1] if 1 <= token <= len(self.pieces) else UNREADABLE for token in inside]
        return SPLITTINGS[getattr(self, side)].join(pieces)

    def shown(self) -> str:
        """The vocabulary in a line, or as much of it as is readable."""
        some = " ".join(map(_visible, self.pieces[:200]))
        rest = len(self.pieces) - 200
        kinds = " to ".join(dict.fromkeys((self.source, self.target)))
        return (
            f"{len(self.pieces):,} {kinds}, {self.size:,} tokens with padding, begin, end and unknown: "
            f"{some}{f' ... and {rest:,} more' if rest > 0 else ''}"
        )

    @functools.cached_property
    def _tokens(self) -> dict[str, int]:
        return {piece: token for token, piece in enumerate(self.pieces, start=1)}


Vocabulary = Symbols | Pieces


def before(end: int, tokens: Tokens) -> list[int]:
    """The tokens before the first `end`, or, where there is none, before the padding."""
    return list(itertools.takewhile(lambda token: token not in (end, PAD), map(int, tokens)))


def _visible(piece: str) -> str:
    return "␣" if piece == " " else piece if piece.isprintable() else piece.encode("unicode_escape").decode()
