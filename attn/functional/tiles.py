"""What every implementation does to a tile of scores: some queries by some keys, or all by all."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from attn.functional import masks, scores


def set_aside(x: Float[Array, "n width"]) -> tuple[Float[Array, "n width"], Bool[Array, "n"]]:
    """Rows with a NaN or an infinity: 0 in their place, and where they were.

    In a matrix product 0 * NaN is NaN, so that what nobody looks at would reach everybody. With 0 in its place it
    reaches nobody, and `modified` gives it back to those who do look.
    """
    tainted = ~jnp.isfinite(x).all(axis=1)
    return jnp.where(tainted[:, None], 0, x), tainted


def modified(
    s: Float[Array, "T S"],
    i: Int[Array, "T 1"],
    j: Int[Array, "1 S"],
    tainted: Bool[Array, "T S"],
    *,
    mask: masks.Mask | None,
    score: scores.Score | None,
    real: Bool[Array, "1 S"] | None = None,
) -> Float[Array, "T S"]:
    """The scaled products `s` of a tile after score and mask: -inf where hidden, NaN where visible but tainted.

    Args:
      i, j: positions of queries and keys, in range.
      tainted: pairs whose query, key or value was set aside.
      real: which columns are keys, where the tile is wider than the keys.
    """
    visible = real
    if mask is not None:
        visible = _both(visible, masks.evaluate(mask, i, j))
    if score is not None:
        s = scores.evaluate(score, s, i, j)
        visible = _both(visible, s != -jnp.inf)
    if visible is None:
        return jnp.where(tainted, jnp.nan, s)
    return jnp.where(visible & tainted, jnp.nan, jnp.where(visible, s, -jnp.inf))


def _both(visible, also):
    return also if visible is None else visible & also
