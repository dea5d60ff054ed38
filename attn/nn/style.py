"""The style of a model's blocks: the choices in which BERT, GPT-2, T5, BART, Marian, ViT and Llama differ.

A style is one record. `parse` reads it from text: a name of `STYLES`, with changes in parentheses if there are any,
such as "llama" or "bert(activation=relu)".
"""

import ast
import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from attn.settings import Constraint, between, literal, nearest, one_of, read_settings, setting

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": nnx.relu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),  # x Phi(x), by the error function
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
}
# "fast_layer" computes the variance as E[x^2] - E[x]^2, which loses digits where the mean is large; "layer" does not.
NORMALIZATIONS: dict[str, Callable] = {
    "fast_layer": nnx.LayerNorm,
    "layer": lambda *sizes, **options: nnx.LayerNorm(*sizes, use_fast_variance=False, **options),
    "rms": nnx.RMSNorm,
}


@dataclasses.dataclass(frozen=True)
class Style:
    """The choices in which families of Transformers differ, apart from sizes, positions and masks.

    Attributes:
      norm: "pre" or "post": the norm is at the input of a sublayer, or after its residual connection.
      normalization: a key of `NORMALIZATIONS`.
      epsilon: of the norms.
      qkv_bias, attention_output_bias: add biases to queries, keys and values, and to the output of attention.
      activation: a key of `ACTIVATIONS`, of the feed-forward layers.
      gated: the feed-forward layer is (activation(x W_g) * x W_1) W_2.
      feed_forward_bias: add biases in the feed-forward layers.
      embedding_norm: normalise the sum of the embeddings, at the bottom of each stack.
      embedding_scale: multiply the embeddings of tokens by the square root of their width.
      logits_transform: apply a linear layer, the activation and a norm before the matrix of the logits.
      logits_bias: add a bias to the logits.
      logits_scale: multiply logits by D^-1/2, for large embeddings that are tied.
    """

    norm: str = setting("pre", one_of(("pre", "post")))
    normalization: str = setting("fast_layer", one_of(NORMALIZATIONS))
    epsilon: float = setting(1e-6, between(0))
    qkv_bias: bool = False
    attention_output_bias: bool = False
    activation: str = setting("relu", one_of(ACTIVATIONS))
    gated: bool = False
    feed_forward_bias: bool = True
    embedding_norm: bool = False
    embedding_scale: bool = False
    logits_transform: bool = False
    logits_bias: bool = False
    logits_scale: bool = False

    def make_norm(self, width: int, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.Module:
        """Make a norm of vectors of `width` numbers."""
        return NORMALIZATIONS[self.normalization](width, epsilon=self.epsilon, dtype=dtype, rngs=rngs)


PLAIN = Style()
_LAYER = Style(normalization="layer", epsilon=1e-5, qkv_bias=True, attention_output_bias=True, activation="gelu")
_RMS = Style(normalization="rms", feed_forward_bias=False)

# A new style is one line. Sources: "plain" Vaswani et al. 2017 with the norms of Xiong et al. 2020; "bert" Devlin et
# al. 2019; "gpt2" Radford et al. 2019; "t5" Raffel et al. 2020; "t5_gated" Shazeer 2020; "bart" Lewis et al. 2020;
# "marian" Junczys-Dowmunt et al. 2018; "vit" Dosovitskiy et al. 2021; "llama" Touvron et al. 2023.
STYLES: dict[str, Style] = {
    "plain": PLAIN,
    "bert": dataclasses.replace(
        _LAYER, norm="post", epsilon=1e-12, embedding_norm=True, logits_transform=True, logits_bias=True
    ),
    "gpt2": dataclasses.replace(_LAYER, activation="gelu_tanh"),
    "t5": dataclasses.replace(_RMS, logits_scale=True),
    "t5_gated": dataclasses.replace(_RMS, activation="gelu_tanh", gated=True),
    "bart": dataclasses.replace(_LAYER, norm="post", embedding_norm=True, logits_bias=True),
    "marian": dataclasses.replace(_LAYER, norm="post", activation="silu", embedding_scale=True, logits_bias=True),
    "vit": dataclasses.replace(_LAYER, epsilon=1e-12, logits_bias=True),
    "llama": dataclasses.replace(_RMS, epsilon=1e-5, activation="silu", gated=True),
}


def parse(text: str) -> Style:
    """Read a style: a name of `STYLES`, with changes in parentheses, such as "bert(activation=relu)".

    Raises:
      ValueError: the text is not a style, or a change is unknown or not allowed.
    """
    try:
        node = ast.parse(text.strip(), mode="eval").body
    except SyntaxError:
        node = None
    call = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
    if not isinstance(call.func, ast.Name):
        raise ValueError("must be a name such as 'llama', or one with changes such as 'bert(activation=relu)'")
    name = call.func.id
    if name not in STYLES:
        raise ValueError(f"unknown style {name!r}{nearest(name, STYLES)}; known: {', '.join(STYLES)}")
    return dataclasses.replace(STYLES[name], **read_settings(f"style {name!r}", Style, call, literal))


def changed(name: str, **choices) -> str:
    """Return the text of a style with these choices; those that it has already are left out."""
    style = STYLES[name]
    changes = [f"{key}={value}" for key, value in choices.items() if getattr(style, key) != value]
    return f"{name}({', '.join(changes)})" if changes else name


def _is_style(text: str) -> bool:
    return parse(text) is not None


TEXT = Constraint("a style such as 'llama' or 'bert(activation=relu)', of ", _is_style, STYLES)  # as a setting
