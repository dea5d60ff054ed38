"""Attention maps of a pretrained model for a text or a picture, with the names of their rows and columns."""

import jax
import numpy as np

from attn.inspection.capture import Maps
from attn.inspection.views import View, view_frames
from attn.pretrained.foundation import Decoder, Edit, Encoder, Vision
from attn.pretrained.loaded import Pretrained
from attn.tasks.vocabulary import InputError

_LONGEST_ANSWER = 32  # tokens that an encoder-decoder writes if no answer is given


def look(model: Pretrained, given, *, answer: str | None = None, edit: Edit | None = None) -> Maps:
    """Compute the attention maps of a text, of a text and an answer, or of a picture.

    Args:
      model: a loaded model.
      given: the text; for a vision model the picture, `[C height width]`.
      answer: of an encoder-decoder; None for the one that it writes.
      edit: see `Pretrained.__call__`.

    Raises:
      ValueError: the text or the picture does not fit the model.
      FileError: it has no tokenizer.
    """
    kind = model.model
    if isinstance(kind, Vision):
        if isinstance(given, str):
            raise ValueError(f"a picture is needed, got the text {given[:40]!r}")
        return _of_picture(model, np.asarray(given), edit)
    if not isinstance(given, str):
        raise ValueError(f"text: got {type(given).__name__}, must be text")
    ids = model.tokens.encode(given)
    if not ids:
        raise ValueError(f"text: got {given!r}, which has no tokens")
    if isinstance(kind, Encoder | Decoder):
        if answer is not None:
            raise ValueError(f"answer: got {answer!r}, means nothing for this model: it reads one text")
        name = "encoder" if isinstance(kind, Encoder) else "decoder"
        out = model([ids], edit=edit, output_hidden_states=False)
        weights = {name: _stacked(out.attentions)}
        return Maps(weights, None, {name: ("source", "source")}, model.tokens.names(ids), [], [])
    if answer is None:
        [written] = model.generate([ids], max_new_tokens=_LONGEST_ANSWER)
        written = written[1:].tolist()
    else:
        written = model.tokens.encode(answer)
    read = [model.origin.greedy.start, *written[:-1]]
    out = model([ids], decoder_input_ids=[read], edit=edit, output_hidden_states=False)
    weights = {"cross": out.cross_attentions, "decoder": out.decoder_attentions, "encoder": out.encoder_attentions}
    axes = {"cross": ("answer", "source"), "decoder": ("answer", "answer"), "encoder": ("source", "source")}
    names = (model.tokens.names(each) for each in (ids, read, written))
    return Maps({name: _stacked(each) for name, each in weights.items()}, None, axes, *names)


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
    return view_frames(first, second, (model.path, None if compare is None else compare.path), title)


def _of_picture(model: Pretrained, pixels: np.ndarray, edit: Edit | None) -> Maps:
    """Return the maps of a picture; the class token is moved behind the patches, as in pictures of our own models."""
    out = model(pixel_values=pixels[None], edit=edit, output_hidden_states=False)
    weights = np.roll(_stacked(out.attentions), -1, axis=(-2, -1))
    _, height, width = model.model.size
    rows, columns = (size // patch for size, patch in zip((height, width), model.model.patch))
    patches = [f"{row},{column}" for row in range(rows) for column in range(columns)]
    grey = pixels.mean(axis=0)
    grey = (grey.max() - grey) / max(float(np.ptp(grey)), 1e-12)  # ink is 1, as in pictures of our own models
    return Maps({"encoder": weights}, None, {"encoder": ("source", "source")}, [*patches, "class"], [], [], grey)


def _stacked(layers: tuple[jax.Array, ...]) -> np.ndarray:
    """Return the weights `[L N T S]` of the one text of a batch."""
    return np.stack([np.asarray(layer[0]) for layer in layers])
