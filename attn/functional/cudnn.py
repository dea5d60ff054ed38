"""cuDNN's fused attention kernel through `jax.nn.dot_product_attention`: half precision on NVIDIA GPUs, reverse mode.

It takes no functions of positions: a mask must be one of those that it has a name for. Two things that it does
differently are corrected around it: a query that may attend to nothing gets 0, and padding is never read.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from attn.functional import dtypes, masks
from attn.functional.contract import Call


def attend(call: Call) -> tuple[Float[Array, "T Hv"], None]:
    """Compute the equation of `reference.attend`, without the normaliser, of which the kernel has no derivative."""
    query, key, value = call.query, call.key, call.value
    options = _named(call.mask, call.T, call.S)
    length = options.pop("length", None)
    if length is not None:
        real = jnp.arange(len(key))[:, None] < length
        query = jnp.where(length > 0, query, 0)
        key, value = jnp.where(real, key, 0), jnp.where(real, value, 0)
        # The kernel wants at least one key; the output is set to 0 below where there is none.
        options["key_value_seq_lengths"] = jnp.clip(length, 1, len(key)).astype(jnp.int32)[None]
    arrays = (x[None, :, None, :] for x in (query, key, value))
    out = jax.nn.dot_product_attention(*arrays, scale=call.scale, implementation="cudnn", **options)[0, :, 0, :]
    return (out if length is None else jnp.where(length > 0, out, 0)), None


def unsupported_reason(call: Call) -> str | None:
    """Return what of a call keeps the kernel from serving it, in words, or None."""
    given = {str(x.dtype) for x in (call.query, call.key, call.value)}
    widths = {x.shape[-1] for x in (call.query, call.key, call.value)}
    if len(given) > 1 or not given <= {"float16", "bfloat16"}:
        return f"dtypes {', '.join(sorted(given))} (one of float16 and bfloat16)"
    if len(widths) > 1 or max(widths) % 8 or max(widths) > 128:
        return f"widths {', '.join(map(str, sorted(widths)))} (one multiple of 8 up to 128)"
    if call.scale is not None and not isinstance(call.scale, (int, float)):
        return "a scale that is an array (a Python number)"
    if _named(call.mask, call.T, call.S) is None:
        return f"mask {call.mask.expression()} (causal, padding, or a window without a right side, joined by &)"
    return None


def _same(left, right) -> bool:
    """Return whether two arguments are known to be equal."""
    return left is right or (_is_constant(left) and _is_constant(right) and np.array_equal(left, right))


def _is_constant(value) -> bool:
    """Return whether a value is known when the kernel is built: a number, not an array of JAX."""
    return not isinstance(value, jax.Array) and dtypes.known(value) is not None


def _named(mask: masks.Mask | None, T: int, S: int) -> dict | None:
    """Return the mask as arguments of the kernel (`length` for a padding); None where it has no name for it."""
    if mask is None:
        return {}
    if isinstance(mask, masks.both):
        left, right = _named(mask.left, T, S), _named(mask.right, T, S)
        if left is None or right is None or not all(_same(left[n], right[n]) for n in left.keys() & right.keys()):
            return None
        named = left | right
        # Queries far behind the padding would see nothing, and the kernel does not say what they get.
        return None if {"length", "local_window_size"} <= named.keys() else named
    if isinstance(mask, masks.padding):
        return {"length": mask.length}
    aligned = T == S and (getattr(mask, "offset", None) is None or _same(mask.offset, 0))
    if isinstance(mask, masks.causal) and aligned:
        return {"is_causal": True}
    if not isinstance(mask, masks.sliding_window) or not aligned or not _same(mask.right, 0):
        return None
    has_left = _is_constant(mask.left) and mask.left >= 0
    return {"is_causal": True, "local_window_size": (int(mask.left), 0)} if has_left else None
