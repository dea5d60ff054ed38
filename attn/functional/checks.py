"""Checks of arguments: each error names the argument, the value given and the values allowed."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Num

from attn.functional import dtypes
from attn.functional.dtypes import is_array


def describe(value) -> str:
    """Describe a mask, a score or one of their fields in a few words."""
    if hasattr(value, "expression"):
        return value.expression()
    if not is_array(value):
        return getattr(value, "__name__", None) or str(value)
    known = not isinstance(value, jax.core.Tracer) and not getattr(value, "is_deleted", bool)()
    if value.shape == () and known:
        return str(value)
    return f"{value.dtype}{list(value.shape)}"


def check_arrays(*arguments: tuple[str, object]) -> list[Array]:
    """Check query, key and optionally value, each with the axes of its shape, such as ("T H", query).

    Raises:
      TypeError: an argument that is not an array of real floats of 16 bits or more; query and key of different dtypes.
      ValueError: a wrong rank, an axis of length 0, sizes that do not agree.
    """
    named = dict(zip(("query", "key", "value"), arguments))
    for name, (axes, array) in named.items():
        _check_one_array(name, axes, array)
    query, key, *value = arrays = [jnp.asarray(array) for _, array in arguments]
    if query.dtype != key.dtype:
        raise TypeError(f"query and key must have the same dtype, got {query.dtype} and {key.dtype}")
    if query.shape[-1] != key.shape[-1]:
        raise ValueError(f"query and key must agree on the width H, got {query.shape} and {key.shape}")
    for v in value:
        if key.shape[:-1] != v.shape[:-1]:
            axes = " and ".join(named["key"][0].split()[:-1])
            raise ValueError(f"key and value must agree on {axes}, got {key.shape} and {v.shape}")
    if query.ndim == 3 and query.shape[1] % key.shape[1]:
        raise ValueError(
            f"the N = {query.shape[1]} query heads must be a multiple of the K = {key.shape[1]} key/value heads"
        )
    return arrays


def _check_one_array(name: str, axes: str, array):
    if not is_array(array):
        raise TypeError(f"{name} must be an array of shape [{axes}], got {type(array).__name__}")
    if len(array.shape) != len(axes.split()):
        hint = "; use jax.vmap for further axes" if len(array.shape) > len(axes.split()) else ""
        raise ValueError(f"{name} must have shape [{axes}], got {tuple(array.shape)}{hint}")
    if 0 in array.shape:
        raise ValueError(f"{name} must have shape [{axes}] with no axis of length 0, got {tuple(array.shape)}")
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"{name} must be a real floating-point array, got {array.dtype}")
    if array.dtype.itemsize < 2:
        raise TypeError(f"{name} must have floats of 16 bits or more, got {array.dtype}: convert it first")


def check_scale(scale, width: int) -> float | Num[Array, ""]:
    """Check the scale of the products q . k and return it; 1 / sqrt(width) unless given.

    Raises:
      TypeError: not a real scalar.
    """
    if scale is None:
        return width**-0.5
    check_real("scale", scale)
    if jnp.shape(scale) != ():
        raise TypeError(f"scale must be a scalar, got shape {jnp.shape(scale)}; for more than one number use score=")
    scale = dtypes.as_real(scale)
    return scale if isinstance(scale, (int, float)) else dtypes.widened(jnp.asarray(scale))


def check_rows(rows, T: int) -> Int[Array, "R"]:
    """Check the query positions whose weights are computed and return them; all T unless given.

    Raises:
      TypeError: rows that are not integers.
      ValueError: wrong rank, no rows, or rows outside 0..T-1 if they are not traced.
    """
    if rows is None:
        return jnp.arange(T, dtype=jnp.int32)
    rows = rows if is_array(rows) else jnp.asarray(rows)
    if not jnp.issubdtype(rows.dtype, jnp.integer):
        raise TypeError(f"rows must be integers, got {rows.dtype}")
    if len(rows.shape) != 1 or rows.shape[0] == 0:
        raise ValueError(f"rows must have shape [R] with R > 0, got {tuple(rows.shape)}")
    if not isinstance(rows, jax.core.Tracer):
        known = np.asarray(rows)  # in NumPy: under jit a comparison in JAX is traced even if its inputs are known
        if (known < 0).any() or (known >= T).any():
            raise ValueError(f"rows must lie in 0..{T - 1}, got {known}")
    return jnp.asarray(rows, jnp.int32)  # row + offset may overflow a narrow integer


def check_integer_or_none(name: str, value):
    """Check an offset: an integer, an integer array, or None.

    Raises:
      TypeError: anything else.
    """
    if value is not None:
        check_integer(name, value)


def check_integer(name: str, value):
    """Check a length, a width or positions.

    Raises:
      TypeError: neither an integer nor an integer array.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return
    if not (is_array(value) and jnp.issubdtype(value.dtype, jnp.integer)):
        raise TypeError(f"{name} must be an integer or an integer array, got {describe(value)}")


def check_real(name: str, value):
    """Check a real number or a real array.

    Raises:
      TypeError: anything else.
    """
    if is_array(value):
        is_real = jnp.issubdtype(value.dtype, jnp.floating) or jnp.issubdtype(value.dtype, jnp.integer)
    else:
        is_real = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_real:
        raise TypeError(f"{name} must be a real number, got {describe(value)}")


def check_array(name: str, value, kind):
    """Check that `value` is an array of dtype `kind` (a dtype or a family of them).

    Raises:
      TypeError: it is not.
    """
    if not is_array(value):
        raise TypeError(f"{name} must be an array of {kind.__name__}, got {value!r}")
    if not jnp.issubdtype(value.dtype, kind):
        raise TypeError(f"{name} must be an array of {kind.__name__}, got dtype {value.dtype}")


def check_shape(name: str, array, shape: tuple):
    """Check the shape of an array with axes of queries or keys.

    Raises:
      ValueError: the shape differs.
    """
    if tuple(array.shape) != shape:
        raise ValueError(f"{name} must have shape {shape} for these queries and keys, got {tuple(array.shape)}")


def check_scalar(name: str, value):
    """Check that an array is a scalar: `jax.vmap` and `per_head` have removed the axes of batch and heads.

    Raises:
      ValueError: the array is not a scalar.
    """
    if is_array(value) and value.shape != ():
        raise ValueError(
            f"{name} must be a scalar here, got shape {tuple(value.shape)}: "
            "use jax.vmap for one value per example, attn.per_head for one per head"
        )


def check_function(kind: str, signature: str, mod):
    """Check a user's function that is given as a mask or as a score.

    Raises:
      TypeError: an array, which must be wrapped in `dense`, or anything else that cannot be called with positions.
    """
    if is_array(mod):
        raise TypeError(
            f"a {kind} is a function {signature}, got an array of shape {tuple(mod.shape)}: "
            f"wrap it as attn.{kind}s.dense(array)"
        )
    if not callable(mod) or isinstance(mod, type):
        hint = f": call it, as in {mod.__name__}(...)" if isinstance(mod, type) else ""
        raise TypeError(f"a {kind} is a function {signature}, got {mod!r}{hint}")
