"""Conversion of other frameworks' arguments to ours: checked arrays, batch axes, masks and biases that broadcast.

An axis of length 1 in a mask or a bias applies to every example, head, query or key. It is never expanded, so that a
padding mask `[B 1 1 S]` does not become `[B N T S]`: `jax.vmap` does not map such axes of batch and heads, and those of
queries and keys are read at index 0 for every position.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from attn.functional import checks, dtypes, masks, mods, per_head, scores
from attn.functional.masks import Index, Mask
from attn.functional.scores import Score


def as_array(name: str, value) -> Array:
    """Convert a value to an array of JAX.

    Raises:
      TypeError: JAX cannot convert it.
    """
    try:
        return jnp.asarray(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be an array, got {type(value).__name__}") from error


def check_lengths(name: str, array: Array, axes: str, *, batch: int):
    """Check that no axis after the batch axes has length 0.

    Args:
      name: name of the argument.
      array: the argument.
      axes: its expected shape, in words.
      batch: number of batch axes.

    Raises:
      ValueError: an axis has length 0.
    """
    if 0 in array.shape[batch:]:
        raise ValueError(f"{name} must have shape {axes} with no axis of length 0, got {array.shape}")


def as_flag(name: str, value) -> bool:
    """Convert a switch to a bool; it must be known while tracing.

    Raises:
      TypeError: neither a bool nor an integer.
    """
    if not isinstance(value, (int, np.integer, np.bool_)):
        raise TypeError(f"{name} must be True or False, got {checks.describe(value)}")
    return bool(value)


def as_bias(value, axes: str, shape: tuple[int, ...]) -> Array | None:
    """Convert `bias`, which is added to the scaled scores, to an array that broadcasts to `shape`, or None.

    Raises:
      TypeError: not an array of real numbers; for bools the message names `mask`.
      ValueError: it does not broadcast to `shape`.
    """
    if value is None:
        return None
    bias = as_array("bias", dtypes.as_real(value))
    if bias.dtype == jnp.bool_:
        raise TypeError("bias must be real numbers to add to the scores, got bool: bools belong in mask")
    if not jnp.issubdtype(bias.dtype, jnp.floating) and not jnp.issubdtype(bias.dtype, jnp.integer):
        raise TypeError(f"bias must be real numbers to add to the scores, got {bias.dtype}")
    # Widen 16 bits too: the gradient of a bias that examples and heads share is a sum over them.
    bias = bias.astype(dtypes.wide_dtype(bias.dtype))
    return fit("bias", bias, axes, shape)


def fit(name: str, array: Array, axes: str, shape: tuple[int, ...]) -> Array:
    """Reshape an array to all axes of `shape`, each of the length in `shape` or of length 1.

    Raises:
      ValueError: it does not broadcast to `shape`.
    """
    missing = len(shape) - array.ndim
    full = (1,) * missing + array.shape
    if missing < 0 or any(n not in (1, expected) for n, expected in zip(full, shape, strict=True)):
        raise ValueError(f"{name} must broadcast to {axes} = {shape}, got shape {array.shape}")
    return array.reshape(full)


def over_batch(function: Callable, batch: tuple[int, ...], *arrays: Array | None):
    """Map `function(*arrays)` over the examples of a batch, with one `jax.vmap` per batch axis.

    Args:
      function: function of arrays without batch axes that returns arrays.
      batch: lengths of the leading axes.
      arrays: arrays whose leading axes have these lengths, or length 1 where examples share an entry; or None.
    """
    if not batch:
        return function(*arrays)
    length, *rest = batch
    if length == 1:  # no `vmap` over a single example
        result = over_batch(function, tuple(rest), *(None if x is None else x[0] for x in arrays))
        return jax.tree.map(lambda x: x[None], result)
    is_mapped = [x is not None and x.shape[0] == length for x in arrays]
    arrays = tuple(x if x is None or mapped else x[0] for x, mapped in zip(arrays, is_mapped, strict=True))
    axes = [0 if mapped else None for mapped in is_mapped]
    return jax.vmap(lambda *xs: over_batch(function, tuple(rest), *xs), in_axes=axes)(*arrays)


def mask_from(array: Bool[Array, "N_or_1 T_or_1 S_or_1"] | None, T: int, S: int) -> Mask | None:
    """Return the mask of an array of one example, True = may attend."""
    return None if array is None else _by_head(masks.dense if array.shape[1:] == (T, S) else spread_mask, array)


def score_from(array: Float[Array, "N_or_1 T_or_1 S_or_1"] | None, T: int, S: int) -> Score | None:
    """Return the score that adds an array of one example."""
    return None if array is None else _by_head(scores.dense if array.shape[1:] == (T, S) else spread_bias, array)


def _by_head(mod, array):
    """Build a mask or a score from `[N_or_1 ...]`: shared by all heads, or marked by `per_head`."""
    return mod(array[0]) if array.shape[0] == 1 else per_head(mod(array))


def all_of(*optional: Mask | None) -> Mask | None:
    """Combine masks by `&`, leaving out None; None if no mask is left."""
    present = [mask for mask in optional if mask is not None]
    return functools.reduce(operator.and_, present) if present else None


@mods.register
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class spread_mask(Mask):
    """Allows pairs by an array; an axis of length 1 applies to every position.

    Args:
      array: `[T S]`, `[1 S]`, `[T 1]` or `[1 1]` bools.
    """

    array: Bool[Array, "*heads T_or_1 S_or_1"]

    def __call__(self, i: Index, j: Index):
        return _lookup(self.array, i, j)

    def bounds(self, rows, columns):
        return tuple(masks.over_blocks(reduce, self.array, rows, columns) for reduce in (jnp.any, jnp.all))


@mods.register
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class spread_bias(Score):
    """Adds an array; an axis of length 1 applies to every position.

    Args:
      bias: `[T S]`, `[1 S]`, `[T 1]` or `[1 1]` floats.
    """

    bias: Float[Array, "*heads T_or_1 S_or_1"]

    def __call__(self, s: Array, i: Index, j: Index):
        return s + _lookup(self.bias, i, j)


def _lookup(array, i, j):
    T, S = array.shape
    return array[i if T > 1 else 0, j if S > 1 else 0]


@mods.register
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class query_padding(Mask):
    """Allows the first `length` queries all keys; the others are padding and attend to nothing: i < length.

    Args:
      length: number of real queries; integer, may be traced.
    """

    length: dtypes.Integer

    def __call__(self, i: Index, j: Index):
        return i < dtypes.clamped(self.length)

    def bounds(self, rows, columns):
        return self(rows[:, :1], 0), self(rows[:, -1:], 0)
