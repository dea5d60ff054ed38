"""The kinds of maps that a page shows as tabs, such as "encoder" and "cross", and the names of their axes."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from attn.viewer.arrays import NO_WEIGHTS, as_array, as_layers

TITLES = {
    "cross": "cross-attention",
    "decoder": "decoder self-attention",
    "encoder": "encoder self-attention",
    "attention": "attention",
}

# Names under which models of the library transformers, and those of `attn.pretrained`, return weights.
_OUTPUTS = {
    "cross_attentions": "cross",
    "decoder_attentions": "decoder",
    "encoder_attentions": "encoder",
    "attentions": "attention",
}
# What a model's output also has: without attentions it is not a dictionary of maps.
_NOT_MAPS = ("logits", "last_hidden_state", "past_key_values", "hidden_states")
_ROUNDING = 1e-3  # by which weights may leave [0, 1]


@dataclasses.dataclass(frozen=True)
class Axis:
    """The rows or the columns of a map.

    Attributes:
      label: text such as "query: written".
      names: one per row or column; None for numbers.
    """

    label: str
    names: tuple[str, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Picture:
    """An image whose patches are columns of a map, row by row.

    Attributes:
      pixels: `[height width]` or `[height width 3]`, of any range.
      grid: numbers of rows and columns of patches.
      first: column of the first patch.
      rows_too: the rows of the map are the same patches.
    """

    pixels: np.ndarray
    grid: tuple[int, int]
    first: int = 0
    rows_too: bool = True


@dataclasses.dataclass(frozen=True)
class Kind:
    """All maps of one kind.

    Attributes:
      name: such as "cross".
      title: its name on the page.
      layers: float32 `[N T S]` per layer; layers may differ in all three.
      rows, columns: the queries and the keys.
      groups: K, the number of key/value heads that the heads share; None if each has its own.
      quantity: "weights", "scores", "mask" or "values".
      picture: of the columns.
      pooled_from: (T, S) of the maps that these were pooled from; None if they are whole.
      offset: position among the keys at which query 0 stands.
      largest: of pooled maps, by layer, the columns and values `[N T k]` of the exact largest weights per row.
    """

    name: str
    title: str
    layers: Sequence[np.ndarray]
    rows: Axis
    columns: Axis
    groups: int | None = None
    quantity: str = "weights"
    picture: Picture | None = None
    pooled_from: tuple[int, int] | None = None
    offset: int = 0
    largest: Sequence[tuple[np.ndarray, np.ndarray]] | None = None

    def num_heads(self) -> int:
        """Return the number of heads of all layers."""
        return sum(len(layer) for layer in self.layers)

    def sizes(self, layer: np.ndarray) -> tuple[int, int]:
        """Return (T, S) of a layer, before any pooling."""
        return self.pooled_from or layer.shape[1:]


def as_kinds(weights, rows, columns, batch: int | None, pooled_from=None) -> list[Kind]:
    """Return the kinds of maps that weights in any form hold.

    Args:
      weights: see `attn.viewer.view`.
      rows, columns: names of queries and keys, or a dictionary of them by kind, or None.
      batch: number of the example.
      pooled_from: (T, S) of pooled maps, whose names are those of the T queries and S keys.

    Raises:
      TypeError, ValueError: see `attn.viewer.view`.
    """
    if callable(getattr(weights, "kinds", None)):  # what names its own axes, as `attn.inspection.capture.Maps`
        kinds, rows, columns = weights.kinds(), by_text(rows), by_text(columns)
        return [_renamed(kind, rows, columns, kinds) for kind in kinds]
    by_name = _by_name(weights)
    rows, columns = by_text(rows), by_text(columns)
    for axis, names in (("rows", rows), ("columns", columns)):
        _check_keys(axis, names, by_name)
    kinds = []
    for name, each in by_name.items():
        layers = as_layers(each, batch, name)
        sides = [
            _axis(axis, names, layers, name, None, pooled_from)
            for axis, names in (("rows", rows), ("columns", columns))
        ]
        kinds.append(Kind(name, TITLES.get(name, name), layers, *sides, quantity=_quantity(layers)))
    return kinds


def _by_name(weights) -> dict:
    """Return the arrays by kind: those of a dictionary or of a model's output, or one kind "attention"."""
    found = {}
    if isinstance(weights, Mapping) or any(hasattr(weights, name) for name in _OUTPUTS):
        get = weights.get if isinstance(weights, Mapping) else lambda name: getattr(weights, name, None)
        found = {kind: get(name) for name, kind in _OUTPUTS.items() if get(name) is not None}
    if found:
        return found
    if any(name in weights if isinstance(weights, Mapping) else hasattr(weights, name) for name in _NOT_MAPS):
        raise TypeError(f"weights: got a model's output without attentions; {NO_WEIGHTS}")
    if not isinstance(weights, Mapping):
        return {"attention": weights}
    if not weights:
        raise ValueError("weights: got an empty dictionary, must hold a kind, such as {'cross': [L N T S]}")
    if len({str(name) for name in weights}) != len(weights):
        raise ValueError(f"weights: two kinds of {', '.join(map(repr, weights))} are the same text")
    return {str(name): each for name, each in weights.items()}


