"""Attention weights in any form, as NumPy arrays `[N T S]` per layer: JAX, torch, NumPy, lists, results of `generate`.

Neither torch nor another library is imported: their arrays are recognised by what they can do.
"""

from collections.abc import Sequence

import jax
import numpy as np

# Masked cells are NaN with these bits, so that one float32 array tells masked, NaN and 0 apart.
MASKED = np.uint32(0x7FC0DEAD).view(np.float32)

FORMS = "[T S], [N T S], [L N T S], or a list of layers [N T S] or [1 N T S]"
NO_WEIGHTS = (
    'fused attention returns no weights: in transformers, load the model with attn_implementation="eager" and call it '
    "with output_attentions=True"
)


def is_masked(x: np.ndarray) -> np.ndarray:
    """Return a bool per cell of a float32 array: True where it is masked."""
    return x.view(np.uint32) == 0x7FC0DEAD


def as_layers(weights, batch: int | None, name: str) -> list[np.ndarray]:
    """Return the weights of each layer, float32 `[N T S]`, masked cells as `MASKED`.

    Args:
      weights: an array `[T S]`, `[N T S]` or `[L N T S]`, with a further axis B if `batch` is given, before N, or
        before T if there is no N; a list of layers `[T S]`, `[N T S]`, `[B N T S]`, or of lists of heads `[T S]`; or a
        tuple of steps of tuples of layers `[B N t s]`, as `generate` of the library transformers returns it.
      batch: number of the example in a batch.
      name: of the kind, for messages.

    Raises:
      TypeError: not an array of real numbers, a tracer, or None in place of a layer.
      ValueError: another number of axes, an empty axis, a batch without `batch`, or a deleted array.
    """
    if not _is_sequence(weights):
        return _layers_of_array(as_array(weights, name), batch, name)
    if not weights or all(_is_sequence(each) and not each for each in weights):
        raise ValueError(f"{name}: got no layers, must be {FORMS}")
    if _holds_numbers(weights):
        return _layers_of_array(as_array(_nested(weights, name), name), batch, name)
    if all(_is_sequence(each) for each in weights):
        if all(np.ndim(each) == 4 for step in weights for each in step if each is not None):
            return _layers_of_steps(weights, batch, name)
        weights = [_stacked_heads(heads, f"{name}, layer {number}") for number, heads in enumerate(weights)]
    return [_layer(each, batch, f"{name}, layer {number}") for number, each in enumerate(weights)]


def as_array(x, name: str) -> np.ndarray:
    """Return an array of any library as float32, masked cells as `MASKED`.

    Raises:
      TypeError, ValueError: see `as_layers`.
    """
    if x is None:
        raise TypeError(f"{name}: got None; {NO_WEIGHTS}")
    if isinstance(x, jax.core.Tracer):
        raise TypeError(f"{name}: got a tracer of JAX: call attn.view outside of jax.jit, with the result")
    if getattr(x, "is_deleted", bool)():
        raise ValueError(f"{name}: the array's memory was deleted or donated; view it before, or keep a copy")
    if not getattr(x, "is_fully_addressable", True):
        raise ValueError(f"{name}: parts of the array are on other processes; gather it first")
    if hasattr(x, "detach"):  # torch: also of a graph, or on a GPU
        x = x.detach().cpu()
        x = (x.to_dense() if getattr(x, "is_sparse", False) else x).double().numpy()
    try:
        mask = np.ma.getmaskarray(x) if isinstance(x, np.ma.MaskedArray) else None
        array = np.ma.getdata(x) if mask is not None else np.asarray(x)
        if array.dtype.kind in "OSUcMmV" and array.dtype.name not in _EXTENDED:
            raise TypeError
        with np.errstate(over="ignore"):
            array = np.array(array, np.float32, order="C")  # a copy: later changes of `x` are not seen
    except (TypeError, ValueError):
        kind = getattr(x, "dtype", type(x).__name__)
        raise TypeError(f"{name}: got {kind}, must be an array of real numbers: {FORMS}") from None
    if mask is not None:
        array[mask] = MASKED
    return array


# Dtypes of ml_dtypes are of NumPy's kind "V".
_EXTENDED = ("bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3", "float8_e3m4", "float8_e8m0fnu")


def _is_sequence(x) -> bool:
    return isinstance(x, Sequence) and not isinstance(x, str | bytes) and not hasattr(x, "__array__")


