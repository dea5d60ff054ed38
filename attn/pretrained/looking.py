"""Inputs of one text or picture to a pretrained model: its attention maps, and the pass that interventions change."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from attn.inspection.capture import Maps
from attn.inspection.passes import NO_TOKEN, Pass
from attn.inspection.views import View, view_frames
from attn.nn.taps import Edit
from attn.pretrained import inputs
from attn.pretrained.files import FileError
from attn.pretrained.foundation import Decoder, Encoder, EncoderDecoder, Record, Vision
from attn.pretrained.loaded import Pretrained, precise
from attn.tasks.vocabulary import InputError

_LONGEST_ANSWER = 32  # tokens that an encoder-decoder writes if no answer is given


class Reading(NamedTuple):
    """The input of a model, as the arguments of a call with a batch of one, and as tokens.

    Attributes:
      arguments: of the call.
      source: tokens of the text; of a picture none.
      read, written: of an encoder-decoder, the tokens of the answer that it reads, and the one after each.
    """

    arguments: dict[str, Any]
    source: Sequence[int] = ()
    read: Sequence[int] = ()
    written: Sequence[int] = ()


def reading(model: Pretrained, given, answer=None) -> Reading:
    """Return what a model reads of a text or a picture, and of an answer.

    Args:
      model: a loaded model.
      given: text, or its tokens as numbers; for a vision model the picture, `[C height width]`.
      answer: of an encoder-decoder, text or tokens; None for the one that it writes.

    Raises:
      ValueError: the text or the picture does not fit the model.
      FileError: it has no tokenizer for a text.
    """
    kind = model.model
    if answer is not None and not isinstance(kind, EncoderDecoder):
        shown = repr(answer)[:80]
        raise ValueError(f"answer: got {shown}, means nothing for this model: it reads one text or picture")
    if isinstance(kind, Vision):
        if isinstance(given, str):
            raise ValueError(f"a picture is needed, got the text {given[:40]!r}")
        return Reading({"pixel_values": np.asarray(given)[None]})
    ids = _tokens(model, given, "text")
    if isinstance(kind, Encoder | Decoder):
        return Reading({"input_ids": [ids]}, ids)
    if answer is None:
        most = min(_LONGEST_ANSWER, inputs.longest(kind) or _LONGEST_ANSWER)
        [written] = model.generate([ids], max_new_tokens=most)
        written = written[1:].tolist()
    else:
        written = _tokens(model, answer, "answer")
    read = [model.origin.greedy.start, *written[:-1]]
    return Reading({"input_ids": [ids], "decoder_input_ids": [read]}, ids, read, written)


def _tokens(model: Pretrained, given, name: str) -> list[int]:
    """Return the tokens of a text, or those that are given."""
    if isinstance(given, str):
        ids = model.tokens.encode(given)
        if not ids:
            raise ValueError(f"{name}: got {given!r}, which has no tokens")
        return ids
    try:
        ids = np.asarray(given)
    except ValueError:  # lists of different lengths
        ids = np.zeros(0)
    if ids.ndim != 1 or not len(ids) or ids.dtype.kind not in "iu":
        raise ValueError(f"{name}: got {type(given).__name__}, must be text, or its tokens as whole numbers")
    return ids.tolist()


def look(model: Pretrained, given, *, answer=None, edit: Edit | None = None) -> Maps:
    """Compute the attention maps of a text, of a text and an answer, or of a picture.

    Args:
      model, given, answer: as of `reading`.
      edit: see `Pretrained.__call__`.

    Raises:
      ValueError, FileError: as of `reading`.
    """
    read = reading(model, given, answer)
    out = model(**read.arguments, edit=edit, output_hidden_states=False)
    kind = model.model
    if isinstance(kind, Vision):
        return _of_picture(kind, read.arguments["pixel_values"][0], _stacked(out.attentions))
    if isinstance(kind, Encoder | Decoder):
        name = "encoder" if isinstance(kind, Encoder) else "decoder"
        weights = {name: _stacked(out.attentions)}
        return Maps(weights, None, {name: ("source", "source")}, _names(model, given, read.source), [], [])
    weights = {"cross": out.cross_attentions, "decoder": out.decoder_attentions, "encoder": out.encoder_attentions}
    axes = {"cross": ("answer", "source"), "decoder": ("answer", "answer"), "encoder": ("source", "source")}
    names = (_names(model, given, each) for each in (read.source, read.read, read.written))
    return Maps({name: _stacked(each) for name, each in weights.items()}, None, axes, *names)


def full_pass(model: Pretrained, given, answer=None) -> Pass:
    """Return the pass over a text, a text and an answer, or a picture; see `attn.interventions`.

    Its labels are the tokens of the answer; of a decoder the next tokens of the text; of an encoder, and of a
    classifier, what the model itself finds most probable.

    Args:
      model, given, answer: as of `reading`.
    """
    read = reading(model, given, answer)
    kind, arrays = model.model, inputs.checked(model.model, read.arguments, model.origin.dtype)
    each = Pass(_logits, {name: array[0] for name, array in arrays.items()}, None)
    if isinstance(kind, Decoder | EncoderDecoder):
        labels = [*read.source[1:], NO_TOKEN] if isinstance(kind, Decoder) else read.written
        return dataclasses.replace(each, labels=jnp.array(labels)) if kind.has_logits else each
    out = model(**read.arguments, output_attentions=False, output_hidden_states=False)
    if out.logits is None:
        return each
    return dataclasses.replace(each, labels=jnp.atleast_1d(jnp.argmax(out.logits[0], axis=-1)))


def _logits(model: nnx.Module, arguments: Mapping[str, Any]) -> Float[Array, "T V"]:
    """Compute the logits, or the last hidden state of a model without logits; those of one class have one row."""
    dtype = jax.tree.leaves(nnx.state(model, nnx.Param))[0].dtype
    with precise(dtype):
        out = model(Record(attentions=False, hidden_states=False), **arguments)
    values = out.get("logits", out["last_hidden_state"])
    return values[None] if values.ndim == 1 else values


def _names(model: Pretrained, given, ids: Sequence[int]) -> list[str]:
    """Return the names of tokens; their numbers if numbers are given and there is no tokenizer."""
    try:
        return model.tokens.names(ids)
    except FileError:
        if isinstance(given, str):
            raise
        return list(map(str, ids))


def view(model: Pretrained, given, *, compare=None, title: str = "") -> View:
    """Return a page of the attention maps of a text or a picture, as `attn.view` makes it.

    Args:
      model: a loaded model.
      given: as in `look`.
      compare: a second model or run, beside it.
      title: of the page.

    Raises:
      ValueError, FileError: as in `look`.
      InputError: the second model has other tokens or maps of other sizes.
    """
    if not isinstance(compare, Pretrained | None) and not isinstance(given, str):
        raise InputError(f"{compare.path}: a run reads text, not a picture")
    first = {"": look(model, given)}
    second = None if compare is None else {"": compare.look(given)}
    paths = model.path, None if compare is None else compare.path
    return view_frames(first, second, paths, title, groups=model.origin.config.get("num_key_value_heads"))


def _of_picture(kind: Vision, pixels: np.ndarray, weights: Float[np.ndarray, "L N T T"]) -> Maps:
    """Return the maps of a picture; the class token is moved behind the patches, as in pictures of our own models."""
    weights = np.roll(weights, -1, axis=(-2, -1))
    _, height, width = kind.size
    rows, columns = (size // patch for size, patch in zip((height, width), kind.patch))
    patches = [f"{row},{column}" for row in range(rows) for column in range(columns)]
    grey = pixels.mean(axis=0)
    grey = (grey.max() - grey) / max(float(np.ptp(grey)), 1e-12)  # ink is 1, as in pictures of our own models
    return Maps({"encoder": weights}, None, {"encoder": ("source", "source")}, [*patches, "class"], [], [], grey)


def _stacked(layers: tuple[jax.Array, ...]) -> np.ndarray:
    """Return the weights `[L N T S]` of the one text of a batch."""
    return np.stack([np.asarray(layer[0]) for layer in layers])
