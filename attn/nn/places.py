"""Where the two sides of an attention layer stand: what encodings of positions are functions of."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


class Side(NamedTuple):
    """Where one side of an attention layer stands: its queries, or its keys.

    Attributes:
      index: `[T]`, 0 at the first token of the sequence.
      length: tokens of the whole sequence, its end token included; None where it is not known. On a tape that is
        counted by part, of the part that each place lies in, `[T]`.
      drawn: `[R]`, the position of each index instead of the index itself; see `randomized`.
      end_tokens: how many of the tokens are end tokens: one, but none on a tape.
    """

    index: Int[Array, "T"]
    length: int | Int[Array, ""] | Int[Array, "T"] | None
    drawn: Int[Array, "R"] | None
    end_tokens: int = 1

    def from_start(self) -> Int[Array, "T"]:
        """Positions counted from the first token."""
        return self._at(self.index)

    def from_end(self) -> Int[Array, "T"]:
        """Positions counted from the last token, which stands at 0; padding stands before 0, or with it."""
        return self._at(self.length - 1 - self.index)

    def from_last_symbol(self) -> Int[Array, "T"]:
        """Positions counted from the last symbol, which stands at 0; the end token stands before it, or with it."""
        return self._at(self.length - self.end_tokens - 1 - self.index)

    def _at(self, index):
        return index if self.drawn is None else self.drawn[jnp.clip(index, 0, len(self.drawn) - 1)]


class Places(NamedTuple):
    """Where the two sides of an attention layer stand, and how many keys each query may see, `[T]`."""

    queries: Side
    keys: Side
    visible: Int[Array, "T"]

    def distance(self, i, j):
        """How far key j stands behind query i.

        Where positions are drawn, a distance of d tokens is the d-th of them and its sign: all pairs that are as far
        apart stay alike (Ruoss et al. 2023, section 3.2).
        """
        steps = self.keys.index[j] - self.queries.index[i]
        if self.keys.drawn is None:
            return steps
        return jnp.sign(steps) * jnp.where(steps == 0, 0, 1 + self.keys.drawn[jnp.abs(steps) - 1])


def heads_from_ends(num_heads: int) -> tuple[Bool[Array, "N"], Bool[Array, "N"]]:
    """For each head whether its keys and whether its queries are counted from the end: all four kinds in turn."""
    head = jnp.arange(num_heads)
    return head % 2 == 1, head // 2 % 2 == 1


def counted(
    places: Places, num_heads: int, *, keys: bool = True, queries: bool = True
) -> tuple[Int[Array, "N S"], Int[Array, "N T"]]:
    """Where keys and queries stand for each head; counted from the start alone unless `keys` and `queries` say more."""
    sides = zip((places.keys, places.queries), (keys, queries), heads_from_ends(num_heads))
    return tuple(
        jnp.where(from_end[:, None], side.from_end() if both else side.from_start(), side.from_start())
        for side, both, from_end in sides
    )
