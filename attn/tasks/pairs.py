"""Pairs of one's own: a file with one pair a line, source TAB target, in UTF-8."""

import codecs
import hashlib
import itertools
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from attn.tasks.examples import DataError, Questions, padded
from attn.tasks.stored import Stored, in_buckets
from attn.tasks.vocabulary import SPLITTINGS, Pieces, is_splitting

LONGEST_LINE = 1 << 20  # bytes; a longer one is no pair but some other kind of file
HELD_OUT = 0.05  # share of the sources that go to validation, and as many again to the test

Pair = tuple[list[str], list[str]]  # pieces of the source and of the target


class File(NamedTuple):
    """What stands in a file of pairs: the distinct pairs in order, how many came again, and the file's SHA-256."""

    path: pathlib.Path
    pairs: list[tuple[str, str]]
    repeated: int
    digest: str


def load(
    path: str | os.PathLike,
    *,
    tokens: str = "characters",
    validation: str | os.PathLike | None = None,
    test: str | os.PathLike | None = None,
    vocabulary: Pieces | None = None,
) -> Stored:
    """Read pairs, split them into parts, and make their vocabulary.

    A source with several targets is several pairs to train on; when it is asked, any of them counts as right. No
    source is in two parts: a hash of the source decides, so that it stays where it is when lines are added, in
    whatever order. With a validation or test file of one's own, its sources are taken out of the training part.

    Args:
      path: of the pairs.
      tokens: what a token is, a key of `SPLITTINGS`, or two of them for source and target: "characters:words".
      validation, test: files of pairs that are these parts; without one, a twentieth of the sources is.
      vocabulary: of a run that has one already; None to make it from the training part.

    Returns:
      The training examples, and the questions "validation" and "test".

    Raises:
      DataError: a file that cannot be read, a line that is no pair, a part without pairs.
    """
    if not is_splitting(tokens):
        raise DataError(f"tokens: got {tokens!r}, must be one of {', '.join(SPLITTINGS)}, or two as SOURCE:TARGET")
    kinds = (tokens.split(":") * 2)[:2]
    files = {"training": read(path)}
    files |= {part: read(own) for part, own in (("validation", validation), ("test", test)) if own}
    taken = {part: [_take_apart(pair, kinds) for pair in file.pairs] for part, file in files.items()}
    name = SPLITTINGS[kinds[0]].join  # of a source: what decides whether two are the same
    parts, left_out = _split(taken, name)
    for part, pairs in parts.items():
        if not pairs:
            raise DataError(_why_empty(part, files["training"], len({name(source) for source, _ in taken["training"]})))
    vocabulary = vocabulary or _vocabulary(parts["training"], kinds)
    questions = {part: _questions(parts[part], vocabulary, name) for part in ("validation", "test")}
    return Stored(
        name=pathlib.Path(path).name,
        vocabulary=vocabulary,
        training=in_buckets(*zip(*((_ended(s, vocabulary), _ended(t, vocabulary)) for s, t in parts["training"]))),
        parts=questions,
        about=tuple(_about(files, parts, questions, left_out, vocabulary)),
        files={str(file.path): file.digest for file in files.values()},
    )


