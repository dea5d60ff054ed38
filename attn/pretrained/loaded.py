"""A loaded model: the call that users of the library transformers know, over our model for one example."""

import dataclasses
import functools
import os
import pathlib
import warnings
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int

from attn.inspection.passes import Pass
from attn.nn.taps import Edit, tapped
from attn.pretrained import generation, inputs
from attn.pretrained.files import Tensor
from attn.pretrained.foundation import Decoder, Encoder, EncoderDecoder, Record, Vision
from attn.pretrained.rules import Rule
from attn.pretrained.tokens import Tokens, load_tokens

ArrayLike = Any  # an array of JAX or NumPy, or nested lists of numbers; `inputs` checks it
Model = Encoder | Decoder | EncoderDecoder | Vision


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Output:
    """The outputs of a call, under the names of the library transformers; those that a model does not have are None.

    It is a pytree, so its leaves may be arrays of JAX or, after `jax.device_get`, of NumPy.

    Attributes:
      logits: `[B T V]` of tokens, or `[B classes]`.
      last_hidden_state: `[B T D]`, of the decoder if there is one.
      pooler_output: `[B D]`.
      hidden_states: `[B T D]` of the embeddings and of each layer.
      attentions: `[B N T T]` per layer.
      encoder_last_hidden_state, encoder_hidden_states, encoder_attentions: of the encoder, if there is a decoder too.
      decoder_hidden_states, decoder_attentions: of the decoder, if there is an encoder too.
      cross_attentions: `[B N T S]` per layer.
    """

    logits: Any = None
    last_hidden_state: Any = None
    pooler_output: Any = None
    hidden_states: Any = None
    attentions: Any = None
    encoder_last_hidden_state: Any = None
    encoder_hidden_states: Any = None
    encoder_attentions: Any = None
    decoder_hidden_states: Any = None
    decoder_attentions: Any = None
    cross_attentions: Any = None

    def __getitem__(self, name: str | int):
        """Return an output by its name, or by its number among those that the model has."""
        return self.to_tuple()[name] if isinstance(name, int) else getattr(self, name)

    def to_tuple(self) -> tuple:
        """Return the outputs that the model has."""
        values = (getattr(self, field.name) for field in dataclasses.fields(self))
        return tuple(value for value in values if value is not None)

    def __repr__(self) -> str:
        shown = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, tuple):
                shown.append(f"{field.name}: {len(value)} of {jnp.shape(value[0])}")
            elif value is not None:
                shown.append(f"{field.name}: {jnp.shape(value)}")
        return f"Output({', '.join(shown)})"


