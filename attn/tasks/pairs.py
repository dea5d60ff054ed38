"""Pairs from a file of text in UTF-8: one pair per line, source TAB target."""

import codecs
import hashlib
import itertools
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from attn.settings import LONGEST, PATH, Constraint, between, checked
from attn.tasks.examples import DataError, Questions, padded
from attn.tasks.stored import Origin, Stored, in_buckets
from attn.tasks.vocabulary import TOKENIZERS, Pieces, is_tokenizer

LONGEST_LINE = 1 << 20  # bytes; a file with a longer line is most likely not of pairs
USUAL_LONGEST = 1_024  # tokens of a source or a target; attention over this many needs little memory

# The hash of its source, as a fraction in [0, 1), puts a pair into one of these parts, else into training.
HELD_OUT = {"test": (0.0, 0.05), "validation": (0.05, 0.1)}

_TOKENS = f"one of {', '.join(TOKENIZERS)}, or two of them as SOURCE:TARGET"
CONSTRAINTS = {
    **dict.fromkeys(("path", "validation", "test"), PATH),
    "tokens": Constraint(_TOKENS, is_tokenizer, TOKENIZERS),
    "longest": between(1, LONGEST),
}

Pair = tuple[tuple[str, ...], tuple[str, ...]]  # pieces of the source and of the target


class File(NamedTuple):
    """The content of a file of pairs: its distinct pairs in order, the number of repeated ones, and its SHA-256."""

    path: pathlib.Path
    pairs: list[Pair]
    repeated: int
    digest: str


@checked(**CONSTRAINTS)
def load_pairs(
    path: str | os.PathLike,
    *,
    tokens: str = "characters",
    validation: str | os.PathLike | None = None,
    test: str | os.PathLike | None = None,
    longest: int = USUAL_LONGEST,
    vocabulary: Pieces | None = None,
) -> Stored:
    """Read pairs, split them into parts, and make their vocabulary.

    A source with several targets is several training pairs; an evaluation accepts each of its targets. No source is in
    two parts: a hash of the source decides, so that a source stays in its part when lines are added or reordered. If a
    validation or test file is given, the hash selects nothing for that part, and the file's sources are left out of
    training.

    Args:
      path: the file.
      tokens: the kind of token, a key of `TOKENIZERS`, or two of them for source and target: "characters:words".
      validation, test: files of pairs for these parts; without one, a twentieth of the sources.
      longest: the greatest number of tokens of a source or a target.
      vocabulary: the vocabulary of an existing run; None to make one from the training part.

    Returns:
      The training examples, and the questions "validation" and "test".

    Raises:
      ValueError: an argument is not allowed.
      DataError: a file cannot be read, a line is not a pair or too long, or a part has no pairs.
    """
    names = (tokens.split(":") * 2)[:2]
    if vocabulary and [vocabulary.source, vocabulary.target] != names:
        raise ValueError(f"vocabulary: is of {vocabulary.source}:{vocabulary.target}, but tokens are {':'.join(names)}")
    paths = {"training": path, "validation": validation, "test": test}
    files = {part: read(each, names, longest) for part, each in paths.items() if each is not None}
    parts, left_out = _split({part: file.pairs for part, file in files.items()}, TOKENIZERS[names[0]].join)
    for part, pairs in parts.items():
        if not pairs:
            raise DataError(_why_empty(part, files))
    vocabulary = vocabulary or _vocabulary(parts["training"], names)
    questions = {part: _questions(parts[part], vocabulary) for part in ("validation", "test")}
    return Stored(
        name=files["training"].path.name,
        vocabulary=vocabulary,
        training=in_buckets(*zip(*([_with_end(side, vocabulary) for side in pair] for pair in parts["training"]))),
        parts=questions,
        about=tuple(_about(files, parts, questions, left_out, vocabulary)),
        origins={part: Origin(str(file.path), file.digest) for part, file in files.items()},
    )


