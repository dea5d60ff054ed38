"""Multi-head attention as a layer: the learned matrices around `attn.multi_head_attention`, and its mechanism."""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.tree_util import Partial
from jaxtyping import Array, Float

from attn.functional import Dropout, masks, multi_head_attention, multi_head_attention_weights, per_head, scores
from attn.mechanisms.mechanism import (
    Chain,
    HeadParam,
    Layer,
    Mechanism,
    build,
    having,
    named_in_errors,
    scale,
)
from attn.mechanisms.rows import Rows
from attn.nn.style import PLAIN, Style


class KeysValues(NamedTuple):
    """Keys `[S K H]` and values `[S K H]`."""

    key: Float[Array, "S K H"]
    value: Float[Array, "S K H"]


class Sides(NamedTuple):
    """The rows of queries and keys, and the mask of padding and causality, a function of row numbers."""

    q: Rows
    k: Rows
    mask: masks.Mask | None


class Attention(nnx.Module):
    """Multi-head attention: MultiHead(x, m) = sum_n softmax(x W_Q[n] (m W_K[n])^T / sqrt(H)) m W_V[n] W_O[n].

    Keys and values are computed apart from the queries, so that decoding can keep them. With K < N key/value heads,
    head n uses W_K and W_V of number n // (N/K). A style may add the biases b_Q, b_K, b_V and b_O.

    Args:
      mechanism: its departures from the formula.
      layer: its kind and sizes.
      implementation: of `attn.multi_head_attention`.
      shared: mechanisms that layers share; see `attn.mechanisms.mechanism.build`.
      rngs: keys for the initial parameters.
      style: its biases.

    Source: Vaswani et al. 2017, section 3.2.2; the sum over heads is concatenation and projection in one. Grouped
    heads: Ainslie et al. 2023, section 2.2.
    """

    def __init__(
        self,
        mechanism: Mechanism | Chain,
        layer: Layer,
        *,
        implementation: str,
        shared: dict[str, Mechanism],
        rngs: nnx.Rngs,
        style: Style = PLAIN,
    ):
        input_init = nnx.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=0, out_axis=(1, 2))
        output_init = nnx.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=(0, 1), out_axis=2)
        heads = layer.num_heads, layer.head_width
        groups = layer.num_groups or layer.num_heads, layer.head_width
        self.W_Q = nnx.Param(input_init(rngs.params(), (layer.width, *heads)))
        self.W_K = nnx.Param(input_init(rngs.params(), (layer.width, *groups)))
        self.W_V = nnx.Param(input_init(rngs.params(), (layer.width, *groups)))
        self.W_O = nnx.Param(output_init(rngs.params(), (*heads, layer.width)))
        self.b_Q, self.b_K, self.b_V = (_bias(shape, style.qkv_bias) for shape in (heads, groups, groups))
        self.b_O = _bias((layer.width,), style.attention_output_bias)
        self.scale, self.dtype = scale(mechanism, layer.head_width), layer.dtype
        self.implementation, self.num_heads = implementation, layer.num_heads
        layer = dataclasses.replace(layer, scale=self.scale)
        self.mechanism = nnx.List(build(mechanism, layer, rngs, shared))

    def keys_values(self, memory: Float[Array, "S D"], k: Rows, added: Float[Array, "S D"] | float = 0.0) -> KeysValues:
        """Compute the keys and values of a memory with rows `k`; `added` is added to the keys' inputs only."""
        key = self._project((memory + added).astype(self.dtype), self.W_K, self.b_K)
        value = self._project(memory, self.W_V, self.b_V)
        return KeysValues(self._apply_mechanism("key", key, k), self._apply_mechanism("value", value, k))

    def __call__(
        self,
        x: Float[Array, "T D"],
        memory: KeysValues,
        sides: Sides,
        added: Float[Array, "T D"] | float = 0.0,
        *,
        dropout: Dropout | None = None,
        return_weights: bool = False,
        edit: Callable[[Float[Array, "N T S"]], Float[Array, "N T S"]] | None = None,
    ) -> tuple[Float[Array, "T D"], Float[Array, "N T S"] | None]:
        """Attend from `x` to the memory.

        Args:
          x: inputs of the queries.
          memory: from `keys_values`.
          sides: rows of queries and keys, and the mask.
          added: is added to the inputs of the queries.
          dropout: of the attention weights.
          return_weights: also return the attention weights.
          edit: takes the attention weights and returns those that are used.

        Raises:
          ValueError: `edit` together with dropout.
        """
        if edit is not None and dropout is not None:
            raise ValueError("edit: does not go with dropout of the attention weights")
        query = self._project((x + added).astype(self.dtype), self.W_Q, self.b_Q)
        query = self._apply_mechanism("query", query, sides.q)
        options = dict(mask=self._mask(sides), score=self._score(sides), scale=self.scale)
        needs_weights = return_weights or edit is not None
        weights = multi_head_attention_weights(query, memory.key, **options) if needs_weights else None
        if edit is None:
            heads = multi_head_attention(query, *memory, **options, dropout=dropout, implementation=self.implementation)
        else:
            weights = edit(weights)
            heads = _weighted_sum(weights, memory.value)
        out = jnp.einsum("tnh,nhd->td", heads, self.W_O[...].astype(self.dtype))
        return _plus(out, self.b_O), weights if return_weights else None

    def _project(self, x: Float[Array, "T D"], W: nnx.Param, b: nnx.Param | None) -> Float[Array, "T N H"]:
        return _plus(jnp.einsum("td,dnh->tnh", x, W[...].astype(self.dtype)), b)

    def _apply_mechanism(self, name: str, x: Float[Array, "T N H"], rows: Rows) -> Float[Array, "T N H"]:
        """Apply the mechanism's function `name` ("query", "key" or "value") to these vectors, mapped over heads."""
        for part in having(self.mechanism, name):
            of_head, per_heads = _by_head(part, self.num_heads)

            if x.shape[1] != self.num_heads:  # K key/value heads; there are no parameters per head then
                per_heads = per_heads[0], jnp.arange(x.shape[1])

            # of_head is bound now, since the loop reassigns it.
            def change(per_heads, x, of_head=of_head):
                part, head = of_head(*per_heads)
                with named_in_errors(part, name):
                    changed = getattr(part, name)(x, dataclasses.replace(rows, head=head))
                    if (found := shape_and_dtype(changed)) != (expected := shape_and_dtype(x)):
                        raise ValueError(f"returned {found}, must be {expected}, as its argument")
                return changed

            x = jax.vmap(change, in_axes=(0, 1), out_axes=1)(per_heads, x)
        return x

    def _mask(self, sides: Sides) -> masks.Mask | None:
        """Return the mask by row numbers: padding and causality, combined with the mechanism's masks."""
        q, k, mask = sides
        for part in having(self.mechanism, "mask"):
            with named_in_errors(part, "mask"):
                visible = part.mask(q, k)
                if isinstance(visible, masks.Mask):
                    visible = masks.placed(visible, q.placement, k.placement)
                elif visible is not None:
                    visible = masks.as_mask(_by_row_numbers(part, "mask", visible, q, k))
            mask = visible if mask is None else mask if visible is None else mask & visible
        return mask

    def _score(self, sides: Sides) -> scores.Score | None:
        """Return the mechanism's score by row numbers; None if it changes no scores."""
        score = None
        for part in having(self.mechanism, "score"):
            of_head, per_heads = _by_head(part, self.num_heads)
            # Partials are pytrees, so the arrays that they hold get gradients; `per_head` marks one slice per head.
            arguments = per_head(Partial(lambda *x: x, *per_heads)), sides.q, sides.k
            change = scores.from_vectors(Partial(functools.partial(_score_of_head, of_head), *arguments))
            score = change if score is None else score >> change
        return score