def read(path: str | os.PathLike) -> File:
    """Read a file of pairs. A byte-order mark and CRLF line ends are accepted.

    Raises:
      DataError: named by file, and by line or byte: what cannot be read.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        raise DataError(f"{path}: a folder, must be a file of pairs")
    if path.exists() and not path.is_file():
        raise DataError(f"{path}: not a regular file, must be a file of pairs")
    pairs, lines = {}, 0
    try:
        for lines, line in enumerate(_lines(path), start=1):
            source, tab, target = line.partition("\t")
            if not tab:
                raise DataError(f"{path}: line {lines} has no TAB; a line is source TAB target")
            if "\t" in target:
                raise DataError(f"{path}: line {lines} has {line.count(chr(9))} TABs; a line is source TAB target")
            for side, text in (("source", source), ("target", target)):
                if not text.strip():
                    raise DataError(f"{path}: line {lines} has an empty {side}; a line is source TAB target")
            pairs[source, target] = None
        digest = _digest(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None
    if not pairs:
        raise DataError(f"{path}: an empty file; it must have lines of source TAB target")
    return File(path, list(pairs), lines - len(pairs), digest)


def _lines(path: pathlib.Path) -> Iterator[str]:
    """The lines of a file as text, without a byte-order mark and without their ends."""
    with path.open("rb") as file:
        offset = len(codecs.BOM_UTF8) if file.read(3) == codecs.BOM_UTF8 else 0
        file.seek(offset)
        for number, line in enumerate(iter(lambda: file.readline(LONGEST_LINE + 1), b""), start=1):
            if len(line) > LONGEST_LINE:
                raise DataError(f"{path}: line {number} is longer than {LONGEST_LINE:,} bytes, the most allowed")
            try:
                yield line.decode().removesuffix("\n").removesuffix("\r")
            except UnicodeDecodeError as error:
                raise DataError(f"{path}: invalid UTF-8 at byte {offset + error.start:,} (line {number})") from None
            offset += len(line)


def _digest(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _take_apart(pair: tuple[str, str], kinds: list[str]) -> Pair:
    return tuple(SPLITTINGS[kind].split(text) for kind, text in zip(kinds, pair))


def _split(taken: dict[str, list[Pair]], name: Callable) -> tuple[dict[str, list[Pair]], int]:
    """The pairs of each part, and how many were left out since their source is in a part that comes before.

    `taken` holds the pairs of each file; what a file of its own does not give, a hash takes from the training file.
    """
    hashed = [part for part in ("test", "validation") if part not in taken]
    parts = {part: list(pairs) for part, pairs in taken.items() if part != "training"}
    parts |= {part: [] for part in (*hashed, "training")}
    for pair in taken["training"]:
        place = int(_share(name(pair[0])) / HELD_OUT)
        parts[hashed[place] if place < len(hashed) else "training"].append(pair)
    seen, left_out = set(), 0
    for part in ("test", "validation", "training"):
        kept = [pair for pair in parts[part] if name(pair[0]) not in seen]
        left_out += len(parts[part]) - len(kept)
        parts[part] = kept
        seen |= {name(pair[0]) for pair in kept}
    return parts, left_out


def _share(source: str) -> float:
    """A number in [0, 1) that depends on the source alone and is spread evenly."""
    return int.from_bytes(hashlib.blake2b(source.encode(), digest_size=8).digest()) / 2**64


def _vocabulary(pairs: list[Pair], kinds: list[str]) -> Pieces:
    """Every piece of the training pairs, in the order of their code points; of bytes, all there can be."""
    pieces = set(itertools.chain.from_iterable(itertools.chain.from_iterable(pairs)))
    if "bytes" in kinds:
        pieces |= set(map(chr, range(256)))
    longest = (max(len(pair[side]) for pair in pairs) for side in (0, 1))
    return Pieces(tuple(sorted(pieces)), *kinds, *longest)


def _questions(pairs: list[Pair], vocabulary: Pieces, name: Callable) -> Questions:
    """Each source once, with all its targets."""
    rows, targets = {}, []
    for source, target in pairs:
        row, _ = rows.setdefault(name(source), (len(rows), source))
        targets.append((row, target))
    targets.sort(key=lambda asked: asked[0])
    sources = [_ended(source, vocabulary) for _, source in rows.values()]
    right = padded([_ended(target, vocabulary) for _, target in targets])
    return Questions(
        sources=padded(sources),
        lengths=np.array([len(source) - 1 for source in sources]),
        targets=np.where(right == vocabulary.unknown, -1, right),
        asked=np.array([row for row, _ in targets]),
    )


def _ended(pieces: list[str], vocabulary: Pieces) -> list[int]:
    return [*vocabulary.encode(pieces), vocabulary.end]


def _why_empty(part: str, file: File, sources: int) -> str:
    return (
        f"{file.path}: nothing is left for the {part} part: a hash of the source takes {HELD_OUT:.0%} each for "
        f"validation and test from {sources:,} sources, and no source is in two parts; give more lines, or files of "
        "your own for validation and test"
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
