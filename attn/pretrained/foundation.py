"""Pretrained models for one example: our models with the heads that foreign files have, and everything inside to see.

Each class takes the inputs of its kind and returns a dictionary of outputs under the names of the library
transformers. `generation` decodes with `prefill` and `step`.
"""

from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float, Int

from attn.functional import masks
from attn.mechanisms.rows import Example, Rows
from attn.nn.attention import KeysValues, Sides
from attn.nn.encoder_only import EncoderOnly
from attn.nn.model import Cache, Model
from attn.nn.taps import Change, Context, Edit, Site, edited
from attn.nn.vision_transformer import VisionTransformer

Outputs = dict[str, Array | tuple[Array, ...]]


class Record:
    """Keeps what a model computes on its way, in one call of a model that has `tap` among its taps.

    Args:
      edit: `(name, layer, weights) -> weights`: changes attention weights `[N T S]` before they are used; `name` is
        "encoder", "decoder" or "cross", `layer` counts from 0. None to leave them.
      attentions, hidden_states: what to keep.
    """

    def __init__(self, edit: Edit | None = None, *, attentions: bool = True, hidden_states: bool = True):
        self.edit, self.attentions, self.hidden_states = edit, attentions, hidden_states
        self.kept: dict[str, list[Array]] = {}

    def tap(self, site: Site) -> Change | None:
        """Return the function that changes and keeps the value at a site of the model."""
        name = f"{site.kind}_hidden" if site.value == "hidden" else site.kind
        keeps = {"weights": self.attentions, "hidden": self.hidden_states, "heads": False}[site.value]
        edits = self.edit is not None and site.value == "weights"
        if not keeps and not edits:
            return None

        def change(value: Array, context: Context) -> Array:
            value = edited(self.edit, site, value) if edits else value
            return self._keep(name, value) if keeps else value

        return change

    def _keep(self, name: str, value: Array) -> Array:
        self.kept.setdefault(name, []).append(value)
        return value

    def weights(self, name: str) -> tuple[Array, ...] | None:
        """Return the attention weights of every layer; None if they are not kept."""
        return tuple(self.kept[name]) if self.attentions else None

    def of_stack(self, name: str, embedded: Array, x: Array, last: Array | None) -> Outputs:
        """Return the outputs of a model with one stack: `x` is the stack's output, the rest is as in `hidden`."""
        hidden_states = self.hidden(name, embedded, last)
        return {"last_hidden_state": x, "hidden_states": hidden_states, "attentions": self.weights(name)}

    def hidden(self, name: str, embedded: Array, last: Array | None) -> tuple[Array, ...] | None:
        """Return the input of a stack and the outputs of its blocks; `last` replaces the last unless it is None."""
        if not self.hidden_states:
            return None
        outputs = self.kept[f"{name}_hidden"]
        return (embedded, *outputs) if last is None else (embedded, *outputs[:-1], last)


def visible(valid: Bool[Array, "S"]) -> masks.Mask:
    """Return the mask that hides the keys which are not valid, for every query."""
    return masks.as_mask(Partial(lambda valid, i, j: valid[j], valid))


def rows_of(count: int, positions: Int[Array, "P"] | None = None, start: int | Int[Array, ""] = 0) -> Rows:
    """Return rows of a text whose token t stands at position t, or `positions[t]`; row 0 is token `start`."""
    return Rows(jnp.arange(count), start=start, table=positions, total=None, example=Example(count))


