"""One block of a Transformer, and a stack of them, written for one example.

A block is self-attention, cross-attention if it has a memory, and feed-forward. A stack that decodes has a key/value
cache with a capacity, so that a prompt, one token and all tokens at once are the same call.

Source: Vaswani et al. 2017, section 3.1.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from attn.functional.implementations import NAMES
from attn.mechanisms.mechanism import Chain, Layer, Mechanism, having, named_in_errors
from attn.mechanisms.rows import Rows
from attn.nn.attention import Attention, KeysValues, Sides, shape_and_dtype
from attn.nn.dropout import dropout, weights_dropout
from attn.nn.model import ModelSettings, split
from attn.nn.sharding import axis_of, constrain
from attn.nn.style import ACTIVATIONS, TEXT, Style, parse
from attn.nn.taps import NO_BLOCK_TAPS, BlockTaps, Context, Tapped
from attn.settings import between, one_of, setting


@dataclasses.dataclass(frozen=True)
class BlockSettings(ModelSettings):
    """Settings of models that are made of blocks; dropout is on embeddings, weights and the output of each sublayer.

    Attributes:
      num_heads: N, the same in every attention layer.
      num_groups: K, the number of key/value heads, a divisor of N; None for N.
      head_width: H; None for width / num_heads, which must then be an integer.
      feed_forward_width: F.
      style: of the blocks, as `attn.nn.style.parse` reads it.
      norm: "pre" or "post"; None for that of the style.
      implementation: of attention; see `attn.attention`.
    """

    num_heads: int = setting(4, between(1, 65_536))
    num_groups: int | None = setting(None, between(1, 65_536))
    head_width: int | None = setting(None, between(1, 65_536))
    feed_forward_width: int = setting(128, between(1, 65_536))
    style: str = setting("plain", TEXT)
    norm: str | None = setting(None, one_of(("pre", "post")))
    implementation: str = setting("fastest", one_of(NAMES))

    def __post_init__(self):
        if self.norm is None:
            object.__setattr__(self, "norm", parse(self.style).norm)

    @property
    def choices(self) -> Style:
        """The style, with the place of the norm that the settings name."""
        return dataclasses.replace(parse(self.style), norm=self.norm)


class FeedForward(nnx.Module):
    """FFN(x) = max(0, x W_1 + b_1) W_2 + b_2, applied to each position separately.

    A style may have another activation a instead of max(0, .), no biases, or a gate: (a(x W_g) * x W_1) W_2.

    Args:
      settings: width D, feed-forward width F, style, and dtype of the computation; parameters are float32.
      rngs: keys for the initial parameters.

    Source: Vaswani et al. 2017, section 3.3; gate: Shazeer 2020, section 2.
    """

    def __init__(self, settings: BlockSettings, rngs: nnx.Rngs):
        style, (D, F) = settings.choices, (settings.width, settings.feed_forward_width)
        options = dict(use_bias=style.feed_forward_bias, dtype=jnp.dtype(settings.dtype), rngs=rngs)
        self.expand = nnx.Linear(D, F, kernel_init=nnx.initializers.he_normal(), **options)
        self.contract = nnx.Linear(F, D, **options)
        self.gate = nnx.Linear(D, F, **options) if style.gated else None
        self.activation = style.activation  # its name, so that equal models have equal structures

    def __call__(self, x: Float[Array, "T D"]) -> Float[Array, "T D"]:
        hidden = self.expand(x)
        activate = ACTIVATIONS[self.activation]
        hidden = activate(hidden) if self.gate is None else activate(self.gate(x)) * hidden
        return self.contract(constrain(hidden, "tokens", "feed_forward"))


class Residual(nnx.Module):
    """The residual connection around a sublayer f: x + f(norm(x)) ("pre"), or norm(x + f(x)) ("post").

    Args:
      settings: width D, style, and dropout of the sublayer's output.
      rngs: keys for the initial parameters.

    Source: post: Vaswani et al. 2017, section 3.1; pre: Xiong et al. 2020.
    """

    def __init__(self, settings: BlockSettings, rngs: nnx.Rngs):
        self.norm = settings.choices.make_norm(settings.width, jnp.dtype(settings.dtype), rngs)
        self.pre, self.rate = settings.norm == "pre", settings.dropout

    def enter(self, x: Float[Array, "T D"]) -> Float[Array, "T D"]:
        """Return the input of the sublayer."""
        return self.norm(x) if self.pre else x

    def leave(self, x: Float[Array, "T D"], out: Float[Array, "T D"], key: Array | None) -> Float[Array, "T D"]:
        """Return the residual stream after the sublayer, whose output is `out`."""
        x = constrain(x + dropout(out, self.rate, key), "tokens", "width")
        return x if self.pre else self.norm(x)


class Memory(NamedTuple):
    """The other text, which cross-attention attends to.

    Attributes:
      keys_values: the block's keys and values; for a stack, those of each block.
      sides: rows of the queries and of the other text, and the mask.
      added: `[T D]`, added to the inputs of the queries.
    """

    keys_values: KeysValues | tuple[KeysValues, ...]
    sides: Sides
    added: Float[Array, "T D"] | float


class Block(nnx.Module):
    """Self-attention, cross-attention to a memory if there is one, and feed-forward.

    Args:
      settings: of all blocks.
      attention: mechanism and layer of the self-attention.
      cross: mechanism and layer of the cross-attention; None for a block without it.
      shared: mechanisms that the model has once.
      rngs: keys for the initial parameters.
    """

    def __init__(
        self,
        settings: BlockSettings,
        attention: tuple[Mechanism | Chain, Layer],
        cross: tuple[Mechanism | Chain, Layer] | None,
        *,
        shared: dict[str, Mechanism],
        rngs: nnx.Rngs,
    ):
        options = dict(implementation=settings.implementation, shared=shared, rngs=rngs, style=settings.choices)
        self.attention, self.attention_residual = Attention(*attention, **options), Residual(settings, rngs)
        self.cross = None if cross is None else Attention(*cross, **options)
        self.cross_residual = None if cross is None else Residual(settings, rngs)
        self.feed_forward = FeedForward(settings, rngs)
        self.feed_forward_residual = Residual(settings, rngs)

    def __call__(
        self,
        x: Float[Array, "T D"],
        sides: Sides,
        cache: tuple[KeysValues, int | Int[Array, ""]] | None,
        memory: Memory | None,
        key: Array | None,
        return_weights: bool,
        taps: BlockTaps = NO_BLOCK_TAPS,
    ):
        """Compute `x` after the block.

        Args:
          x: before the block.
          sides: rows and mask of the self-attention.
          cache: keys and values of the self-attention, and the row at which the new ones are written; None to attend
            to the rows of `x` only.
          memory: for the cross-attention.
          key: for dropout.
          return_weights: also return the attention weights.
          taps: changes of this block's values.

        Returns:
          (x, keys and values of the self-attention, weights of self-attention and cross-attention or None). Weights are
          `[N T S]`, where S is the number of keys: in self-attention the capacity of the cache, or T.
        """
        rate, keys = self.attention_residual.rate, iter(split(key, 3 if memory is None else 5))

        entered = self.attention_residual.enter(x)
        self_kv = self.attention.keys_values(entered, sides.q)
        if cache is not None:
            cached, index = cache
            self_kv = jax.tree.map(lambda old, new: _written(old, new, index), cached, self_kv)
        options = dict(dropout=weights_dropout(rate, next(keys)), return_weights=return_weights, taps=taps.attention)
        out, weights = self.attention(entered, self_kv, sides, **options)
        x = self.attention_residual.leave(x, out, next(keys))

        cross_weights = None
        if memory is not None:
            options = dict(dropout=weights_dropout(rate, next(keys)), return_weights=return_weights, taps=taps.cross)
            out, cross_weights = self.cross(self.cross_residual.enter(x), *memory, **options)
            x = self.cross_residual.leave(x, out, next(keys))

        out = self.feed_forward(self.feed_forward_residual.enter(x))
        x = self.feed_forward_residual.leave(x, out, next(keys))
        x = x if taps.hidden is None else taps.hidden(x, Context(sides.q, sides.k))
        return x, self_kv, (weights, cross_weights)


class Stack(Tapped):
    """A sequence of blocks.

    Args:
      settings: of all blocks.
      num_layers: L.
      attention: mechanism of the self-attention, and its kind; see `attn.mechanisms.mechanism.Layer`.
      cross: mechanism of the cross-attention; None for blocks without it.
      shared: mechanisms that the model has once.
      distinct: number of blocks with parameters of their own, each used L / distinct times in succession; None for L.
      rngs: keys for the initial parameters.

    Source: blocks used several times: Lan et al. 2020, section 3.1.
    """

    def __init__(
        self,
        settings: BlockSettings,
        num_layers: int,
        attention: tuple[Mechanism | Chain, str],
        cross: Mechanism | Chain | None = None,
        *,
        shared: dict[str, Mechanism],
        rngs: nnx.Rngs,
        distinct: int | None = None,
    ):
        # A copy, to which the blocks add the mechanisms that this stack alone shares.
        (mechanism, kind), options = attention, dict(shared=dict(shared), rngs=rngs)
        self.kind, self.taps = kind, ()
        layers = (mechanism, layer(settings, kind)), None if cross is None else (cross, layer(settings, "cross"))
        blocks = [Block(settings, *layers, **options) for _ in range(distinct or num_layers)]
        self.blocks = nnx.List([block for block in blocks for _ in range(num_layers // len(blocks))])
        groups = settings.num_groups or settings.num_heads
        self.cache_shape, self.dtype = (groups, layer(settings, kind).head_width), jnp.dtype(settings.dtype)

    def add_norm(self, settings: BlockSettings, rngs: nnx.Rngs):
        """Make the norm after the last block, which only pre-norm blocks need; every model calls it once.

        It is not made with the blocks, since the order in which a model draws its random keys decides its parameters.
        """
        is_pre = settings.norm == "pre"
        self.norm = settings.choices.make_norm(settings.width, self.dtype, rngs) if is_pre else None

    def cache(self, capacity: int) -> tuple[KeysValues, ...]:
        """Make an empty key/value cache of every layer."""
        empty = jnp.zeros((capacity, *self.cache_shape), self.dtype)
        return tuple(KeysValues(empty, empty) for _ in self.blocks)

    def added(self, rows: Rows, width: int | None = None) -> Float[Array, "T E"] | float:
        """Compute the sum that the self-attention's mechanism adds to the embeddings, of this width; None for D."""
        return _sum_of_embeddings(self.blocks[0].attention, rows, width)

    def cross_added(self, rows: Rows) -> Float[Array, "T D"] | float:
        """Compute the sum that the cross-attention's mechanism adds to the inputs of queries and keys."""
        return _sum_of_embeddings(self.blocks[0].cross, rows)

    def memory(self, encoded: Float[Array, "S D"], k: Rows) -> tuple[KeysValues, ...]:
        """Compute the keys and values of each layer's cross-attention to an encoded text with rows `k`."""
        added = self.cross_added(k)
        return tuple(block.cross.keys_values(encoded, k, added) for block in self.blocks)

    def __call__(
        self,
        x: Float[Array, "T D"],
        sides: Sides,
        *,
        cache: tuple[tuple[KeysValues, ...], int | Int[Array, ""]] | None = None,
        memory: Memory | None = None,
        key: Array | None = None,
        return_weights: bool = False,
    ):
        """Compute `x` after the last block and norm.

        Args:
          x: embeddings, with everything that mechanisms add to them.
          sides: rows and mask of the self-attention.
          cache: keys and values of each layer, and the row at which the new ones are written; None to attend to the
            rows of `x` only.
          memory: for the cross-attention.
          key: for dropout.
          return_weights: also return the attention weights.

        Returns:
          As of `Block`, of all layers: (x, keys and values of each layer, both weights, `[L N T S]`).
        """
        caches, index = (None, None) if cache is None else cache
        x, all_keys_values, all_weights = constrain(x, "tokens", "width"), [], []
        # One key more than blocks: the last one is for the dropout of the embeddings.
        for number, (block, block_key) in enumerate(zip(self.blocks, split(key, len(self.blocks) + 1))):
            block_cache = None if cache is None else (caches[number], index)
            block_memory = memory and memory._replace(keys_values=memory.keys_values[number])
            inputs = x, sides, block_cache, block_memory, block_key
            x, keys_values, weights = block(*inputs, return_weights, self.taps_of(number))
            all_keys_values.append(keys_values)
            all_weights.append(weights)
        x = x if self.norm is None else self.norm(x)
        return x, tuple(all_keys_values), jax.tree.map(lambda *layers: jnp.stack(layers), *all_weights)


