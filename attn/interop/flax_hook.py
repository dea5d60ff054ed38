"""The `attention_fn` of Flax's attention layers, computed by `attn.multi_head_attention`."""

import contextlib
import numbers

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from attn.functional import (
    Dropout,
    Unsupported,
    checks,
    masks,
    mods,
    multi_head_attention,
    multi_head_attention_weights,
)
from attn.interop import arrays

_AXES = "[batch... N T S]"


def flax_attention_fn(
    query: Float[ArrayLike, "... T N H"],
    key: Float[ArrayLike, "... S K H"],
    value: Float[ArrayLike, "... S K Hv"],
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    broadcast_dropout: bool = True,
    dropout_rng: Array | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype=None,
    precision=None,
    module=None,
    *,
    promote_dtype=None,
    is_causal: bool = False,
    force_fp32_for_softmax: bool = False,
    einsum_dot_general=None,
    qk_attn_weights_einsum=None,
    attn_weights_value_einsum=None,
    implementation: str = "auto",
) -> Float[Array, "... T N Hv"]:
    """Compute Flax's `dot_product_attention`: a drop-in for the `attention_fn` of Flax's attention layers.

        nnx.MultiHeadAttention(8, 64, attention_fn=flax_attention_fn, rngs=rngs)
        linen.MultiHeadDotProductAttention(8, attention_fn=partial(flax_attention_fn, implementation="fastest"))

    It takes every argument of the `dot_product_attention` of both NNX and Linen. Differences: a query without a visible
    key gets 0, and its weights are 0 (in Flax: the mean of the values); NaN in keys or values that no query may attend
    to has no effect; the softmax is always computed in float32 or wider; dropout draws different random bits.

    Args:
      query: `[batch... T N H]`, with any number of batch axes.
      key, value: `[batch... S K H]` and `[batch... S K Hv]`, where K divides N.
      bias: real numbers to add to the scaled scores; broadcasts to `[batch... N T S]`.
      mask: bools or numbers, not 0 = may attend; broadcasts to `[batch... N T S]`.
      broadcast_dropout: drop the same weights in all heads and examples.
      dropout_rng: JAX random key, needed if weights are dropped.
      dropout_rate: probability to drop a weight, a number in [0, 1).
      deterministic: no dropout.
      dtype: dtype of the computation and of the result; the promoted dtype of query, key and value unless given.
      precision: precision of the matrix products: a string, `jax.lax.Precision` or `jax.lax.DotAlgorithmPreset`.
      module: a Flax module; the weights `[batch... N T S]` before dropout, in `dtype`, are sown into its intermediates
        as `attention_weights`.
      promote_dtype: function of ((query, key, value), dtype=) that converts them to the same dtype.
      is_causal: mask by j <= i. Query 0 is at the position of key 0, also where T != S.
      force_fp32_for_softmax: return, and sow, float32 where `dtype` is narrower.
      einsum_dot_general, qk_attn_weights_einsum, attn_weights_value_einsum: must be None.
      implementation: as for `attn.multi_head_attention`; not an argument of Flax's function.

    Returns:
      `[batch... T N Hv]`.

    Raises:
      TypeError: an argument that is not an array, or has the wrong dtype.
      ValueError: shapes that do not fit together, a rate outside [0, 1), dropout without a key.
      attn.Unsupported: a custom einsum, or a precision that differs between operands.

    Source: `flax.nnx.dot_product_attention`, `flax.linen.dot_product_attention`; Vaswani et al. 2017, section 3.2.
    """
    _check_no_einsums(einsum_dot_general, qk_attn_weights_einsum, attn_weights_value_einsum)
    query, key, value = _promote(query, key, value, dtype, promote_dtype)
    dtype, batch, (T, N, _), S = query.dtype, query.shape[:-3], query.shape[-3:], key.shape[-3]
    if arrays.as_flag("force_fp32_for_softmax", force_fp32_for_softmax):
        dtype = jnp.promote_types(dtype, jnp.float32)
    bias, mask = arrays.as_bias(bias, _AXES, (*batch, N, T, S)), _as_mask(mask, (*batch, N, T, S))
    causal = masks.causal(offset=0) if arrays.as_flag("is_causal", is_causal) else None
    keys, dropout = _dropout(batch, broadcast_dropout, dropout_rng, dropout_rate, deterministic)

    def mods_of(bias, mask):
        return {"mask": arrays.all_of(causal, arrays.mask_from(mask, T, S)), "score": arrays.score_from(bias, T, S)}

    def one_example(query, key, value, bias, mask, rng):
        options = {"dropout": rng if rng is None else dropout(dropout_rate, rng), "implementation": implementation}
        return multi_head_attention(query, key, value, **mods_of(bias, mask), **options)

    def weights_of_one(query, key, bias, mask):
        return multi_head_attention_weights(query, key, **mods_of(bias, mask))

    with _matmul_precision(precision):
        out = arrays.over_batch(one_example, batch, query, key, value.astype(dtype), bias, mask, keys)
        if module is not None:
            weights = arrays.over_batch(weights_of_one, batch, query, key, bias, mask)
            module.sow("intermediates", "attention_weights", weights.astype(dtype))
    return out


