"""Dropout of attention weights, with random bits that every implementation can recompute for any tile."""

import dataclasses
import numbers

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from attn.functional.hashing import mix
from attn.functional.mods import register

_GOLDEN = np.uint32(0x9E3779B9)  # 2^32 / golden ratio: spreads consecutive integers over the whole range


@register
@dataclasses.dataclass(frozen=True, eq=False)
class Dropout:
    """Drop attention weights with probability `rate` and scale the kept ones by 1 / (1 - rate).

    A weight is dropped by (key, head, i, j) alone. So the same weights are dropped for any tiling, under `vmap` over
    heads, and when they are recomputed in a backward pass. Use another key for each example of a batch.

    Args:
      rate: number in [0, 1).
      key: JAX random key, needed when rate > 0.
      head: index of the head; the multi-head functions set it.
      first_head, first_query, first_key: what heads, queries and keys are counted from; `part` sets them.

    Raises:
      TypeError: rate is not a number, or key is not a PRNG key.
      ValueError: rate outside [0, 1), or rate > 0 without a key.

    Source: Srivastava et al. 2014; on attention weights as in Vaswani et al. 2017, section 5.4.
    """

    rate: float | np.floating
    key: Array | None = None
    head: int | Array = 0
    first_head: int | Array = 0
    first_query: int | Array = 0
    first_key: int | Array = 0

    def __post_init__(self):
        if isinstance(self.rate, bool) or not isinstance(self.rate, numbers.Real):
            raise TypeError(f"Dropout: rate must be a Python number, got {self.rate!r}")
        object.__setattr__(self, "rate", float(self.rate))  # a NumPy number could change the dtype of the weights
        if not 0 <= self.rate < 1:
            raise ValueError(f"Dropout: rate must lie in [0, 1), got {self.rate}")
        if self.rate > 0 and self.key is None:
            raise ValueError(f"Dropout: rate {self.rate} needs a random key: Dropout({self.rate}, key)")
        if self.key is not None and not _is_key(self.key):
            raise TypeError(f"Dropout: key must be a random key of JAX, such as jax.random.key(0), got {self.key!r}")

    def for_head(self, head: Int[Array, ""]) -> "Dropout":
        """Return the same dropout with the random bits of head number `head`."""
        return dataclasses.replace(self, head=head)

    def part(self, *, heads: int | Array = 0, queries: int | Array = 0, keys: int | Array = 0) -> "Dropout":
        """Return the dropout of a part of the heads, queries and keys, from these on: it drops what the whole drops."""
        first = {"first_head": heads, "first_query": queries, "first_key": keys}
        return dataclasses.replace(self, **{name: _plus(getattr(self, name), x) for name, x in first.items()})

    def keep(self, i: Int[Array, "..."], j: Int[Array, "..."]) -> Bool[Array, "..."]:
        """Return True for the weights that are kept, at query positions `i` and key positions `j` (broadcast)."""
        words = jax.random.bits(self.key, (2,), jnp.uint32)
        starts = (self.head, self.first_head), (i, self.first_query), (j, self.first_key)
        head, i, j = (jnp.asarray(_plus(*each)).astype(jnp.uint32) for each in starts)
        row = mix(mix(words[0] + head * _GOLDEN) + i * _GOLDEN)
        column = mix(words[1] + j * _GOLDEN)
        return mix(row ^ column) >= jnp.uint32(int(self.rate * 2**32))

    def __call__(self, weights: Array, i: Int[Array, "..."], j: Int[Array, "..."]) -> Array:
        """Drop weights of a tile and rescale the others."""
        if self.rate == 0:
            return weights
        return jnp.where(self.keep(i, j), weights / (1 - self.rate), 0)


def check_dropout(dropout):
    """Check that dropout is `attn.Dropout` or None.

    Raises:
      TypeError: anything else.
    """
    if dropout is not None and not isinstance(dropout, Dropout):
        raise TypeError(f"dropout must be attn.Dropout(rate, key) or None, got {dropout!r}")


def _plus(x, first):
    """Return x + first, and x itself where first is the number 0: programs of whole calls do not add it."""
    return x if isinstance(first, int) and first == 0 else x + first


def _is_key(key) -> bool:
    dtype = getattr(key, "dtype", None)
    return dtype is not None and (jnp.issubdtype(dtype, jax.dtypes.prng_key) or dtype == jnp.uint32)
