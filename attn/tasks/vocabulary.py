"""From text to symbols and back: symbols are whole numbers 1..V separated by spaces."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Array, Int

from attn.tasks.sequences import PAD, Task


class InputError(ValueError):
    """Text that is no input for the task; the message is one line for the user."""


def parse(task: Task, text: str) -> Int[np.ndarray, "n"]:
    """The symbols that a text names.

    Raises:
      InputError: nothing there, or a word that is no symbol of the task.
    """
    words = text.split()
    if not words:
        raise InputError(f"empty input; give symbols 1..{task.symbols} separated by spaces")
    for word in words:
        # ASCII digits alone: `int` would take "1_0" and digits of other scripts as well.
        if not (word.isascii() and word.isdigit() and len(word) < 10 and 1 <= int(word) <= task.symbols):
            shown = word if len(word) <= 20 else word[:20] + "..."
            raise InputError(f"unknown symbol {shown!r}; symbols are whole numbers 1..{task.symbols}")
    return np.array([int(word) for word in words], np.int32)


def names(task: Task, tokens: Int[Array | np.ndarray, "T"] | Sequence[int]) -> list[str]:
    """What each token is called: symbols by their number, the others by their purpose."""
    special = {PAD: "pad", task.begin: "begin", task.end: "end"}
    return [special.get(int(token), str(int(token))) for token in tokens]


def answer_text(task: Task, tokens: Int[Array | np.ndarray, "T"] | Sequence[int]) -> str:
    """An answer as text: what stands before its end token."""
    words = names(task, tokens)
    return " ".join(words[: words.index("end")] if "end" in words else words)
