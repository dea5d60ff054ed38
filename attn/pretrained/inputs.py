"""Checks of the inputs of pretrained models: names, shapes, and values where they are known."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from attn.pretrained.foundation import Decoder, Encoder, EncoderDecoder, Vision
from attn.settings import between, error_message

# The inputs of each kind of model: those that it must get, and those that it may get.
_INPUTS = {
    Encoder: (("input_ids",), ("attention_mask", "token_type_ids", "position_ids")),
    Decoder: (("input_ids",), ("attention_mask", "position_ids")),
    EncoderDecoder: (("input_ids", "decoder_input_ids"), ("attention_mask", "decoder_attention_mask")),
    Vision: (("pixel_values",), ()),
}
_SHAPED_AS = {
    "attention_mask": "input_ids",
    "token_type_ids": "input_ids",
    "position_ids": "input_ids",
    "decoder_attention_mask": "decoder_input_ids",
}


def checked(model, given: Mapping[str, object], dtype: jnp.dtype) -> dict[str, Array]:
    """Return the inputs of a model as arrays, with masks where none are given.

    Args:
      model: the model.
      given: by name; None if an input is not given.
      dtype: of pictures.

    Raises:
      ValueError: an input is missing, means nothing for this model, or has a wrong shape or values out of range.
    """
    needed, allowed = _INPUTS[type(model)]
    arrays = {name: _array(name, value) for name, value in given.items() if value is not None}
    for name in arrays:
        if name not in (*needed, *allowed):
            raise ValueError(f"{name}: means nothing for this model; it takes {', '.join((*needed, *allowed))}")
    for name in needed:
        if name not in arrays:
            raise ValueError(f"{name}: none given, must be an array {_shape_of(name, model)}")
    if isinstance(model, Vision):
        return {"pixel_values": _picture(model, arrays["pixel_values"], dtype)}
    for name, array in arrays.items():
        _check_integers(name, array)
        if name == "position_ids" and len(array) == 1:  # the same for all rows
            array = arrays[name] = jnp.broadcast_to(array, (len(arrays["input_ids"]), array.shape[1]))
        if name in _SHAPED_AS and array.shape != (expected := arrays[_SHAPED_AS[name]].shape):
            raise ValueError(f"{name}: got shape {[*array.shape]}, must be {[*expected]}, as {_SHAPED_AS[name]}")
    if len(sizes := {len(array) for array in arrays.values()}) > 1:
        raise ValueError(f"{' and '.join(arrays)}: have {sizes} rows, must have equally many")
    _check_ranges(model, arrays)
    for name in needed:
        mask = name.replace("input_ids", "attention_mask")
        arrays[mask] = arrays[mask] != 0 if mask in arrays else jnp.ones(arrays[name].shape, bool)
    return arrays


def _array(name: str, value) -> Array:
    """Return an input as an array.

    Raises:
      ValueError: it is not an array of numbers.
    """
    try:
        if not isinstance(value, jax.Array):  # JAX would wrap larger integers
            numbers = np.asarray(value)
            if numbers.dtype.kind in "iu" and (np.abs(numbers.astype(float)) >= 2**31).any():
                raise ValueError
        array = jnp.asarray(value)
        if jnp.issubdtype(array.dtype, jnp.number) or array.dtype == bool:
            return array
    except (TypeError, ValueError, OverflowError):
        pass
    raise ValueError(
        f"{name}: got {repr(value)[:80]}, must be an array of numbers of 32 bits, or lists of equally many"
    )


def checked_prompt(model, input_ids, attention_mask, max_new_tokens: int) -> tuple[dict[str, Array], int]:
    """Return prompts or sources for decoding, and the number of new tokens.

    Raises:
      ValueError: the model does not write text, the prompt is wrong, or too long with what is to be written.
    """
    if not isinstance(model, Decoder | EncoderDecoder) or not model.has_logits:
        raise ValueError("generate: this model does not write text")
    if message := error_message(int, max_new_tokens, between(1, 1_000_000)):
        raise ValueError(f"max_new_tokens: {message}")
    max_new_tokens = int(max_new_tokens)
    if input_ids is None:
        raise ValueError("input_ids: none given, must be an array [B T] of tokens")
    ids, extra = _array("input_ids", input_ids), {}
    if isinstance(model, EncoderDecoder):
        extra = {"decoder_input_ids": jnp.zeros((len(ids), 1), jnp.int32)} if ids.ndim else {}
    arrays = checked(model, dict(input_ids=ids, attention_mask=attention_mask, **extra), jnp.dtype(jnp.float32))
    mask = arrays["attention_mask"]
    if isinstance(model, Decoder) and not isinstance(mask, jax.core.Tracer) and not np.asarray(mask)[:, -1].all():
        row = int(np.argmin(np.asarray(mask)[:, -1]))
        raise ValueError(f"attention_mask: row {row} ends with padding; prompts must be padded at the front")
    limit = longest(model)
    total = max_new_tokens + (ids.shape[1] if isinstance(model, Decoder) else 1)
    if limit is not None and total - 1 > limit:
        raise ValueError(f"max_new_tokens: got {max_new_tokens}, which needs {total - 1} positions; there are {limit}")
    return arrays, max_new_tokens


def longest(model) -> int | None:
    """Return the number of positions of a model; None for any number."""
    stack = model.model.decoder if isinstance(model, EncoderDecoder) else model.model.stack
    bounds = [part.max_positions for part in stack.blocks[0].attention.mechanism]
    return min((bound for bound in bounds if bound is not None), default=None)


def _shape_of(name: str, model) -> str:
    return f"[B {' '.join(map(str, model.size))}] of pixels" if name == "pixel_values" else "[B T] of tokens"


def _picture(model: Vision, pixels: Array, dtype: jnp.dtype) -> Array:
    if pixels.ndim != 4 or pixels.shape[1:] != tuple(model.size):
        raise ValueError(f"pixel_values: got shape {[*pixels.shape]}, must be {_shape_of('pixel_values', model)}")
    if not jnp.issubdtype(pixels.dtype, jnp.floating) and not jnp.issubdtype(pixels.dtype, jnp.integer):
        raise ValueError(f"pixel_values: got {pixels.dtype}, must be real numbers")
    return pixels.astype(dtype)


def _check_integers(name: str, array: Array):
    is_mask = name.endswith("attention_mask")
    if array.ndim != 2 or 0 in array.shape:
        raise ValueError(f"{name}: got shape {[*array.shape]}, must be [B T], of at least one token")
    if not jnp.issubdtype(array.dtype, jnp.integer) and not is_mask:
        raise ValueError(f"{name}: got {array.dtype}, must be {'0 and 1' if is_mask else 'integers'}")


def _check_ranges(model, arrays: Mapping[str, Array]):
    """Check the values of inputs that are known, and the lengths of texts."""
    limit, types = longest(model), getattr(model, "types", None)
    of_source, of_answer = model.model.source_embed, model.model.embedding_of_answer()
    below = {"input_ids": of_source.num_embeddings, "decoder_input_ids": of_answer.num_embeddings}
    below |= {"position_ids": limit}
    below |= {"token_type_ids": types and types.num_embeddings}
    for name, array in arrays.items():
        bound = 2 if name.endswith("attention_mask") else below[name]
        if name.endswith("input_ids") and limit is not None and array.shape[1] > limit and "position_ids" not in arrays:
            raise ValueError(
                f"{name}: got {array.shape[1]} tokens, must be at most {limit}, the positions of the model"
            )
        if isinstance(array, jax.core.Tracer) or bound is None:
            continue
        values = np.asarray(array)
        wrong = (values < 0) | (values >= bound) | (values != np.round(values))
        if wrong.any():
            raise ValueError(f"{name}: got {values[wrong][0]}, must lie in 0..{bound - 1}")
