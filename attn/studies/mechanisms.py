"""Mechanisms that the studies of lengths compare: heads that count from either end, lines, and drawn positions."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from attn.functional import positions
from attn.functional.mods import Mod
from attn.mechanisms.mechanism import HeadParam, Layer, Mechanism, build
from attn.mechanisms.registry import register
from attn.mechanisms.rows import Count, Example, LengthUnknown, Rows, known

_DRAW = 1 << 16  # folded into a key to draw positions: no layer has such a number
NEAR = 14  # T5's buckets, made to end at two more, hold one distance each up to here; all farther ones share one
_PACE = 4.0  # the parameters of a line have farther to go than others


class PositionsUnknown(LengthUnknown):
    """The length of the answer is read, but only for how many positions to draw, not for where the answer ends."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TapeExample(Example):
    """An example on a tape: its symbols, and after them as many cells as its answer has symbols."""

    symbols: Count = 0
    cells: Count = 0


def _from_start(rows: Rows) -> Int[Array, "T"]:
    """Positions counted from the first token."""
    return _looked_up(rows, _place(rows))


def _from_end(rows: Rows, symbols: bool = False) -> Int[Array, "T"]:
    """Positions counted from the last token, or from the last symbol, which stands at 0; what follows it, before 0."""
    if isinstance(rows.example, TapeExample):  # which has no end tokens
        length = jnp.where(rows.token < rows.example.symbols, rows.example.symbols, rows.example.cells)
    else:
        length = rows.length - symbols
    return _looked_up(rows, length - 1 - _place(rows))


def _place(rows: Rows) -> Int[Array, "T"]:
    """The number of each token in its text; on a tape symbols and cells are two texts."""
    if not isinstance(rows.example, TapeExample):
        return rows.token
    return rows.token - rows.example.symbols * (rows.token >= rows.example.symbols)


def _looked_up(rows: Rows, place: Int[Array, "T"]) -> Int[Array, "T"]:
    return place if rows.table is None else rows.table[jnp.clip(place, 0, len(rows.table) - 1)]


