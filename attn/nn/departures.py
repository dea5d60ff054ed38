"""The mask, the score and the dropout of one attention layer, from its mechanism and the rows that it attends to."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.tree_util import Partial
from jaxtyping import Array, Float, Int

from attn.functional import Dropout, masks, mods, per_head, scores
from attn.mechanisms.mechanism import HeadParam, Mechanism, having, named_in_errors
from attn.mechanisms.rows import Rows


class Sides(NamedTuple):
    """The rows of queries and keys, and the mask of padding and causality, a function of row numbers."""

    q: Rows
    k: Rows
    mask: masks.Mask | None


class Departures(NamedTuple):
    """All in which the attention of a layer departs from the equation.

    Attributes:
      mechanism: the parts of the layer's mechanism.
      sides: rows of queries and keys, and their mask.
      heads: `[N]`, the numbers of the heads.
      dropout: of the weights.
    """

    mechanism: Sequence[Mechanism]
    sides: Sides
    heads: Int[Array, "N"]
    dropout: Dropout | None = None

    def mask(self) -> masks.Mask | None:
        """Return the mask by row numbers: padding and causality, combined with the mechanism's masks."""
        q, k, mask = self.sides
        for part in having(self.mechanism, "mask"):
            with named_in_errors(part, "mask"):
                visible = part.mask(q, k)
                if isinstance(visible, masks.Mask):
                    visible = masks.placed(visible, q.placement, k.placement)
                elif visible is not None:
                    visible = masks.as_mask(_by_row_numbers(part, "mask", visible, q, k))
            mask = visible if mask is None else mask if visible is None else mask & visible
        return mask

    def score(self) -> scores.Score | None:
        """Return the mechanism's score by row numbers; None if it changes no scores."""
        return functools.reduce(_chained, map(scores.from_vectors, self._makers()), None)

    def score_of_positions(self, query: Float[Array, "T N H"], key: Float[Array, "S K H"]) -> scores.Score | None:
        """Return the same score for vectors that are not at hand, of which it reads the shapes and dtypes alone.

        Args:
          query, key: some of the rows.
        """
        (q, k, _), H = self.sides, query.shape[-1]
        vectors = jnp.zeros((len(q.row), H), query.dtype), jnp.zeros((len(k.row), H), key.dtype)
        changes = (scores.function(Partial(_score_at, make, *vectors)) for make in self._makers())
        return functools.reduce(_chained, changes, None)

    def reads_vectors(self, query: Float[Array, "T N H"], key: Float[Array, "S K H"]) -> bool:
        """Return whether the score reads queries or keys, and not their positions alone."""
        i, s = jnp.zeros((1, 1), int), jnp.zeros((1, 1))

        def of_first_head(query, key):
            marked, of_head = mods.unwrap_per_head(self._makers(), len(self.heads))
            return [_score_at(make, query, key, s, i, i) for make in of_head([x[0] for x in marked])]

        jaxpr = jax.make_jaxpr(of_first_head)(query[:, 0], key[:, 0]).jaxpr
        read = {id(v) for equation in jaxpr.eqns for v in equation.invars}
        return any(id(v) in read for v in jaxpr.invars)

    def _makers(self) -> list[Partial]:
        """Return a function of queries and keys to a score, of one head, for each part that has one."""
        makers = []
        for part in having(self.mechanism, "score"):
            of_head, per_heads = by_head(part, self.heads)
            # Partials are pytrees, so the arrays that they hold get gradients; `per_head` marks one slice per head.
            arguments = per_head(Partial(lambda *x: x, *per_heads)), self.sides.q, self.sides.k
            makers.append(Partial(_score_of_head, of_head, *arguments))
        return makers


def by_head(part: Mechanism, heads: Int[Array, "N"]) -> tuple[Callable, tuple]:
    """Return `(parameters of one head, its number) -> (part, number)`, and these two arguments for all heads."""
    graphdef, of_heads, rest = nnx.split(part, HeadParam, ...)
    return Partial(functools.partial(_of_head, graphdef), rest), (of_heads, heads)


def _of_head(graphdef, rest, params, head):
    return nnx.merge(graphdef, params, rest), head


def _chained(first: scores.Score | None, second: scores.Score) -> scores.Score:
    return second if first is None else first >> second


def shape_and_dtype(x) -> str:
    """Return text such as "float32[6, 16]", or the type of what is not an array."""
    return f"{x.dtype}{[*x.shape]}" if hasattr(x, "dtype") else type(x).__name__


def _score_of_head(of_head: Callable, per_heads: Callable, q: Rows, k: Rows, query, key) -> scores.Score | None:
    """Return the score of one head by row numbers, given its queries `[T H]` and keys `[S H]`."""
    part, head = of_head(*per_heads())
    q, k = (dataclasses.replace(rows, head=head, vectors=x) for rows, x in ((q, query), (k, key)))
    with named_in_errors(part, "score"):
        score = part.score(q, k)
        if isinstance(score, scores.Score):
            return scores.placed(score, q.placement, k.placement)
        return None if score is None else scores.as_score(_by_row_numbers(part, "score", score, q, k))


def _score_at(make: Callable, query, key, s, i, j):
    """Evaluate on a tile the score that `make` makes."""
    score = make(query, key)
    return s if score is None else score(s, i, j)


def _by_row_numbers(part: Mechanism, name: str, function, q: Rows, k: Rows) -> Callable:
    """Turn a mechanism's mask or score of the rows of a tile into one of their numbers."""
    if not callable(function):
        raise TypeError(f"returned {type(function).__name__}, must be a {name} of `attn`, a function, or None")

    def call(*arguments):  # (i, j) of a mask, (s, i, j) of a score
        *s, i, j = arguments
        with named_in_errors(part, name):
            return function(*s, q.tile(i), k.tile(j))

    call.__name__ = type(part).__name__  # for messages about its results
    return call
