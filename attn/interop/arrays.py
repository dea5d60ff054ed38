"""Arguments of other frameworks in our terms: arrays checked by name, batch axes, masks and biases that broadcast.

An axis of length 1 in a mask or a bias stands for every example, head, query or key. It stays that long: those of
batch and heads are kept out of `jax.vmap`, those of queries and keys are read at 0 whatever the position, so that a
padding mask `[B 1 1 S]` never becomes `[B N T S]`.
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
    """Take what JAX takes for an array.

    Raises:
      TypeError: JAX does not.
    """
    try:
        return jnp.asarray(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be an array, got {type(value).__name__}") from error


def check_lengths(name: str, array: Array, axes: str, *, batch: int):
    """Check that no axis behind the batch axes has length 0.

    Args:
      name: of the argument.
      array: as it was given.
      axes: of its shape, in words.
      batch: number of batch axes.

    Raises:
      ValueError: one has.
    """
    if 0 in array.shape[batch:]:
        raise ValueError(f"{name} must have shape {axes} with no axis of length 0, got {array.shape}")


def as_flag(name: str, value) -> bool:
    """Take a switch, which must be known while tracing.

    Raises:
      TypeError: neither a bool nor an integer.
    """
    if not isinstance(value, (int, np.integer, np.bool_)):
        raise TypeError(f"{name} must be True or False, got {checks.describe(value)}")
    return bool(value)


def as_bias(value, axes: str, shape: tuple[int, ...]) -> Array | None:
    """Take `bias`, which is added to the scaled scores and broadcasts to `shape`.

    Raises:
      TypeError: not an array of real numbers; bools are pointed to `mask`.
      ValueError: it does not broadcast to `shape`.
    """
    if value is None:
        return None
    bias = as_array("bias", dtypes.as_real(value))
    if bias.dtype == jnp.bool_:
        raise TypeError("bias must be real numbers to add to the scores, got bool: bools belong in mask")
    if not jnp.issubdtype(bias.dtype, jnp.floating) and not jnp.issubdtype(bias.dtype, jnp.integer):
        raise TypeError(f"bias must be real numbers to add to the scores, got {bias.dtype}")
    # Also of 16 bits: the gradient of what examples and heads share is a sum over them.
    bias = bias.astype(dtypes.wide_dtype(bias.dtype))
    return fit("bias", bias, axes, shape)


def fit(name: str, array: Array, axes: str, shape: tuple[int, ...]) -> Array:
    """The array with all the axes of `shape`, each of its length there or of length 1.

    Raises:
      ValueError: it does not broadcast to `shape`.
    """
    missing = len(shape) - array.ndim
    full = (1,) * missing + array.shape
    if missing < 0 or any(n not in (1, wanted) for n, wanted in zip(full, shape, strict=True)):
        raise ValueError(f"{name} must broadcast to {axes} = {shape}, got shape {array.shape}")
    return array.reshape(full)


def over_batch(function: Callable, batch: tuple[int, ...], *arrays: Array | None):
    """`function(*arrays)` for every example of a batch, by one `jax.vmap` for each of its axes.

    Args:
      function: of arrays without batch axes, returning arrays.
      batch: lengths of the leading axes.
      arrays: whose leading axes have these lengths, or length 1 where the examples share one; or None.
    """
    if not batch:
        return function(*arrays)
    length, *rest = batch
    if length == 1:
        result = over_batch(function, tuple(rest), *(None if x is None else x[0] for x in arrays))
        return jax.tree.map(lambda x: x[None], result)
    own = [x is not None and x.shape[0] == length for x in arrays]
    arrays = tuple(x if x is None or is_own else x[0] for x, is_own in zip(arrays, own, strict=True))
    axes = [0 if is_own else None for is_own in own]
    return jax.vmap(lambda *xs: over_batch(function, tuple(rest), *xs), in_axes=axes)(*arrays)


def mask_from(array: Bool[Array, "N_or_1 T_or_1 S_or_1"] | None, T: int, S: int) -> Mask | None:
    """The mask that an array of one example holds, True = may attend."""
    return None if array is None else _by_head(masks.dense if array.shape[1:] == (T, S) else spread_mask, array)


def score_from(array: Float[Array, "N_or_1 T_or_1 S_or_1"] | None, T: int, S: int) -> Score | None:
    """The score that adds an array of one example."""
    return None if array is None else _by_head(scores.dense if array.shape[1:] == (T, S) else spread_bias, array)


def _by_head(mod, array):
    return mod(array[0]) if array.shape[0] == 1 else per_head(mod(array))


def all_of(*given: Mask | None) -> Mask | None:
    """Return the mask that allows what every given mask allows; None if there is none."""
    present = [mask for mask in given if mask is not None]
    return functools.reduce(operator.and_, present) if present else None


@mods.register
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class spread_mask(Mask):
    """A given array, of which an axis of length 1 holds for every position.

    Args:
      array: `[T S]`, `[1 S]`, `[T 1]` or `[1 1]` bools.
    """

    array: Bool[Array, "*heads T_or_1 S_or_1"]

    def __call__(self, i: Index, j: Index):
        return _at(self.array, i, j)

    def bounds(self, rows, columns):
        return tuple(masks.over_blocks(reduce, self.array, rows, columns) for reduce in (jnp.any, jnp.all))


@mods.register
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class spread_bias(Score):
    """A given array to add, of which an axis of length 1 holds for every position.

    Args:
      bias: `[T S]`, `[1 S]`, `[T 1]` or `[1 1]` floats.
    """

    bias: Float[Array, "*heads T_or_1 S_or_1"]

    def __call__(self, s: Array, i: Index, j: Index):
        return s + _at(self.bias, i, j)


def _at(array, i, j):
    T, S = array.shape
    return array[i if T > 1 else 0, j if S > 1 else 0]


@mods.register
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class query_padding(Mask):
    """Only the first `length` queries are real: i < length. The others attend to nothing.

    Args:
      length: number of real queries; integer, may be traced.
    """

    length: dtypes.Integer

    def __call__(self, i: Index, j: Index):
        return i < dtypes.clamped(self.length)

    def bounds(self, rows, columns):
        return self(rows[:, :1], 0), self(rows[:, -1:], 0)
