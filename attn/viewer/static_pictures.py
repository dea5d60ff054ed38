"""A view as a picture for papers and slides: a grid of heads with names along both axes."""

import io
import pathlib
import warnings
from collections.abc import Iterable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from attn.viewer.arrays import is_masked
from attn.viewer.files import write_whole
from attn.viewer.kinds import Kind, Picture

_MOST_AXES = 64  # heads; of more, each kind is one image of small maps
_THUMBNAIL = 24  # pixels of such a map
_MASKED, _NAN = "0.85", "#c2185b"


def draw(kinds: Sequence[Kind], title: str) -> Figure:
    """Draw every layer and head, one row per layer of each kind; both are counted from 0.

    Of weights dark is 1 and white is 0; other quantities have a scale per head, blue below 0 and orange above it.
    Masked cells are grey, NaN is magenta. Over a picture, the weights of the class token are drawn, the one token that
    is not a patch; without one the mean over queries. Of many heads, small maps show the largest magnitude of a block.
    """
    if sum(kind.num_heads() for kind in kinds) > _MOST_AXES:
        return _draw_mosaics(kinds, title)
    overlays = [_overlay(kind, number) for kind in kinds if kind.picture for number in range(len(kind.layers))]
    rows = [(kind, number) for kind in kinds for number in range(len(kind.layers))]
    num_heads = max(len(layer) for kind in kinds for layer in kind.layers)
    num_rows = len(rows) + len(overlays)
    longest = max(min(80, size) for kind in kinds for layer in kind.layers for size in layer.shape[1:])
    side = min(6.0, max(2.4, 0.16 * longest))
    figure = Figure(figsize=(max(4.8, side * num_heads + 0.6), side * num_rows + 0.8), layout="constrained")
    axes = figure.subplots(num_rows, num_heads, squeeze=False)
    for row, (name, heads, picture) in zip(axes, overlays):
        for head, (ax, weights) in enumerate(zip(row, heads)):
            _draw_overlay(ax, picture, weights)
            _set_title(ax, name, head, len(heads))
    for row, (kind, number) in zip(axes[len(overlays) :], rows, strict=True):
        _draw_layer(row, kind, number)
    for row, count in zip(axes, [*(len(each[1]) for each in overlays), *(len(k.layers[n]) for k, n in rows)]):
        for ax in row[count:]:
            ax.remove()
    figure.suptitle(_short(title, 90), fontsize=9, parse_math=False)
    return figure


def _draw_layer(row: Iterable[Axes], kind: Kind, number: int):
    heads = kind.layers[number]
    is_only = kind.quantity != "weights" and len(kind.layers) == 1
    name = _short(kind.title, 60) if is_only else f"{_short(kind.title, 60)}\nlayer {number}"
    for head, (ax, weights) in enumerate(zip(row, heads)):
        _draw_map(ax, weights, kind)
        _set_title(ax, name, head, len(heads))
        ax.set_xlabel(kind.columns.label, fontsize=7, parse_math=False)
        if head == 0:
            ax.set_ylabel(kind.rows.label, fontsize=7, parse_math=False)


def _draw_map(ax: Axes, weights: np.ndarray, kind: Kind):
    shown, options = _shown(weights, kind.quantity)
    ax.imshow(shown, aspect="auto", interpolation="nearest", **options)
    if is_masked(weights).any():
        _paint(ax, is_masked(weights), _MASKED)
    if (np.isnan(weights) & ~is_masked(weights)).any():
        _paint(ax, np.isnan(weights) & ~is_masked(weights), _NAN)
    T, S = kind.sizes(weights[None])
    for axis, names, size, cells in (
        (ax.xaxis, kind.columns.names, S, weights.shape[1]),
        (ax.yaxis, kind.rows.names, T, weights.shape[0]),
    ):
        _set_ticks(axis, names, size, cells)
    ax.tick_params(length=0, pad=1)
    for label in ax.get_xticklabels():
        label.set_rotation(90 if len(label.get_text()) > 2 else 0)


