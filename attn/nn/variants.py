"""Variants of the Transformer's attention: a registry of records, each a few pure functions.

A new variant is one record here; `config.model.variant` then accepts its name. In a notebook, put one into `VARIANTS`.
"""

import dataclasses
from collections.abc import Callable


@dataclasses.dataclass(frozen=True)
class Variant:
    """What every attention layer does besides softmax(Q K^T / sqrt(H)) V, encoder, decoder and cross alike.

    Attributes:
      score: `(s, i, j) -> s`, the scaled score s of query position i and key position j; None to leave it.
      mask: `(i, j) -> bool`, who may be attended to, besides padding and causality; None for all.
      scale: of the scores; None for 1 / sqrt(H).
    """

    score: Callable | None = None
    mask: Callable | None = None
    scale: float | None = None


VARIANTS = {
    "plain": Variant(),
    "unscaled": Variant(scale=1.0),
}
