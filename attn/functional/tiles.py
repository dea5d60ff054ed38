"""What every implementation does to a tile of scores: some queries by some keys, or all by all."""

import functools
import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Shaped

from attn.functional import masks


class Normalizer(NamedTuple):
    """The sum of exp(score) over the keys of each query, as total * exp(peak).

    The two stay apart: where the peak is large, the logarithm of the total would be lost in a sum with it, and with it
    the weights exp(score - peak) / total that derivatives are made of.

    Attributes:
      peak: the largest score; 0 where no key is visible.
      total: the sum of exp(score - peak); 0 where no key is visible.
    """

    peak: Float[Array, "*T"]
    total: Float[Array, "*T"]

    def inverse(self) -> Float[Array, "*T"]:
        """1 / total, and 1 where no key is visible."""
        return 1 / jnp.where(self.total == 0, 1, self.total)

    def logsumexp(self) -> Float[Array, "*T"]:
        """log sum exp(score); -inf where no key is visible."""
        empty = self.total == 0
        return jnp.where(empty, -jnp.inf, self.peak + jnp.log(jnp.where(empty, 1, self.total)))


def gathered(x: Float[Array, "n width"]) -> Float[Array, "n width"]:
    """On an explicit mesh, bring the rows of all devices to each of them; elsewhere do nothing."""
    return sharded_along(x, None)


def sharded_along(x: Shaped[Array | np.ndarray, "n *width"], axes) -> Shaped[Array | np.ndarray, "n *width"]:
    """On an explicit mesh, distribute the rows over these axes of the mesh."""
    first, *rest = jax.typeof(x).sharding.spec or (None,)
    return x if first == axes else jax.sharding.reshard(x, PartitionSpec(axes, *rest))


def zero_nonfinite_rows(x: Float[Array, "n width"]) -> tuple[Float[Array, "n width"], Bool[Array, "n"]]:
    """Replace rows with a NaN or an infinity by 0, and tell which they were.

    0 * NaN is NaN, so a NaN in a masked key would contaminate every row. `mark_nonfinite` gives it back to those who
    see it.
    """
    nonfinite = ~jnp.isfinite(x).all(axis=1)
    return jnp.where(nonfinite[:, None], 0, x), nonfinite


def zero_hidden_values(value: Float[Array, "S Hv"], visible: Bool[Array, "T S"]) -> Float[Array, "S Hv"]:
    """Replace by 0 the values that no query of a tile sees, whatever they are, NaN too.

    The choice does not look at the values, so that attention stays linear in them (`jax.linear_transpose`).
    """
    return jnp.where(visible.any(axis=0)[:, None], value, 0)


def visible_pairs(
    s: Float[Array, "T S"] | None,
    i: Int[Array, "T 1"],
    j: Int[Array, "1 S"],
    mask: masks.Mask | None,
    real: Bool[Array, "1 S"] | None = None,
) -> Bool[Array, "T S"]:
    """Which pairs of a tile are visible.

    Args:
      s: what a score has made, where -inf hides; None where there is no score, so that what heads see alike stays one
        array for all of them.
      i, j: positions of queries and keys, in range.
      mask: which pairs are visible.
      real: which columns are keys, where the tile is wider than the keys.
    """
    parts = [] if s is None else [s != -jnp.inf]
    parts += [] if mask is None else [masks.evaluate(mask, i, j)]
    parts += [] if real is None else [real]
    return jnp.broadcast_to(functools.reduce(operator.and_, parts), (i.shape[0], j.shape[1]))


def mark_nonfinite(
    s: Float[Array, "T S"], visible: Bool[Array, "T S"], nonfinite: Bool[Array, "T S"]
) -> Float[Array, "T S"]:
    """The scores, NaN at the visible pairs whose query or key was not finite."""
    return jnp.where(visible & nonfinite, jnp.nan, s)
