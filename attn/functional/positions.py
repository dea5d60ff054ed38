"""Positions: encodings of the position of each token, since attention alone sees its input as a set.

Additive encodings return rows to add to embeddings; `rotary` rotates queries and keys; `alibi_slopes` and
`relative_buckets` are for scores; `randomized` draws positions for any of them; `none` adds nothing. Positions are
integers or real numbers, in tokens.
"""

import math
import operator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num

from attn.functional import dtypes


def sinusoidal(positions: Num[Array, "T"], width: int, *, base: dtypes.Real = 10_000.0) -> Float[Array, "T D"]:
    """Encode positions by sines and cosines of geometrically spaced frequencies.

        PE(t, 2m) = sin(t / base^(2m/D)),  PE(t, 2m+1) = cos(t / base^(2m/D))

    Args:
      positions: `[T]`.
      width: D; if odd, the last cosine is left out.
      base: the longest wavelength is 2 pi base tokens.

    Returns:
      `[T D]` in float32 or wider.

    Raises:
      ValueError: wrong rank, or width < 1.

    Source: Vaswani et al. 2017, section 3.5.
    """
    positions = _check_positions(positions)
    if width < 1:
        raise ValueError(f"sinusoidal: width must be at least 1, got {width}")
    angles = _angles(positions, width, base)
    return jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1).reshape(len(positions), -1)[:, :width]


def learned(positions: Int[Array, "T"], table: Float[Array, "P D"]) -> Float[Array, "T D"]:
    """Look positions up in a learned table: PE(t) = table[t].

    Args:
      positions: `[T]` integers in 0..P-1; others give NaN, not the row of another position.
      table: `[P D]`.

    Returns:
      `[T D]`.

    Raises:
      TypeError: positions that are not integers.

    Source: Gehring et al. 2017, section 3.1.
    """
    positions = _check_positions(positions)
    if not jnp.issubdtype(positions.dtype, jnp.integer):
        raise TypeError(f"learned: positions must be integers, got {positions.dtype}")
    return jnp.asarray(table).at[positions].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)


def none(positions: Num[Array, "T"], width: int) -> Float[Array, "T D"]:
    """Return zeros, `[T D]`: no encoding."""
    return jnp.zeros((_check_positions(positions).shape[0], width))


