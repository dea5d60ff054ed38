"""Strings that are held out from training, as a hash of the string decides."""

import numpy as np
from jaxtyping import Array, Bool, Int, UInt32

from attn.functional.hashing import mix
from attn.tasks.examples import PAD


def is_held_out(
    symbols: Int[Array | np.ndarray, "*B n"], num_symbols: int
) -> Bool[Array | np.ndarray | np.bool_, "*B"]:
    """Return whether a string is held out for evaluation, by a hash of the string.

    All symbols but the first are hashed together with their positions; then one residue of the first symbol, modulo
    m = min(V, 10), is held out. So about 1/m of the strings are held out. With every continuation, and so
    at every length, some first symbols are held out and some are not.

    Args:
      symbols: `[... n]` symbols 1..V, padded with 0; of JAX or of NumPy. Padding does not matter.
      num_symbols: V >= 2.
    """
    modulus = np.uint32(min(num_symbols, 10))
    first, rest = symbols[..., 0].astype(np.uint32), symbols[..., 1:]
    return (mix(hash_of(rest)) % modulus + first) % modulus == 0


def is_for_validation(
    symbols: Int[Array | np.ndarray, "*B n"], num_symbols: int
) -> Bool[Array | np.ndarray | np.bool_, "*B"]:
    """Return whether a string is for validation; one more bit of the hash divides held-out strings from those for test.

    Args:
      symbols, num_symbols: as of `is_held_out`.
    """
    return is_held_out(symbols, num_symbols) & (mix(hash_of(symbols)) % 2 == 1)


def hash_of(symbols: Int[Array | np.ndarray, "*B n"]) -> UInt32[Array | np.ndarray | np.generic, "*B"]:
    """Return a hash of the symbols together with their positions; padding does not matter."""
    symbols = symbols.astype(np.uint32)
    positions = np.arange(1, symbols.shape[-1] + 1, dtype=np.uint32) * np.uint32(0x9E3779B9)
    return (mix(symbols + positions) * (symbols != PAD)).sum(-1, dtype=np.uint32)
