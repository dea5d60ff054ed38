"""Ring attention: a sequence over U devices, with keys and values that travel around while a part is computed.

Each device keeps its queries. In U steps it receives the keys and values of every device, computes attention to this
part of the keys, and combines the parts by their normalisers (see `blockwise`). The next keys are sent before a part is
computed, so that communication and computation overlap.

The derivative of a loop would keep the keys of all steps, O(T) per device. Here reverse mode is a second ring: from the
output and the normaliser over all keys, each part's share of the gradients is FlashAttention's backward pass, and the
gradients of keys and values travel along until they are back at their owner. Memory per device is O(T / U) both ways.

Source: Liu et al. 2023 (Ring Attention).
"""

from collections.abc import Callable

from jax import lax
from jaxtyping import Array, Float

from attn.functional import checks, dtypes, mods, ring_functions, scores, sharding, zigzag
from attn.functional.contract import Call, Normalizer
from attn.functional.derivatives import Forms, differentiable
from attn.functional.dropout import Dropout, check_dropout
from attn.functional.implementations import IMPLEMENTATIONS, Unsupported
from attn.functional.masks import as_mask
from attn.functional.ring_heads import Heads, turns_of
from attn.functional.ring_passes import Ring
from attn.functional.scores import as_score


def ring_attention(
    query: Float[Array, "T_local N H"],
    key: Float[Array, "S_local K H"],
    value: Float[Array, "S_local K Hv"],
    *,
    axis_name: str,
    mask=None,
    score=None,
    scale=None,
    dropout: Dropout | None = None,
    return_logsumexp: bool = False,
    order: str = "balanced",
    implementation: str = "blockwise",
) -> Float[Array, "T_local N Hv"] | tuple[Float[Array, "T_local N Hv"], Float[Array, "T_local N"]]:
    """Compute `multi_head_attention` of a sequence that is sharded over a mesh axis, inside `jax.shard_map`.

    The result on each device is its rows of `multi_head_attention` of the whole arrays, `[T N H]`, `[S K H]` and
    `[S K Hv]`. Mask, score and dropout are functions of positions in the whole sequences, 0..T-1 and 0..S-1, and the
    arrays that they read by position, such as the ids of `masks.segments`, are those of whole sequences.

    Args:
      query: `[T/U N H]`, this device's rows.
      key, value: `[S/U K H]` and `[S/U K Hv]`, this device's rows; K divides N.
      axis_name: the mesh axis, of U devices, over which the sequences are sharded.
      mask, score, scale, dropout, return_logsumexp: as for `multi_head_attention`. The same on all devices of the axis.
      order: the order of the rows on the devices.
        "balanced": consecutive, as of an array sharded by `PartitionSpec(axis_name)`. With a mask, rows are moved to
        zig-zag order before and back after, so that each device has the same work under a causal mask.
        "consecutive": the same without the moves. For masks that are the same work for each device, as windows are.
        "zigzag": the order of `zigzag.to_zigzag`. Saves the moves where a whole model works in this order.
      implementation: of the parts, "blockwise", or an implementation of the registry that attends parts: the fused
        kernels "pallas_tpu" and "pallas_gpu".

    Returns:
      `[T/U N Hv]` in the value's dtype, in the order of the queries; with `return_logsumexp` also `[T/U N]`.

    Raises:
      TypeError, ValueError: as `multi_head_attention`; ValueError also for an axis that is not manual here, an unknown
        order or implementation, and an odd number of rows in zig-zag order. An odd number of "balanced" rows is not
        moved.
      attn.Unsupported: a score made from vectors, since no device has all of them; or kernels on a backend that is
        not theirs, or with a function that they cannot evaluate.

    Source: Liu et al. 2023; causal balance: Llama Team 2024, section 3.3.2.
    """
    query, key, value = checks.check_arrays(("T/U N H", query), ("S/U K H", key), ("S/U K Hv", value))
    devices = _check_ring(axis_name, order, len(query), len(key))
    check_dropout(dropout)
    attend = _attend_of_parts(implementation)
    scale = checks.check_scale(scale, query.shape[-1])
    mask, score = as_mask(mask), dtypes.widened(as_score(score))
    if any(isinstance(part, scores.from_vectors) for part in mods.nested(score)):
        raise Unsupported(
            "ring attention does not support scores made from vectors, which need all queries and keys of the "
            "sequence; use a function of (s, i, j)"
        )
    T, S = len(query) * devices, len(key) * devices
    mask, score = (None if mod is None else mod.resolve(T, S) for mod in (mask, score))

    is_exchanged = order == "balanced" and mask is not None and len(query) % 2 == 0 and len(key) % 2 == 0
    rows = "zigzag" if is_exchanged or order == "zigzag" else "consecutive"
    call = Call(query, key, value, mask, score, scale, dropout)
    out, normalizer = _attend(call, axis_name, rows, is_exchanged, attend)
    return (out, normalizer.logsumexp()) if return_logsumexp else out


