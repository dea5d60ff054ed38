"""The arrays of a tree by their path, such as `params.encoder.0.attention.W_Q`, with a digest for each."""

import hashlib
from typing import Any

import jax
import numpy as np


def leaves_by_name(tree) -> dict[str, Any]:
    """Return the leaves of a tree by their path; the order is that of `jax.tree.leaves`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def array_digest(name: str, array: np.ndarray) -> str:
    """Return the SHA-256 of an array's name, dtype, shape and values. With the name in it, swapped arrays differ."""
    digest = hashlib.sha256(f"{name} {describe(array)}\n".encode())
    digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def describe(leaf) -> str:
    """Return the dtype and the shape of an array as text; "missing" for None."""
    return "missing" if leaf is None else f"{np.dtype(leaf.dtype)}{list(leaf.shape)}"