def _holds_numbers(x) -> bool:
    while _is_sequence(x) and x:
        x = x[0]
    return np.ndim(x) == 0 and not _is_sequence(x) and x is not None


def _nested(weights, name: str):
    try:
        return np.asarray(weights)
    except ValueError:
        raise ValueError(f"{name}: the rows of the nested lists differ in length") from None


def _stacked_heads(heads, name: str) -> np.ndarray:
    """Return the heads `[T S]` of a layer, given one by one, as `[N T S]`."""
    arrays = [as_array(head, f"{name}, head {number}") for number, head in enumerate(heads)]
    shapes = {array.shape for array in arrays}
    if len(shapes) != 1 or len(*shapes) != 2:
        raise ValueError(f"{name}: got heads of shapes {', '.join(map(_shape, shapes))}, must be of one shape [T S]")
    return np.stack(arrays)


def _layers_of_array(x: np.ndarray, batch: int | None, name: str) -> list[np.ndarray]:
    # A batch of one needs no choice, as [L 1 N T S] of stacked layers of transformers.
    if batch is None and x.ndim == 5 and x.shape[1] == 1:
        batch = 0
    if batch is not None:
        axes = {3: "[B T S]", 4: "[B N T S]", 5: "[L B N T S]"}
        if x.ndim not in axes:
            raise ValueError(f"{name}: got {_shape(x.shape)}, must with batch= be {', '.join(axes.values())}")
        x = _example(x, batch, 1 if x.ndim == 5 else 0, name, axes[x.ndim])
    if x.ndim not in (2, 3, 4):
        hint = "; it has a batch axis, so choose an example, such as batch=0" if x.ndim == 5 else ""
        raise ValueError(f"{name}: got {_shape(x.shape)}, must be {FORMS}{hint}")
    x = x[(None,) * (4 - x.ndim)]
    return [_not_empty(layer, name) for layer in x] if len(x) else [_not_empty(x, name)]


def _layer(x, batch: int | None, name: str) -> np.ndarray:
    x = as_array(x, name)
    if x.ndim == 4:
        if batch is None and x.shape[0] != 1:
            raise ValueError(
                f"{name}: got {_shape(x.shape)}, a batch [B N T S] of {x.shape[0]}: choose one example, such as batch=0"
            )
        x = _example(x, batch or 0, 0, name, "[B N T S]")
    elif batch is not None:
        raise ValueError(f"{name}: got {_shape(x.shape)} and batch={batch}: layers of a list must then be [B N T S]")
    if x.ndim not in (2, 3):
        raise ValueError(f"{name}: got {_shape(x.shape)}, must be {FORMS}")
    return _not_empty(x.reshape(-1, *x.shape[-2:]) if x.ndim == 3 else x[None], name)


def _layers_of_steps(steps, batch: int | None, name: str) -> list[np.ndarray]:
    """Return one map per layer from those of each generated token: rows of the steps below each other.

    A step sees more keys than the step before it, so what earlier rows lack is masked.
    """
    counts = {len(step) for step in steps}
    if len(counts) != 1:
        raise ValueError(f"{name}: the steps have {', '.join(map(str, sorted(counts)))} layers, must have equally many")
    layers = []
    for number in range(counts.pop()):
        parts = [_layer(step[number], batch, f"{name}, step {t}, layer {number}") for t, step in enumerate(steps)]
        if len({len(part) for part in parts}) != 1:
            raise ValueError(f"{name}, layer {number}: the steps differ in the number of heads")
        columns = max(part.shape[-1] for part in parts)
        padded = [np.pad(p, ((0, 0), (0, 0), (0, columns - p.shape[-1])), constant_values=MASKED) for p in parts]
        layers.append(np.concatenate(padded, axis=1))
    return layers


def _example(x: np.ndarray, batch: int, axis: int, name: str, axes: str) -> np.ndarray:
    size = x.shape[axis]
    if isinstance(batch, bool) or not isinstance(batch, int | np.integer) or not 0 <= batch < size:
        raise ValueError(f"batch: got {batch!r}, must be a whole number in 0..{size - 1}: {name} is {axes}")
    return x.take(int(batch), axis=axis)


def _not_empty(x: np.ndarray, name: str) -> np.ndarray:
    if 0 in x.shape:
        raise ValueError(f"{name}: got {_shape(x.shape)} for [N T S], which has an empty axis")
    return x


def _shape(shape: Sequence[int]) -> str:
    return f"[{' '.join(map(str, shape))}]"