def _check_ring(axis_name, order: str, *lengths: int) -> int:
    """Check the axis, the order and the numbers of rows; return the number of devices.

    Raises:
      ValueError: the axis is not manual here, the order is unknown, or in zig-zag order a number of rows is odd.
    """
    try:
        devices = lax.axis_size(axis_name)
    except NameError:
        raise ValueError(
            f"axis_name must be a manual mesh axis: call ring_attention inside jax.shard_map over it, got {axis_name!r}"
        ) from None
    if order not in zigzag.ORDERS:
        raise ValueError(f"order must be one of {', '.join(map(repr, zigzag.ORDERS))}, got {order!r}")
    if order == "zigzag":
        for length in lengths:
            zigzag.check_even(length)
    return devices


def _attend_of_parts(implementation: str) -> Callable | None:
    """Return the function that attends parts by kernels; None for "blockwise".

    Raises:
      ValueError: another name.
      Unsupported: kernels on a backend that is not theirs.
    """
    kernels = {name: each for name, each in IMPLEMENTATIONS.items() if each.attends_parts}
    if implementation == "blockwise":
        return None
    if implementation not in kernels:
        known = ", ".join(map(repr, ("blockwise", *kernels)))
        raise ValueError(f"implementation of ring attention must be one of {known}, got {implementation!r}")
    chosen, backend = kernels[implementation], sharding.platform()
    if chosen.backends is not None and backend not in chosen.backends:
        raise Unsupported(f"implementation {implementation!r} does not support backend {backend!r}; use 'blockwise'")
    return chosen.attend


def _attend(
    call: Call, axis_name: str, rows: str, is_exchanged: bool, attend: Callable | None
) -> tuple[Float[Array, "n N Hv"], Normalizer]:
    """Compute output and normaliser of this device's queries, with every derivative.

    Args:
      call: of all heads, with this device's rows.
      axis_name: the mesh axis.
      rows: the order in which rows are computed, "consecutive" or "zigzag".
      is_exchanged: whether rows are moved from the consecutive order to that one, and the results back.
      attend: from `_attend_of_parts`.
    """
    devices, (n, N, _), (c, K, _) = lax.axis_size(axis_name), call.query.shape, call.key.shape
    T, S = n * devices, c * devices
    functions, floats, fixed = ring_functions.take_apart(call, T, S)
    inputs = [call.query, call.key, call.value, *dtypes.widened(floats)]
    # The gradient of an array that devices share is a sum over them: one message at the end, not one per part.
    inputs, _ = sharding.vary_alike((inputs, (fixed, lax.axis_index(axis_name))))
    ring = Ring(axis_name, devices, rows, T, S, N, K, functions.captured, functions.rebuild, attend)
    heads = Heads(ring, turns_of(K, c, call.key.shape[-1]), is_exchanged, functions)
    out, *normalizer = differentiable(Forms(heads.value, heads.like, heads.pullback))(inputs, fixed)
    return out, Normalizer(*normalizer)
