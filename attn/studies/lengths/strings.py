"""Structured strings, which a model that was trained on random ones may still get wrong."""

import numpy as np
from jaxtyping import Int


def structured(length: int, symbols: int) -> dict[str, Int[np.ndarray, "B n"]]:
    """Return structured strings of one length, by kind.

    Args:
      length: n >= 2.
      symbols: V >= 2; most kinds are made of the first and the last symbol.

    Returns:
      By kind: one symbol only; one different symbol at each position; two symbols alternating; a random piece of 3, 5
      or 7 symbols, repeated; random palindromes; all symbols equal but the first, the last, or both.
    """
    a, b = 1, symbols
    rng = np.random.default_rng([length, symbols])
    all_a = np.full((length, length), a)
    halves = rng.integers(1, symbols + 1, (8, (length + 1) // 2))
    pieces = [rng.integers(1, symbols + 1, period) for period in (3, 5, 7) for _ in range(4)]
    ends = np.full((3, length), a)
    ends[[0, 2], 0] = b
    ends[[1, 2], -1] = b
    return {
        "constant": np.stack([np.full(length, a), np.full(length, b)]),
        "one odd": np.where(np.eye(length, dtype=bool), b, all_a),
        "alternating": np.stack([np.resize([a, b], length), np.resize([b, a], length)]),
        "periodic": np.stack([np.resize(piece, length) for piece in pieces]),
        "palindromes": np.concatenate([halves, halves[:, : length // 2][:, ::-1]], axis=1),
        "equal but the ends": ends,
    }
