"""How a model tells positions: a registry of records, each a pair of pure functions.

A new encoding is one record here; `config.model.positions` then accepts its name.
"""

import dataclasses
from collections.abc import Callable

from jaxtyping import Array, Float, Int

from attn.functional import positions


def _add_nothing(at: Int[Array, "T"], width: int, table: None) -> float:
    return 0.0


def _turn_nothing(x: Float[Array, "T N H"], at: Int[Array, "T"]) -> Float[Array, "T N H"]:
    return x


@dataclasses.dataclass(frozen=True)
class Encoding:
    """Where positions enter a model.

    Attributes:
      add: `(positions [T], width, table) -> [T D]`, added to the embeddings at the bottom of both stacks.
      turn: `(x [T N H], positions [T]) -> [T N H]`, applied to queries and keys in every attention layer.
      learned: whether `add` reads a learned table `[max_length D]`.
    """

    add: Callable = _add_nothing
    turn: Callable = _turn_nothing
    learned: bool = False


ENCODINGS = {
    "sinusoidal": Encoding(add=lambda at, width, table: positions.sinusoidal(at, width)),
    "learned": Encoding(add=lambda at, width, table: positions.learned(at, table), learned=True),
    "rotary": Encoding(turn=positions.rotary),
    "none": Encoding(),
}