class Encoder(nnx.Module):
    """An encoder: BERT, ALBERT.

    Args:
      model: the encoder.
      types: embeddings of the types of tokens; None if there are none.
      pooler: linear layer of the first token's output; None if there is none.
      classifier: linear layer of the pooled output, or of the output of each token; None if there is none.
      classifies_tokens: which of these.
      has_logits: the model predicts tokens.
    """

    def __init__(
        self,
        model: EncoderOnly,
        *,
        types: nnx.Embed | None = None,
        pooler: nnx.Linear | None = None,
        classifier: nnx.Linear | None = None,
        classifies_tokens: bool = False,
        has_logits: bool,
    ):
        self.model, self.types, self.pooler, self.classifier = model, types, pooler, classifier
        self.classifies_tokens, self.has_logits = classifies_tokens, has_logits

    def __call__(
        self,
        record: Record,
        input_ids: Int[Array, "T"],
        attention_mask: Bool[Array, "T"],
        token_type_ids: Int[Array, "T"] | None = None,
        position_ids: Int[Array, "T"] | None = None,
    ) -> Outputs:
        """Compute the outputs of one text."""
        own = rows_of(len(input_ids), position_ids)
        types = jnp.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        embedded = self.model.embed(input_ids, own, shift=None if self.types is None else self.types(types))
        x, *_ = self.model.stack(embedded, Sides(own, own, visible(attention_mask)))
        outputs = record.of_stack("encoder", embedded, x, x)
        if self.has_logits:
            outputs["logits"] = self.model.logits(x)
        if self.pooler is not None:
            outputs["pooler_output"] = jnp.tanh(self.pooler(x[0]))
        if self.classifier is not None:
            outputs["logits"] = self.classifier(x if self.classifies_tokens else outputs["pooler_output"])
        return outputs


