"""Write a report as one HTML page: its style, figures whose panels reflow, and equations. It loads no other files."""

import base64
import html
import importlib.resources
import io
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from attn.studies.report import escape

_STYLE = importlib.resources.files("attn.studies") / "web.css"
_PIXELS, _MARGIN = 96, 0.04  # per inch; inches around a panel


def html_page(title: str, description: str, body: str) -> str:
    """Return an HTML page; `body` has its landmarks."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f'<meta name="description" content="{html.escape(description)}"><title>{escape(title)}</title>\n'
        f"<style>\n{_STYLE.read_text(encoding='utf-8')}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def html_figure(figure: Figure, caption: str) -> str:
    """Return a figure for an HTML page, with an image per panel, so that panels can stand below each other on a phone.

    The alternative text of a panel is what it shows; a figure without panels has its caption.
    """
    rows = _rows_of_panels(figure)
    if rows:
        figure.draw_without_rendering()  # places the axes, which then stay where they are
        figure.set_layout_engine("none")
        images = "".join(f'<div class="panels">{_row(figure, row)}</div>' for row in rows)
    else:
        images = f'<img alt="{html.escape(caption)}" src="{_svg(figure)}">'
    return f"<figure>{images}<figcaption>{escape(caption)}</figcaption></figure>"


def _rows_of_panels(figure: Figure) -> list[list[list[Axes]]]:
    """Return the panels by their row in the figure; a panel is all axes at one place, and the bars of their colors."""
    rows: dict[int, dict[int, list[Axes]]] = {}
    for ax in figure.axes:
        if (place := ax.get_subplotspec()) is not None:
            panel = rows.setdefault(place.rowspan.start, {}).setdefault(place.colspan.start, [])
            panel += [ax, *(image.colorbar.ax for image in ax.images if image.colorbar is not None)]
    return [[panels[column] for column in sorted(panels)] for _, panels in sorted(rows.items())]


def _row(figure: Figure, panels: Sequence[Sequence[Axes]]) -> str:
    """Return the images of a row, all of one height, so that their axes are level; they shrink and grow together."""
    to_inches = figure.dpi_scale_trans.inverted()
    boxes = [Bbox.union([ax.get_tightbbox().transformed(to_inches) for ax in panel]) for panel in panels]
    bottom, top = min(box.y0 for box in boxes) - _MARGIN, max(box.y1 for box in boxes) + _MARGIN
    images = []
    for panel, box in zip(panels, boxes):
        for ax in figure.axes:
            ax.set_visible(ax in panel)
        source = _svg(figure, Bbox([[box.x0 - _MARGIN, bottom], [box.x1 + _MARGIN, top]]))
        style = f"--width:{(box.width + 2 * _MARGIN) * _PIXELS:.0f}"
        images.append(f'<img alt="{html.escape(_words(panel[0]))}" style="{style}" src="{source}">')
    for ax in figure.axes:
        ax.set_visible(True)
    return "".join(images)


def _words(ax: Axes) -> str:
    """Return what a panel shows: its title, axes, the ends and extremes of each line, and the heights of bars."""
    title = ax.get_title("left") or ax.get_title("center")
    parts = [title, " against ".join(filter(None, (ax.get_ylabel(), ax.get_xlabel())))]
    if ax.images:
        parts += ["map of {} by {}".format(*ax.images[0].get_array().shape[:2])]
    parts += [f"{line.get_label()}: {_course(line.get_ydata(orig=False))}" for line in ax.lines if _has_name(line)]
    names = [label.get_text() for label in ax.get_xticklabels()]
    for bars in ax.containers:
        heights = [f"{bar.get_height():.3g}" for bar in bars]
        if len(names) == len(heights):
            heights = [f"{height} ({name})" for name, height in zip(names, heights)]
        parts.append(f"{bars.get_label() if _has_name(bars) else 'bars'}: {', '.join(heights)}")
    return ". ".join(" ".join(part.split()) for part in parts if part)


def _has_name(artist: Any) -> bool:
    return not artist.get_label().startswith("_")  # matplotlib's names of those that have none


def _course(values: np.ndarray) -> str:
    """Return the first and the last value of a line, and the least and the greatest if they are between."""
    shown = {f"{value:.3g}": float(value) for value in values}
    if len(shown) <= 1:
        return "".join(shown)
    first, last = values[0], values[-1]
    words = f"from {first:.3g} to {last:.3g}"
    if (least := min(shown.values())) < min(first, last):
        words += f", at least {least:.3g}"
    if (most := max(shown.values())) > max(first, last):
        words += f", at most {most:.3g}"
    return words


def _svg(figure: Figure, box: Bbox | str = "tight") -> str:
    """Return the address of an image of the part of a figure in a box in inches, on a transparent ground."""
    file = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "attn"}):  # so that equal numbers give equal pages
        figure.savefig(file, format="svg", bbox_inches=box, pad_inches=0.02, transparent=True, metadata={"Date": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(file.getvalue().encode()).decode()}"


def html_equation(tex: str) -> str:
    """Return an equation, in TeX as matplotlib reads it, with an image per part; parts are divided by `\\quad`."""
    images = []
    for part in tex.split(r"\quad"):
        figure = Figure(figsize=(0.01, 0.01))
        with matplotlib.rc_context({"mathtext.fontset": "stix"}):
            figure.text(0, 0, f"${part.strip()}$", fontsize=15)
            images.append(f'<img alt="{html.escape(part.strip())}" src="{_svg(figure)}">')
    return f'<p class="equation">{"".join(images)}</p>'