def _bias(shape: tuple[int, ...], is_used: bool) -> nnx.Param | None:
    return nnx.Param(jnp.zeros(shape)) if is_used else None


def _plus(x: Float[Array, "..."], bias: nnx.Param | None) -> Float[Array, "..."]:
    return x if bias is None else x + bias[...].astype(x.dtype)


def _weighted_sum(weights: Float[Array, "N T S"], values: Float[Array, "S K H"]) -> Float[Array, "T N H"]:
    """Compute the outputs of all heads from their weights; each group of N/K heads has one head of values."""
    num_groups = values.shape[1]
    weights = weights.reshape(num_groups, -1, *weights.shape[1:])  # [K N/K T S]
    heads = jnp.einsum("kgts,skh->tkgh", weights.astype(values.dtype), values)
    return heads.reshape(heads.shape[0], -1, heads.shape[-1])


def shape_and_dtype(x) -> str:
    """Return text such as "float32[6, 16]", or the type of what is not an array."""
    return f"{x.dtype}{[*x.shape]}" if hasattr(x, "dtype") else type(x).__name__


def _by_head(part: Mechanism, num_heads: int) -> tuple[Callable, tuple]:
    """Return `(parameters of one head, its number) -> (part, number)`, and these two arguments for all heads."""
    graphdef, of_heads, rest = nnx.split(part, HeadParam, ...)
    return (lambda params, head: (nnx.merge(graphdef, params, rest), head)), (of_heads, jnp.arange(num_heads))


def _score_of_head(of_head: Callable, per_heads: Callable, q: Rows, k: Rows, query, key) -> scores.Score | None:
    """Return the score of one head by row numbers, given its queries `[T H]` and keys `[S H]`."""
    part, head = of_head(*per_heads())
    q, k = (dataclasses.replace(rows, head=head, vectors=x) for rows, x in ((q, query), (k, key)))
    with named_in_errors(part, "score"):
        score = part.score(q, k)
        if isinstance(score, scores.Score):
            return scores.placed(score, q.placement, k.placement)
        return None if score is None else scores.as_score(_by_row_numbers(part, "score", score, q, k))


def _by_row_numbers(part: Mechanism, name: str, function, q: Rows, k: Rows) -> Callable:
    """Turn a mechanism's mask or score of the rows of a tile into one of their numbers."""
    if not callable(function):
        raise TypeError(f"returned {type(function).__name__}, must be a {name} of `attn`, a function, or None")

    def call(*arguments):  # (i, j) of a mask, (s, i, j) of a score
        *s, i, j = arguments
        with named_in_errors(part, name):
            return function(*s, q.tile(i), k.tile(j))

    call.__name__ = type(part).__name__  # for messages about its results
    return call