def rotary(
    x: Float[Array, "T *heads H"],
    positions: Num[Array, "T"],
    *,
    base: dtypes.Real = 10_000.0,
    fraction: float | np.floating = 1.0,
    scale: float = 1.0,
    frequencies: Float[Array | np.ndarray, "pairs"] | None = None,
) -> Float[Array, "T *heads H"]:
    """Rotate queries or keys by their positions, so that scores depend on positions only through distances.

    The pair (x_m, x_{m+Hr/2}) of the Hr = fraction H rotated features is rotated by the angle t f_m, with the frequency
    f_m = 1 / (scale base^(2m/Hr)) unless frequencies are given.

    Args:
      x: `[T H]`, or `[T N H]` for N heads.
      positions: `[T]`.
      base: the longest wavelength is 2 pi base tokens.
      fraction: fraction of the features to rotate (partial rotary), rounded down to an even number; the others are
        unchanged.
      scale: positions are divided by it (position interpolation).
      frequencies: `[Hr/2]` in radians per position, such as learned ones; may be traced and differentiated. `base`
        and `scale` must then keep their defaults.

    Returns:
      Array of the shape and dtype of `x`.

    Raises:
      ValueError: lengths that differ, a fraction outside (0, 1], a scale that is not positive, frequencies of another
        shape or together with `base` or `scale`.

    Source: Su et al. 2021, section 3.2; partial: Black et al. 2022, section 2.1; scale: Chen et al. 2023, equation 4.
    """
    positions = _check_positions(positions)
    _check_rotary(x, positions, fraction, scale)
    # Rounded first: a whole product such as 50 * 0.58 may be slightly too small in floating point.
    width = math.floor(round(x.shape[-1] * float(fraction), 6)) // 2 * 2  # Hr
    if frequencies is None:
        angles = _angles(positions, width, base, scale)
    else:
        _check_frequencies(frequencies, width // 2, base, scale)
        frequencies = dtypes.widened(jnp.asarray(frequencies))
        angles = positions.astype(frequencies.dtype)[:, None] * frequencies[None, :]
    angles = jnp.expand_dims(angles, tuple(range(1, x.ndim - 1)))  # [T pairs]; with heads [T 1 pairs]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    left, right, rest = jnp.split(x, (width // 2, width), axis=-1)
    left, right = left.astype(angles.dtype), right.astype(angles.dtype)
    rotated = [left * cos - right * sin, left * sin + right * cos]
    return jnp.concatenate([half.astype(x.dtype) for half in rotated] + [rest], axis=-1)


def relative_buckets(
    distance: dtypes.Integer, *, num_buckets: int = 32, max_distance: int = 128, bidirectional: bool = True
) -> Int[Array, "..."]:
    """Assign distances j - i to buckets that share a bias: exact when near, logarithmic up to `max_distance`, then one.

    Args:
      distance: key position minus query position; integers.
      num_buckets: number of buckets; half of them for each direction if bidirectional.
      max_distance: from here on all distances share the last bucket.
      bidirectional: distinguish keys ahead of the query from keys behind it; otherwise all keys ahead share bucket 0.

    Returns:
      Integers in 0..num_buckets-1, for `score=lambda s, i, j: s + table[relative_buckets(j - i)]`.

    Raises:
      TypeError: distances that are not integers.
      ValueError: too few buckets, or a max_distance that is not beyond the exact buckets.

    Source: Raffel et al. 2020, section 2.1.
    """
    # As Python integers: those of NumPy would overflow in the powers below.
    num_buckets, max_distance = operator.index(num_buckets), operator.index(max_distance)
    per_direction = num_buckets // 2 if bidirectional else num_buckets
    exact = per_direction // 2
    if exact < 1 or max_distance <= exact:
        raise ValueError(
            f"relative_buckets: num_buckets must be at least {4 if bidirectional else 2} and max_distance greater than "
            f"the number of exact buckets ({exact} per direction), got {num_buckets} and {max_distance}"
        )
    if not isinstance(distance, int) and not jnp.issubdtype(dtype := jnp.result_type(distance), jnp.integer):
        raise TypeError(f"relative_buckets: distance must be integer, got {dtype}")
    distance = jnp.asarray(dtypes.clamped(distance))
    first_bucket = jnp.where(distance > 0, per_direction, 0) if bidirectional else 0
    d = jnp.abs(distance) if bidirectional else jnp.maximum(-distance, 0)
    starts = jnp.asarray(_logarithmic_starts(exact, per_direction - exact, max_distance), d.dtype)
    logarithmic = exact - 1 + jnp.searchsorted(starts, d, side="right", method="compare_all").astype(d.dtype)
    return first_bucket + jnp.where(d < exact, d, logarithmic)


def _logarithmic_starts(exact: int, count: int, max_distance: int) -> list[int]:
    """Compute the first distance of each of `count` logarithmic buckets.

    Bucket exact + m holds the distances d with floor(log(d / exact) / log(max_distance / exact) * count) = m. Computed
    in integers, d^count >= max_distance^m exact^(count - m), since the floating-point quotient of the logarithms may be
    slightly below a whole number.
    """
    starts = [exact]
    for m in range(1, count):
        bound = max_distance**m * exact ** (count - m)
        start = math.floor((max_distance / exact) ** (m / count) * exact)  # a first guess; corrected below
        while start**count >= bound:
            start -= 1
        while start**count < bound:
            start += 1
        starts.append(start)
    return starts


def alibi_slopes(num_heads: int | np.integer) -> Float[Array, "N"]:
    """Return slopes for `scores.alibi`, one per head: 2^(-8 n / N) for n = 1..N.

    Raises:
      TypeError: not an integer.
      ValueError: fewer than one head.

    Source: Press et al. 2022, section 3 (the geometric sequence also where N is not a power of 2).
    """
    try:
        num_heads = operator.index(num_heads)
    except TypeError:
        raise TypeError(f"alibi_slopes: num_heads must be an integer, got {num_heads!r}") from None
    if num_heads < 1:
        raise ValueError(f"alibi_slopes: num_heads must be at least 1, got {num_heads}")
    return 2.0 ** (-8.0 * jnp.arange(1, num_heads + 1) / num_heads)


def randomized(key: Array, length: int, max_length: int, *, count: dtypes.Integer | None = None) -> Int[Array, "T"]:
    """Draw ordered random positions: distinct integers of 0..max_length-1, sorted.

    Args:
      key: JAX random key.
      length: T.
      max_length: the range to draw from, far beyond the training lengths.
      count: number of positions to draw, at most `length`; may be traced. The entries after the first `count` are all
        max_length - 1. None: `length`.

    Returns:
      `[T]` integers; every subset of `count` positions has the same probability.

    Raises:
      ValueError: length > max_length.

    Source: Ruoss et al. 2023, section 3.
    """
    if not 0 < length <= max_length:
        raise ValueError(f"randomized: length must lie in 1..max_length = {max_length}, got {length}")
    # Clamped, since JAX would wrap a NumPy integer beyond 32 bits.
    num_drawn = jnp.minimum(length if count is None else dtypes.clamped(count), length)
    last = max_length - 1
    # Not `jax.random.permutation`: it sorts pairs, which on a CPU takes ten times as long as two sorts of one array.
    priority = jax.random.bits(key, (max_length,))
    chosen = priority <= jnp.sort(priority)[num_drawn - 1]
    drawn = jnp.sort(jnp.where(chosen, jnp.arange(max_length), last))[:length]
    return jnp.where(jnp.arange(length) < num_drawn, drawn, last)


def _angles(positions: Num[Array, "T"], width: int, base: dtypes.Real, scale=1.0) -> Float[Array, "T pairs"]:
    """Compute t / (scale base^(2m/D)) for m = 0 .. ceil(D/2) - 1."""
    frequencies = dtypes.as_real(base) ** (-jnp.arange(0.0, width, 2) / width)
    scaled = positions.astype(frequencies.dtype) / jnp.asarray(dtypes.as_real(scale), frequencies.dtype)
    return scaled[:, None] * frequencies[None, :]


def _check_rotary(x, positions, fraction, scale):
    if x.shape[0] != positions.shape[0]:
        raise ValueError(f"rotary: x {tuple(x.shape)} and positions {tuple(positions.shape)} differ in length")
    if not 0 < fraction <= 1:
        raise ValueError(f"rotary: fraction must lie in (0, 1], got {fraction}")
    known = dtypes.known(scale)
    if known is not None and not (known > 0).all():
        raise ValueError(f"rotary: scale must be positive, got {scale}")


def _check_frequencies(frequencies, pairs: int, base, scale):
    if tuple(frequencies.shape) != (pairs,):
        raise ValueError(f"rotary: frequencies must have shape ({pairs},), got {tuple(frequencies.shape)}")
    if not (isinstance(base, float) and base == 10_000.0 and isinstance(scale, float) and scale == 1.0):
        raise ValueError(f"rotary: frequencies replace base and scale: keep their defaults, got {base} and {scale}")


def _check_positions(positions) -> Array:
    """Check positions and convert them to an array of JAX.

    Raises:
      TypeError: floats of 16 bits, which hold whole numbers only up to 256 (bfloat16) or 2,048 (float16).
      ValueError: wrong rank, or NumPy integers that JAX would wrap.
    """
    if dtypes.is_half(positions):
        raise TypeError(
            f"positions must be integers or floats of 32 bits or more, got {positions.dtype}, which rounds large "
            "whole numbers: compute the positions in a wider dtype"
        )
    array = jnp.asarray(positions)
    if array.ndim != 1:
        raise ValueError(f"positions must have shape [T], got {array.shape}")
    if isinstance(positions, np.ndarray) and positions.dtype.kind in "iu" and (np.asarray(array) != positions).any():
        raise ValueError(f"positions must fit into {array.dtype}, got {positions[np.asarray(array) != positions][0]}")
    return array
