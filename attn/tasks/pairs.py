"""Pairs of one's own: a file with one pair a line, source TAB target, in UTF-8."""

import codecs
import hashlib
import itertools
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from attn.tasks.examples import DataError, Questions, padded
from attn.tasks.settings import LONGEST, PATH, Rule, between, checked
from attn.tasks.stored import Origin, Stored, in_buckets
from attn.tasks.vocabulary import SPLITTINGS, Pieces, is_splitting

LONGEST_LINE = 1 << 20  # bytes; a longer one is no pair but some other kind of file
USUAL_LONGEST = 1_024  # tokens of a source or a target: what attention can be trained on without much thought

# By the hash of its source, as a fraction of all hashes, a pair is in one of these parts, else in training.
HELD_OUT = {"test": (0.0, 0.05), "validation": (0.05, 0.1)}

RULES = {
    **dict.fromkeys(("path", "validation", "test"), PATH),
    "tokens": Rule(f"one of {', '.join(SPLITTINGS)}, or two of them as SOURCE:TARGET", is_splitting, (*SPLITTINGS,)),
    "longest": between(1, LONGEST),
}

Pair = tuple[tuple[str, ...], tuple[str, ...]]  # pieces of the source and of the target


class File(NamedTuple):
    """What stands in a file of pairs: the distinct pairs in order, how many came again, and the file's SHA-256."""

    path: pathlib.Path
    pairs: list[Pair]
    repeated: int
    digest: str


@checked(**RULES)
def load(
    path: str | os.PathLike,
    *,
    tokens: str = "characters",
    validation: str | os.PathLike | None = None,
    test: str | os.PathLike | None = None,
    longest: int = USUAL_LONGEST,
    vocabulary: Pieces | None = None,
) -> Stored:
    """Read pairs, split them into parts, and make their vocabulary.

    A source with several targets is several pairs to train on; when it is asked, any of them counts as right. No
    source is in two parts: a hash of the source decides, so that it stays where it is when lines are added, in
    whatever order. With a validation or test file of one's own the hash takes nothing for that part, and its sources
    are taken out of the training part.

    Args:
      path: of the pairs.
      tokens: what a token is, a key of `SPLITTINGS`, or two of them for source and target: "characters:words".
      validation, test: files of pairs that are these parts; without one, a twentieth of the sources is.
      longest: how many tokens a source or a target may have.
      vocabulary: of a run that has one already; None to make it from the training part.

    Returns:
      The training examples, and the questions "validation" and "test".

    Raises:
      ValueError: an argument that is not what it must be.
      DataError: a file that cannot be read, a line that is no pair or too long, a part without pairs.
    """
    kinds = (tokens.split(":") * 2)[:2]
    if vocabulary and [vocabulary.source, vocabulary.target] != kinds:
        raise ValueError(f"vocabulary: is of {vocabulary.source}:{vocabulary.target}, but tokens are {':'.join(kinds)}")
    paths = {"training": path, "validation": validation, "test": test}
    files = {part: read(own, kinds, longest) for part, own in paths.items() if own is not None}
    parts, left_out = _split({part: file.pairs for part, file in files.items()}, SPLITTINGS[kinds[0]].join)
    for part, pairs in parts.items():
        if not pairs:
            raise DataError(_why_empty(part, files))
    vocabulary = vocabulary or _vocabulary(parts["training"], kinds)
    questions = {part: _questions(parts[part], vocabulary) for part in ("validation", "test")}
    return Stored(
        name=files["training"].path.name,
        vocabulary=vocabulary,
        training=in_buckets(*zip(*((_ended(s, vocabulary), _ended(t, vocabulary)) for s, t in parts["training"]))),
        parts=questions,
        about=tuple(_about(files, parts, questions, left_out, vocabulary)),
        origins={part: Origin(str(file.path), file.digest) for part, file in files.items()},
    )


def read(
    path: str | os.PathLike, kinds: Sequence[str] = ("characters", "characters"), longest: int = USUAL_LONGEST
) -> File:
    """Read a file of pairs. A byte-order mark and CRLF line ends are accepted.

    Args:
      path: of the file.
      kinds: keys of `SPLITTINGS`, how sources and targets are taken apart.
      longest: how many tokens a source or a target may have.

    Raises:
      DataError: named by file, and by line or byte: what cannot be read.
    """
    path, digest = pathlib.Path(os.path.expanduser(path)), hashlib.sha256()
    pairs, lines = {}, 0
    try:
        if path.is_dir():
            raise DataError(f"{path}: a folder, must be a file of pairs")
        if path.exists() and not path.is_file():
            raise DataError(f"{path}: not a regular file, must be a file of pairs")
        for lines, line in enumerate(_lines(path, digest), start=1):
            try:
                pairs[_pair(line, kinds, longest)] = None
            except DataError as error:
                raise DataError(f"{path}: line {lines} {error}") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None
    if not pairs:
        raise DataError(f"{path}: an empty file; it must have lines of source TAB target")
    return File(path, list(pairs), lines - len(pairs), digest.hexdigest())


def _lines(path: pathlib.Path, digest) -> Iterator[str]:
    """The lines of a file as text, without a byte-order mark and without their ends; `digest` gets all its bytes."""
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
                at = offset + mark + error.start
                raise DataError(f"{path}: invalid UTF-8 at byte {at:,} (line {number})") from None
            if "\0" in text:
                raise DataError(
                    f"{path}: line {number} has a NUL character; a file of pairs is text in UTF-8, not UTF-16"
                )
            if text or line != codecs.BOM_UTF8:  # a mark alone is no line
                yield text
            offset += len(line)


