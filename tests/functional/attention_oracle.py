"""Attention of one head in NumPy, float64 or wider, row by row, and its gradient derived by hand: the tests' truth.

With s = score(scale q.k), p = softmax(s) over the visible keys, w = keep p:

    out = w v                       dv = w^T g
    logsumexp = log sum exp(s)      ds = p (dp - p.dp) + p gl     with dp = keep (g v^T)
                                    dq = scale (ds score') k,  dk = scale (ds score')^T q
"""

import dataclasses
from collections.abc import Callable

import numpy as np

# 80 bits where the processor has them, so that the oracle's own rounding does not count against float64.
WIDE = np.longdouble


def identity(s, i, j):
    """No score: (s, ds/ds, the derivative evaluated on absolute values)."""
    return s, np.ones_like(s), np.ones_like(s)


@dataclasses.dataclass
class Head:
    """One call: wide arrays; `keep` holds 0 or 1 / (1 - rate); `score(s, i, j)` returns as `identity`."""

    query: np.ndarray
    key: np.ndarray
    value: np.ndarray
    visible: np.ndarray | None = None
    score: Callable = identity
    scale: float | None = None
    keep: np.ndarray | None = None

    def __post_init__(self):
        self.query, self.key, self.value = (np.asarray(x).astype(WIDE) for x in (self.query, self.key, self.value))
        shape = len(self.query), len(self.key)
        self.visible = np.ones(shape, bool) if self.visible is None else np.broadcast_to(self.visible, shape)
        self.scale = WIDE(self.query.shape[1]) ** WIDE(-0.5) if self.scale is None else WIDE(self.scale)
        self.keep = np.ones(shape) if self.keep is None else self.keep


@dataclasses.dataclass
class Row:
    """The keys that one query sees: their positions, their weights, the score's derivative, the logsumexp."""

    keys: np.ndarray
    weights: np.ndarray
    slope: np.ndarray
    absolute_slope: np.ndarray
    logsumexp: float
    largest: float


def row(head: Head, i: int) -> Row:
    """Softmax over the keys that query i may attend to."""
    keys = np.flatnonzero(head.visible[i])
    raw = np.array([head.scale * np.dot(head.query[i], head.key[j]) for j in keys], WIDE)
    s, slope, absolute_slope = (np.asarray(x, WIDE) for x in head.score(raw, np.full(len(keys), i), keys))
    seen = s > -np.inf
    keys, raw, s, slope, absolute_slope = keys[seen], raw[seen], s[seen], slope[seen], absolute_slope[seen]
    if not len(keys):
        return Row(keys, s, slope, absolute_slope, -np.inf, 0.0)
    e = np.exp(s - s.max())
    largest = max(np.abs(s).max(), np.abs(raw).max())
    return Row(keys, e / e.sum(), slope, absolute_slope, s.max() + np.log(e.sum()), largest)


def weights(head: Head) -> np.ndarray:
    """softmax(s), [T S], before dropout."""
    result = np.zeros(head.visible.shape, WIDE)
    for i in range(len(result)):
        found = row(head, i)
        result[i, found.keys] = found.weights
    return result


def forward(head: Head, *, absolute: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """(out [T Hv], logsumexp [T]); `absolute` takes the absolute value of every term."""
    value = np.abs(head.value) if absolute else head.value
    out, logsumexp = np.zeros((len(head.query), value.shape[1]), WIDE), np.zeros(len(head.query), WIDE)
    for i in range(len(out)):
        found = row(head, i)
        out[i] = (head.keep[i, found.keys] * found.weights) @ value[found.keys]
        logsumexp[i] = np.abs(found.logsumexp) if absolute and len(found.keys) else found.logsumexp
    return out, logsumexp


def backward(head: Head, g, gl, *, absolute: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(dq, dk, dv) for the cotangents g [T Hv] of out and gl [T] of logsumexp."""
    signed = np.abs if absolute else np.asarray
    q, k, v, g, gl = (signed(x) for x in (head.query, head.key, head.value, g, gl))
    dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    for i in range(len(q)):
        found = row(head, i)
        p, keys, keep = found.weights, found.keys, head.keep[i, found.keys]
        dp = keep * (v[keys] @ g[i])
        mean = p @ dp
        ds = p * (dp + mean if absolute else dp - mean) + p * gl[i]
        ds = ds * signed(head.scale) * (found.absolute_slope if absolute else found.slope)
        dq[i] = ds @ k[keys]
        dk[keys] += np.outer(ds, q[i])
        dv[keys] += np.outer(keep * p, g[i])
    return dq, dk, dv


def largest_score(head: Head) -> float:
    """max |s| over what is visible, before and after the score function."""
    return max(row(head, i).largest for i in range(len(head.query)))


def error(got, expected, magnitude: float, head: Head, dtype) -> float:
    """The C in |got - expected| = C eps (1 + max|s|) magnitude, eps the unit roundoff of `dtype`."""
    import ml_dtypes

    info = ml_dtypes.finfo(dtype)
    got = np.asarray(got).astype(WIDE)
    assert got.shape == expected.shape
    finite = np.isfinite(expected)
    assert np.array_equal(np.where(finite, 0, got), np.where(finite, 0, expected)), "not finite in other places"
    largest = np.max(np.abs(np.where(finite, got - np.where(finite, expected, 0), 0)), initial=0.0)
    magnitude = max(float(magnitude), float(info.smallest_normal))
    return float(largest / magnitude / (float(info.eps) / 2) / (1 + largest_score(head)))


def finite_differences(objective: Callable, arrays: list, index: int, step: float = 1e-6) -> np.ndarray:
    """The gradient of a number `objective(*arrays)` to one of the arrays, by central differences."""
    result = np.zeros(np.shape(arrays[index]))
    for place in np.ndindex(result.shape):
        sides = []
        for sign in (1, -1):
            moved = np.array(arrays[index])
            moved[place] += sign * step
            sides.append(objective(*arrays[:index], moved, *arrays[index + 1 :]))
        result[place] = (sides[0] - sides[1]) / (2 * step)
    return result
