"""What is learnt: copying, reversing and duplicating strings, and pairs of one's own.

Importing this registers the TFDS builders `attn_copy`, `attn_reverse` and `attn_duplicate`.
"""

from attn.tasks import builders, pairs
from attn.tasks.examples import DataError
from attn.tasks.generated import Generated
from attn.tasks.sequences import KINDS, Task
from attn.tasks.stored import Stored

SOURCES = ("generated", "tfds")  # of the examples of a synthetic task


def load(name: str, **settings) -> Generated | Stored:
    """What `train.py` trains on and judges by: `load("reverse", symbols=8)`, `load("pairs", path="pairs.tsv")`.

    Args:
      name: a key of `KINDS` (copy, reverse, duplicate), or "pairs".
      settings: for "pairs" the arguments of `pairs.load`. For the others the fields of `Task` (symbols, min_length,
        max_length); `source="tfds"` for the data set instead of examples drawn as they are needed ("generated"), and
        `folder`, see `builders.load`.

    Raises:
      ValueError: an unknown name or source, or settings that do not go together.
      DataError: files that cannot be learnt from.
    """
    if name == "pairs":
        return pairs.load(**settings)
    if name not in KINDS:
        raise ValueError(f"unknown task {name!r}; known are {', '.join(KINDS)} and pairs")
    source, folder = settings.pop("source", "generated"), settings.pop("folder", None)
    if source not in SOURCES:
        raise ValueError(f"unknown source {source!r}; known are {', '.join(SOURCES)}")
    if folder is not None and source != "tfds":
        raise ValueError(f"folder: got {folder!r}, but only source='tfds' reads it")
    task = Task(name, **settings)
    if not 1 <= task.min_length <= task.max_length or task.symbols < 2:
        raise ValueError(f"{task}: must have 2 symbols or more, and 1 <= min_length <= max_length")
    return Generated(task) if source == "generated" else builders.load(task, folder)


__all__ = ["SOURCES", "DataError", "Generated", "Stored", "Task", "load"]
