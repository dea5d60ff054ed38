"""The synthetic tasks as TensorFlow Datasets: versioned, seeded, with splits that share no string.

    tfds.data_source("attn_reverse")["train"][0]  # {"source": [3, 1, 4], "target": [4, 1, 3]}

They are written as array_record, for which TensorFlow is not needed.
"""

import contextlib
import dataclasses
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

from attn.tasks.examples import DataError, Questions, padded
from attn.tasks.generated import ask, distinct_strings
from attn.tasks.sequences import KINDS, Task, is_for_validation, is_held_out
from attn.tasks.stored import Origin, Stored, in_buckets

_SEED = 0  # of every draw; another one would be another version
_LONGEST = 512  # symbols of a training string: the data set is held in memory, and "test_long" is longer still
_TIMES_AS_LONG = 4  # the strings of "test_long", compared with the longest of training


@dataclasses.dataclass(kw_only=True)
class SequenceConfig(tfds.core.BuilderConfig):
    """Which symbols and lengths; the name says them.

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


# Of each split: how many strings at most, whether they are long, and which belong to it.
_SPLITS: dict[str, tuple[int, bool, Callable]] = {
    "train": (100_000, False, lambda strings, v: ~is_held_out(strings, v)),
    "validation": (5_000, False, is_for_validation),
    "test": (10_000, False, lambda strings, v: is_held_out(strings, v) & ~is_for_validation(strings, v)),
    "test_long": (5_000, True, is_held_out),
}


class SequenceBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """One kind of task. Strings are distinct, drawn evenly over the lengths, symbols uniformly."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar = {"1.0.0": "First version."}
    BUILDER_CONFIGS: ClassVar = [
        SequenceConfig(symbols=16, min_length=1, max_length=32),  # the first is the default
        SequenceConfig(symbols=16, min_length=1, max_length=64),
        SequenceConfig(symbols=2, min_length=1, max_length=40),
    ]
    kind: ClassVar[str]

    def __init__(self, *, file_format=None, **settings):
        super().__init__(file_format=file_format or "array_record", **settings)

    def __reduce__(self) -> tuple[Callable, tuple]:
        """To be handed to other processes, as loaders with workers do: the class is found by its kind."""
        return _builder, (self.kind, self._original_state)

    def download_and_prepare(self, **settings):
        """Write the data set if it is not there.

        Raises:
          DataError: a split would be empty; no folder is made then.
        """
        task = self.task
        for split, (_, _, belongs) in _SPLITS.items() if not self.is_prepared() else ():
            each = (distinct_strings(task, [n], 1, _SEED, belongs)[0] for n in reversed(self._lengths(split)))
            if not any(map(len, each)):
                needs = "it needs more symbols or longer strings"
                raise DataError(f"{self.name}: no string for the split {split}; {needs}")
        super().download_and_prepare(**settings)

    @property
    def task(self) -> Task:
        """The task that the builder's config describes."""
        config = self.builder_config
        return Task(self.kind, config.symbols, config.min_length, config.max_length)

    def _info(self) -> tfds.core.DatasetInfo:
        tokens = tfds.features.Tensor(shape=(None,), dtype=np.int32)
        return tfds.core.DatasetInfo(
            builder=self,
            description=f"{self.kind.capitalize()} a string of symbols 1..V. No string is in two splits; those of "
            '"test_long" are longer than those of the others.',
            features=tfds.features.FeaturesDict({"source": tokens, "target": tokens}),
            supervised_keys=("source", "target"),
        )

    def _split_generators(self, dl_manager) -> dict[str, Iterator]:
        return {split: self._generate_examples(split) for split in _SPLITS}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict]]:
        task = self.task
        total, _, belongs = _SPLITS[split]
        questions = ask(task, *distinct_strings(task, self._lengths(split), total, _SEED, belongs))
        for number, (source, target) in enumerate(zip(questions.sources, questions.targets)):
            yield number, {"source": _symbols(source, task), "target": _symbols(target, task)}

    def _lengths(self, split: str) -> range:
        """The lengths of a split's strings, in symbols."""
        task, (_, long, _) = self.task, _SPLITS[split]
        if long:
            return range(task.max_length + 1, _TIMES_AS_LONG * task.max_length + 1)
        return range(task.min_length, task.max_length + 1)