class Vision(nnx.Module):
    """A vision Transformer: ViT.

    Args:
      model: the encoder of patches.
      size: channels, height and width of a picture.
      patch: height and width of a patch in pixels.
      pooler, has_logits: as of `Encoder`; the logits are those of the class token.
    """

    def __init__(
        self,
        model: VisionTransformer,
        *,
        size: tuple[int, int, int],
        patch: tuple[int, int],
        pooler: nnx.Linear | None,
        has_logits: bool,
    ):
        self.model, self.size, self.patch, self.pooler, self.has_logits = model, size, patch, pooler, has_logits

    def __call__(self, record: Record, pixel_values: Float[Array, "C height width"]) -> Outputs:
        """Compute the outputs of one picture."""
        channels, height, width = pixel_values.shape
        p, q = self.patch
        patches = pixel_values.reshape(channels, height // p, p, width // q, q)
        patches = patches.transpose(1, 3, 2, 4, 0).reshape(-1, p * q * channels)
        class_token = self.model.class_token[...][None]
        vectors = jnp.concatenate([class_token, self.model.patch(patches.astype(class_token.dtype))])
        own = rows_of(len(vectors))
        embedded = self.model.embed_vectors(vectors, own)
        x, *_ = self.model.stack(embedded, Sides(own, own, None))
        outputs = record.of_stack("encoder", embedded, x, None)  # the last hidden state is before the norm
        if self.has_logits:
            outputs["logits"] = self.model.logits(x[:1])[0]
        if self.pooler is not None:
            outputs["pooler_output"] = jnp.tanh(self.pooler(x[0]))
        return outputs


class Prompt(NamedTuple):
    """The state of a decoder between tokens.

    Attributes:
      cache: keys and values of each layer, with room for the tokens to come.
      valid: `[capacity]`, False for padding of the prompt.
      positions: `[capacity]`, of all tokens.
    """

    cache: tuple[KeysValues, ...]
    valid: Bool[Array, "C"]
    positions: Int[Array, "C"]


class Decoder(nnx.Module):
    """A decoder without an encoder: GPT-2, Llama.

    Args:
      model: the decoder.
      has_logits: the model predicts tokens.
    """

    def __init__(self, model: Model, *, has_logits: bool):
        self.model, self.has_logits = model, has_logits

    def __call__(
        self,
        record: Record,
        input_ids: Int[Array, "T"],
        attention_mask: Bool[Array, "T"],
        position_ids: Int[Array, "T"] | None = None,
    ) -> Outputs:
        """Compute the outputs of one text."""
        own = rows_of(len(input_ids), position_ids)
        embedded = self.model.embed(input_ids, own)
        sides = Sides(own, own, masks.causal() & visible(attention_mask))
        x, *_ = self.model.stack(embedded, sides)
        outputs = record.of_stack("decoder", embedded, x, x)
        return outputs | ({"logits": self.model.logits(x)} if self.has_logits else {})

    def prefill(
        self, input_ids: Int[Array, "T"], attention_mask: Bool[Array, "T"], capacity: int
    ) -> tuple[Float[Array, "V"], Prompt]:
        """Read a prompt, padded at the front; return the logits of the next token, and the state after the prompt."""
        T = len(input_ids)
        valid = jnp.pad(attention_mask, (0, capacity - T), constant_values=True)
        positions = jnp.maximum(jnp.cumsum(valid) - 1, 0)
        prompt = Prompt(self.model.stack.cache(capacity), valid, positions)
        return self._read(input_ids, 0, prompt)

    def step(self, token: Int[Array, ""], index: Int[Array, ""], prompt: Prompt) -> tuple[Float[Array, "V"], Prompt]:
        """Read token number `index`; return the logits of the next one, and the state after it."""
        return self._read(token[None], index, prompt)

    def _read(self, tokens: Int[Array, "T"], index, prompt: Prompt):
        q = rows_of(len(tokens), prompt.positions, index)
        k = rows_of(len(prompt.valid), prompt.positions)
        sides = Sides(q, k, masks.causal(offset=index) & visible(prompt.valid))
        x, cache, _ = self.model.stack(self.model.embed(tokens, q), sides, cache=(prompt.cache, index))
        return self.model.logits(x[-1:])[0], prompt._replace(cache=cache)


class EncoderDecoder(nnx.Module):
    """An encoder and a decoder: T5, BART, Marian.

    Args:
      model: the Transformer.
      has_logits: the model predicts tokens.
    """

    def __init__(self, model: Model, *, has_logits: bool):
        self.model, self.has_logits = model, has_logits

    def __call__(
        self,
        record: Record,
        input_ids: Int[Array, "S"],
        attention_mask: Bool[Array, "S"],
        decoder_input_ids: Int[Array, "T"],
        decoder_attention_mask: Bool[Array, "T"],
    ) -> Outputs:
        """Compute the outputs of one source and the answer so far."""
        model, T = self.model, len(decoder_input_ids)
        source, own = rows_of(len(input_ids)), rows_of(T)
        sides = Sides(source, source, visible(attention_mask))
        encoded, _ = model.encode(input_ids, sides)
        sides = Sides(own, own, masks.causal() & visible(decoder_attention_mask))
        to_source = Sides(own, source, visible(attention_mask))
        x, _, _ = model.decode(decoder_input_ids, sides, to_source, self._cache(encoded, T))
        outputs = {
            "last_hidden_state": x,
            "encoder_last_hidden_state": encoded,
            "encoder_hidden_states": record.hidden("encoder", model.embed_source(input_ids, source), encoded),
            "decoder_hidden_states": record.hidden("decoder", model.embed_answer(decoder_input_ids, own), x),
            "encoder_attentions": record.weights("encoder"),
            "decoder_attentions": record.weights("decoder"),
            "cross_attentions": record.weights("cross"),
        }
        return outputs | ({"logits": model.logits(x)} if self.has_logits else {})

    def prefill(
        self, input_ids: Int[Array, "S"], attention_mask: Bool[Array, "S"], capacity: int
    ) -> tuple[Cache, Bool[Array, "S"]]:
        """Encode a source; return the state before the answer."""
        source = rows_of(len(input_ids))
        encoded, _ = self.model.encode(input_ids, Sides(source, source, visible(attention_mask)))
        return self._cache(encoded, capacity), attention_mask

    def step(self, token: Int[Array, ""], index: Int[Array, ""], state) -> tuple[Float[Array, "V"], tuple]:
        """Read token number `index` of the answer; return the logits of the next one, and the state after it."""
        cache, valid = state
        capacity, source = len(cache.own[0].key), rows_of(len(valid))
        q = rows_of(1, start=index)
        sides = Sides(q, rows_of(capacity), masks.causal(offset=index))
        x, cache, _ = self.model.decode(token[None], sides, Sides(q, source, visible(valid)), cache)
        return self.model.logits(x)[0], (cache, valid)

    def _cache(self, encoded: Float[Array, "S D"], capacity: int) -> Cache:
        memory = self.model.decoder.memory(encoded, rows_of(len(encoded)))
        return Cache(0, self.model.decoder.cache(capacity), memory, Example(len(encoded)))
