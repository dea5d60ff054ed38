"""Comparison of the contestants of attention.py with the formula in float64."""

import math
from collections.abc import Callable, Iterator

import numpy as np
from attention_contestants import build
from attention_job import Job, draw, error_line, say
from jax.sharding import Mesh

LARGEST_DIFFERENCE = {"float32": 5e-3, "float16": 0.03, "bfloat16": 0.2}  # wide enough for TF32


def checks(job: Job, mesh: Mesh | None) -> Iterator[dict]:
    """Compare every contestant's output and gradients with the formula in float64; yield one row per contestant."""
    arrays = draw(job, job.checked_length)
    for mask in job.masks:
        visible = np.tri(job.checked_length, dtype=bool) if mask == "causal" else None
        expected = by_formula(arrays, visible)
        for name in job.contestants:
            row = {"section": "checks", "setup": job.setup, "contestant": name, "T": job.checked_length, "mask": mask}
            try:
                program = build(name, job, arrays, mask, mesh)
                program.prepare()
                difference = max(float(np.abs(x - y).max()) for x, y in zip(program.results(), expected, strict=True))
            except Exception as error:
                say(f"warning: {job.setup}, {mask}: {name} is left out: {error_line(error)}")
                yield row | {"left_out": error_line(error)}
                continue
            row |= {"largest_difference": difference, "agrees": difference <= LARGEST_DIFFERENCE[job.dtype]}
            if not row["agrees"]:
                say(f"warning: {job.setup}, {mask}: {name} is off by {difference:.2g}: ignore its times")
            yield row


def by_formula(arrays: list[np.ndarray], visible: np.ndarray | None, score: Callable | None = None) -> list[np.ndarray]:
    """Compute output and gradients to query, key and value by the formula in NumPy, head by head, in float64.

    Args:
      arrays: query, key, value and the output's cotangent, `[B T N H]`.
      visible: `[T T]`, True where a query attends to a key; None for everywhere.
      score: `(s, n) -> (score, its derivative)` of the scaled products of head n, `[T T]`.
    """
    results = [np.empty(x.shape) for x in arrays]
    H = arrays[0].shape[-1]
    for b, n in np.ndindex(arrays[0].shape[0], arrays[0].shape[2]):
        query, key, value, cotangent = (x[b, :, n].astype(np.float64) for x in arrays)
        s, slope = query @ key.T / math.sqrt(H), 1.0
        if score is not None:
            s, slope = score(s, n)
        if visible is not None:
            s = np.where(visible, s, -np.inf)
        p = np.exp(s - s.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        dp = cotangent @ value.T
        ds = p * (dp - (p * dp).sum(axis=1, keepdims=True)) * slope / math.sqrt(H)
        for result, x in zip(results, (p @ value, ds @ key, ds.T @ query, p.T @ cotangent), strict=True):
            result[b, :, n] = x
    return results
