"""Dtypes: safe handling of integers of any size and dtype, and sums of 16-bit floats in 32 bits.

JAX silently wraps NumPy integers beyond 32 bits, and sums a gradient in the dtype of the array that it belongs to.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from jaxtyping import Integer as Integers

# Numbers, and arrays of them, of Python, NumPy or JAX.
Integer = int | np.integer | Integers[Array | np.ndarray, "..."]
Real = float | np.floating | Float[Array | np.ndarray, "..."] | Integer

FAR = 2**30  # larger than any position; the sum of two such integers still fits into 32 bits


def is_array(x) -> bool:
    """Return True if `x` is an array of JAX or NumPy (tracers and NumPy scalars included)."""
    return hasattr(x, "dtype") and hasattr(x, "shape")


def clamped(value):
    """Clamp an integer, or integers, to -2^30..2^30, so that no sum with positions exceeds 32 bits.

    No sequence is that long, so clamping does not change the effect of a length or an offset; the caller must treat a
    width of 2^30 as unlimited. Python integers stay Python integers, arrays become int32, and None stays None.
    """
    if isinstance(value, int):
        return max(-FAR, min(value, FAR))
    if isinstance(value, (np.ndarray, np.generic)):
        return np.asarray(np.clip(np.asarray(value, object), -FAR, FAR), np.int32)
    if isinstance(value, jax.Array):
        limits = jnp.iinfo(value.dtype)  # a narrow or unsigned dtype may not hold -FAR or FAR
        value = jnp.minimum(value, FAR) if limits.max > FAR else value
        value = jnp.maximum(value, -FAR) if limits.min < -FAR else value
        return value.astype(jnp.int32)
    return value


def as_real(value):
    """Convert integers beyond 32 bits to floats; return other real numbers unchanged.

    JAX would silently wrap NumPy integers and raise an overflow error for Python integers.
    """
    if isinstance(value, int):
        return value if -FAR <= value <= FAR else float(value)
    is_long = isinstance(value, (np.ndarray, np.generic)) and value.dtype.kind in "iu" and value.dtype.itemsize > 4
    return value.astype(np.float64) if is_long else value


def clamp_known(mod, *fields: str):
    """Clamp those fields of a new mod that are not arrays of JAX.

    Arrays of JAX are clamped where they are used, so that the mod keeps the caller's arrays.
    """
    for field in fields:
        if not isinstance(value := getattr(mod, field), jax.Array):
            object.__setattr__(mod, field, clamped(value))


def known(value) -> np.ndarray | None:
    """Convert a number or an array to NumPy if its values are known while tracing; return None if not."""
    if isinstance(value, (int, float, np.ndarray, np.generic)):
        return np.asarray(value)
    is_concrete = isinstance(value, jax.Array) and not isinstance(value, jax.core.Tracer)
    return np.asarray(value) if is_concrete and value.is_fully_addressable else None


def widened(tree):
    """Return the same tree with arrays of 16-bit floats as float32.

    The gradient of an array that is read many times is a sum; in 16 bits it would be rounded at each addition.
    """
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32) if is_half(x) else x, tree)


def wide_dtype(*dtypes) -> np.dtype:
    """Return the dtype to sum in: float64 if one of the dtypes is, else float32."""
    return np.dtype("float64" if any(dtype == np.float64 for dtype in dtypes) else "float32")


def is_half(x) -> bool:
    """Return True if `x` is an array of floats of 16 bits or fewer."""
    return is_array(x) and jnp.issubdtype(x.dtype, jnp.floating) and jnp.dtype(x.dtype).itemsize < 4


def in_32_bits(query_ids, key_ids) -> tuple:
    """Return the ids unchanged or, if NumPy ids do not fit into 32 bits, their ranks.

    Raises:
      ValueError: ids beyond 32 bits together with ids that are arrays of JAX.
    """
    both = query_ids, key_ids
    limits = np.iinfo(np.int32)
    in_numpy = [ids for ids in both if isinstance(ids, np.ndarray) and ids.size]
    if all(limits.min <= ids.min() and ids.max() <= limits.max for ids in in_numpy):
        return both
    if len(in_numpy) < 2:
        raise ValueError("segments: ids beyond 32 bits must be NumPy arrays, both query_ids and key_ids")
    # As objects: NumPy has no integer dtype for both int64 and uint64, and would convert them to floats.
    distinct = np.unique(np.concatenate([np.ravel(ids).astype(object) for ids in both]))
    return tuple(np.searchsorted(distinct, ids.astype(object)).astype(np.int32) for ids in both)


def comparable(query_ids, key_ids) -> tuple[Array, Array]:
    """Convert ids to the same dtype, also under strict dtype promotion, without changing which pairs are equal."""
    both = jnp.asarray(query_ids), jnp.asarray(key_ids)
    common = np.result_type(*(ids.dtype for ids in both))
    dtype = jax.dtypes.canonicalize_dtype(common)
    if dtype == common and dtype.kind in "iu":
        return tuple(ids.astype(dtype) for ids in both)
    # No dtype holds both signed and unsigned ids. An id outside the other dtype's range equals none of its ids: so
    # negative ids become -1 and ids that are too large -2.
    signed = jnp.dtype("int64" if jax.config.jax_enable_x64 else "int32")
    limit = jnp.iinfo(signed).max

    def narrowed(ids):
        if jnp.issubdtype(ids.dtype, jnp.signedinteger):
            return jnp.maximum(ids, -1).astype(signed)
        return jnp.where(ids > jnp.asarray(limit, ids.dtype), jnp.asarray(-2, signed), ids.astype(signed))

    return tuple(map(narrowed, both))
