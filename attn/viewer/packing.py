"""Maps as compressed bytes: as they are, rounded to 7 bits, or pooled, by what fits a budget.

The order is: for each run, frame, kind, layer and head, one sheet of values. `viewer/src/payload.ts` reads them.
"""

import base64
import dataclasses
import gzip
from collections.abc import Iterator, Sequence

import numpy as np

from attn.viewer.arrays import MASKED, is_masked
from attn.viewer.kinds import Kind

PAGE_BUDGET = 1_000_000  # bytes of packed maps of a page in a notebook: more would exceed Jupyter's rate of output
FILE_BUDGET = 8_000_000  # of a saved page
_EXACT = 200_000  # bytes up to which values are float32
_LEVELS = 126  # 7 bits, which pages of many heads need to stay small; 252..255 are special
_MOST_TOPS = 16  # largest exact weights per row
_TOP_BYTES = 6  # of an index and a value, compressed


@dataclasses.dataclass(frozen=True)
class Packing:
    """The way in which maps are packed.

    Attributes:
      encoding: "float32" or "levels".
      blocks: for each kind, for each layer, the rows and columns of a block that becomes one cell.
      tops: number of exact largest values per row, 0 for none.
    """

    encoding: str
    blocks: tuple[tuple[tuple[int, int], ...], ...]
    tops: int

    @property
    def pools(self) -> bool:
        return any(block != (1, 1) for layers in self.blocks for block in layers)


