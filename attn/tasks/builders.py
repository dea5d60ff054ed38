"""The synthetic tasks as TensorFlow Datasets: versioned, seeded, with splits that share no string.

    tfds.data_source("attn_reverse")["train"][0]  # {"source": [3, 1, 4], "target": [4, 1, 3]}

They are written as array_record, for which TensorFlow is not needed.
"""

import contextlib
import dataclasses
import functools
import hashlib
import os
import pathlib
import sys
import textwrap
from collections.abc import Callable, Iterator
from typing import ClassVar

import numpy as np
import tensorflow_datasets as tfds
from absl import logging

from attn.tasks.examples import PAD, DataError, Questions, padded
from attn.tasks.generated import distinct_strings
from attn.tasks.held_out import is_for_validation, is_held_out
from attn.tasks.rules import RULES
from attn.tasks.sequences import Task
from attn.tasks.stored import Origin, Stored, in_buckets
from attn.tasks.vocabulary import Symbols, before

_SEED = 0  # of every draw; a different seed would need a new VERSION
_LONGEST = 512  # symbols of a training string at most, since the data set is in memory and "test_long" is even longer
_TIMES_AS_LONG = 4  # the longest strings of "test_long", relative to the longest of training


@dataclasses.dataclass(kw_only=True)
class SequenceConfig(tfds.core.BuilderConfig):
    """The symbols and lengths of a data set, which also make its name.

    Args:
      symbols: V.
      min_length, max_length: of the sources of train, validation and test, in symbols, both included.
    """

    name: str = dataclasses.field(init=False)
    symbols: int
    min_length: int
    max_length: int

    def __post_init__(self):
        self.name = f"symbols{self.symbols}_lengths{self.min_length}to{self.max_length}"
        self.description = f"{self.symbols} symbols, strings of {self.min_length} to {self.max_length} of them"


# For each split: the greatest number of strings, whether they are long, and (strings, V) -> which are of the split.
_SPLITS: dict[str, tuple[int, bool, Callable]] = {
    "train": (100_000, False, lambda strings, v: ~is_held_out(strings, v)),
    "validation": (5_000, False, is_for_validation),
    "test": (10_000, False, lambda strings, v: is_held_out(strings, v) & ~is_for_validation(strings, v)),
    "test_long": (5_000, True, is_held_out),
}


class SequenceBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """The builder of one task. Strings are distinct, equally many per length of the source, with uniform symbols."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar = {"1.0.0": "First version."}
    BUILDER_CONFIGS: ClassVar = [
        SequenceConfig(symbols=16, min_length=1, max_length=32),  # the first is the default
        SequenceConfig(symbols=16, min_length=1, max_length=64),
        SequenceConfig(symbols=2, min_length=1, max_length=40),
    ]
    rule: ClassVar[str]  # a key of `RULES`

    def __init__(self, *, file_format=None, **settings):
        super().__init__(file_format=file_format or "array_record", **settings)

    def __reduce__(self) -> tuple[Callable, tuple]:
        """Pickle the builder by its rule, for loaders with workers, since its class is not an attribute of a module."""
        return _unpickle, (self.rule, self._original_state)

    def download_and_prepare(self, **settings):
        """Write the data set if it does not exist.

        Raises:
          DataError: a split would be empty; then nothing is written.
        """
        for split in _SPLITS if not self.is_prepared() else ():
            if not any(len(self._strings(split, [n], 1)[0]) for n in reversed(self._lengths(split))):
                hint = "it needs more symbols or longer strings"
                raise DataError(f"{self.name}: no string for the split {split}; {hint}")
        super().download_and_prepare(**settings)

    @property
    def task(self) -> Task:
        """The task that the builder's config describes."""
        config = self.builder_config
        return Task(self.rule, config.symbols, config.min_length, config.max_length)

    def _info(self) -> tfds.core.DatasetInfo:
        tokens = tfds.features.Tensor(shape=(None,), dtype=np.int32)
        return tfds.core.DatasetInfo(
            builder=self,
            description=f"The task {self.rule} on strings of symbols 1..V. No string is in two splits; those of "
            '"test_long" are longer than those of the others.',
            features=tfds.features.FeaturesDict({"source": tokens, "target": tokens}),
            supervised_keys=("source", "target"),
        )

    def _split_generators(self, dl_manager) -> dict[str, Iterator]:
        return {split: self._generate_examples(split) for split in _SPLITS}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict]]:
        strings, lengths = self._strings(split, self._lengths(split), _SPLITS[split][0])
        questions, end = self.task.questions(strings, lengths), self.task.vocabulary.end
        for number, (source, length, target) in enumerate(zip(questions.sources, lengths, questions.targets)):
            yield (
                number,
                {"source": source[:length].astype(np.int32), "target": np.array(before(end, target), np.int32)},
            )

    def _strings(self, split: str, lengths, total: int) -> tuple[np.ndarray, np.ndarray]:
        return distinct_strings(self.task, lengths, total, _SEED, _SPLITS[split][2])

    def _lengths(self, split: str) -> range:
        """Return the lengths of a split's strings, in symbols."""
        task, (_, long, _) = self.task, _SPLITS[split]
        if long:
            return range(task.max_length + 1, _TIMES_AS_LONG * task.max_length + 1)
        return range(task.min_length, task.max_length + 1)


