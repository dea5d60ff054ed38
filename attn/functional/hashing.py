"""A counter-based hash of 32-bit integers, for bits that depend on positions alone."""

import numpy as np


def mix(x):
    """Scramble unsigned 32-bit integers: a bijection whose every output bit depends on every input bit.

    Args:
      x: `uint32` array of any shape, of JAX or of NumPy (both give the same bits).

    Returns:
      `uint32` array of the same shape.

    Source: A. Appleby, MurmurHash3, the 32-bit finaliser.
    """
    x = x ^ (x >> 16)
    x = x * np.uint32(0x85EBCA6B)
    x = x ^ (x >> 13)
    x = x * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