def _written(cached: Float[Array, "C K H"], new: Float[Array, "T K H"], index: int | Int[Array, ""]):
    """Return the cached rows after writing new ones from row `index` on."""
    if isinstance(index, int) and index == 0 and len(new) == len(cached):
        return new  # also on a mesh that divides the rows, where no row has to move then
    if isinstance(index, int) and axis_of("tokens") is not None:
        # A padded array moves to the next device, row by row, where a written slice would be gathered by all.
        before_and_after = index, len(cached) - index - len(new)
        row = jnp.arange(len(cached))[:, None, None]
        is_new = (row >= index) & (row < index + len(new))
        return jnp.where(is_new, jnp.pad(new, (before_and_after, (0, 0), (0, 0))), cached)
    return jax.lax.dynamic_update_slice_in_dim(cached, new, index, axis=0)


def layer(settings: BlockSettings, kind: str) -> Layer:
    """Describe an attention layer of a kind: "encoder", "decoder" or "cross"."""
    head_width = settings.head_width or settings.width // settings.num_heads
    sizes = settings.width, settings.num_heads, head_width
    return Layer(kind, *sizes, head_width**-0.5, jnp.dtype(settings.dtype), settings.num_groups)


def _sum_of_embeddings(attention: Attention, rows: Rows, width: int | None = None) -> Float[Array, "T E"] | float:
    """Compute the sum of all that an attention layer's mechanism adds to the embeddings of these rows."""
    total, shape = 0, (*rows.row.shape, width or attention.W_Q.shape[0])
    for part in having(attention.mechanism, "embedding"):
        with named_in_errors(part, "embedding"):
            added = part.embedding(rows)
            if jnp.shape(added) != shape:
                raise ValueError(f"returned {shape_and_dtype(added)}, must be of shape {[*shape]}")
        total = total + added
    return total