def read(
    path: str | os.PathLike, names: Sequence[str] = ("characters", "characters"), longest: int = USUAL_LONGEST
) -> File:
    """Read a file of pairs. A byte-order mark and CRLF line ends are accepted.

    Args:
      path: the file.
      names: keys of `TOKENIZERS`, for sources and for targets.
      longest: the greatest number of tokens of a source or a target.

    Raises:
      DataError: the file, a line or a byte cannot be read.
    """
    path, digest = pathlib.Path(os.path.expanduser(path)), hashlib.sha256()
    pairs, number = {}, 0  # a dict keeps distinct pairs in order
    try:
        if path.exists() and not path.is_file():
            kind = "a folder" if path.is_dir() else "not a regular file"
            raise DataError(f"{path}: {kind}, must be a file of pairs")
        for number, line in enumerate(_lines(path, digest), start=1):
            try:
                pairs[_pair(line, names, longest)] = None
            except DataError as error:
                raise DataError(f"{path}: line {number} {error}") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None
    if not pairs:
        raise DataError(f"{path}: an empty file; it must have lines of source TAB target")
    return File(path, list(pairs), number - len(pairs), digest.hexdigest())


def _lines(path: pathlib.Path, digest) -> Iterator[str]:
    """Yield the lines of a file as text, without a byte-order mark and line ends; update `digest` by all its bytes."""
    with path.open("rb") as file:
        offset = 0
        for number, line in enumerate(iter(lambda: file.readline(LONGEST_LINE + 1), b""), start=1):
            if len(line) > LONGEST_LINE:
                raise DataError(f"{path}: line {number} is longer than {LONGEST_LINE:,} bytes, the most allowed")
            digest.update(line)
            mark = len(codecs.BOM_UTF8) if number == 1 and line.startswith(codecs.BOM_UTF8) else 0
            try:
                text = line[mark:].decode().removesuffix("\n").removesuffix("\r")
            except UnicodeDecodeError as error:
                position = f"byte {offset + mark + error.start:,} (line {number})"
                raise DataError(f"{path}: invalid UTF-8 at {position}") from None
            if "\0" in text:
                raise DataError(f"{path}: line {number} has a NUL character; the file must be in UTF-8, not UTF-16")
            if text or line != codecs.BOM_UTF8:  # a mark alone is not a line
                yield text
            offset += len(line)


def _pair(line: str, names: Sequence[str], longest: int) -> Pair:
    """Return the pieces of the two sides of a line.

    Raises:
      DataError: the line is not a pair; the message is to be put after its number.
    """
    format_hint = "; a line is source TAB target"
    if not line.strip() and "\t" not in line:
        raise DataError(f"is empty{format_hint}")
    texts = line.split("\t")
    if len(texts) != 2:
        cause = " (and a CR inside: lines must end with LF or CRLF)" if "\r" in line else ""
        raise DataError(f"has {len(texts) - 1 or 'no'} TAB{'s' if len(texts) > 2 else ''}{cause}{format_hint}")
    sides = tuple(tuple(TOKENIZERS[name].split(text)) for name, text in zip(names, texts))
    for side, text, pieces, name in zip(("source", "target"), texts, sides, names):
        if not text.strip():
            raise DataError(f"has an empty {side}{format_hint}")
        if len(pieces) > longest:
            fix = f"; `longest` (config.data.longest) of {len(pieces)} would allow it" if len(pieces) <= LONGEST else ""
            raise DataError(f"has a {side} of {len(pieces):,} {name}, more than {longest:,}{fix}")
    return sides


