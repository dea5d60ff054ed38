"""Progress of a run: a bar on a terminal, plain lines elsewhere, and files of metrics."""

import contextlib
import math
import time
from collections.abc import Iterator
from typing import NamedTuple
from unicodedata import category

import psutil
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from attn.training.folders import Folder
from attn.training.rows import RowFiles


class Clock:
    """Seconds by phase; "total" counts from the start of the process."""

    def __init__(self):
        self.started = psutil.Process().create_time()
        self.seconds = {"import": time.time() - self.started, "compile": 0.0, "train": 0.0, "evaluate": 0.0}

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time that the block takes to a phase."""
        start = time.time()
        yield
        self.seconds[name] += time.time() - start

    def so_far(self) -> dict[str, float]:
        """Return the rounded seconds of each phase, and the total until now."""
        total = time.time() - self.started
        return {name: round(seconds, 3) for name, seconds in (self.seconds | {"total": total}).items()}


class Row(NamedTuple):
    """One row of the metrics; those of answers are None unless there was an evaluation at this step."""

    step: int
    loss: float
    tokens_per_second: float
    learning_rate: float
    exact_match: float | None = None
    token_accuracy: float | None = None
    error_rate: float | None = None
    held_out_loss: float | None = None


class Display:
    """Shows rows on the terminal and writes them into the run's folder. Silent on hosts that do not write.

    Args:
      folder: of the run; None to keep silent.
      steps: of the whole run.
      first: the step at which this process starts.
    """

    def __init__(self, folder: Folder | None, steps: int, first: int):
        self._folder, self._steps, self._first = folder, steps, first
        self._exact_match = None
        self._bar = self._files = None

    def __enter__(self) -> "Display":
        self._began = time.time()
        if self._folder is None:
            return self
        self._files = RowFiles(self._folder, self._first)
        console = Console(stderr=True)
        if console.is_terminal:
            columns = [TextColumn("{task.completed:,}/{task.total:,} steps"), BarColumn(None)]
            columns += [TextColumn("{task.fields[status]}"), TimeRemainingColumn(elapsed_when_finished=True)]
            self._bar = Progress(*columns, console=console, expand=True)
            self._task = self._bar.add_task("train", total=self._steps, completed=self._first, status="compiling")
            self._bar.start()
        else:
            steps = f"steps {self._first + 1:,} to {self._steps:,}" if self._first < self._steps else "the evaluation"
            self.say(f"compiling; then {steps}")
        return self

    def __exit__(self, *_):
        if self._bar:
            self._bar.stop()
        if self._files:
            self._files.close()

    def begin(self):
        """Start the clock for the estimate of the time left."""
        self._began = time.time()

    def show(self, row: Row):
        """Show and write one row."""
        if self._folder is None:
            return
        if row.exact_match is not None:
            self._exact_match = row.exact_match
        self._files.write({name: value for name, value in row._asdict().items() if value is not None})
        status = f"loss {row.loss:.4f}  exact match {percent(self._exact_match)}  {row.tokens_per_second:,.0f} tokens/s"
        if self._bar:
            self._bar.update(self._task, completed=row.step, status=status)
        else:
            seconds = (time.time() - self._began) / (row.step - self._first) * (self._steps - row.step)
            self.say(f"step {row.step:,}/{self._steps:,}  {status}  {seconds:.0f} s left")

    def say(self, line: str):
        """Print a line, above the bar if there is one."""
        if self._folder is None:
            return
        if self._bar:
            self._bar.console.print(line, highlight=False, markup=False)
        else:
            print(line, flush=True)


def waiting(words: str) -> contextlib.AbstractContextManager:
    """Show a spinner on a terminal while the block runs; do nothing elsewhere."""
    console = Console(stderr=True)
    return console.status(escape(words)) if console.is_terminal else contextlib.nullcontext()


def percent(fraction: float | None, *, up: bool = False) -> str:
    """Format a fraction in percent, rounded down, so that "100.00 %" means all, or up, so that "0.00 %" means none.

    None and NaN, of nothing, are shown as "-".
    """
    if fraction is None or math.isnan(fraction):
        return "    -   "
    return f"{(math.ceil if up else math.floor)(round(fraction * 10_000, 6)) / 100:6.2f} %"


def readable(text: str) -> str:
    """Return the text with control characters as escapes, such as \\x1b, so that it cannot control a terminal."""
    return "".join(c.encode("unicode_escape").decode() if category(c) == "Cc" else c for c in text)


def shortened(text: str, most: int) -> str:
    """Return the text, cut off with an ellipsis if it is longer than `most` characters."""
    return text if len(text) <= most else text[: most - 1] + "…"