@functools.cache
def builder_class(rule: str) -> type[SequenceBuilder]:
    """Return the TFDS builder of a rule, a key of `RULES`; defining it registers it with TFDS as attn_RULE."""
    return type(f"Attn{rule.title().replace('_', '')}", (SequenceBuilder,), {"name": f"attn_{rule}", "rule": rule})


def _unpickle(rule: str, settings: dict) -> SequenceBuilder:
    return builder_class(rule)(**settings)


for _name in RULES:
    builder_class(_name)


def load_dataset(task: Task, folder: str | os.PathLike | None = None) -> Stored:
    """Return the data set of a task, in memory; it is prepared first if it does not exist.

    TFDS writes into a folder of another name and renames it at the end, so that a data set is always complete.

    Args:
      task: the rule, symbols and lengths.
      folder: where TFDS keeps its data sets; None for its default, `default_folder`.

    Raises:
      DataError: it cannot be prepared or read.
    """
    if task.max_length > _LONGEST:
        raise DataError(f"max_length: got {task.max_length}, a data set has strings of at most {_LONGEST} symbols")
    folder = os.path.expanduser(folder or default_folder())
    with _quiet(f"{folder}: attn_{task.name}"):
        builder = _prepared(task, folder)
        splits = {name: source.__getitems__(range(len(source))) for name, source in builder.as_data_source().items()}
        if splits.keys() != _SPLITS.keys():
            raise DataError(f"{builder.data_dir}: has the splits {', '.join(splits) or 'none'}; it is damaged")
    vocabulary = task.vocabulary
    pairs = [
        ([*row["source"].tolist(), vocabulary.source_end], [*row["target"].tolist(), vocabulary.end])
        for row in splits["train"]
    ]
    if vocabulary.continues:  # one string, without a source
        pairs = [([PAD], [*source, *target]) for source, target in pairs]
    return Stored(
        name=f"attn_{task.name}",
        vocabulary=vocabulary,
        training=in_buckets(*zip(*pairs)),
        parts={name: _questions(vocabulary, rows) for name, rows in splits.items() if name != "train"},
        about=(f"{builder.info.full_name} in {builder.data_dir}: {len(splits['train']):,} examples to train on",),
        origins={name: Origin(os.fspath(builder.data_dir), digest(rows)) for name, rows in splits.items()},
    )


def _questions(vocabulary: Symbols, rows: list[dict[str, np.ndarray]]) -> Questions:
    """Return the rows of a split as questions."""
    sources = padded([[*row["source"].tolist(), vocabulary.source_end] for row in rows])
    targets = padded([[*row["target"].tolist(), vocabulary.end] for row in rows])
    capacity = vocabulary.capacity(sources.shape[1] - 1)
    targets = np.pad(targets, ((0, 0), (0, capacity - targets.shape[1])))
    return Questions(sources, np.array([len(row["source"]) for row in rows]), targets, np.arange(len(rows)))


def digest(rows: list[dict[str, np.ndarray]]) -> str:
    """Return the SHA-256 of the sources and targets of a split, in their order, with their lengths."""
    content = hashlib.sha256()
    for tokens in (row[side] for row in rows for side in ("source", "target")):
        content.update(np.array([len(tokens), *tokens], "<i4").tobytes())
    return content.hexdigest()


def default_folder() -> str:
    """Return where TFDS keeps its data sets by default: TFDS_DATA_DIR, or ~/tensorflow_datasets."""
    return tfds.core.constants.get_default_data_dir()


@contextlib.contextmanager
def _quiet(where: str) -> Iterator[None]:
    """Send the output of TFDS to stderr, hide its warnings, and raise every error as a one-line DataError.

    There are no progress bars unless stderr is a terminal.
    """
    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)  # TFDS warns of every config that is not listed
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except DataError:
        raise
    except Exception as error:  # TFDS and array_record raise many types for a damaged or unwritable folder
        cause = textwrap.shorten(f"{type(error).__name__}: {error}", 500, placeholder=" ...")
        raise DataError(f"{where} cannot be prepared or read ({cause})") from None
    finally:
        logging.set_verbosity(verbosity)


def _prepared(task: Task, folder: str) -> SequenceBuilder:
    """Return the builder of a data set; the data set is written if it does not exist."""
    config = SequenceConfig(symbols=task.symbols, min_length=task.min_length, max_length=task.max_length)
    listed = config.name in SequenceBuilder.builder_configs  # TFDS needs a listed config by name, others as an object
    make = functools.partial(builder_class(task.name), config=config.name if listed else config, data_dir=folder)
    builder = make()
    if not builder.is_prepared():
        _check_writable(folder)
    try:
        builder.download_and_prepare()
    except OSError:
        if not make().is_prepared():  # else another process has written it in the meantime
            raise
    return builder


def _check_writable(folder: str):
    """Check that TFDS can create its folder, before it starts."""
    if "://" in folder:  # a bucket, as in gs://bucket: TFDS checks it
        return
    existing = pathlib.Path(folder)
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        raise DataError(f"{folder}: cannot be written ({existing} is a file, must be a folder)")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise DataError(f"{folder}: cannot be written (no permission to write into {existing})")