def planned(kinds: Sequence[Kind], repeats: int, budget: int, exact: bool) -> Packing:
    """Choose the packing.

    Args:
      kinds: those of one frame.
      repeats: number of runs times number of frames.
      budget: bytes.
      exact: keep all values as float32, no matter how many.
    """
    layers = [layer for kind in kinds for layer in kind.layers]
    tops_bytes = sum(index.size * _TOP_BYTES for kind in kinds for index, _ in kind.largest or ())
    known = min((kind.largest[0][0].shape[-1] for kind in kinds if kind.largest), default=0)
    known = known if exact or tops_bytes <= budget else 0
    cells = repeats * sum(layer.size for layer in layers)
    whole = tuple(tuple((1, 1) for _ in kind.layers) for kind in kinds)
    if exact or 4 * cells <= min(budget, _EXACT):
        return Packing("float32", whole, known)
    if cells <= budget:
        return Packing("levels", whole, known)
    rows = repeats * sum(layer.shape[0] * layer.shape[1] for layer in layers)
    tops = min(_MOST_TOPS, budget // 2 // (rows * _TOP_BYTES))
    tops = max(tops, int(rows * _TOP_BYTES <= 0.7 * budget))
    if any(kind.pooled_from for kind in kinds):
        tops = known  # the others are lost
    sheets = repeats * sum(len(layer) for layer in layers)
    most = max(1, (budget - tops * rows * _TOP_BYTES) // sheets)
    blocks = tuple(tuple(block_sizes(*layer.shape[1:], most) for layer in kind.layers) for kind in kinds)
    return Packing("levels", blocks, tops)


def block_sizes(T: int, S: int, most: int) -> tuple[int, int]:
    """Return the smallest rows and columns of nearly square blocks that leave at most `most` cells of `[T S]`."""
    side = 1
    while -(-T // min(side, T)) * -(-S // min(side, S)) > most:
        # Far from the goal, larger steps.
        cells = -(-T // min(side, T)) * -(-S // min(side, S))
        side = max(side + 1, int(side * (cells / most) ** 0.5 * 0.9))
    return min(side, T), min(side, S)


def packed(runs: Sequence[Sequence[Sequence[Kind]]], packing: Packing) -> dict:
    """Return the parts of the payload that hold the maps: values, ranges and top.

    Args:
      runs: for each run, for each frame, its kinds.
      packing: how.
    """
    values, ranges, indices, tops = bytearray(), [], [], []
    for kind, number, block in _layers(runs, packing):
        layer = kind.layers[number]
        cells = layer if block == (1, 1) else pooled(layer, block, kind.quantity)
        for sheet in cells:
            low, high = _range(sheet)
            low = max(low, 0.0) if kind.quantity == "weights" else low  # what rounding left below 0
            ranges.append((low, high))
            values += sheet.tobytes() if packing.encoding == "float32" else levels(sheet, low, high).tobytes()
        if packing.tops:
            index, top = kind.largest[number] if kind.largest else largest(layer, packing.tops)
            indices.append(index.ravel())
            tops.append(top.ravel())
    top = None
    if packing.tops:
        index, value = np.concatenate(indices), np.concatenate(tops)
        top = {"k": packing.tops, "index": _text(index.tobytes()), "value": _text(value.tobytes())}
    return {"values": _text(bytes(values)), "ranges": _text(np.array(ranges, "<f4").tobytes()), "top": top}


def _layers(runs, packing: Packing) -> Iterator[tuple[Kind, int, tuple[int, int]]]:
    for frames in runs:
        for kinds in frames:
            for kind, blocks in zip(kinds, packing.blocks, strict=True):
                for number, block in enumerate(blocks):
                    yield kind, number, block


def pooled(layer: np.ndarray, block: tuple[int, int], quantity: str) -> np.ndarray:
    """Pool `[N T S]` over blocks of (a, b) cells, to float32 `[N t s]`.

    Weights are the mean over a block's rows of the sum over its columns ("mass"), so that rows still sum to 1; other
    quantities the largest value ("max"). A cell is masked if its whole block is, NaN if a visible cell of it is.
    """
    masked = is_masked(layer)
    rows, columns = (range(0, size, side) for size, side in zip(layer.shape[1:], block))

    def reduced(ufunc: np.ufunc, x: np.ndarray) -> np.ndarray:
        return ufunc.reduceat(ufunc.reduceat(x, columns, axis=2), rows, axis=1)

    if quantity == "weights":
        counts = np.diff([*rows, layer.shape[1]])[:, None]
        cells = reduced(np.add, np.where(masked, np.float32(0), layer)) / counts.astype(np.float32)
    else:
        cells = reduced(np.maximum, np.where(masked, np.float32(-np.inf), layer))
    cells = np.ascontiguousarray(cells, np.float32)
    cells[reduced(np.logical_and, masked)] = MASKED
    return cells


def _range(sheet: np.ndarray) -> tuple[float, float]:
    finite = sheet[np.isfinite(sheet)]
    return (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)


def levels(sheet: np.ndarray, low: float, high: float) -> np.ndarray:
    """Round values to uint8 levels, which lie closer to each other near 0.

    For low >= 0, level c stands for high (c / 126)^2, which is off by at most 0.8 % of `high`; else, with m the
    largest magnitude, for m sign(c - 63) ((c - 63) / 63)^2. 252 is -inf, 253 inf, 254 masked, 255 NaN.
    """
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        x = np.where(np.isfinite(sheet), sheet, 0).astype(np.float64)
        if low >= 0:
            codes = _LEVELS * np.sqrt(np.maximum(x, 0) / (high if high > 0 else 1))
        else:
            most = max(abs(low), abs(high))
            codes = _LEVELS / 2 * (1 + np.sign(x) * np.sqrt(abs(x) / most))
        codes = np.rint(codes).astype(np.uint8)
    codes[sheet == -np.inf] = 252
    codes[sheet == np.inf] = 253
    codes[np.isnan(sheet)] = 255
    codes[is_masked(sheet)] = 254
    return codes


def largest(layer: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the columns and values `[N T count]` of the largest values of each row, in descending order.

    NaN and masked cells are left out; where fewer remain, the column is 0xffffffff.
    """
    x = np.where(np.isnan(layer), -np.inf, layer)
    width = min(count, x.shape[-1])
    # Only the `width` largest are sorted.
    some = np.argpartition(-x, width - 1, axis=-1)[..., :width]
    order = np.argsort(-np.take_along_axis(x, some, -1), axis=-1, kind="stable")
    index = np.take_along_axis(some, order, -1)
    value = np.take_along_axis(x, index, -1)
    index = np.where(value == -np.inf, 0xFFFFFFFF, index).astype("<u4")
    value = np.where(value == -np.inf, 0, value).astype("<f4")
    pad = ((0, 0), (0, 0), (0, count - width))
    return np.pad(index, pad, constant_values=0xFFFFFFFF), np.pad(value, pad)


def _text(data: bytes) -> str:
    return base64.b64encode(gzip.compress(data, compresslevel=6, mtime=0)).decode()


def note(kinds: Sequence[Kind], packing: Packing) -> str:
    """Say in words what of the maps is exact, rounded or pooled."""
    # Half a step of the levels at the largest value; maps with negative values have half as many on each side.
    share = "0.8 %" if all(kind.quantity in ("weights", "mask") for kind in kinds) else "1.6 %"
    if packing.encoding == "float32":
        words = "All values are exact (float32)."
    elif not packing.pools:
        words = f"Values are rounded to 7 bits: within {share} of the largest of each map, closer for small values."
    else:
        blocks = sorted({block for layers in packing.blocks for block in layers if block != (1, 1)})
        how = "mass" if any(kind.quantity == "weights" for kind in kinds) else "largest value"
        words = f"Pooled by {how}: one cell stands for {_blocks(blocks)} cells, rounded to 7 bits. " + (
            f"The largest {packing.tops if packing.tops > 1 else 'weight'} of each row {_is_are(packing.tops)} exact."
            if packing.tops
            else "No row has exact values here."
        )
        words += " A file with all values: save(path, exact=True)."
    pooled_before = [kind for kind in kinds if kind.pooled_from is not None]
    if pooled_before:
        T, S = pooled_before[0].pooled_from
        words += f" The maps were pooled from {T:,} x {S:,}"
        words += "; the largest weight of each row is exact." if packing.tops else "."
    return words


def _blocks(blocks: Sequence[tuple[int, int]]) -> str:
    sizes = [f"{a} x {b}" for a, b in blocks]
    return sizes[0] if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"


def _is_are(count: int) -> str:
    return "is" if count == 1 else "are"
