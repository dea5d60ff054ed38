"""How a model tells positions: a registry of records, each a few pure functions.

A new encoding is one record here; `config.model.positions` then accepts its name, for all of a model's attention or for
one kind of it (`config.model.positions.cross`). In a notebook or a config file, put one into `ENCODINGS`.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float, Int

from attn.functional import per_head, positions
from attn.functional.scores import as_score

_CLIP = 16  # distances beyond share a row: k of Shaw et al. 2018, section 4.1
_BUCKETS = 32  # of T5
_PACE = 4.0  # a line's numbers have farther to go than other parameters
_DRAW = 1 << 16  # what a key is folded with to draw positions: no layer has such a number


class Side(NamedTuple):
    """Where one side of an attention layer stands: its queries, or its keys.

    Attributes:
      index: `[T]`, 0 at the first token of the sequence.
      length: tokens of the whole sequence, its end token included; None where it is not known. On a tape that is
        counted by part, of the part that each place lies in, `[T]`.
      drawn: `[R]`, the position of each index instead of the index itself; see `randomized`.
    """

    index: Int[Array, "T"]
    length: int | Int[Array, ""] | Int[Array, "T"] | None
    drawn: Int[Array, "R"] | None

    def from_start(self) -> Int[Array, "T"]:
        """Positions counted from the first token."""
        return self._at(self.index)

    def from_end(self) -> Int[Array, "T"]:
        """Positions counted from the last token, which stands at 0; padding stands before 0, or with it."""
        return self._at(self.length - 1 - self.index)

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


def _turn_nothing(x: Float[Array, "T N H"], side: Side) -> Float[Array, "T N H"]:
    return x


@dataclasses.dataclass(frozen=True)
class Encoding:
    """Where positions enter a model.

    Attributes:
      builds_in: what it tells the model that the model would otherwise have to learn, in a few words.
      add: `(side, width, table) -> [T D]`, added to the embeddings at the bottom of a stack; in cross-attention, to
        what queries and keys are made of. None for nothing.
      turn, turn_keys: `(x [T N H], side) -> [T N H]`, applied to queries and keys; `turn_keys` None for the same.
      score: `(parameters, query [T N H], key [S N H], places) -> score`, a score function of rows of queries and keys.
      parameters: `(key, width, num_heads, head_width) -> {name: array}`, what a layer learns for it.
      learned: whether `add` reads a learned table `[max_length D]`.
      needs_length: whether it counts queries from their end; those of a decoder only if their number is known.
      by_part: whether source and answer are counted each from its own ends where they stand on one tape.
      randomized: whether it reads positions that are drawn.
    """

    builds_in: str
    add: Callable | None = None
    turn: Callable = _turn_nothing
    turn_keys: Callable | None = None
    score: Callable | None = None
    parameters: Callable | None = None
    learned: bool = False
    needs_length: bool = False
    by_part: bool = False
    randomized: bool = False

    def side(self, index: Int[Array, "T"], length, drawn: Int[Array, "R"] | None) -> Side:
        """Where the rows of one side stand: at drawn positions only if this encoding reads them."""
        return Side(index, length, drawn if self.randomized else None)

    def added(self, side: Side, width: int, table: nnx.Param | None) -> Float[Array, "T D"] | float:
        """What it adds to the rows of one side."""
        return 0.0 if self.add is None else self.add(side, width, None if table is None else table[...])


@dataclasses.dataclass(frozen=True)
class Positions:
    """Which encoding each kind of attention has.

    Attributes:
      encoder, decoder, cross: names in `ENCODINGS`.
      range: randomized positions are drawn from 0..range-1.
      at_test: "spaced", evenly over the range, or "random", drawn as in training but the same every time.
    """

    encoder: str = "sinusoidal"
    decoder: str = "sinusoidal"
    cross: str = "none"
    range: int = 2_048
    at_test: str = "spaced"

    @classmethod
    def named(cls, name: str) -> "Positions":
        """One encoding for all attention; what is added to embeddings is added once, at the bottom of both stacks."""
        added = name in ENCODINGS and ENCODINGS[name].add is not None
        return cls(name, name, "none" if added else name)

    def by_kind(self) -> dict[str, str]:
        """The names by the kind of attention."""
        return {"encoder": self.encoder, "decoder": self.decoder, "cross": self.cross}

    def needing_length(self) -> dict[str, str]:
        """Those of them that count from the end of the target, whose length must then be known."""
        return {
            kind: name for kind, name in self.by_kind().items() if kind != "encoder" and ENCODINGS[name].needs_length
        }


def make_table(encodings: Sequence[Encoding], max_length: int, width: int, rngs: nnx.Rngs) -> nnx.Param | None:
    """The learned table `[max_length D]`, one for all encodings that read it; None where none does."""
    if not any(encoding.learned for encoding in encodings):
        return None
    return nnx.Param(nnx.initializers.normal(width**-0.5)(rngs.params(), (max_length, width)))


def draw(settings: Positions, length: Int[Array, ""], key: Array | None) -> Int[Array, "range"]:
    """The positions of the first `length` places, ascending, for randomized encodings; those after are filled up.

    Args:
      settings: the range, and what to do without a key.
      length: how many places there are.
      key: of an example in training, whatever else is drawn from it; None at test.

    Source: Ruoss et al. 2023, section 3.1.
    """
    places = jnp.arange(settings.range)
    if key is None and settings.at_test == "spaced":
        return jnp.minimum(places * (settings.range - 1) // jnp.maximum(length - 1, 1), settings.range - 1)
    key = jax.random.key(0) if key is None else key
    return positions.randomized(jax.random.fold_in(key, _DRAW), settings.range, settings.range, count=length)


def _heads_from_ends(num_heads: int) -> tuple[Bool[Array, "N"], Bool[Array, "N"]]:
    """For each head whether its keys and whether its queries are counted from the end: all four kinds in turn."""
    head = jnp.arange(num_heads)
    return head % 2 == 1, head // 2 % 2 == 1


def _counted(
    places: Places, num_heads: int, *, keys: bool = True, queries: bool = True
) -> tuple[Int[Array, "N S"], Int[Array, "N T"]]:
    """Where keys and queries stand for each head; counted from the start alone unless `keys` and `queries` say more."""
    sides = zip((places.keys, places.queries), (keys, queries), _heads_from_ends(num_heads))
    return tuple(
        jnp.where(from_end[:, None], side.from_end() if both else side.from_start(), side.from_start())
        for side, both, from_end in sides
    )


def anchored(
    *, keys: bool = True, queries: bool = True, slope: Callable | None = None, frozen: bool = False, shift: bool = True
) -> Encoding:
    """Each head looks at one place: s - slope |idx - tau - c|.

    idx counts the keys from the start or from the end, tau the queries from the start or from the end; slope, which a
    softplus keeps positive, and c are learned, one a head. A cross-attention head is then a pointer that moves by one
    place a step, forwards or backwards.

    Args:
      keys: whether every second head counts the keys from their end.
      queries: whether every second pair of heads counts the queries from their end; the length must then be known.
      slope: `num_heads -> [N]`, the slopes at first; None for 3.
      frozen: whether the slopes stay as they are.
      shift: whether c, 0 at first, is learned.
    """

    def first(num_heads):
        return jnp.full(num_heads, 3.0) if slope is None else slope(num_heads)

    def parameters(key, width, num_heads, head_width):
        learned = {} if frozen else {"slope": jnp.log(jnp.expm1(first(num_heads)))}
        return learned | ({"shift": jnp.zeros(num_heads)} if shift else {})

    def score(learned, query, key, places: Places):
        num_heads = query.shape[1]
        slopes = first(num_heads) if frozen else jax.nn.softplus(learned["slope"])
        shifts = learned.get("shift", jnp.zeros(num_heads))
        idx, tau = _counted(places, num_heads, keys=keys, queries=queries)

        def of_head(slope, shift, idx, tau, s, i, j):
            return s - slope * jnp.abs(idx[j] - tau[i] - shift)

        return per_head(Partial(of_head, slopes, shifts, idx, tau))

    return Encoding(
        "the pointer, counted from either end" if keys or queries else "the pointer, counted from the start",
        score=score,
        parameters=parameters if shift or not frozen else None,
        needs_length=queries,
        by_part=True,
    )


def _anchored_rotary() -> Encoding:
    """Rotary positions, counted from the start by some heads and from the end by others."""

    def turn_by(x, side: Side, from_end):
        start, end = positions.rotary(x, side.from_start()), positions.rotary(x, side.from_end())
        return jnp.where(from_end[:, None], end, start)

    return Encoding(
        "distances between places, counted from both ends; no head prefers any",
        turn=lambda x, side: turn_by(x, side, _heads_from_ends(x.shape[1])[1]),
        turn_keys=lambda x, side: turn_by(x, side, _heads_from_ends(x.shape[1])[0]),
        needs_length=True,
        by_part=True,
    )


def _t5_parameters(key, width, num_heads, head_width):
    return {"table": jax.random.normal(key, (num_heads, _BUCKETS)) * width**-0.5}


def _anchored_t5_score(learned, query, key, places: Places):
    idx, tau = _counted(places, query.shape[1])

    def of_head(table, idx, tau, s, i, j):
        # The last bucket begins well within the lengths of training, so that nothing farther is news.
        return s + table[positions.relative_buckets(idx[j] - tau[i], num_buckets=_BUCKETS, max_distance=_BUCKETS // 2)]

    return per_head(Partial(of_head, learned["table"], idx, tau))


def _line_parameters(key, width, num_heads, head_width):
    """Lines that at first stand still, spread over the keys, with slopes so soft that most keys are seen."""
    spread = (jnp.arange(num_heads) + 0.5) / num_heads
    lines = jnp.stack([jnp.zeros(num_heads), spread, jnp.zeros(num_heads)], axis=-1)
    return {"line": lines / _PACE, "slope": jnp.full(num_heads, jnp.log(jnp.expm1(0.3)) / _PACE)}


def _line_score(learned, query, key, places: Places):
    """s - slope |j - (a t + b n + c)| among n keys: where a head looks is a line, of which a, b and c are learned."""
    tau = places.queries.from_start()
    known = jnp.stack(jnp.broadcast_arrays(tau, places.keys.length, 1), axis=-1).astype(query.dtype)
    lines = jnp.einsum("tf,nf->nt", known, _PACE * learned["line"])
    slopes, idx = jax.nn.softplus(_PACE * learned["slope"]), places.keys.from_start()

    def of_head(slope, line, s, i, j):
        return s - slope * jnp.abs(idx[j] - line[i])

    return per_head(Partial(of_head, slopes, lines))


def _alibi_score(learned, query, key, places: Places):
    slopes = positions.alibi_slopes(query.shape[1])
    # A quarter of a step to one side, so that left and right of a query differ.
    return per_head(Partial(lambda slope, s, i, j: s - slope * jnp.abs(places.distance(i, j) + 0.25), slopes))


def _t5_score(learned, query, key, places: Places):
    def of_head(table, s, i, j):
        return s + table[positions.relative_buckets(places.distance(i, j), num_buckets=_BUCKETS)]

    return per_head(Partial(of_head, learned["table"]))


def _shaw_score(learned, query, key, places: Places):
    rows = jnp.einsum("tnh,rh->ntr", query, learned["table"].astype(query.dtype)) / query.shape[-1] ** 0.5

    def of_head(rows, s, i, j):
        return s + rows[i, jnp.clip(places.distance(i, j), -_CLIP, _CLIP) + _CLIP]

    return per_head(Partial(of_head, rows))


def _transformer_xl_score(learned, query, key, places: Places):
    """s + (u k_j + (q_i + v) R(p_j - p_i)) / sqrt(H), with R a linear map of sinusoids; s holds q_i k_j."""
    first = places.keys.index[0] - places.queries.index[-1]
    steps = first + jnp.arange(len(query) + len(key) - 1)  # every j - i, in order
    one = Places(Side(jnp.zeros(1, int), None, None), Side(steps, None, places.keys.drawn), places.visible)
    distances = one.distance(0, jnp.arange(len(steps)))
    width = learned["relative"].shape[0]
    relative = jnp.einsum("rd,dnh->rnh", positions.sinusoidal(distances, width), learned["relative"])
    rows = jnp.einsum("tnh,rnh->ntr", query + learned["v"], relative) / query.shape[-1] ** 0.5
    content = jnp.einsum("nh,snh->ns", learned["u"], key) / query.shape[-1] ** 0.5

    def of_head(rows, content, s, i, j):
        return s + content[j] + rows[i, places.keys.index[j] - places.queries.index[i] - first]

    return per_head(Partial(of_head, rows, content))


def _transformer_xl_parameters(key, width, num_heads, head_width):
    keys, shape = jax.random.split(key, 3), (num_heads, head_width)
    return {
        "relative": jax.random.normal(keys[0], (width, *shape)) * width**-0.5,
        "u": 0.02 * jax.random.normal(keys[1], shape),
        "v": 0.02 * jax.random.normal(keys[2], shape),
    }


def log_scaled(encoding: Encoding) -> Encoding:
    """The encoding, and scores that grow with the logarithm of how many keys there are: s ln(keys).

    Weights over many keys can then be as sharp as over few.

    Source: Chiang and Cholak 2022, section 5.3.
    """

    def score(learned, query, key, places: Places):
        factor = jnp.log1p(places.visible.astype(query.dtype))
        before = as_score(encoding.score and encoding.score(learned, query, key, places))

        def scaled(s, i, j):
            return s * factor[i]

        return scaled if before is None else before >> scaled

    return dataclasses.replace(encoding, score=score, builds_in=f"{encoding.builds_in}; sharper scores among more keys")


def randomized(encoding: Encoding) -> Encoding:
    """The encoding over positions that are drawn, ordered, from a range far beyond the training lengths; see `draw`.

    Source: Ruoss et al. 2023, section 3.
    """
    return dataclasses.replace(encoding, randomized=True)


_PLAIN = {
    "none": Encoding("nothing"),
    "sinusoidal": Encoding(
        "places, as sines and cosines", add=lambda side, width, table: positions.sinusoidal(side.from_start(), width)
    ),
    "learned": Encoding(
        "nothing but that places differ",
        add=lambda side, width, table: positions.learned(side.from_start(), table),
        learned=True,
    ),
    "rotary": Encoding("distances, as angles", turn=lambda x, side: positions.rotary(x, side.from_start())),
    # Source: Shaw et al. 2018, section 3.2, for keys; one table a layer.
    "shaw": Encoding(
        f"distances up to {_CLIP}",
        score=_shaw_score,
        parameters=lambda key, width, num_heads, head_width: {
            "table": jax.random.normal(key, (2 * _CLIP + 1, head_width)) * head_width**-0.5
        },
    ),
    # Source: Raffel et al. 2020, section 2.1; one table a layer.
    "t5": Encoding("distances in buckets, the far ones together", score=_t5_score, parameters=_t5_parameters),
    "anchored_t5": log_scaled(
        Encoding(
            f"distances up to {_BUCKETS // 2}, counted from both ends; no head prefers any",
            score=_anchored_t5_score,
            parameters=_t5_parameters,
            needs_length=True,
            by_part=True,
        )
    ),
    "line": Encoding(
        "that each head looks at one place, which moves evenly", score=_line_score, parameters=_line_parameters
    ),
    # Source: Dai et al. 2019, section 3.3.
    "transformer_xl": Encoding(
        "distances, as sines and cosines", score=_transformer_xl_score, parameters=_transformer_xl_parameters
    ),
    # Source: Press et al. 2022, section 3; in both directions, told apart as by Ruoss et al. 2023.
    "alibi": Encoding("near keys count more than far ones", score=_alibi_score),
    "log_length": log_scaled(Encoding("nothing")),
    "anchored": anchored(),
    "anchored_to_source": anchored(queries=False),
    "anchored_once": anchored(keys=False, queries=False),
    "anchored_frozen": anchored(frozen=True),
    "anchored_soft": anchored(slope=positions.alibi_slopes),
    "anchored_unshifted": anchored(shift=False),
    "anchored_rotary": log_scaled(_anchored_rotary()),
}
_DRAWN = ("sinusoidal", "learned", "rotary", "shaw", "t5", "transformer_xl", "alibi", "anchored_rotary")
ENCODINGS = _PLAIN | {f"randomized_{name}": randomized(_PLAIN[name]) for name in _DRAWN}
