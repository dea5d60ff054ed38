"""cuDNN's fused attention kernel through `jax.nn.dot_product_attention`: half precision on NVIDIA GPUs, reverse mode.

It takes no functions of positions: a mask must be one that the kernel has an argument for. Two differences are
corrected here: a query without a visible key gets 0, and padding is never read.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from attn.functional import dtypes, masks
from attn.functional.contract import Call


def attend(call: Call) -> tuple[Float[Array, "T Hv"], None]:
    """Compute the equation of `reference.attend`; no normaliser, since the kernel has no derivative for it."""
    query, key, value = call.query, call.key, call.value
    options = _kernel_options(call.mask, call.T, call.S)
    length = options.pop("length", None)
    if length is not None:
        is_real = jnp.arange(len(key))[:, None] < length  # [S 1]
        query = jnp.where(length > 0, query, 0)
        key, value = jnp.where(is_real, key, 0), jnp.where(is_real, value, 0)
        # The kernel needs at least one key; if there is none, the output is set to 0 below.
        options["key_value_seq_lengths"] = jnp.clip(length, 1, len(key)).astype(jnp.int32)[None]
    arrays = (x[None, :, None, :] for x in (query, key, value))  # [1 T 1 H], [1 S 1 H], [1 S 1 Hv]
    out = jax.nn.dot_product_attention(*arrays, scale=call.scale, implementation="cudnn", **options)[0, :, 0, :]
    return (out if length is None else jnp.where(length > 0, out, 0)), None


def unsupported_reason(call: Call) -> str | None:
    """Return the part of a call that the kernel cannot serve and, in parentheses, what it can; or None."""
    names = {str(x.dtype) for x in (call.query, call.key, call.value)}
    widths = {x.shape[-1] for x in (call.query, call.key, call.value)}
    if len(names) > 1 or not names <= {"float16", "bfloat16"}:
        return f"dtypes {', '.join(sorted(names))} (supported: all float16 or all bfloat16)"
    if len(widths) > 1 or max(widths) % 8 or max(widths) > 128:
        return f"widths {', '.join(map(str, sorted(widths)))} (supported: the same multiple of 8 up to 128)"
    if call.scale is not None and not isinstance(call.scale, (int, float)):
        return "a scale that is an array (supported: a Python number)"
    if _kernel_options(call.mask, call.T, call.S) is None:
        return f"mask {call.mask.expression()} (supported: causal, padding, a window without a right side, joined by &)"
    return None


def _same(left, right) -> bool:
    """Return True if two arguments are known to be equal."""
    return left is right or (_is_constant(left) and _is_constant(right) and np.array_equal(left, right))


def _is_constant(value) -> bool:
    """Return True if a value is known when the kernel is built: a number, not an array of JAX."""
    return not isinstance(value, jax.Array) and dtypes.known(value) is not None


def _kernel_options(mask: masks.Mask | None, T: int, S: int) -> dict | None:
    """Return the mask as arguments of the kernel, with `length` for padding; None if the kernel has none."""
    if mask is None:
        return {}
    if isinstance(mask, masks.both):
        left, right = _kernel_options(mask.left, T, S), _kernel_options(mask.right, T, S)
        if left is None or right is None or not all(_same(left[n], right[n]) for n in left.keys() & right.keys()):
            return None
        options = left | right
        # Queries far behind the real keys would see no key, and the kernel does not document their output.
        return None if {"length", "local_window_size"} <= options.keys() else options
    if isinstance(mask, masks.padding):
        return {"length": mask.length}
    aligned = T == S and (getattr(mask, "offset", None) is None or _same(mask.offset, 0))
    if isinstance(mask, masks.causal) and aligned:
        return {"is_causal": True}
    if not isinstance(mask, masks.sliding_window) or not aligned or not _same(mask.right, 0):
        return None
    has_left = _is_constant(mask.left) and mask.left >= 0
    return {"is_causal": True, "local_window_size": (int(mask.left), 0)} if has_left else None