def _renamed(kind: Kind, rows, columns, kinds: Sequence[Kind]) -> Kind:
    for axis, names in (("rows", rows), ("columns", columns)):
        _check_keys(axis, names, [each.name for each in kinds])
        kind = dataclasses.replace(kind, **{axis: _axis(axis, names, kind.layers, kind.name, getattr(kind, axis))})
    return kind


def by_text(names):
    """Return names by kind with the kinds as texts; other names as they are."""
    return {str(kind): each for kind, each in names.items()} if isinstance(names, Mapping) else names


def _check_keys(axis: str, names, known):
    unknown = [str(key) for key in names if key not in known] if isinstance(names, Mapping) else []
    if unknown:
        raise ValueError(f"{axis}: got names for {', '.join(unknown)}, must be for {', '.join(map(str, known))}")


def _axis(axis: str, names, layers: Sequence[np.ndarray], kind: str, otherwise: Axis | None, pooled_from=None) -> Axis:
    """Make an axis from its names, checking that there is one per row or column of every layer."""
    label = "query" if axis == "rows" else "key"
    names = names.get(kind) if isinstance(names, Mapping) else names
    if names is None:
        return otherwise or Axis(label)
    names = as_names(axis, names)
    for number, layer in enumerate(layers):
        size = (pooled_from or layer.shape[1:])[0 if axis == "rows" else 1]
        if size != len(names):
            where = kind if len({each.shape for each in layers}) == 1 else f"{kind}, layer {number}"
            raise ValueError(f"{where}: {size:,} {axis}, but {len(names):,} names")
    return Axis(label if otherwise is None else otherwise.label, names)


def as_names(axis: str, names) -> tuple[str, ...]:
    """Return names as texts; bytes that are not UTF-8 are shown as escapes.

    Raises:
      TypeError: one text, or something that cannot be iterated.
    """
    if isinstance(names, str | bytes) or not hasattr(names, "__iter__"):
        raise TypeError(f"{axis}: got {_short(names)}, must be a list with one name per {axis[:-1]}")
    return tuple(name.decode("utf-8", "backslashreplace") if isinstance(name, bytes) else str(name) for name in names)


def is_whole(number) -> bool:
    """Return whether a value is a whole number of at least 1."""
    return isinstance(number, int | np.integer) and not isinstance(number, bool) and number > 0


def _short(value) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _quantity(layers: Sequence[np.ndarray]) -> str:
    """Return "weights" if all values are in [0, 1] (or no numbers), else "values"."""
    for layer in layers:
        finite = layer[np.isfinite(layer)]
        if (finite.size and (finite.min() < -_ROUNDING or finite.max() > 1 + _ROUNDING)) or np.isinf(layer).any():
            return "values"
    return "weights"


def as_picture(picture, kind: Kind) -> Picture:
    """Return the picture whose patches are the columns of a kind.

    The number of columns must be that of a grid of patches, with or without one class token before it, in the
    picture's own proportions.

    Raises:
      ValueError: not `[height width]`, `[height width 3]` or `[3 height width]`, or no grid has as many patches.
    """
    num_rows, num_columns = kind.layers[0].shape[1:]
    if isinstance(picture, Picture):
        if not (isinstance(picture.grid, Sequence) and len(picture.grid) == 2 and all(map(is_whole, picture.grid))):
            raise ValueError(f"picture: got the grid {picture.grid!r}, must be (rows, columns) of patches")
        picture = dataclasses.replace(picture, pixels=_pixels(picture.pixels))
        end = picture.first + picture.grid[0] * picture.grid[1]
        if picture.first < 0 or end > num_columns:
            raise ValueError(
                f"picture: patches {picture.first}..{end - 1}, but {kind.name} has {num_columns:,} columns"
            )
        return dataclasses.replace(picture, rows_too=picture.rows_too and num_rows == num_columns)
    pixels = _pixels(picture)
    for first in (0, 1):
        if grid := _grid(num_columns - first, *pixels.shape[:2]):
            return Picture(pixels, grid, first, num_rows == num_columns)
    raise ValueError(
        f"picture: {kind.name} has {num_columns:,} columns; no grid of patches of a picture of {pixels.shape[0]} x "
        f"{pixels.shape[1]} pixels has as many, with or without a class token: say where they are by "
        "attn.viewer.Picture(pixels, grid, first)"
    )


def _pixels(picture) -> np.ndarray:
    """Return the pixels of an image as `[height width]` or `[height width 3]`."""
    pixels = as_array(picture, "picture")
    if pixels.ndim == 3 and pixels.shape[0] in (1, 3) and pixels.shape[-1] not in (1, 3):
        pixels = np.moveaxis(pixels, 0, -1)
    if pixels.ndim == 3 and pixels.shape[-1] == 1:
        pixels = pixels[..., 0]
    if pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[-1] != 3) or 0 in pixels.shape:
        raise ValueError(
            f"picture: got {list(pixels.shape)}, must be [height width], [height width 3] or [3 height width]"
        )
    return pixels


def _grid(count: int, height: int, width: int) -> tuple[int, int] | None:
    """Return the rows and columns of `count` square patches that divide a picture; None if there are none."""
    for rows in range(1, min(count, height) + 1):
        columns = count // rows
        if rows * columns == count and rows * width == columns * height:
            return rows, columns
    return None