def counted(q: Rows, k: Rows, *, keys: bool = True, queries: bool = True) -> tuple[Int[Array, "S"], Int[Array, "T"]]:
    """Positions idx of keys and tau of queries for a head: from the start or from the end, all four kinds in turn.

    Args:
      q, k: rows of the head.
      keys: whether every second head counts the keys from their end.
      queries: whether every second pair of heads counts the queries from their end.
    """
    idx = jnp.where(q.head % 2 == 1, _from_end(k), _from_start(k)) if keys else _from_start(k)
    tau = jnp.where(q.head // 2 % 2 == 1, _from_end(q), _from_start(q)) if queries else _from_start(q)
    return idx, tau


@register
class anchored(Mechanism):
    """Each head attends to one position: s - slope |idx - tau - c|.

    idx counts the keys from the start or from the end, tau the queries from the start or from the end; slope, which a
    softplus keeps positive, and c are learned, one per head. A cross-attention head is then a pointer that moves by one
    position per step, forwards or backwards. All four kinds of heads are there if the layer has four.

    Args:
      keys, queries: as of `counted`.
      soft: whether the slopes start as those of ALiBi; otherwise at 3.
      frozen: whether the slopes stay as they are.
      shift: whether c, 0 at first, is learned.
    """

    keys: bool = True
    queries: bool = True
    soft: bool = False
    frozen: bool = False
    shift: bool = True

    def setup(self, layer: Layer, rngs: nnx.Rngs):
        self.num_heads = layer.num_heads
        if self.shift or not self.frozen:
            rngs.params()  # unused; the layers after this one were initialised after it in the recorded results
        if not self.frozen:
            self.slope = HeadParam(_inverse_softplus(self._first_slopes()))
        if self.shift:
            self.c = HeadParam(jnp.zeros(layer.num_heads))

    def _first_slopes(self) -> Float[Array, "N"]:
        return positions.alibi_slopes(self.num_heads) if self.soft else jnp.full(self.num_heads, 3.0)

    def score(self, q: Rows, k: Rows):
        slope = self._first_slopes()[q.head] if self.frozen else jax.nn.softplus(self.slope[...])
        c = self.c[...] if self.shift else 0.0
        idx, tau = counted(q, k, keys=self.keys, queries=self.queries)
        return lambda s, q, k: s - slope * jnp.abs(idx[k.row] - tau[q.row] - c)


@register
class anchored_t5(Mechanism):
    """s + b(idx - tau), as T5, with idx and tau counted from the start by some heads and from the end by others.

    b has a number for each distance up to `NEAR`, either way; all that are farther share one.
    """

    def setup(self, layer: Layer, rngs: nnx.Rngs):
        self.table = HeadParam(jax.random.normal(rngs.params(), (layer.num_heads, 32)) * layer.width**-0.5)

    def score(self, q: Rows, k: Rows):
        idx, tau = counted(q, k)

        def added(s, q, k):
            bucket = positions.relative_buckets(idx[k.row] - tau[q.row], max_distance=NEAR + 2)
            return s + self.table[...][bucket]

        return added


@register
class anchored_rotary(Mechanism):
    """Rotary positions, counted from the start by some heads and from the last symbol by others.

    Not from the end token: a source's symbol j is the j-th of its reverse counted back from the last symbol, but the
    (j + 1)-th counted back from the end token. Heads can learn to look one position aside, but how far aside that is
    depends on the length where positions are drawn.
    """

    def query(self, x: Float[Array, "T H"], q: Rows) -> Float[Array, "T H"]:
        return _rotated(x, q, q.head // 2 % 2 == 1)

    def key(self, x: Float[Array, "S H"], k: Rows) -> Float[Array, "S H"]:
        return _rotated(x, k, k.head % 2 == 1)


def _rotated(x: Float[Array, "T H"], rows: Rows, from_end) -> Float[Array, "T H"]:
    start, end = positions.rotary(x, _from_start(rows)), positions.rotary(x, _from_end(rows, symbols=True))
    return jnp.where(from_end, end, start)


@register
class line(Mechanism):
    """s - slope |j - (a t + b n + c)| among n keys: a head attends to a line, of which a, b and c are learned."""

    def setup(self, layer: Layer, rngs: nnx.Rngs):
        rngs.params()  # as in `anchored`
        # At first the lines stand still, spread over the keys, with slopes so soft that most keys are seen.
        spread = (jnp.arange(layer.num_heads) + 0.5) / layer.num_heads
        self.line = HeadParam(jnp.stack([0 * spread, spread, 0 * spread], axis=-1) / _PACE)
        self.slope = HeadParam(jnp.full(layer.num_heads, _inverse_softplus(0.3) / _PACE))

    def score(self, q: Rows, k: Rows):
        tau = q.position
        features = jnp.stack(jnp.broadcast_arrays(tau, k.length, 1), axis=-1)
        # In float32, since bfloat16 rounds positions above 256.
        target = features.astype(jnp.float32) @ (_PACE * self.line[...])
        slope, idx = jax.nn.softplus(_PACE * self.slope[...]), k.position
        return lambda s, q, k: s - slope * jnp.abs(idx[k.row] - target[q.row])


@register
class log_length(Mechanism):
    """s ln(1 + n), with n the number of keys that a query may attend to: weights over many keys can be as sharp.

    Source: Chiang and Cholak 2022, section 5.3, with 1 + n for n, so that the score of a single key still counts.
    """

    def setup(self, layer: Layer, rngs: nnx.Rngs):
        self.is_causal = layer.kind == "decoder"

    def score(self, q: Rows, k: Rows):
        visible = q.token + 1 if self.is_causal else jnp.broadcast_to(k.length, q.token.shape)
        factor = jnp.log1p(visible.astype(jnp.float32))
        return lambda s, q, k: s * factor[q.row]


@register
class randomized(Mechanism):
    """Another mechanism over positions that are drawn, in order, from a range far beyond the training lengths.

    Args:
      inner: the other mechanism.
      range: positions are drawn from 0..range-1.
      at_test: "spaced", evenly over the range, or "random", drawn as in training but the same every time.

    Source: Ruoss et al. 2023, section 3.
    """

    inner: Mechanism
    range: int = 2_048
    at_test: str = "spaced"

    def __post_init__(self):
        if not 2 <= self.range <= 40_000:
            raise ValueError(f"randomized: range must lie in 2..40,000, got {self.range}")
        if self.at_test not in ("spaced", "random"):
            raise ValueError(f"randomized: at_test must be 'spaced' or 'random', got {self.at_test!r}")
        if (self.inner.max_positions or self.range) < self.range:
            told = f"{self.inner.expression()} tells {self.inner.max_positions} positions apart"
            raise ValueError(f"randomized: {told}, must tell range = {self.range} apart")

    @property
    def max_positions(self) -> int:
        return self.range

    def has(self, name: str) -> bool:
        return self.inner.has(name)

    def setup(self, layer: Layer, rngs: nnx.Rngs):
        (self.inner,) = build(self.inner, layer, rngs, {})

    def _drawn(self, rows: Rows) -> Rows:
        count = known(rows.example.num_positions, PositionsUnknown)
        table = draw(self.range, count, rows.example.key, at_test=self.at_test)
        return dataclasses.replace(rows, table=table)

    def embedding(self, rows: Rows) -> Float[Array, "T D"]:
        return self.inner.embedding(self._drawn(rows))

    def query(self, x: Float[Array, "T H"], q: Rows) -> Float[Array, "T H"]:
        return self.inner.query(x, self._drawn(q))

    def key(self, x: Float[Array, "S H"], k: Rows) -> Float[Array, "S H"]:
        return self.inner.key(x, self._drawn(k))

    def value(self, x: Float[Array, "S H"], k: Rows) -> Float[Array, "S H"]:
        return self.inner.value(x, self._drawn(k))

    def score(self, q: Rows, k: Rows):
        q, k = self._drawn(q), self._drawn(k)
        return _of_drawn(self.inner.score(q, k), q, k)

    def mask(self, q: Rows, k: Rows):
        q, k = self._drawn(q), self._drawn(k)
        return _of_drawn(self.inner.mask(q, k), q, k)


def _of_drawn(change: Callable | None, q: Rows, k: Rows) -> Callable | None:
    """A score or mask of drawn rows, or of drawn positions, as a function of the rows of a tile."""

    def call(*given):
        tiles = q.tile(given[-2].row), k.tile(given[-1].row)
        return change(*given[:-2], *([tile.position for tile in tiles] if isinstance(change, Mod) else tiles))

    return None if change is None else call


def draw(range: int, count: Count, key: Array | None, *, at_test: str) -> Int[Array, "range"]:
    """Draw the positions of the first `count` tokens, ascending; those after are filled.

    Evenly spaced, token t stands at the mean of what is drawn for it, (t + 1) (range + 1) / (count + 1) - 1, rounded
    down.

    Args:
      range: positions are of 0..range-1.
      count: number of tokens.
      key: of an example in training; None at test.
      at_test: see `randomized`.

    Source: Ruoss et al. 2023, section 3.1.
    """
    tokens = jnp.arange(range)
    if key is None and at_test == "spaced":
        return jnp.minimum((tokens + 1) * (range + 1) // (count + 1), range) - 1
    key = jax.random.key(0) if key is None else key
    return positions.randomized(jax.random.fold_in(key, _DRAW), range, range, count=count)


def _inverse_softplus(x):
    """ln(e^x - 1), whose softplus is x."""
    return jnp.log(jnp.expm1(x))
