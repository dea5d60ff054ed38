"""Multi-head attention as a layer: the learned matrices around `attn.multi_head_attention`, and its mechanism."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from attn.functional import Dropout, multi_head_attention_weights, scores
from attn.mechanisms.mechanism import Chain, Layer, Mechanism, build, having, named_in_errors, scale
from attn.mechanisms.rows import Rows
from attn.nn.departures import Departures, Sides, by_head, shape_and_dtype
from attn.nn.on_mesh import attend_on_mesh
from attn.nn.sharding import constrain
from attn.nn.style import PLAIN, Style
from attn.nn.taps import NO_TAPS, Context, Taps

_HEADS = "tokens", "heads", "head_width"  # the axes of queries and outputs of heads


class KeysValues(NamedTuple):
    """Keys `[S K H]` and values `[S K H]`."""

    key: Float[Array, "S K H"]
    value: Float[Array, "S K H"]


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
        key, value = self._apply_mechanism("key", key, k), self._apply_mechanism("value", value, k)
        return KeysValues(*(constrain(x, "tokens", "groups", "head_width") for x in (key, value)))

    def __call__(
        self,
        x: Float[Array, "T D"],
        memory: KeysValues,
        sides: Sides,
        added: Float[Array, "T D"] | float = 0.0,
        *,
        dropout: Dropout | None = None,
        return_weights: bool = False,
        taps: Taps = NO_TAPS,
    ) -> tuple[Float[Array, "T D"], Float[Array, "N T S"] | None]:
        """Attend from `x` to the memory.

        Args:
          x: inputs of the queries.
          memory: from `keys_values`.
          sides: rows of queries and keys, and the mask.
          added: is added to the inputs of the queries.
          dropout: of the attention weights.
          return_weights: also return the attention weights.
          taps: change the attention weights and the outputs of the heads.

        Raises:
          ValueError: changed weights together with dropout.
        """
        if taps.weights is not None and dropout is not None:
            raise ValueError("weights: a change does not go with dropout of the attention weights")
        query = self._project((x + added).astype(self.dtype), self.W_Q, self.b_Q)
        query = constrain(self._apply_mechanism("query", query, sides.q), *_HEADS)
        departures, weights = Departures(self.mechanism, sides, jnp.arange(self.num_heads), dropout), None
        if return_weights or taps.weights is not None:
            options = dict(mask=departures.mask(), score=departures.score(), scale=self.scale)
            weights = multi_head_attention_weights(query, memory.key, **options)
        if taps.weights is None:
            heads = attend_on_mesh(query, memory, departures, scale=self.scale, implementation=self.implementation)
        else:
            uniform = functools.partial(_uniform_weights, query, memory.key, options)
            # A row of padding sees no key: a change that divides by the sum of a row would make it NaN, and 0 * NaN in
            # later layers would carry that to all rows.
            sees_a_key = (weights != 0).any(axis=-1, keepdims=True)
            weights = jnp.where(sees_a_key, taps.weights(weights, Context(sides.q, sides.k, uniform)), 0)
            heads = _weighted_sum(weights, memory.value)
        heads = heads if taps.heads is None else taps.heads(heads, Context(sides.q, sides.k))
        heads = constrain(heads, *_HEADS)
        out = jnp.einsum("tnh,nhd->td", heads, self.W_O[...].astype(self.dtype))
        return _plus(out, self.b_O), weights if return_weights else None

    def _project(self, x: Float[Array, "T D"], W: nnx.Param, b: nnx.Param | None) -> Float[Array, "T N H"]:
        return _plus(jnp.einsum("td,dnh->tnh", x, W[...].astype(self.dtype)), b)

    def _apply_mechanism(self, name: str, x: Float[Array, "T N H"], rows: Rows) -> Float[Array, "T N H"]:
        """Apply the mechanism's function `name` ("query", "key" or "value") to these vectors, mapped over heads."""
        for part in having(self.mechanism, name):
            of_head, per_heads = by_head(part, jnp.arange(self.num_heads))

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


def _bias(shape: tuple[int, ...], is_used: bool) -> nnx.Param | None:
    return nnx.Param(jnp.zeros(shape)) if is_used else None


def _plus(x: Float[Array, "..."], bias: nnx.Param | None) -> Float[Array, "..."]:
    return x if bias is None else x + bias[...].astype(x.dtype)


def _uniform_weights(query, key, options: dict) -> Float[Array, "N T S"]:
    """Compute weights that are equal over all keys that a query may attend to: every score but -inf becomes 0."""
    equal = scores.function(lambda s, i, j: jnp.where(jnp.isneginf(s), s, 0.0))
    score = equal if options["score"] is None else options["score"] >> equal
    return multi_head_attention_weights(query, key, **options | dict(score=score))


def _weighted_sum(weights: Float[Array, "N T S"], values: Float[Array, "S K H"]) -> Float[Array, "T N H"]:
    """Compute the outputs of all heads from their weights; each group of N/K heads has one head of values."""
    num_groups = values.shape[1]
    weights = weights.reshape(num_groups, -1, *weights.shape[1:])  # [K N/K T S]
    heads = jnp.einsum("kgts,skh->tkgh", weights.astype(values.dtype), values)
    return heads.reshape(heads.shape[0], -1, heads.shape[-1])
