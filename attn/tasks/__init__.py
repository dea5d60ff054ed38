"""What is learnt: copying, reversing and duplicating strings, and pairs of one's own.

Importing this registers the TFDS builders `attn_copy`, `attn_reverse`, `attn_duplicate` and
`attn_mirror_or_next`.
"""

import os

from attn.tasks import builders, pairs
from attn.tasks.examples import DataError
from attn.tasks.generated import Generated
from attn.tasks.sequences import KINDS, Task
from attn.tasks.settings import PATH, between, checked, fault, one_of
from attn.tasks.stored import Stored

SOURCES = ("generated", "tfds")  # of the examples of a synthetic task
RULES = {"symbols": between(2, 1_000_000), "min_length": between(1, 65_536), "max_length": between(1, 65_536)}


def load(name: str, **settings) -> Generated | Stored:
    """What `train.py` trains on and judges by: `load("reverse", symbols=8)`, `load("pairs", path="pairs.tsv")`.

    Args:
      name: a key of `KINDS` (copy, reverse, duplicate), or "pairs".
      settings: for "pairs" the arguments of `pairs.load`. For the others the fields of `Task` (symbols, min_length,
        max_length); `source="tfds"` for the data set instead of examples drawn as they are needed ("generated"), and
        `folder`, see `builders.load`.

    Raises:
      ValueError: an unknown name, or settings that are unknown, not what they must be, or do not go together.
      DataError: files that cannot be learnt from.
    """
    if said := fault(str, name, one_of((*KINDS, "pairs"))):
        raise ValueError(f"name: {said}")
    return pairs.load(**settings) if name == "pairs" else _load_task(name, **settings)


@checked(**RULES, source=one_of(SOURCES), folder=PATH)
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
    return Generated(task) if source == "generated" else builders.load(task, folder)


__all__ = ["RULES", "SOURCES", "DataError", "Generated", "Stored", "Task", "load"]
