"""Write the results of a study: JSON, and tables and figures in Markdown or HTML. Files are written atomically.

Reports are made only from the numbers, so that they can be written again from the JSON files.
"""

import base64
import html
import io
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
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 0.6rem 0 } caption { text-align: left; font-size: 0.9rem; color: #555 }
th, td { padding: 0.15rem 0.7rem; border-bottom: 1px solid #ddd; text-align: left; font-variant-numeric: tabular-nums }
img { max-width: 100% } section { border-top: 2px solid #eee; margin-top: 2.5rem } .tables { display: flex;
flex-wrap: wrap; gap: 0 2rem } .holds { color: #176b2c } .fails { color: #a11a1a } .part { color: #8a5a00 }
blockquote { margin: 0.5rem 0; padding-left: 1rem; border-left: 4px solid #ccc; font-size: 1.1rem }
small { color: #555 } .reduced { background: #fff4d6; padding: 0.5rem 1rem }
"""


class Table(NamedTuple):
    """A table: its caption, the names of its columns (may be empty), and its rows."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[Any]]

    def html(self) -> str:
        """Return the table in HTML; floats have four significant digits."""
        head = "".join(f"<th>{escape(name)}</th>" for name in self.header)
        rows = "".join("<tr>" + "".join(f"<td>{_number(cell)}</td>" for cell in row) + "</tr>" for row in self.rows)
        return f"<table><caption>{escape(self.caption)}</caption>{f'<tr>{head}</tr>' if head else ''}{rows}</table>"

    def markdown(self) -> str:
        """Return the table in Markdown, with its caption as a heading; cells are shown as they are."""
        lines = [self.header, ["---"] * len(self.header), *self.rows]
        return "\n".join([f"### {self.caption}\n", *(f"| {' | '.join(map(str, line))} |" for line in lines), ""])


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else escape(str(value))


def escape(text: str) -> str:
    """Return text for the content of an HTML element."""
    return html.escape(text, quote=False)


def html_page(title: str, body: str) -> str:
    """Return an HTML page that loads no other files."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        f'content="width=device-width"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body>\n<h1>{escape(title)}</h1>\n{body}\n</body></html>\n"
    )


def html_figure(figure: Figure, words: str) -> str:
    """Return a figure as an image inside of an HTML page; `words` are its alternative text."""
    file = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "attn"}):  # so that equal numbers give equal pages
        figure.savefig(file, format="svg", bbox_inches="tight", metadata={"Date": None})
    data = base64.b64encode(file.getvalue().encode()).decode()
    return f'<p><img alt="{html.escape(words)}" src="data:image/svg+xml;base64,{data}"></p>'


def html_equation(tex: str) -> str:
    """Return an equation, in TeX as matplotlib reads it, as an image inside of an HTML page."""
    figure = Figure(figsize=(0.01, 0.01))
    figure.text(0, 0, f"${tex}$", fontsize=12)
    return html_figure(figure, tex)


def panels(columns: int, width: float, height: float) -> tuple[Figure, np.ndarray]:
    """Return a figure of a size in inches, and its axes side by side, `[columns]`."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, columns)


def tick_lengths(ax: Axes, lengths: Sequence[int]):
    """Make the x-axis logarithmic, with a tick and a plain number at each length."""
    ax.set_xscale("log")
    ax.set_xticks(lengths, lengths)
    ax.minorticks_off()


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
