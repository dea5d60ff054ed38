"""Write the results of a study: JSON, tables in Markdown or HTML, and figures. Files are written atomically.

Reports are made only from the numbers, so that they can be written again from the JSON files.
"""

import html
import json
import pathlib
import tempfile
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from attn.tasks.vocabulary import InputError
from attn.training.folders import RunError, write_whole

T = TypeVar("T")
BEGIN, END = "<!-- made by attn lengths: begin -->", "<!-- made by attn lengths: end -->"  # of the part of a page
_NARROW = 3  # columns of a table without names that fit on a phone
# Colors that are told apart with any color vision (Okabe and Ito 2008), and from white and black. Each has one meaning:
# the Transformer and the equation as published are blue, the LSTM and what lacks the part in question vermilion, the
# LSTM with attention green, the GRU purple. Use another marker or dash as well.
BLUE, VERMILION, GREEN, PURPLE, GRAY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#666666"
_LOOK = {
    "axes.prop_cycle": matplotlib.cycler(color=(BLUE, VERMILION, GREEN, PURPLE, GRAY)),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "font.size": 9,
    "image.cmap": "Blues",
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
}


class Table(NamedTuple):
    """A table: its caption, the names of its columns (may be empty), and its rows."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[Any]]

    def html(self) -> str:
        """Return the table in HTML; floats have four significant digits, and a wide table scrolls in its own box."""
        head = "".join(f'<th scope="col">{escape(name)}</th>' for name in self.header)
        head = f"<thead><tr>{head}</tr></thead>" if head else ""
        rows = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in self.rows)
        table = f"<table><caption>{escape(self.caption)}</caption>{head}<tbody>{rows}</tbody></table>"
        if not self.header and max(map(len, self.rows), default=0) <= _NARROW:
            return table
        # Without a mouse, a box can be scrolled only if it can get the focus.
        return f'<div class="scroll" role="region" tabindex="0" aria-label="{html.escape(self.caption)}">{table}</div>'

    def markdown(self) -> str:
        """Return the table in Markdown, with its caption as a heading; cells are shown as they are."""
        lines = [self.header, ["---"] * len(self.header), *self.rows]
        return "\n".join([f"### {self.caption}\n", *(f"| {' | '.join(map(str, line))} |" for line in lines), ""])


def _cell(value: Any) -> str:
    number = isinstance(value, (int, float))
    text = f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if number else escape(str(value))
    return f'<td class="number">{text}</td>' if number else f"<td>{text}</td>"


def escape(text: str) -> str:
    """Return text for the content of an HTML element."""
    return html.escape(text, quote=False)


def panels(columns: int, width: float, height: float, rows: int = 1) -> tuple[Figure, np.ndarray]:
    """Return a figure of a size in inches, and its axes in the order of reading, `[rows * columns]`."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False).ravel()


def styled(draw: Callable[[], Figure]) -> Figure:
    """Return the figure that `draw` makes, in the common style of all studies."""
    with matplotlib.rc_context(_LOOK):
        figure = draw()
    for ax in figure.axes:
        if not ax.images and ax.get_subplotspec() is not None:  # neither a map nor the bar of its colors
            ax.grid(axis="y", color="0.9", linewidth=0.7)
            ax.set_axisbelow(True)
    return figure


def tick_lengths(ax: Axes, lengths: Sequence[int]):
    """Make the x-axis logarithmic, with a tick and a plain number at each length."""
    ax.set_xscale("log")
    ax.set_xticks(lengths, lengths)
    ax.set_xticks([], minor=True)


def save_json(path: pathlib.Path, values: Any, indent: int | None = None):
    """Write plain values as JSON."""
    write_whole(path, json.dumps(values, indent=indent) + "\n")


def load_json(path: pathlib.Path, parse: Callable[[Any], T]) -> T | None:
    """Return `parse(values)` of a JSON file, or None if it does not exist.

    Raises:
      RunError: the file is damaged: it is not JSON, or `parse` fails.
    """
    if not path.exists():
        return None
    try:
        return parse(json.loads(path.read_text()))
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, ArithmeticError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise RunError(f"{path}: cannot be read ({reason}); delete it to measure it again") from None


def other_settings(path: pathlib.Path, hint: str = "") -> RunError:
    """Return the error for a result that was measured with different settings."""
    return RunError(f"{path}: was produced with different settings{hint}; delete it or choose another --output")


def save_markdown(path: pathlib.Path, part: str, figure: Figure):
    """Write a part between the marks of a Markdown page, or into a new page, and the figure next to it as PNG.

    Raises:
      ValueError: the page exists and has no marks.
    """
    text = replace_part(path.read_text(), part) if path.exists() else f"{BEGIN}\n{part}{END}\n"
    if text is None:
        raise ValueError(f"{path}: has no lines {BEGIN} and {END} to write between")
    write_whole(path, text)
    picture = path.with_suffix(".png")
    partial = picture.with_name(f".{picture.name}.partial")
    figure.savefig(partial, format="png", dpi=110)
    partial.replace(picture)


def replace_part(text: str, part: str) -> str | None:
    """Return a page with a new part between its marks; None if it has no marks."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    return f"{before}{BEGIN}\n{part}{END}{after}" if begin and end else None


def check_page(path: pathlib.Path):
    """Check, before a study runs, that `save_markdown` can write a page: it does not exist yet or has marks.

    Raises:
      InputError: it cannot.
    """
    if path.suffix != ".md":
        raise InputError(f"--page={path}: must end in .md; the figure beside it will end in .png")
    try:
        if path.exists() and replace_part(path.read_text(), "") is None:
            raise InputError(f"{path}: has no lines {BEGIN} and {END} to write between")
    except UnicodeDecodeError:
        raise InputError(f"{path}: is not a text file") from None


def check_writable(path: pathlib.Path, option: str = "--output"):
    """Check, before a study runs, that a file can be written.

    Raises:
      InputError: it cannot; the message names `option`.
    """
    if path.is_dir():
        raise InputError(f"{option}={path}: is a folder, must be a file")
    if not path.parent.is_dir():
        raise InputError(f"{option}={path}: folder {path.parent} does not exist")
    try:
        with path.open("ab") if path.exists() else tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise InputError(f"{option}={path}: cannot be written ({error.strerror or error})") from None