def _pair(line: str, kinds: Sequence[str], longest: int) -> Pair:
    """The two sides of a line, taken apart.

    Raises:
      DataError: what is wrong with the line, to be put after its number.
    """
    must = "; a line is source TAB target"
    if not line.strip() and "\t" not in line:
        raise DataError(f"is empty{must}")
    texts = line.split("\t")
    if len(texts) != 2:
        cause = " (and a CR inside: lines must end with LF or CRLF)" if "\r" in line else ""
        raise DataError(f"has {line.count(chr(9)) or 'no'} TAB{'s' if len(texts) > 2 else ''}{cause}{must}")
    sides = tuple(tuple(SPLITTINGS[kind].split(text)) for kind, text in zip(kinds, texts))
    for side, text, pieces, kind in zip(("source", "target"), texts, sides, kinds):
        if not text.strip():
            raise DataError(f"has an empty {side}{must}")
        if len(pieces) > longest:
            may = f"; `longest` (config.data.longest) of {len(pieces)} would allow it" if len(pieces) <= LONGEST else ""
            raise DataError(f"has a {side} of {len(pieces):,} {kind}, more than {longest:,}{may}")
    return sides


def _split(found: dict[str, list[Pair]], join: Callable) -> tuple[dict[str, list[Pair]], int]:
    """The pairs of each part, and how many were left out since their source is in a part that comes before.

    `found` holds the pairs of each file; what a file of its own does not give, a hash takes from the training file.
    """
    parts = {part: list(found.get(part, ())) for part in ("test", "validation", "training")}
    parts["training"] = []
    hashed = {part: band for part, band in HELD_OUT.items() if part not in found}
    for pair in found["training"]:
        share = _share(join(pair[0]))
        part = next((part for part, (low, high) in hashed.items() if low <= share < high), "training")
        parts[part].append(pair)
    seen, left_out = set(), 0
    for part, pairs in parts.items():
        parts[part] = [pair for pair in pairs if pair[0] not in seen]
        left_out += len(pairs) - len(parts[part])
        seen |= {source for source, _ in parts[part]}
    return parts, left_out


def _share(source: str) -> float:
    """A number in [0, 1) that depends on the source alone and is spread evenly."""
    return int.from_bytes(hashlib.blake2b(source.encode(), digest_size=8).digest()) / 2**64


def _vocabulary(pairs: list[Pair], kinds: Sequence[str]) -> Pieces:
    """Every piece of the training pairs, in the order of their code points; of bytes, all there can be."""
    pieces = set(itertools.chain.from_iterable(itertools.chain.from_iterable(pairs)))
    if "bytes" in kinds:
        pieces |= set(map(chr, range(256)))
    longest = {}
    for source, target in pairs:
        longest[len(source)] = max(len(target), longest.get(len(source), 0))
    lengths = sorted(longest)
    targets = list(itertools.accumulate((longest[length] for length in lengths), max))
    return Pieces(tuple(sorted(pieces)), *kinds, tuple(zip(lengths, targets)))


def _questions(pairs: list[Pair], vocabulary: Pieces) -> Questions:
    """Each source once, with all its targets."""
    rows = {source: row for row, source in enumerate(dict.fromkeys(source for source, _ in pairs))}
    asked = sorted(pairs, key=lambda pair: rows[pair[0]])
    right = padded([_ended(target, vocabulary) for _, target in asked])
    return Questions(
        sources=padded([_ended(source, vocabulary) for source in rows]),
        lengths=np.array([len(source) for source in rows]),
        targets=np.where(right == vocabulary.unknown, -1, right),
        asked=np.array([rows[source] for source, _ in asked]),
    )


def _ended(pieces: Sequence[str], vocabulary: Pieces) -> list[int]:
    return [*vocabulary.encode(pieces), vocabulary.end]


def _why_empty(part: str, files: dict[str, File]) -> str:
    file = files["training"]
    sources = len({source for source, _ in file.pairs})
    own = [str(files[name].path) for name in HELD_OUT if name in files]
    takes = [
        f"the hash of the source takes {high - low:.0%} for {name}"
        for name, (low, high) in HELD_OUT.items()
        if name not in files
    ]
    takes += [f"sources of {' and '.join(dict.fromkeys(own))} are taken out"] if own else []
    return (
        f"{file.path}: nothing is left for the {part} part of {sources:,} sources: {', '.join(takes)}, "
        "and no source is in two parts; give more lines, or files of your own for validation and test"
    )


def _about(files: dict[str, File], parts: dict, questions: dict, left_out: int, vocabulary: Pieces) -> Iterator[str]:
    """What was read, in lines for people."""
    counts = ", ".join(f"{part} {len(asked.lengths):,} sources" for part, asked in questions.items())
    yield f"{files['training'].path}: {len(parts['training']):,} pairs to train on, {counts}"
    for file in files.values():
        if file.repeated:
            yield f"{file.path}: {file.repeated:,} duplicate pairs; each counts once"
    if left_out:
        yield f"{left_out:,} pairs are left out, since their sources are in the test or validation part"
    for part, asked in questions.items():
        unknown = (asked.sources == vocabulary.unknown).any(1).sum(), (asked.targets == -1).any(1).sum()
        for side, count in zip(("sources", "targets"), unknown):
            if count:
                yield f"{part}: {count:,} {side} have tokens that no training pair has, read as unknown"
