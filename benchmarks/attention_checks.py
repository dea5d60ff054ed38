"""Comparison of the contestants of attention.py with the formula in float64."""

import math
from collections.abc import Iterator

import numpy as np
from attention_contestants import build
from attention_job import Job, draw, error_line, say
from jax.sharding import Mesh

LARGEST_DIFFERENCE = {"float32": 5e-3, "float16": 0.03, "bfloat16": 0.2}  # wide enough for TF32


def checks(job: Job, mesh: Mesh | None) -> Iterator[dict]:
    """Compare every contestant's output and gradients with the formula in float64; yield one row per contestant."""
    arrays = draw(job, job.checked_length)
    for mask in job.masks:
        expected = by_formula(arrays, mask)
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


def by_formula(arrays: list[np.ndarray], mask: str) -> list[np.ndarray]:
    """Compute output and gradients to query, key and value by the formula in NumPy, head by head, in float64."""
    results = [np.empty(x.shape) for x in arrays]
    _, T, _, H = arrays[0].shape
    hidden = np.triu(np.full((T, T), -np.inf), 1) if mask == "causal" else 0.0
    for b, n in np.ndindex(arrays[0].shape[0], arrays[0].shape[2]):
        query, key, value, cotangent = (x[b, :, n].astype(np.float64) for x in arrays)
        s = query @ key.T / math.sqrt(H) + hidden
        p = np.exp(s - s.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        dp = cotangent @ value.T
        ds = p * (dp - (p * dp).sum(axis=1, keepdims=True)) / math.sqrt(H)
        for result, x in zip(results, (p @ value, ds @ key, ds.T @ query, p.T @ cotangent), strict=True):
            result[b, :, n] = x
    return results