def _split(by_file: dict[str, list[Pair]], join: Callable) -> tuple[dict[str, list[Pair]], int]:
    """Return the pairs of each part, and the number of pairs left out since their source is in an earlier part.

    `by_file` holds the pairs of each file. A part without a file is taken from the training file, by a hash.
    """
    hashed = {part: band for part, band in HELD_OUT.items() if part not in by_file}
    parts = {part: by_file.get(part, []) for part in ("test", "validation")} | {"training": []}
    for pair in by_file["training"]:
        fraction = _hash_fraction(join(pair[0]))
        part = next((part for part, (low, high) in hashed.items() if low <= fraction < high), "training")
        parts[part].append(pair)
    seen, left_out = set(), 0
    for part, pairs in parts.items():
        parts[part] = [pair for pair in pairs if pair[0] not in seen]
        left_out += len(pairs) - len(parts[part])
        seen |= {source for source, _ in parts[part]}
    return parts, left_out


def _hash_fraction(source: str) -> float:
    """Return a number in [0, 1) that depends only on the source and is uniform over sources."""
    return int.from_bytes(hashlib.blake2b(source.encode(), digest_size=8).digest()) / 2**64


def _vocabulary(pairs: list[Pair], names: Sequence[str]) -> Pieces:
    """Return the vocabulary of all pieces of the training pairs, sorted by code point; for bytes, all 256."""
    pieces = set(itertools.chain.from_iterable(itertools.chain.from_iterable(pairs)))
    if "bytes" in names:
        pieces |= set(map(chr, range(256)))
    longest = {}  # length of a source -> length of its longest target
    for source, target in pairs:
        longest[len(source)] = max(len(target), longest.get(len(source), 0))
    lengths = sorted(longest)
    targets = itertools.accumulate((longest[length] for length in lengths), max)
    return Pieces(tuple(sorted(pieces)), *names, tuple(zip(lengths, targets)))


def _questions(pairs: list[Pair], vocabulary: Pieces) -> Questions:
    """Return one question per source, which accepts all targets of the source."""
    rows = {source: row for row, source in enumerate(dict.fromkeys(source for source, _ in pairs))}
    pairs = sorted(pairs, key=lambda pair: rows[pair[0]])
    targets = padded([_with_end(target, vocabulary) for _, target in pairs])
    return Questions(
        sources=padded([_with_end(source, vocabulary) for source in rows]),
        lengths=np.array([len(source) for source in rows]),
        targets=np.where(targets == vocabulary.unknown, -1, targets),  # a model must not be right by writing unknown
        source_rows=np.array([rows[source] for source, _ in pairs]),
    )


def _with_end(pieces: Sequence[str], vocabulary: Pieces) -> list[int]:
    return [*vocabulary.encode(pieces), vocabulary.end]


def _why_empty(part: str, files: dict[str, File]) -> str:
    path, pairs, *_ = files["training"]
    sources = len({source for source, _ in pairs})
    fractions = {name: high - low for name, (low, high) in HELD_OUT.items() if name not in files}
    reasons = [f"the hash of the source takes {fraction:.0%} for {name}" for name, fraction in fractions.items()]
    if paths := dict.fromkeys(str(files[name].path) for name in HELD_OUT if name in files):
        reasons.append(f"sources of {' and '.join(paths)} are left out")
    return (
        f"{path}: nothing is left for the {part} part of {sources:,} sources: {', '.join(reasons)}, "
        "and no source is in two parts; give more lines, or separate files for validation and test"
    )


def _about(files: dict[str, File], parts: dict, questions: dict, left_out: int, vocabulary: Pieces) -> Iterator[str]:
    """Yield lines about the files, the parts and the unknown tokens."""
    counts = ", ".join(f"{part} {len(each.lengths):,} sources" for part, each in questions.items())
    yield f"{files['training'].path}: {len(parts['training']):,} pairs to train on, {counts}"
    for file in files.values():
        if file.repeated:
            yield f"{file.path}: {file.repeated:,} duplicate pairs; each counts once"
    if left_out:
        yield f"{left_out:,} pairs are left out, since their sources are in the test or validation part"
    for part, each in questions.items():
        for side, unknown in (("sources", each.sources == vocabulary.unknown), ("targets", each.targets == -1)):
            if count := unknown.any(1).sum():
                yield f"{part}: {count:,} {side} have tokens that no training pair has, read as unknown"
