"""Mechanisms that the studies of lengths compare: heads that count from either end, lines, randomized positions."""

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

_DRAW = 1 << 16  # folded into a key to draw positions; a number that no layer has
NEAR = 14  # with max_distance = NEAR + 2, T5's buckets have one distance each up to here; farther ones share one
_LINE_RATE = 4.0  # multiplies the parameters of a line, which must change more in training than others


class PositionsUnknown(LengthUnknown):
    """The length of the answer is needed, but only for the number of positions to draw, not for the answer's end."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TapeExample(Example):
    """An example on a tape: its symbols, then one cell per symbol of its answer."""

    symbols: Count = 0
    cells: Count = 0


def _from_start(rows: Rows) -> Int[Array, "T"]:
    """Return positions counted from the first token."""
    return _lookup(rows, _number_in_text(rows))


def _from_end(rows: Rows, symbols: bool = False) -> Int[Array, "T"]:
    """Return positions counted back from the last token, or from the last symbol, which is at 0; later ones are < 0."""
    if isinstance(rows.example, TapeExample):  # a tape has no end tokens
        length = jnp.where(rows.token < rows.example.symbols, rows.example.symbols, rows.example.cells)
    else:
        length = rows.length - symbols
    return _lookup(rows, length - 1 - _number_in_text(rows))


def _number_in_text(rows: Rows) -> Int[Array, "T"]:
    """Return the number of each token in its text; the symbols and the cells of a tape are two texts."""
    if not isinstance(rows.example, TapeExample):
        return rows.token
    return rows.token - rows.example.symbols * (rows.token >= rows.example.symbols)


def _lookup(rows: Rows, number: Int[Array, "T"]) -> Int[Array, "T"]:
    return number if rows.table is None else rows.table[jnp.clip(number, 0, len(rows.table) - 1)]


def counted(q: Rows, k: Rows, *, keys: bool = True, queries: bool = True) -> tuple[Int[Array, "S"], Int[Array, "T"]]:
    """Return positions idx of keys and tau of queries for a head; the heads take all four kinds of counting in turn.

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
    position per step, forwards or backwards. A layer with four heads has all four kinds.

    Args:
      keys, queries: as of `counted`.
      soft: whether the initial slopes are those of ALiBi; otherwise they are 3.
      frozen: whether the slopes stay at their initial values.
      shift: whether c, initially 0, is learned.
    """

    keys: bool = True
    queries: bool = True
    soft: bool = False
    frozen: bool = False
    shift: bool = True

    def setup(self, layer: Layer, rngs: nnx.Rngs):
        self.num_heads = layer.num_heads
        if self.shift or not self.frozen:
            rngs.params()  # unused, but later layers must get the same keys as in the recorded results
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

    b has one number per distance up to `NEAR` in each direction; all farther ones share one.
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

    Not from the end token: symbol j of a source is the j-th of its reverse counted back from the last symbol, but the
    (j + 1)-th counted back from the end token. Heads can learn a shift by one position, but with randomized positions
    the size of that shift depends on the length.
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
        # At first the lines do not move with t and are spread over the keys; soft slopes let a head see most keys.
        spread = (jnp.arange(layer.num_heads) + 0.5) / layer.num_heads
        self.line = HeadParam(jnp.stack([0 * spread, spread, 0 * spread], axis=-1) / _LINE_RATE)
        self.slope = HeadParam(jnp.full(layer.num_heads, _inverse_softplus(0.3) / _LINE_RATE))

    def score(self, q: Rows, k: Rows):
        tau = q.position
        features = jnp.stack(jnp.broadcast_arrays(tau, k.length, 1), axis=-1)  # [T 3]
        # In float32, since bfloat16 rounds positions above 256.
        target = features.astype(jnp.float32) @ (_LINE_RATE * self.line[...])
        slope, idx = jax.nn.softplus(_LINE_RATE * self.slope[...]), k.position
        return lambda s, q, k: s - slope * jnp.abs(idx[k.row] - target[q.row])


@register
class log_length(Mechanism):
    """s ln(1 + n), with n the number of keys that a query may attend to: weights over many keys can be equally sharp.

    Source: Chiang and Cholak 2022, section 5.3, with 1 + n instead of n, so that the score of a single key is not 0.
    """

    def setup(self, layer: Layer, rngs: nnx.Rngs):
        self.is_causal = layer.kind == "decoder"

    def score(self, q: Rows, k: Rows):
        # Padding before a prompt stands at negative positions; the logarithm of those would give gradients of NaN.
        visible = jnp.maximum(q.token + 1, 1) if self.is_causal else jnp.broadcast_to(k.length, q.token.shape)
        factor = jnp.log1p(visible.astype(jnp.float32))
        return lambda s, q, k: s * factor[q.row]


@register
class randomized(Mechanism):
    """Another mechanism over positions that are drawn, ascending, from a range far beyond the training lengths.

    Args:
      inner: the other mechanism.
      range: positions are drawn from 0..range-1.
      at_test: "spaced": evenly over the range; "random": drawn as in training, but with a fixed key.

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
            reason = f"{self.inner.expression()} distinguishes {self.inner.max_positions} positions"
            raise ValueError(f"randomized: {reason}, must distinguish range = {self.range}")

    @property
    def max_positions(self) -> int:
        return self.range

    @property
    def scale(self) -> float | None:
        return self.inner.scale

    @property
    def scope(self) -> str:
        return self.inner.scope

    def has(self, name: str) -> bool:
        return self.inner.has(name)

    def setup(self, layer: Layer, rngs: nnx.Rngs):
        (self.inner,) = build(self.inner, layer, rngs, {})

    def _randomized_rows(self, rows: Rows) -> Rows:
        count = known(rows.example.num_positions, PositionsUnknown)
        table = draw(self.range, count, rows.example.key, at_test=self.at_test)
        return dataclasses.replace(rows, table=table)

    def embedding(self, rows: Rows) -> Float[Array, "T D"]:
        return self.inner.embedding(self._randomized_rows(rows))

    def query(self, x: Float[Array, "T H"], q: Rows) -> Float[Array, "T H"]:
        return self.inner.query(x, self._randomized_rows(q))

    def key(self, x: Float[Array, "S H"], k: Rows) -> Float[Array, "S H"]:
        return self.inner.key(x, self._randomized_rows(k))

    def value(self, x: Float[Array, "S H"], k: Rows) -> Float[Array, "S H"]:
        return self.inner.value(x, self._randomized_rows(k))

    def score(self, q: Rows, k: Rows):
        q, k = self._randomized_rows(q), self._randomized_rows(k)
        return _by_tile(self.inner.score(q, k), q, k)

    def mask(self, q: Rows, k: Rows):
        q, k = self._randomized_rows(q), self._randomized_rows(k)
        return _by_tile(self.inner.mask(q, k), q, k)


def _by_tile(change: Callable | None, q: Rows, k: Rows) -> Callable | None:
    """Turn a score or mask of randomized rows, or of their positions, into a function of the rows of a tile."""

    def call(*arguments):  # (q, k) of a mask, (s, q, k) of a score
        *s, q_tile, k_tile = arguments
        tiles = q.tile(q_tile.row), k.tile(k_tile.row)
        return change(*s, *([tile.position for tile in tiles] if isinstance(change, Mod) else tiles))

    return None if change is None else call


def draw(range: int, count: Count, key: Array | None, *, at_test: str) -> Int[Array, "range"]:
    """Draw the positions of the first `count` tokens, ascending; the values after them are not used.

    The evenly spaced position of token t is the mean of its drawn one, (t + 1) (range + 1) / (count + 1) - 1, rounded
    down.

    Args:
      range: positions are in 0..range-1.
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
    """Return ln(e^x - 1), whose softplus is x."""
    return jnp.log(jnp.expm1(x))