def _symbols(tokens: np.ndarray, task: Task) -> np.ndarray:
    """The symbols before the end token."""
    return tokens[: int(np.argmax(tokens == task.vocabulary.end))]


# Defining them registers them with TFDS.
BUILDERS = {
    name: type(f"Attn{name.title().replace('_', '')}", (SequenceBuilder,), {"name": f"attn_{name}", "kind": name})
    for name in KINDS
}


def _builder(kind: str, settings: dict) -> SequenceBuilder:
    return BUILDERS[kind](**settings)


def load(task: Task, folder: str | os.PathLike | None = None) -> Stored:
    """The data set of a task, in memory; prepared first if it is not there.

    TFDS writes into a folder of another name and renames it at the end, so that what is there is whole.

    Args:
      task: which data set, symbols and lengths.
      folder: that TFDS keeps its data sets in; None for its own choice, `default_folder`.

    Raises:
      DataError: it cannot be prepared or read.
    """
    if task.max_length > _LONGEST:
        raise DataError(f"max_length: got {task.max_length}, a data set has strings of at most {_LONGEST} symbols")
    config = SequenceConfig(symbols=task.symbols, min_length=task.min_length, max_length=task.max_length)
    listed = config.name in SequenceBuilder.builder_configs  # TFDS wants those by name, and others as they are
    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)  # TFDS warns of every config that is not listed
    try:
        folder = os.path.expanduser(folder or default_folder())
        builder = BUILDERS[task.name](config=config.name if listed else config, data_dir=folder)
        _prepare(builder, folder)
        splits = {name: source.__getitems__(range(len(source))) for name, source in builder.as_data_source().items()}
        if splits.keys() != _SPLITS.keys():
            raise DataError(f"{builder.data_dir}: has the splits {', '.join(splits) or 'none'}; it is damaged")
    except DataError:
        raise
    except Exception as error:  # TFDS and array_record raise many kinds for a damaged or unwritable folder
        cause = textwrap.shorten(f"{type(error).__name__}: {error}", 500, placeholder=" ...")
        raise DataError(f"{folder}: attn_{task.name} cannot be prepared or read ({cause})") from None
    finally:
        logging.set_verbosity(verbosity)
    end = [task.vocabulary.end]
    return Stored(
        name=f"attn_{task.name}",
        vocabulary=task.vocabulary,
        training=in_buckets(
            *([[*row[side].tolist(), *end] for row in splits["train"]] for side in ("source", "target"))
        ),
        parts={name: _questions(task, rows) for name, rows in splits.items() if name != "train"},
        about=(f"{builder.info.full_name} in {builder.data_dir}: {len(splits['train']):,} examples to train on",),
        origins={name: Origin(os.fspath(builder.data_dir), digest(rows)) for name, rows in splits.items()},
    )


def digest(rows: list[dict[str, np.ndarray]]) -> str:
    """The SHA-256 of the sources and targets of a split, in their order, with their lengths."""
    content = hashlib.sha256()
    for tokens in (row[side] for row in rows for side in ("source", "target")):
        content.update(np.array([len(tokens), *tokens], "<i4").tobytes())
    return content.hexdigest()


def default_folder() -> str:
    """Where TFDS keeps its data sets unless told otherwise: TFDS_DATA_DIR, or ~/tensorflow_datasets."""
    return tfds.core.constants.get_default_data_dir()


def _prepare(builder: SequenceBuilder, folder: str):
    """Write the data set if it is not there; another process may be doing the same."""
    if not builder.is_prepared():
        _check_writable(folder)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # where TFDS tells what it does
            builder.download_and_prepare()
    except OSError:
        if not BUILDERS[builder.kind](config=builder.builder_config, data_dir=folder).is_prepared():
            raise


def _check_writable(folder: str):
    """Find out before TFDS begins whether it may make its folder."""
    if "://" in folder:  # a bucket, as in gs://bucket: TFDS finds out
        return
    there = pathlib.Path(folder)
    while not there.exists():
        there = there.parent
    if not there.is_dir():
        raise DataError(f"{folder}: cannot be written ({there} is a file, must be a folder)")
    if not os.access(there, os.W_OK | os.X_OK):
        raise DataError(f"{folder}: cannot be written (no permission to write into {there})")


def _questions(task: Task, rows: list[dict]) -> Questions:
    lengths = np.array([len(row["source"]) for row in rows])
    return ask(task, padded([row["source"] for row in rows]), lengths)