@mods.register
class BroadcastDropout(Dropout):
    """Dropout that drops the same weights in every head."""

    def for_head(self, head):
        return self


def _check_no_einsums(*einsums):
    for name, value in zip(("einsum_dot_general", "qk_attn_weights_einsum", "attn_weights_value_einsum"), einsums):
        if value is not None:
            raise Unsupported(
                f"flax_attention_fn does not support {name}, got {checks.describe(value)}: the matrix products are "
                "those of attn's implementations; use Flax's dot_product_attention for custom ones"
            )


def _promote(query, key, value, dtype, promote_dtype) -> tuple[Array, Array, Array]:
    """Convert query, key and value to the same dtype, and check their batch axes."""
    named = {"query": query, "key": key, "value": value}
    promoted = tuple(arrays.as_array(name, array) for name, array in named.items())
    if promote_dtype is not None:
        promoted = promote_dtype(promoted, dtype=dtype)
    else:
        dtype = jnp.result_type(*promoted) if dtype is None else dtype
        promoted = tuple(array.astype(dtype) for array in promoted)
    for name, array in zip(named, promoted, strict=True):
        if array.ndim < 3:
            raise ValueError(f"{name} must have shape [batch... length heads width], got {array.shape}")
        arrays.check_lengths(name, array, "[batch... length heads width]", batch=array.ndim - 3)
    if len({array.shape[:-3] for array in promoted}) > 1:
        shapes = ", ".join(str(array.shape) for array in promoted)
        raise ValueError(f"query, key and value must agree on their batch axes, got {shapes}")
    return promoted


def _as_mask(mask, shape) -> Array | None:
    """Convert a mask of Flax, often of floats, to bools: nonzero = may attend."""
    return None if mask is None else arrays.fit("mask", arrays.as_array("mask", mask).astype(bool), _AXES, shape)


def _dropout(batch, broadcast, rng, rate, deterministic) -> tuple[Array | None, type[Dropout]]:
    """Return the random keys `[batch...]`, with axes of 1 if examples share one, or None; and the class of dropout."""
    broadcast = arrays.as_flag("broadcast_dropout", broadcast)
    dropout_class = BroadcastDropout if broadcast else Dropout
    if not isinstance(rate, numbers.Real):
        raise TypeError(f"dropout_rate must be a Python number, got {checks.describe(rate)}")
    if not 0 <= rate < 1:
        raise ValueError(f"dropout_rate must lie in [0, 1), got {rate}")
    if arrays.as_flag("deterministic", deterministic) or rate == 0:
        return None, dropout_class
    if rng is None:
        raise ValueError(f"dropout_rng must be a random key where the dropout_rate is {rate}, got None")
    return (jnp.expand_dims(rng, range(len(batch))) if broadcast else jax.random.split(rng, batch)), dropout_class


def _matmul_precision(precision):
    """Return a context manager in which matrix products have this precision.

    Raises:
      ValueError: a precision that JAX does not know.
      attn.Unsupported: one precision per operand, or an algorithm without a name.
    """
    if precision is None:
        return contextlib.nullcontext()
    if isinstance(precision, (tuple, list)):
        raise Unsupported(f"precision must be a single named value for both operands, got {precision!r}")
    try:
        name = jax.lax.Precision(precision).name.lower()  # of its many names, the one that the context accepts
    except ValueError:
        name = getattr(precision, "name", precision)  # a preset, or its name
    try:
        return jax.default_matmul_precision(name)
    except ValueError as error:
        raise ValueError(
            "precision must be a jax.lax.Precision, a jax.lax.DotAlgorithmPreset other than DEFAULT, or the name of "
            f"one, got {precision!r}"
        ) from error
