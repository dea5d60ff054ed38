"""Numbers per head, by which a page sorts the heads."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from attn.viewer.arrays import is_masked
from attn.viewer.kinds import Kind


@dataclasses.dataclass(frozen=True)
class Measure:
    """One number per head.

    Attributes:
      name, help, unit: for people.
      of_head: from the weights `[T S]` of a head, float64, masked cells 0, and the position of query 0 among the keys,
        to its number.
    """

    name: str
    help: str
    unit: str
    of_head: Callable[[np.ndarray, int], float]


def entropy(p: np.ndarray, offset: int = 0) -> float:
    """Return the mean over queries of -sum_j p_j log p_j, in nats, over the queries that see a key."""
    logs = np.log(np.where(p > 0, p, 1))
    return _mean_over_rows(p, -(p * logs).sum(axis=1))


def distance(p: np.ndarray, offset: int) -> float:
    """Return the mean over queries of sum_j p_j |i + offset - j|, over the queries that see a key."""
    i, j = offset + np.arange(p.shape[0])[:, None], np.arange(p.shape[1])
    return _mean_over_rows(p, (p * abs(i - j)).sum(axis=1))


def diagonal(p: np.ndarray, offset: int = 0) -> float:
    """Return the largest mass of the cells with one j - i, per row: 1 if each query attends to the key at one shift."""
    return _largest_sum(p, 1)


def antidiagonal(p: np.ndarray, offset: int = 0) -> float:
    """Return the largest mass of the cells with one j + i, per row: 1 if each query reads the text backwards."""
    return _largest_sum(p, -1)


MEASURES = (
    Measure("entropy", "Mean over queries of the entropy of the weights", "nats", entropy),
    Measure("distance", "Mean distance from a query to the keys, weighted", "positions", distance),
    Measure("diagonal", "Largest mass per query on one diagonal, j - i the same", "", diagonal),
    Measure("anti-diagonal", "Largest mass per query on one anti-diagonal, i + j the same", "", antidiagonal),
)


def computed(kinds: Sequence[Kind]) -> dict[str, list[tuple[float | None, ...]]]:
    """Compute all `MEASURES`: for each name, for each kind, one number per head; None where it has no meaning."""
    rows = [_of_kind(kind) for kind in kinds]
    return {measure.name: [heads[n] for heads in rows] for n, measure in enumerate(MEASURES)}


def _of_kind(kind: Kind) -> list[tuple[float | None, ...]]:
    """Return, for each measure, one number per head."""
    if kind.quantity != "weights" or kind.pooled_from is not None:
        return [(None,) * kind.num_heads()] * len(MEASURES)
    heads = (_visible(head) for layer in kind.layers for head in layer)
    return [*zip(*([_finite(measure.of_head(head, kind.offset)) for measure in MEASURES] for head in heads))]


def given(values: Mapping, kinds: Sequence[Kind], frames: int) -> dict[str, list[list[list[float | None]]]]:
    """Return measures that the user gives: for each name, for each frame, for each kind, one number per head.

    Args:
      values: `{name: {kind: [L N]}}`, or with a leading axis of the frames; an array in place of the dictionary is of
        the only kind.
      kinds: those of a frame.
      frames: their number.

    Raises:
      ValueError: an unknown kind, or not one number per head.
    """
    return {str(name): _given(str(name), each, kinds, frames) for name, each in values.items()}


def _given(name: str, values, kinds: Sequence[Kind], frames: int) -> list[list[list[float | None]]]:
    if not isinstance(values, Mapping):
        if len(kinds) > 1:
            names = ", ".join(kind.name for kind in kinds)
            raise ValueError(f"measures: {name!r} must be a dictionary by kind: {names}")
        values = {kinds[0].name: values}
    if unknown := [str(key) for key in values if key not in [kind.name for kind in kinds]]:
        known = ", ".join(kind.name for kind in kinds)
        raise ValueError(f"measures: {name!r} has values for {', '.join(unknown)}, must be for {known}")
    by_kind = [_numbers(name, values.get(kind.name), kind, frames) for kind in kinds]
    return [[numbers[frame] for numbers in by_kind] for frame in range(frames)]


def _numbers(name: str, values, kind: Kind, frames: int) -> list[list[float | None]]:
    """Return the numbers of a kind, per frame."""
    count = kind.num_heads()
    if values is None:
        return [[None] * count] * frames
    heads = [len(layer) for layer in kind.layers]
    is_array = len(set(heads)) == 1  # where layers differ in their heads, there is a list per layer
    try:
        rows = np.asarray(values, float) if is_array else [np.asarray(row, float) for row in values]
        shape = list(np.shape(rows)) if is_array else [len(row) for row in rows]
        flat = np.concatenate([np.ravel(row) for row in rows])
    except (TypeError, ValueError):
        shape, flat = type(values).__name__, np.zeros(0)
    shapes = [[len(heads), heads[0]], [frames, len(heads), heads[0]]] if is_array else [heads]
    shapes += [[count]] if len(heads) == 1 else []
    if shape not in shapes:
        allowed = " or ".join(map(str, shapes))
        raise ValueError(
            f"measures: {name!r} of {kind.name}: got {shape}, must be one number for each of {count} heads, {allowed}"
        )
    flat = np.broadcast_to(flat.reshape(-1, count), (frames, count))
    return [[_finite(float(number)) for number in frame] for frame in flat]


def _visible(head: np.ndarray) -> np.ndarray:
    return np.where(is_masked(head), 0, head).astype(np.float64)


def _mean_over_rows(p: np.ndarray, values: np.ndarray) -> float:
    sees = p.sum(axis=1) != 0  # True for NaN
    return float(values[sees].mean()) if sees.any() else float("nan")


def _largest_sum(p: np.ndarray, sign: int) -> float:
    i, j = np.arange(p.shape[0])[:, None], np.arange(p.shape[1])
    shifts = (j - sign * i) + (p.shape[0] - 1 if sign == 1 else 0)
    sums = np.bincount(shifts.ravel(), weights=p.ravel())
    sees = (p.sum(axis=1) != 0).sum()
    return float(sums.max() / sees) if sees else float("nan")


def _finite(number: float) -> float | None:
    return round(number, 6) if np.isfinite(number) else None
