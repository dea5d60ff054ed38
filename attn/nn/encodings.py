"""How a model tells positions: a registry of records, each a few pure functions.

A new encoding is one record here; `config.model.positions` then accepts its name, for all of a model's attention or for
one kind of it (`config.model.positions.cross`). In a notebook or a config file, put one into `ENCODINGS`.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from attn.functional import positions
from attn.functional.scores import as_score
from attn.nn import position_scores as scores
from attn.nn.places import Places, Side, heads_from_ends

_DRAW = 1 << 16  # what a key is folded with to draw positions: no layer has such a number


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
      queries_from_end, keys_from_end: whether it counts one side from its end, or asks how long it is; an answer that
        is being written must then be told its length.
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
    queries_from_end: bool = False
    keys_from_end: bool = False
    by_part: bool = False
    randomized: bool = False

    def side(self, index: Int[Array, "T"], length, drawn: Int[Array, "R"] | None, end_tokens: int = 1) -> Side:
        """Where the rows of one side stand: at drawn positions only if this encoding reads them."""
        return Side(index, length, drawn if self.randomized else None, end_tokens)

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
        """Those of them that count from the end of the target, whose length must then be known.

        In the decoder's own attention both sides are the target, in cross-attention the queries alone are.
        """
        own, cross = ENCODINGS[self.decoder], ENCODINGS[self.cross]
        needing = {"decoder": own.queries_from_end or own.keys_from_end, "cross": cross.queries_from_end}
        return {kind: name for kind, name in self.by_kind().items() if needing.get(kind)}


def make_table(encodings: Sequence[Encoding], max_length: int, width: int, rngs: nnx.Rngs) -> nnx.Param | None:
    """The learned table `[max_length D]`, one for all encodings that read it; None where none does."""
    if not any(encoding.learned for encoding in encodings):
        return None
    return nnx.Param(nnx.initializers.normal(width**-0.5)(rngs.params(), (max_length, width)))


def draw(settings: Positions, length: Int[Array, ""], key: Array | None) -> Int[Array, "range"]:
    """The positions of the first `length` places, ascending, for randomized encodings; those after are filled up.

    Evenly spaced, place k stands at the mean of what is drawn for it, (k + 1) (range + 1) / (length + 1) - 1, rounded
    down.

    Args:
      settings: the range, and what to do without a key.
      length: how many places there are.
      key: of an example in training, whatever else is drawn from it; None at test.

    Source: Ruoss et al. 2023, section 3.1.
    """
    places = jnp.arange(settings.range)
    if key is None and settings.at_test == "spaced":
        return jnp.minimum((places + 1) * (settings.range + 1) // (length + 1), settings.range) - 1
    key = jax.random.key(0) if key is None else key
    return positions.randomized(jax.random.fold_in(key, _DRAW), settings.range, settings.range, count=length)


def anchored(
    *, keys: bool = True, queries: bool = True, soft: bool = False, frozen: bool = False, shift: bool = True
) -> Encoding:
    """Each head looks at one place: s - slope |idx - tau - c|.

    idx counts the keys from the start or from the end, tau the queries from the start or from the end; slope, which a
    softplus keeps positive, and c are learned, one a head. A cross-attention head is then a pointer that moves by one
    place a step, forwards or backwards. All four kinds of heads are there if the layer has four.

    Args:
      keys: whether every second head counts the keys from their end.
      queries: whether every second pair of heads counts the queries from their end; the length must then be known.
      soft: whether the slopes start as those of ALiBi; otherwise at 3.
      frozen: whether the slopes stay as they are.
      shift: whether c, 0 at first, is learned.
    """

    def first(num_heads):
        return positions.alibi_slopes(num_heads) if soft else jnp.full(num_heads, 3.0)

    counted = {(False, False): "from the start", (True, False): "from the source's ends", (True, True): "from all ends"}
    sharp = "soft" if soft else "sharp"
    return Encoding(
        f"the pointer, counted {counted[keys, queries]}, {sharp} {'for good' if frozen else 'at first'}"
        f"{'' if shift else ', without a shift'}",
        score=scores.anchored_score(first, keys=keys, queries=queries, frozen=frozen),
        parameters=scores.anchored_parameters(first, frozen=frozen, shift=shift),
        queries_from_end=queries,
        keys_from_end=keys,
        by_part=True,
    )


def _anchored_rotary() -> Encoding:
    """Rotary positions, counted from the start by some heads and from the last symbol by others.

    Not from the end token: a source's symbol j is the j-th of its reverse counted back from the last symbol, but the
    (j + 1)-th counted back from the end token. Heads can learn to look one place aside, but how far aside that is
    depends on the length where positions are drawn.
    """

    def turn_by(x, side: Side, from_end):
        start, end = positions.rotary(x, side.from_start()), positions.rotary(x, side.from_last_symbol())
        return jnp.where(from_end[:, None], end, start)

    return Encoding(
        "distances between places, counted from both ends; no head prefers any",
        turn=lambda x, side: turn_by(x, side, heads_from_ends(x.shape[1])[1]),
        turn_keys=lambda x, side: turn_by(x, side, heads_from_ends(x.shape[1])[0]),
        queries_from_end=True,
        keys_from_end=True,
        by_part=True,
    )


def log_scaled(encoding: Encoding) -> Encoding:
    """The encoding, and scores that grow with the logarithm of how many keys there are: s ln(1 + keys).

    Weights over many keys can then be as sharp as over few.

    Source: Chiang and Cholak 2022, section 5.3, with 1 + keys for keys, so that the score of a single one still counts.
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
    return dataclasses.replace(encoding, randomized=True, builds_in=f"{encoding.builds_in}; how many places there are")


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
    "shaw": Encoding(f"distances up to {scores.CLIP}", score=scores.shaw_score, parameters=scores.shaw_parameters),
    "t5": Encoding(
        "distances in buckets, the far ones together", score=scores.t5_score, parameters=scores.t5_parameters
    ),
    "anchored_t5": log_scaled(
        Encoding(
            f"distances up to {scores.NEAR}, counted from both ends; no head prefers any",
            score=scores.anchored_t5_score,
            parameters=scores.t5_parameters,
            queries_from_end=True,
            keys_from_end=True,
            by_part=True,
        )
    ),
    "line": Encoding(
        "that each head looks at one place, which moves evenly",
        score=scores.line_score,
        parameters=scores.line_parameters,
        keys_from_end=True,
    ),
    "transformer_xl": Encoding(
        "distances, as sines and cosines",
        score=scores.transformer_xl_score,
        parameters=scores.transformer_xl_parameters,
    ),
    "alibi": Encoding("near keys count more than far ones", score=scores.alibi_score),
    "log_length": log_scaled(Encoding("nothing")),
    "anchored": anchored(),
    "anchored_to_source": anchored(queries=False),
    "anchored_once": anchored(keys=False, queries=False),
    "anchored_frozen": anchored(frozen=True),
    "anchored_soft": anchored(soft=True),
    "anchored_unshifted": anchored(shift=False),
    "anchored_rotary": log_scaled(_anchored_rotary()),
}
_DRAWN = ("sinusoidal", "learned", "rotary", "shaw", "t5", "transformer_xl", "alibi", "anchored_rotary")
ENCODINGS = _PLAIN | {f"randomized_{name}": randomized(_PLAIN[name]) for name in _DRAWN}
