"""Tasks to learn: rules on strings of symbols, such as copy, reverse, sort and add, and files of pairs.

Importing this registers the TFDS builders of the package's rules: `attn_copy`, `attn_reverse` and so on.
"""

import os
from collections.abc import Callable

from attn.settings import PATH, between, checked, error_message, one_of
from attn.tasks import builders, pairs
from attn.tasks.examples import DataError
from attn.tasks.generated import Generated
from attn.tasks.rules import RULES, Rule, rearranged, register
from attn.tasks.sequences import Task
from attn.tasks.stored import Stored

# Sources of the examples of a task, for `config.data.source`: each makes the data from the task.
SOURCES: dict[str, Callable[..., Generated | Stored]] = {"generated": Generated, "tfds": builders.load_dataset}
CONSTRAINTS = {"symbols": between(2, 1_000_000), "min_length": between(1, 65_536), "max_length": between(1, 65_536)}


def load(name: str, **settings) -> Generated | Stored:
    """Return the data that `train.py` trains on: `load("reverse", symbols=8)`, `load("pairs", path="pairs.tsv")`.

    Args:
      name: a key of `RULES` (copy, sort and others; see `register`), or "pairs".
      settings: for "pairs" the arguments of `pairs.load_pairs`. For the others the fields of `Task` (symbols,
        min_length, max_length); `source="tfds"` for the TFDS data set instead of generated examples; and `folder`,
        see `builders.load_dataset`.

    Raises:
      ValueError: an unknown name, or settings that are unknown, not allowed, or do not go together.
      DataError: files that a model cannot be trained on.
    """
    if message := error_message(str, name, one_of((*RULES, "pairs"))):
        raise ValueError(f"name: {message}")
    return pairs.load_pairs(**settings) if name == "pairs" else _load_task(name, **settings)


@checked(**CONSTRAINTS, source=one_of(SOURCES), folder=PATH)
def _load_task(
    name: str,
    *,
    symbols: int = Task.symbols,
    min_length: int = Task.min_length,
    max_length: int = Task.max_length,
    source: str = "generated",
    folder: str | os.PathLike | None = None,
) -> Generated | Stored:
    if min_length > max_length:
        raise ValueError(f"min_length: got {min_length}, must be at most max_length = {max_length}")
    if folder is not None and source != "tfds":
        raise ValueError(f"folder: got {folder!r}, but only source='tfds' reads it")
    task = Task(name, symbols, min_length, max_length)
    return SOURCES[source](task, folder) if source == "tfds" else SOURCES[source](task)


__all__ = ["RULES", "DataError", "Generated", "Rule", "Stored", "Task", "load", "rearranged", "register"]
