"""Attention maps, or influence, of an answer of a trained model, with the tokens of their rows and columns."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Num

from attn.inspection.influence import influence
from attn.nn.model import Model, Weights
from attn.tasks.examples import PAD, Tokens, decoder_input
from attn.tasks.vocabulary import Vocabulary
from attn.training.decoding import prompts
from attn.viewer.arrays import MASKED
from attn.viewer.kinds import TITLES, Axis, Kind, Picture

_TINY = np.finfo(np.float32).tiny


class Maps(NamedTuple):
    """Attention weights of one answer, cut to its length, with names for the rows and columns.

    Attributes:
      weights: `[L N rows columns]`, by the names of the model's maps.
      influence: `[T S]`, only of a model without attention; see `attn.inspection.influence`.
      axes: for each map, the text of its rows and of its columns: "source", "answer" or "both".
      source: names of the S source tokens.
      read: names of the T tokens that the decoder read, the begin token first.
      written: names of the T tokens that it wrote, one after each token read.
      picture: `[height width]`, of a model whose source is a picture; its patches are the source tokens but the last.
    """

    weights: Weights
    influence: Float[np.ndarray, "T S"] | None
    axes: dict[str, tuple[str, str]]
    source: list[str]
    read: list[str]
    written: list[str]
    picture: Num[np.ndarray, "height width"] | None = None

    def rows(self, name: str) -> tuple[str, list[str]]:
        """Return a label for the rows of a map, and the name of each row."""
        return ("source", self.source) if self.axes[name][0] == "source" else ("written", self.written)

    def kinds(self) -> list[Kind]:
        """Return the maps for `attn.view` and for pictures; without attention, the influence of each source token.

        The influence is relative to the greatest in its row.
        """
        if self.influence is not None:
            relative = self.influence / np.maximum(self.influence.max(axis=-1, keepdims=True), _TINY)
            axes = Axis("written", tuple(self.written)), Axis("source", tuple(self.source))
            return [Kind("influence", "influence", [relative[None].astype(np.float32)], *axes, quantity="values")]
        return [self._kind(name) for name in self.axes if name in self.weights]

    def _kind(self, name: str) -> Kind:
        axes = [
            Axis(f"{role}: {label}", tuple(names))
            for role, (label, names) in (("query", self.rows(name)), ("key", self.columns(name)))
        ]
        layers = [np.array(layer, np.float32) for layer in self.weights[name]]
        offset = len(self.source) if self.axes[name][1] == "both" and self.axes[name][0] == "answer" else 0
        if name == "decoder":
            for layer in layers:
                _mark_later_keys(layer, offset)
        picture = None
        if self.picture is not None and [*self.axes[name]] == ["source", "source"]:
            picture = self._patches()
        return Kind(name, TITLES.get(name, name), layers, *axes, picture=picture, offset=offset)

    def _patches(self) -> Picture:
        """Return the picture of the source, whose last token is not a patch; ink is dark."""
        num_patches = len(self.source) - 1
        side = math.isqrt(self.picture.size // num_patches)  # of a patch, in pixels
        rows, columns = (pixels // side for pixels in self.picture.shape)
        return Picture(self.picture.max() - self.picture.astype(np.float32), (rows, columns))

    def columns(self, name: str) -> tuple[str, list[str]]:
        """Return a label for the columns of a map, and the name of each column."""
        return {
            "source": ("source", self.source),
            "answer": ("read so far", self.read),
            "both": ("source, and read so far", self.source + self.read),
        }[self.axes[name][1]]


def _mark_later_keys(weights: Float[np.ndarray, "N T S"], offset: int):
    """Mark the keys that causality hides as masked, which a weight of 0 alone is not; a visible prefix has others."""
    i, j = offset + np.arange(weights.shape[1])[:, None], np.arange(weights.shape[2])
    weights[(j > i) & (weights == 0)] = MASKED


def capture(model: Model, vocabulary: Vocabulary, source: Tokens, answer: Int[Array | np.ndarray, "T"]) -> Maps:
    """Compute the attention weights of an answer, or its influence if the model has no attention.

    Args:
      model: a trained model.
      vocabulary: names the tokens.
      source: `[n]` tokens, without an end token.
      answer: `[T]` tokens that the model wrote, its end token included; padding is cut off.
    """
    [maps] = capture_each(model, [nnx.state(model, nnx.Param)], vocabulary, source, answer)
    return maps


def capture_each(
    model: Model,
    each: Sequence[nnx.State],
    vocabulary: Vocabulary,
    source: Tokens,
    answer: Int[Array | np.ndarray, "T"],
) -> list[Maps]:
    """Compute the attention weights of one answer with each of several parameters of a model; compiled once.

    Args:
      model: gives the structure.
      each: parameters, such as those of several steps of training.
      vocabulary, source, answer: as in `capture`. The answer is what the decoder reads, with all parameters.
    """
    inputs, answer = answer_inputs(vocabulary, source, answer)
    source, read, length = inputs["source"], inputs["read"], inputs["answer_length"]
    graphdef, _ = nnx.split(model, nnx.Param)

    @jax.jit
    def compute(params):
        model = nnx.merge(graphdef, params)
        weights = model(source, read, answer_length=length, return_weights=True)[1]
        return weights, None if weights else influence(model, source, read, jnp.arange(len(read)))

    picture = model.picture(source[:-1])
    names = [vocabulary.names(tokens) for tokens in (source, read, answer)]
    axes = {name: axes for name, *axes in model.maps}
    return [Maps(*jax.device_get(compute(params)), axes, *names, jax.device_get(picture)) for params in each]


def answer_inputs(
    vocabulary: Vocabulary, source: Tokens, answer: Int[Array | np.ndarray, "width"]
) -> tuple[dict[str, Any], Int[Array, "T"]]:
    """Return the inputs of a model that reads a source and an answer to it, and the answer without padding.

    Args:
      vocabulary: of the model.
      source: `[n]` tokens, without an end token.
      answer: tokens with their end token, then padding.
    """
    answer = jnp.asarray(answer)[: max(1, int(np.sum(np.asarray(answer) != PAD)))]
    source = prompts(vocabulary, jnp.asarray([*source, vocabulary.source_end]))
    length = vocabulary.answer_length(len(source) - 1)
    return dict(source=source, read=decoder_input(answer, vocabulary.begin), answer_length=length), answer


def answer_logits(model: Model, inputs: Mapping[str, Any]) -> Float[Array, "T V"]:
    """Compute the logits of the token after each token of the answer that is read; inputs as of `answer_inputs`."""
    return model(inputs["source"], inputs["read"], answer_length=inputs["answer_length"])