def _shown(weights: np.ndarray, quantity: str) -> tuple[np.ndarray, dict]:
    """Return what `imshow` gets: of weights on the scale 0 to 1, of other quantities on one around 0."""
    finite = weights[np.isfinite(weights)]
    if quantity in ("weights", "mask"):
        return weights, dict(vmin=0, vmax=1, cmap="Blues")
    most = float(abs(finite).max()) if finite.size else 1.0
    return weights, dict(vmin=-most or -1, vmax=most or 1, cmap=_signed())


def _signed():
    """Return the colours from blue over white to orange."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("signed", ["#12356f", "#5b9bd5", "#f7f7f7", "#e59a4b", "#8a4207"])


def _paint(ax: Axes, where: np.ndarray, color: str):
    from matplotlib.colors import ListedColormap

    ax.imshow(np.ma.masked_equal(where, False), cmap=ListedColormap([color]), aspect="auto", interpolation="nearest")


def _set_ticks(axis, names: Sequence[str] | None, size: int, cells: int):
    """Label rows or columns; more than 40 labels would overlap, so only every k-th is shown."""
    every = -(-cells // 40)
    shown = range(0, cells, every)
    block = -(-size // cells)
    labels = [_short(names[cell * block]) if names else f"{cell * block:,}" for cell in shown]
    axis.set_ticks(shown, labels, fontsize=6 if every == 1 else 5, parse_math=False)


def _short(name: str, most: int = 20) -> str:
    """Return a text as it can be drawn: at most so many characters, without control characters."""
    name = name.encode("utf-8", "backslashreplace").decode()
    name = "".join(char if char.isprintable() else f"\\x{ord(char):02x}" for char in name)
    return name if len(name) <= most else f"{name[: most - 1]}…"


def _set_title(ax: Axes, name: str, head: int, num_heads: int):
    ax.set_title(f"{name}, head {head}" if num_heads > 1 else name, fontsize=7, parse_math=False)


def _overlay(kind: Kind, number: int) -> tuple[str, np.ndarray, Picture]:
    """Return the title, the weights `[N rows columns]` over the patches, and the picture of a layer."""
    heads, picture = kind.layers[number], kind.picture
    rows, columns = picture.grid
    patches = slice(picture.first, picture.first + rows * columns)
    if heads.shape[1] == heads.shape[2] == rows * columns + 1:
        query, who = heads[:, 0 if picture.first else -1], "class token"
    else:
        query, who = heads.mean(axis=1), "mean over queries"
    return f"{who} over the picture\nlayer {number}", query[:, patches].reshape(-1, rows, columns), picture


def _draw_overlay(ax: Axes, picture: Picture, weights: np.ndarray):
    """Draw weights `[rows columns]` of patches, relative to the greatest, under the ink of their picture."""
    height, width = picture.pixels.shape[:2]
    # Both images have one unit per pixel, with the middle of the first pixel at 0.
    extent = -0.5, width - 0.5, height - 0.5, -0.5
    ax.imshow(weights, vmin=0, vmax=weights.max() or 1, cmap="Blues", extent=extent, interpolation="nearest")
    grey = picture.pixels if picture.pixels.ndim == 2 else picture.pixels.mean(axis=-1)
    ink = np.ma.masked_equal((grey.max() - grey) / (np.ptp(grey) or 1), 0)
    ax.imshow(ink, vmin=0, vmax=1, cmap="gray_r", alpha=0.55, extent=extent, interpolation="nearest")
    ax.set(xticks=[], yticks=[])


def _draw_mosaics(kinds: Sequence[Kind], title: str) -> Figure:
    """Draw one image per kind, in which each head is a small map."""
    grids = [_mosaic(kind) for kind in kinds]
    width = max(6.4, max(grid.shape[1] for grid in grids) / 100)
    heights = [max(1.6, grid.shape[0] / grid.shape[1] * width) for grid in grids]
    figure = Figure(figsize=(width, sum(heights) + 0.8), layout="constrained")
    axes = figure.subplots(len(kinds), 1, squeeze=False, height_ratios=heights)[:, 0]
    for ax, kind, grid in zip(axes, kinds, grids):
        ax.imshow(grid, interpolation="nearest")
        side = _THUMBNAIL + 1
        every = -(-max(len(kind.layers), kind.num_heads() // len(kind.layers)) // 32)
        heads, layers = range(0, grid.shape[1] // side, every), range(0, len(kind.layers), every)
        ax.set_xticks([head * side + side // 2 for head in heads], [*heads], fontsize=6)
        ax.set_yticks([layer * side + side // 2 for layer in layers], [*layers], fontsize=6)
        ax.set(xlabel="head", ylabel="layer")
        ax.set_title(f"{kind.title}, each map relative to its largest", fontsize=8, parse_math=False)
    figure.suptitle(_short(title, 90), fontsize=9, parse_math=False)
    return figure


def _mosaic(kind: Kind) -> np.ndarray:
    """Return the small maps of all heads as one image `[height width 4]`, with white between them."""
    most = max(len(layer) for layer in kind.layers)
    grid = np.ones((len(kind.layers) * (_THUMBNAIL + 1), most * (_THUMBNAIL + 1), 4))
    for number, layer in enumerate(kind.layers):
        for head, weights in enumerate(layer):
            y, x = number * (_THUMBNAIL + 1), head * (_THUMBNAIL + 1)
            grid[y : y + _THUMBNAIL, x : x + _THUMBNAIL] = _colors(weights, kind.quantity)
    return grid


def _colors(head: np.ndarray, quantity: str) -> np.ndarray:
    """Return a small map in colour: blue below 0 and orange above it, grey where all is masked, magenta for NaN."""
    from matplotlib import colormaps
    from matplotlib.colors import to_rgba

    sizes = thumbnail(head, _THUMBNAIL)
    if quantity in ("weights", "mask"):
        colors = colormaps["Blues"](sizes)
    else:
        above = thumbnail(np.where(head > 0, head, 0), _THUMBNAIL, thumbnail_scale(head))
        below = thumbnail(np.where(head < 0, head, 0), _THUMBNAIL, thumbnail_scale(head))
        colors = _signed()(0.5 + np.where(above >= below, above, -below) / 2)
    nan = np.isnan(head) & ~is_masked(head)
    colors[thumbnail(~is_masked(head), _THUMBNAIL, 1.0) == 0] = to_rgba(_MASKED)
    colors[thumbnail(nan, _THUMBNAIL, 1.0) > 0] = to_rgba(_NAN)
    return colors


def thumbnail_scale(head: np.ndarray) -> float:
    """Return the largest finite magnitude of a head, or 1 if it is 0."""
    return float(abs(np.where(np.isfinite(head), head, 0)).max()) or 1.0


def thumbnail(head: np.ndarray, side: int, scale: float | None = None) -> np.ndarray:
    """Return a head as `[side side]`: each cell the largest magnitude there, relative to `scale` or the head's own."""
    scale = thumbnail_scale(head) if scale is None else scale
    x = abs(np.where(np.isfinite(head), head, 0))
    for axis in (0, 1):
        size = x.shape[axis]
        if size > side:
            x = np.maximum.reduceat(x, np.arange(side) * size // side, axis=axis)
        x = x.take(np.arange(side) * x.shape[axis] // side, axis=axis)
    return x / scale


def save(figure: Figure, path: pathlib.Path):
    """Write a figure in the format that the path's suffix names."""
    data = io.BytesIO()
    with warnings.catch_warnings():
        # A character that no font has is drawn as a box.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(data, dpi=120, format=path.suffix.lower().removeprefix("."))
    write_whole(path, data.getvalue())
