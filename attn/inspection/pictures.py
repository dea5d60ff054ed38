"""Pictures: attention maps as a grid of heads, and accuracy against length."""

import math
import pathlib
import warnings

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from attn.inspection.capture import Maps
from attn.training.evaluation import Metrics

_TITLES = {"cross": "cross-attention", "decoder": "decoder self-attention", "encoder": "encoder self-attention"}


def draw_maps(maps: Maps, title: str) -> Figure:
    """Draw the attention of every layer and head, one row per layer of each of the model's maps.

    Dark is 1, white is 0. A row is the token that the model wrote (in an encoder: represented), a column a token that
    it could attend to. For a model without attention the map is the influence of each source token, relative to the
    greatest in the row. If the source is a picture, the attention of its last token, the class token, is also drawn
    over it.
    """
    rows = [
        (f"{_TITLES.get(name, name)}\nlayer {layer}", heads, *maps.rows(name), *maps.columns(name))
        for name in maps.axes
        for layer, heads in enumerate(maps.weights.get(name, ()), start=1)
    ]
    if maps.influence is not None:
        relative = maps.influence / np.maximum(maps.influence.max(axis=-1, keepdims=True), np.finfo(np.float32).tiny)
        rows.append(("influence", relative[None], "written", maps.written, "source", maps.source))
    overlays = _overlays(maps)
    num_heads, num_rows = len(rows[0][1]), len(rows) + len(overlays)
    side = min(6.0, max(2.4, 0.16 * max(len(maps.source), len(maps.written))))
    figure = Figure(figsize=(max(4.8, side * num_heads + 0.6), side * num_rows + 0.8), layout="constrained")
    axes = figure.subplots(num_rows, num_heads, squeeze=False)
    for row, (name, heads) in zip(axes, overlays):
        for head, (ax, weights) in enumerate(zip(row, heads, strict=True)):
            _draw_overlay(ax, maps.picture, weights)
            _set_title(ax, name, head, num_heads)
    for row, (name, heads, down_name, down, across_name, across) in zip(axes[len(overlays) :], rows, strict=True):
        for head, (ax, weights) in enumerate(zip(row, heads, strict=True)):
            _draw_map(ax, weights, down, across)
            _set_title(ax, name, head, num_heads)
            ax.set_xlabel(across_name, fontsize=7)
            if head == 0:
                ax.set_ylabel(down_name, fontsize=7)
    figure.suptitle(title, fontsize=9, parse_math=False)
    return figure


def _draw_map(ax: Axes, weights: np.ndarray, down: list[str], across: list[str]):
    ax.imshow(weights, vmin=0, vmax=1, cmap="Blues", aspect="auto", interpolation="nearest")
    # More than 40 labels would overlap, so only every k-th is shown.
    for axis, labels in ((ax.xaxis, across), (ax.yaxis, down)):
        every = -(-len(labels) // 40)
        size = 6 if every == 1 else 5
        axis.set_ticks(range(0, len(labels), every), labels[::every], fontsize=size, parse_math=False)
    ax.tick_params(length=0, pad=1)
    for label, text in zip(ax.get_xticklabels(), across[:: -(-len(across) // 40)]):
        label.set_rotation(90 if len(text) > 2 else 0)


def _set_title(ax: Axes, name: str, head: int, num_heads: int):
    ax.set_title(f"{name}, head {head + 1}" if num_heads > 1 else name, fontsize=7)


def _overlays(maps: Maps) -> list[tuple[str, np.ndarray]]:
    """Return the title and the attention `[N rows columns]` of the last source token over the patches, by layer."""
    if maps.picture is None:
        return []
    num_patches = len(maps.source) - 1
    side = math.isqrt(maps.picture.size // num_patches)  # of a patch, in pixels
    grid = [pixels // side for pixels in maps.picture.shape]
    return [
        (f"class token over the picture\nlayer {layer}", heads[:, -1, :num_patches].reshape(-1, *grid))
        for name, axes in maps.axes.items()
        for layer, heads in enumerate(maps.weights.get(name, ()), start=1)
        if [*axes] == ["source", "source"]
    ]


def _draw_overlay(ax: Axes, picture: np.ndarray, weights: np.ndarray):
    """Draw weights `[rows columns]` of patches, relative to the greatest, under the ink of their picture."""
    height, width = picture.shape
    # Both images have one unit per pixel, with the middle of the first pixel at 0.
    extent = -0.5, width - 0.5, height - 0.5, -0.5
    ax.imshow(weights, vmin=0, vmax=weights.max(), cmap="Blues", extent=extent, interpolation="nearest")
    ink = np.ma.masked_equal(picture, 0)
    ax.imshow(ink, vmin=0, vmax=1, cmap="gray_r", alpha=0.55, extent=extent, interpolation="nearest")
    ax.set(xticks=[], yticks=[])


def draw_lengths(metrics: Metrics, trained: tuple[int, int], title: str) -> Figure:
    """Draw exact match and token accuracy against length, with the lengths of training shaded."""
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    ax = figure.subplots()
    rows = list(metrics.by_length())
    lengths = [length for length, _ in rows]
    ax.axvspan(trained[0] - 0.5, trained[1] + 0.5, color="0.92", label="trained lengths")
    ax.plot(lengths, [row.token_accuracy.value() for _, row in rows], ".-", color="tab:orange", label="token accuracy")
    ax.plot(lengths, [row.exact_match.value() for _, row in rows], ".-", color="tab:blue", label="exact match")
    ax.set(xlabel="length of the source (symbols)", ylabel="share", ylim=(-0.03, 1.03))
    ax.set_title(title, parse_math=False)
    ax.legend(loc="lower left", fontsize=8)
    return figure


def save(figure: Figure, path: pathlib.Path):
    """Write a figure in the format that the path's suffix names."""
    with warnings.catch_warnings():
        # A character that no font has is drawn as a box.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(path, dpi=120)