@dataclasses.dataclass(frozen=True, eq=False)
class Origin:
    """The files that a model was loaded from, as far as they are needed to run it and to write it again.

    Attributes:
      path: the folder or file.
      config: config.json.
      metadata: of a GGUF file; None of a folder.
      graphdef: the structure of our model.
      rules: of its tensors.
      dtypes: of the tensors in the file.
      copies: names of the tensors that repeat another one, as tied matrices.
      unused: the tensors that are not parameters of the model.
      dtype: of parameters and computation.
      greedy: settings of greedy decoding.
    """

    path: pathlib.Path
    config: Mapping[str, Any]
    metadata: Mapping[str, Any] | None
    graphdef: nnx.GraphDef
    rules: tuple[Rule, ...]
    dtypes: Mapping[str, np.dtype]
    copies: tuple[str, ...]
    unused: Mapping[str, Tensor]
    dtype: jnp.dtype
    greedy: generation.GreedySettings

    def __eq__(self, other) -> bool:
        """Compare by value, so that the parameters of two loads of one folder can be combined."""
        if not isinstance(other, Origin):
            return NotImplemented
        mine, others = ((o.path, o.graphdef, o.rules, o.dtype, o.greedy) for o in (self, other))
        return mine == others

    def __hash__(self) -> int:
        return hash((self.path, self.dtype))

    @property
    def ignored(self) -> tuple[str, ...]:
        """The names of the tensors that were not used."""
        return (*self.copies, *self.unused)

    @functools.cached_property
    def tokens(self) -> Tokens:
        """The tokenizer, read when it is first needed."""
        return load_tokens(self.path, self.metadata)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A model with the weights of a foreign file; a pytree whose leaves are its parameters.

    Attributes:
      params: its parameters.
      origin: its structure and its files.
    """

    params: nnx.State
    origin: Origin = dataclasses.field(metadata=dict(static=True))

    @property
    def model(self) -> Model:
        """Our model for one example, with its parameters."""
        return nnx.merge(self.origin.graphdef, self.params)

    @property
    def tokens(self) -> Tokens:
        """The tokenizer of its texts.

        Raises:
          FileError: there is none, or the library tokenizers is not installed.
        """
        return self.origin.tokens

    @property
    def config(self) -> dict:
        """The settings in config.json."""
        return dict(self.origin.config)

    def __call__(
        self,
        input_ids: ArrayLike | None = None,
        attention_mask: ArrayLike | None = None,
        token_type_ids: ArrayLike | None = None,
        position_ids: ArrayLike | None = None,
        decoder_input_ids: ArrayLike | None = None,
        decoder_attention_mask: ArrayLike | None = None,
        pixel_values: ArrayLike | None = None,
        *,
        edit: Edit | None = None,
        output_attentions: bool = True,
        output_hidden_states: bool = True,
    ) -> Output:
        """Compute the outputs of a batch.

        Args:
          input_ids: `[B T]` tokens.
          attention_mask: 0 for padding, which no token attends to; all 1 unless given.
          token_type_ids: types of the tokens, of BERT and ALBERT; all 0 unless given.
          position_ids: positions of the tokens; 0, 1, 2, ... unless given.
          decoder_input_ids, decoder_attention_mask: tokens of the answer so far.
          pixel_values: `[B C height width]` pictures, of ViT.
          edit: `(name, layer, weights) -> weights`, changes attention weights `[N T S]` before they are used; `name` is
            "encoder", "decoder" or "cross". Return `weights.at[3].set(0)` to remove head 3, or add an array of zeros
            to differentiate with respect to it.
          output_attentions, output_hidden_states: return them; without, less memory is needed.

        Raises:
          ValueError: an input is missing, means nothing for this model, or has a wrong shape or values out of range.
        """
        given = dict(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            pixel_values=pixel_values,
        )
        if edit is not None and not callable(edit):
            raise ValueError(f"edit: got {edit!r}, must be a function (name, layer, weights) -> weights")
        arrays = inputs.checked(self.model, given, self.origin.dtype)
        # A new function would be compiled at every call, so with `edit` the caller jits.
        run = _run_compiled if edit is None else _run
        options = dict(edit=edit, attentions=output_attentions, hidden_states=output_hidden_states)
        with precise(self.origin.dtype):
            return run(self.origin.graphdef, self.params, arrays, **options)

    def generate(
        self,
        input_ids: ArrayLike,
        attention_mask: ArrayLike | None = None,
        *,
        max_new_tokens: int = 20,
    ) -> Int[Array, "B length"]:
        """Decode greedily with a key/value cache, until the end token or for `max_new_tokens`.

        Args:
          input_ids: `[B T]` prompts, padded at the front; of an encoder-decoder the sources.
          attention_mask: 0 for padding; all 1 unless given.
          max_new_tokens: the number of tokens to write at most.

        Returns:
          The prompts with what follows, or the answers with their start token; padded after the end token. Inside of
          `jax.jit` they have `max_new_tokens` new tokens, outside as many as the longest answer.

        Raises:
          ValueError: the model does not write text, or as in a call.
        """
        model = self.model
        given, max_new_tokens = inputs.checked_prompt(model, input_ids, attention_mask, max_new_tokens)
        capacity, greedy = generation.rounded(max_new_tokens), self.origin.greedy
        if greedy.left_out:
            warnings.warn(
                f"generate: greedy decoding leaves out {', '.join(greedy.left_out)} of the model", stacklevel=2
            )
        if isinstance(model, EncoderDecoder) and greedy.start is None:
            raise ValueError(f"{self.origin.path}: names no decoder_start_token_id, with which answers begin")
        vocabulary = model.model.embedding_of_answer().num_embeddings
        if wrong := [token for token in greedy.tokens() if not 0 <= token < vocabulary]:
            raise ValueError(f"{self.origin.path}: its settings name token {wrong[0]}, must lie in 0..{vocabulary - 1}")
        ids = given["input_ids"]
        with precise(self.origin.dtype):
            tokens, count = generation.decode(
                self.origin.graphdef,
                self.params,
                ids,
                given["attention_mask"],
                max_new_tokens,
                greedy=greedy,
                capacity=capacity,
            )
        longest = max_new_tokens + (ids.shape[1] if isinstance(model, Decoder) else 1)
        return tokens[:, : longest if isinstance(count, jax.core.Tracer) else int(count)]

    @property
    def graphdef(self) -> nnx.GraphDef:
        """The structure of our model, as `flax.nnx.split` gives it."""
        return self.origin.graphdef

    def with_graphdef(self, graphdef: nnx.GraphDef) -> "Pretrained":
        """Return the same with another structure for the same parameters; see `attn.interventions`."""
        return Pretrained(self.params, dataclasses.replace(self.origin, graphdef=graphdef))

    def full_pass(self, given, answer=None) -> Pass:
        """Return the pass over a text or a picture: `attn.pretrained.looking.full_pass`."""
        from attn.pretrained.looking import full_pass  # imported here, since `looking` imports this module

        return full_pass(self, given, answer)

    def look(self, given, *, answer=None, edit: Edit | None = None):
        """Compute the attention maps of a text or a picture: `attn.pretrained.looking.look`."""
        from attn.pretrained.looking import look  # imported here, since loading and calling need nothing of it

        return look(self, given, answer=answer, edit=edit)

    def view(self, given, *, compare=None, title: str = ""):
        """Return a page of the attention maps of a text or a picture: `attn.pretrained.looking.view`."""
        from attn.pretrained.looking import view  # as in `look`

        return view(self, given, compare=compare, title=title)

    @property
    def path(self) -> pathlib.Path:
        """The folder or file that the model was loaded from."""
        return self.origin.path

    def save(self, folder: str | os.PathLike):
        """Write a folder that the library transformers reads: `attn.pretrained.save`."""
        from attn.pretrained.loading import save  # imported here, since `loading` imports this module

        save(self, folder)

    def about(self) -> list[str]:
        """Describe the model in lines."""
        origin = self.origin
        dtypes = ", ".join(sorted({str(dtype) for dtype in origin.dtypes.values()}))
        lines = [
            f"weights     {origin.path}, {len(origin.rules)} tensors of {dtypes}",
            f"model       {self._summary()}",
        ]
        stacks = {"encoder": "encoder", "decoder": "decoder", "stack": "layers"}
        for name, shown in stacks.items():
            if (stack := getattr(self.model.model, name, None)) is not None:
                heads, width = stack.blocks[0].attention.W_Q.shape[1], stack.blocks[0].attention.W_Q.shape[0]
                lines.append(f"{shown:<12}{len(stack.blocks)} of {heads} heads, width {width}")
        if origin.ignored:
            lines.append(f"not used    {', '.join(origin.ignored)}")
        return lines

    def __repr__(self) -> str:
        return f"Pretrained({self._summary()}, from {self.origin.path})"

    def _summary(self) -> str:
        """Return the family and the number of parameters."""
        count = sum(leaf.size for leaf in jax.tree.leaves(self.params))
        return f"{self.origin.config.get('model_type')}, {count:,} parameters"


def precise(dtype: jnp.dtype):
    """Return the context of float32 products that are as precise as on a CPU, unless the user has chosen another."""
    chosen = jax.config.jax_default_matmul_precision
    return jax.default_matmul_precision("highest" if chosen is None and dtype == jnp.float32 else chosen)


def _run(graphdef: nnx.GraphDef, params: nnx.State, arrays: dict[str, Array], *, edit, attentions, hidden_states):
    def one(arrays):
        record = Record(edit, attentions=attentions, hidden_states=hidden_states)
        return nnx.merge(tapped(graphdef, params, record.tap), params)(record, **arrays)

    return Output(**jax.vmap(one)(arrays))


_run_compiled = functools.partial(jax.jit, static_argnames=("graphdef", "edit", "attentions", "hidden_states"))(_run)
