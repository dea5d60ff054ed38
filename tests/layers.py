"""An attention layer with a mechanism, and its scores, read off its weights to be compared with formulas in NumPy."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attn.mechanisms.mechanism import Layer
from attn.mechanisms.rows import Example, Rows
from attn.nn.attention import Attention, Sides

T, S, N, H, D = 5, 7, 4, 6, 22
FIRST, LENGTH, SOURCE_LENGTH = 3, 11, 6  # position of the first query; length of the target and of the source
EXAMPLE = Example(SOURCE_LENGTH, LENGTH, LENGTH)
DRAWN = np.sort(np.random.default_rng(0).permutation(60)[:20])  # positions by the number of the token


class Read(NamedTuple):
    """Scores `[N T S]` up to one number per row, and what they are made of, in float64."""

    scores: np.ndarray
    query: np.ndarray
    key: np.ndarray

    @property
    def content(self) -> np.ndarray:
        """q_i k_j."""
        return np.einsum("tnh,snh->nts", self.query, self.key)


def attention(mechanism, params=None, *, kind: str = "cross", dtype=jnp.float32) -> Attention:
    """A layer with a mechanism whose parameters have these values."""
    described = Layer(kind, D, N, H, H**-0.5, jnp.dtype(dtype))
    layer = Attention(mechanism, described, implementation="reference", shared={}, rngs=nnx.Rngs(0))
    for name, value in (params or {}).items():
        [part] = (part for part in layer.mechanism if hasattr(part, name))
        getattr(part, name)[...] = jnp.asarray(value, jnp.float32)
    return layer


def sides(drawn=None, *, first: int = FIRST, length: int = LENGTH, source_length: int = SOURCE_LENGTH) -> Sides:
    """T queries from `first` on of a target of `length` tokens, S keys from 0 on of a source, nothing hidden."""
    table = None if drawn is None else jnp.asarray(drawn)
    q = Rows(jnp.arange(T), start=first, table=table, total=length, example=EXAMPLE)
    return Sides(q, Rows(jnp.arange(S), table=table, total=source_length, example=EXAMPLE), None)


def inputs(dtype=jnp.float32) -> tuple[jax.Array, jax.Array]:
    """Return the inputs of queries `[T D]` and keys `[S D]`."""
    return tuple(jax.random.normal(jax.random.key(seed), (n, D), dtype) for seed, n in ((1, T), (2, S)))


def read(mechanism, params=None, drawn=None, **options) -> Read:
    """Return the scores after a mechanism; queries and keys are those before it."""
    return read_layer(attention(mechanism, params, **options), sides(drawn))


def read_layer(layer: Attention, where: Sides) -> Read:
    """The scores of a layer between some rows."""
    x, memory = inputs(layer.dtype)
    _, weights = layer(x, layer.keys_values(memory, where.k), where, return_weights=True)
    query, key = (
        np.einsum("td,dnh->tnh", np.asarray(rows, np.float64), np.asarray(W[...], np.float64))
        for rows, W in ((x, layer.W_Q), (memory, layer.W_K))
    )
    with np.errstate(divide="ignore"):  # of hidden keys
        return Read(np.log(np.asarray(weights, np.float64)), query, key)


def check(found: np.ndarray, expected: np.ndarray, tolerance: float = 2e-4):
    """Compare scores, which are known up to one number per row, which the softmax takes away."""
    found, expected = (x - x.max(axis=-1, keepdims=True) for x in (found, expected))
    seen = expected > -12  # below, a weight has no digits left next to the others
    assert seen.mean() > 0.3
    np.testing.assert_allclose(found[seen], expected[seen], atol=tolerance)


def positions(drawn=None) -> tuple[np.ndarray, np.ndarray]:
    """Positions of queries `[T 1]` and keys `[1 S]`."""
    i, j = (FIRST + np.arange(T))[:, None], np.arange(S)[None, :]
    return (i, j) if drawn is None else (drawn[i], drawn[j])


def steps(drawn=None) -> np.ndarray:
    """j - i `[T S]`, or the drawn distance of so many steps."""
    i, j = positions()
    far = j - i
    return far if drawn is None else np.sign(far) * np.where(far == 0, 0, 1 + drawn[np.abs(far) - 1])
