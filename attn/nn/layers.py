"""The layers of the Transformer: thin holders of parameters over `attn.functional`, written for one example."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from attn.functional import Dropout, multi_head_attention, multi_head_attention_weights
from attn.functional.scores import as_score
from attn.nn.encodings import Encoding
from attn.nn.places import Places, Side
from attn.nn.variants import Variant


class KeysValues(NamedTuple):
    """What queries attend to: keys `[S N H]` and values `[S N H]`."""

    key: Float[Array, "S N H"]
    value: Float[Array, "S N H"]


class Attention(nnx.Module):
    """Multi-head attention: MultiHead(x, m) = sum_n softmax(x W_Q[n] (m W_K[n])^T / sqrt(H)) m W_V[n] W_O[n].

    Keys and values are made apart from the queries, so that decoding can keep them. Without biases.

    Args:
      width: D of input, memory and output.
      num_heads, head_width: N and H.
      encoding: turns queries and keys by their positions, or changes scores, or leaves both.
      variant: what changes scores and masks besides, by positions.
      dtype: of the computation; parameters are float32.

    Source: Vaswani et al. 2017, section 3.2.2; the sum over heads is concatenation and projection in one.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        head_width: int,
        *,
        encoding: Encoding,
        variant: Variant,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        into = nnx.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=0, out_axis=(1, 2))
        out_of = nnx.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=(0, 1), out_axis=2)
        self.W_Q = nnx.Param(into(rngs.params(), (width, num_heads, head_width)))
        self.W_K = nnx.Param(into(rngs.params(), (width, num_heads, head_width)))
        self.W_V = nnx.Param(into(rngs.params(), (width, num_heads, head_width)))
        self.W_O = nnx.Param(out_of(rngs.params(), (num_heads, head_width, width)))
        self.encoding, self.variant = encoding, variant
        self.dtype = dtype
        learns = encoding.parameters
        made = {} if learns is None else learns(rngs.params(), width, num_heads, head_width)
        self.learned = nnx.Dict({name: nnx.Param(value) for name, value in made.items()})

    def keys_values(
        self, memory: Float[Array, "S D"], side: Side, added: Float[Array, "S D"] | float = 0.0
    ) -> KeysValues:
        """The keys and values of a memory whose rows stand where `side` says; `added` goes into keys alone."""
        turn = self.encoding.turn_keys or self.encoding.turn
        return KeysValues(
            turn(self._project((memory + added).astype(self.dtype), self.W_K), side), self._project(memory, self.W_V)
        )

    def __call__(
        self,
        x: Float[Array, "T D"],
        memory: KeysValues,
        *,
        places: Places,
        mask,
        added: Float[Array, "T D"] | float = 0.0,
        dropout: Dropout | None = None,
        return_weights: bool = False,
    ) -> tuple[Float[Array, "T D"], Float[Array, "N T S"] | None]:
        """What the rows of `x` read from the memory; and, if asked for, the weights.

        Args:
          x: what queries are made of.
          memory: from `keys_values`.
          places: where queries and keys stand.
          mask: who may be attended to.
          added: to what queries are made of.
          dropout: of weights.
          return_weights: whether to return them, too.
        """
        query = self.encoding.turn(self._project((x + added).astype(self.dtype), self.W_Q), places.queries)
        how = self._varied(mask, query, memory.key, places)
        heads = multi_head_attention(query, *memory, **how, dropout=dropout, implementation="fastest")
        out = jnp.einsum("tnh,nhd->td", heads, self.W_O[...].astype(self.dtype))
        return out, multi_head_attention_weights(query, memory.key, **how) if return_weights else None

    def _varied(self, mask, query, key, places: Places) -> dict:
        """Mask, score and scale; the variant's functions see positions that count from the start of the sequence."""
        variant, encoding, first = self.variant, self.encoding, places.queries.index[0]
        score = None
        if encoding.score is not None:
            learned = {name: each[...] for name, each in self.learned.items()}
            score = encoding.score(learned, query, key, places)
        if variant.score is not None:
            varied = as_score(lambda s, i, j: variant.score(s, i + first, j))
            score = varied if score is None else as_score(score) >> varied
        if variant.mask is not None:
            mask = mask & (lambda i, j: variant.mask(i + first, j))
        return dict(mask=mask, score=score, scale=variant.scale)

    def _project(self, x: Float[Array, "T D"], W: nnx.Param) -> Float[Array, "T N H"]:
        return jnp.einsum("td,dnh->tnh", x, W[...].astype(self.dtype))


class FeedForward(nnx.Module):
    """FFN(x) = max(0, x W_1 + b_1) W_2 + b_2, for each position alone.

    Args:
      width, hidden: D and F.
      dtype: of the computation; parameters are float32.

    Source: Vaswani et al. 2017, section 3.3.
    """

    def __init__(self, width: int, hidden: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.expand = nnx.Linear(width, hidden, dtype=dtype, kernel_init=nnx.initializers.he_normal(), rngs=rngs)
        self.contract = nnx.Linear(hidden, width, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "T D"]) -> Float[Array, "T D"]:
        return self.contract(nnx.relu(self.expand(x)))


class Residual(nnx.Module):
    """The connection around a block: x + f(norm(x)) ("pre"), or norm(x + f(x)) ("post").

    Args:
      width: D.
      norm: "pre" or "post".
      dropout: rate of dropping the block's output.
      dtype: of the computation; parameters are float32.

    Source: post: Vaswani et al. 2017, section 3.1; pre: Xiong et al. 2020.
    """

    def __init__(self, width: int, *, norm: str, dropout: float, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.norm = nnx.LayerNorm(width, dtype=dtype, rngs=rngs)
        self.pre = norm == "pre"
        self.dropout = dropout

    def enter(self, x: Float[Array, "T D"]) -> Float[Array, "T D"]:
        """What the block sees."""
        return self.norm(x) if self.pre else x

    def leave(self, x: Float[Array, "T D"], out: Float[Array, "T D"], key: Array | None) -> Float[Array, "T D"]:
        """The stream after the block's output."""
        x = x + dropout(out, self.dropout, key)
        return x if self.pre else self.norm(x)


def dropout(x: Float[Array, "..."], rate: float, key: Array | None) -> Float[Array, "..."]:
    """Zero each element with probability `rate` and scale the rest by 1 / (1 - rate); without a key, nothing.

    Source: Srivastava et al. 2014.
    """
    if key is None or rate == 0:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0)


def weights_dropout(rate: float, key: Array | None) -> Dropout | None:
    """Dropout for attention weights; without a key or a rate, None."""
    return None if key is None or rate == 0 else Dropout(rate, key)
