"""What every implementation does to a tile of scores: some queries by some keys, or all by all."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from attn.functional import masks


def set_aside(x: Float[Array, "n width"]) -> tuple[Float[Array, "n width"], Bool[Array, "n"]]:
    """Rows with a NaN or an infinity: 0 in their place, and where they were.

    In a matrix product 0 * NaN is NaN, so that what nobody looks at would reach everybody. With 0 in its place it
    reaches nobody, and `masked` gives it back to those who do look.
    """
    tainted = ~jnp.isfinite(x).all(axis=1)
    return jnp.where(tainted[:, None], 0, x), tainted


def masked(
    s: Float[Array, "T S"],
    i: Int[Array, "T 1"],
    j: Int[Array, "1 S"],
    tainted: Bool[Array, "T S"],
    mask: masks.Mask | None,
    real: Bool[Array, "1 S"] | None = None,
) -> Float[Array, "T S"]:
    """The scores of a tile under a mask: -inf where hidden, NaN where visible but tainted.

    Args:
      s: scores; those of -inf count as hidden.
      i, j: positions of queries and keys, in range.
      tainted: pairs whose query, key or value was set aside.
      real: which columns are keys, where the tile is wider than the keys.
    """
    visible = s != -jnp.inf
    if mask is not None:
        visible &= masks.evaluate(mask, i, j)
    if real is not None:
        visible &= real
    return jnp.where(visible, jnp.where(tainted, jnp.nan, s), -jnp.inf)
