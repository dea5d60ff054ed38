"""`jax.nn.dot_product_attention`, computed by `attn.multi_head_attention`."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from attn.functional import checks, dtypes, masks, multi_head_attention
from attn.interop import arrays

_AXES = {"query": "T N H", "key": "S K H", "value": "S K Hv"}


def dot_product_attention(
    query: Float[ArrayLike, "... T N H"],
    key: Float[ArrayLike, "... S K H"],
    value: Float[ArrayLike, "... S K Hv"],
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    scale: float | Array | None = None,
    is_causal: bool = False,
    query_seq_lengths: ArrayLike | Sequence[int] | None = None,
    key_value_seq_lengths: ArrayLike | Sequence[int] | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: str | None = None,
    return_residual: bool = False,
) -> Float[Array, "... T N Hv"] | tuple[Float[Array, "... T N Hv"], Float[Array, "... T N"]]:
    """Compute `jax.nn.dot_product_attention` by our implementations: a drop-in with the same arguments and results.

        out[b, i, n] = sum_j softmax_j(scale q[b, i, n] . k[b, j, n // (N/K)] + bias[b, n, i, j]) v[b, j, n // (N/K)]

    Differences: a query without a visible key gets 0 and the residual -inf (in JAX: the mean of the values); NaN in
    keys or values that no query may attend to, or in queries past their length, has no effect; float64 is computed in
    float64; values may be wider or narrower than keys; lengths may have any integer dtype.

    Args:
      query: `[B T N H]` or `[T N H]`.
      key, value: `[B S K H]` and `[B S K Hv]`, or without B, where K divides N; in the query's dtype.
      bias: real numbers to add to the scaled scores; broadcasts to `[B N T S]`.
      mask: bools, True = may attend; broadcasts to `[B N T S]`.
      scale: real scalar; 1 / sqrt(H) unless given.
      is_causal: mask by j <= i. Query 0 is at the position of key 0, also where T != S.
      query_seq_lengths: `[B]` integers (`[1]` without a batch axis). Queries past their length get 0 and residual -inf.
      key_value_seq_lengths: `[B]` integers. Keys past their length are masked.
      local_window_size: (left, right), or one number for both: -left <= j - i <= right.
      implementation: as for `attn.multi_head_attention` ("auto", "fastest", "reference", ...). None and "xla" mean
        "auto".
      return_residual: also return the logsumexp of the scores, without gradient.

    Returns:
      `[B T N Hv]` or `[T N Hv]`; with `return_residual` also `[B T N]` or `[T N]`; both in the query's dtype.

    Raises:
      TypeError: an argument that is not an array, or has the wrong dtype.
      ValueError: shapes that do not fit together, an unknown implementation.
      attn.Unsupported: the named implementation cannot serve the call.

    Source: `jax.nn.dot_product_attention`; Vaswani et al. 2017, section 3.2.
    """
    query = arrays.as_array("query", query)
    has_batch = query.ndim == 4
    query, key, value = _with_batch_axis(query, key, value)
    (B, T, N, _), S = query.shape, key.shape[1]
    bias, mask = arrays.as_bias(bias, "[B N T S]", (B, N, T, S)), _check_mask(mask, (B, N, T, S))
    lengths = {"query_seq_lengths": query_seq_lengths, "key_value_seq_lengths": key_value_seq_lengths}
    num_queries, num_keys = (_check_lengths(name, array, B) for name, array in lengths.items())
    positional = _positional_mask(is_causal, local_window_size)
    options = {
        "scale": scale,
        "implementation": "auto" if implementation in (None, "xla") else implementation,
        "return_logsumexp": arrays.as_flag("return_residual", return_residual),
    }

    def one_example(query, key, value, bias, mask, num_queries, num_keys):
        padding = None if num_keys is None else masks.padding(num_keys)
        query_padding = None if num_queries is None else arrays.query_padding(num_queries)
        mask = arrays.all_of(positional, padding, query_padding, arrays.mask_from(mask, T, S))
        return multi_head_attention(query, key, value, mask=mask, score=arrays.score_from(bias, T, S), **options)

    results = arrays.over_batch(one_example, (B,), query, key, value, bias, mask, num_queries, num_keys)
    results = results if has_batch else jax.tree.map(lambda x: x[0], results)
    if not return_residual:
        return results
    out, logsumexp = results
    return out, jax.lax.stop_gradient(logsumexp.astype(out.dtype))


def _with_batch_axis(query, key, value) -> list[Array]:
    """Return query, key and value as `[B ...]`, after the checks that `multi_head_attention` does not make."""
    converted = [arrays.as_array(name, array) for name, array in zip(_AXES, (query, key, value), strict=True)]
    for (name, axes), array in zip(_AXES.items(), converted, strict=True):
        if array.ndim not in (3, 4):
            raise ValueError(f"{name} must have shape [B {axes}] or [{axes}], got {array.shape}")
        arrays.check_lengths(name, array, f"[B {axes}] or [{axes}]", batch=array.ndim - 3)
        if array.dtype != converted[0].dtype:
            raise TypeError(f"{name} must have the query's dtype {converted[0].dtype}, got {array.dtype}")
    converted = [array if array.ndim == 4 else array[None] for array in converted]
    if len({len(array) for array in converted}) > 1:
        sizes = ", ".join(str(len(array)) for array in converted)
        raise ValueError(f"query, key and value must agree on the batch size B, got {sizes}")
    return converted


def _check_mask(mask, shape) -> Array | None:
    if mask is None:
        return None
    mask = arrays.as_array("mask", mask)
    if mask.dtype != jnp.bool_:
        raise TypeError(f"mask must be bool (True = may attend), got {mask.dtype}: additive values belong in bias")
    return arrays.fit("mask", mask, "[B N T S]", shape)


def _check_lengths(name, lengths, B: int) -> Array | None:
    if lengths is None:
        return None
    if not isinstance(lengths, jax.Array):  # JAX would wrap integers beyond 32 bits
        lengths = np.asarray(lengths)
        lengths = dtypes.clamped(lengths) if lengths.dtype.kind in "iu" else lengths
    lengths = arrays.as_array(name, lengths)
    if not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise TypeError(f"{name} must be integers, got {lengths.dtype}")
    if lengths.shape != (B,):
        raise ValueError(f"{name} must have shape [B] = ({B},), got {lengths.shape}")
    return lengths


def _positional_mask(is_causal, local_window_size) -> masks.Mask | None:
    causal = masks.causal(offset=0) if arrays.as_flag("is_causal", is_causal) else None
    if local_window_size is None:
        return causal
    is_pair = isinstance(local_window_size, (tuple, list))
    sizes = tuple(local_window_size) if is_pair else (local_window_size, local_window_size)
    for size in sizes:
        checks.check_integer("local_window_size", size)
    if len(sizes) != 2 or any(np.shape(size) for size in sizes):
        raise ValueError(f"local_window_size must be one integer or (left, right), got {local_window_size!r}")
    return arrays.all_of(causal, masks.sliding_window(*sizes, offset=0))
