"""Positions of keys relative to queries: rotations of both, and terms of the scores."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from attn.functional import positions
from attn.mechanisms.mechanism import HeadParam, Layer, Mechanism
from attn.mechanisms.rows import Rows
from attn.settings import POSITIVE, between, setting


def distance(q: Rows, k: Rows) -> Int[Array, "..."]:
    """Return the distances j - i from queries to keys.

    With randomized positions, a distance of d tokens is 1 + the d-th drawn position, with the sign of d, so that all
    pairs d tokens apart have the same distance (Ruoss et al. 2023, section 3.2).
    """
    steps = k.token - q.token
    return steps if k.table is None else jnp.sign(steps) * jnp.where(steps == 0, 0, 1 + k.table[jnp.abs(steps) - 1])


class rotary(Mechanism):
    """Queries and keys are rotated by their positions, so that scores depend on distances alone.

    Args:
      base: the longest wavelength is 2 pi base tokens.
      fraction: fraction of the features that are rotated.
      factor: positions are divided by it.

    Source: Su et al. 2021, section 3.2; those of the settings are in `attn.positions.rotary`.
    """

    base: float = setting(10_000.0, POSITIVE)
    fraction: float = setting(1.0, between(0, 1))
    factor: float = setting(1.0, POSITIVE)

    def query(self, x: Float[Array, "T H"], q: Rows) -> Float[Array, "T H"]:
        return positions.rotary(x, q.position, base=self.base, fraction=self.fraction, scale=self.factor)

    key = query


class llama3_rotary(Mechanism):
    """Rotary positions whose long wavelengths are stretched, so that a longer context than in training can be read.

    With wavelengths w = 2 pi / f and the length L of the original context: f stays where w < L / high, becomes
    f / factor where w > L / low, and changes smoothly in between.

    Args:
      base: the longest wavelength is 2 pi base tokens, before it is stretched.
      factor: by which the longest wavelengths are stretched.
      low, high: wavelengths between L / high and L / low are stretched in part.
      original: L.

    Source: the code of Grattafiori et al. 2024 (Llama 3.1), section 3.4.2.
    """

    base: float = setting(500_000.0, POSITIVE)
    factor: float = setting(8.0, POSITIVE)
    low: float = setting(1.0, POSITIVE)
    high: float = setting(4.0, POSITIVE)
    original: int = setting(8_192, between(1))

    def frequencies(self, width: int) -> Float[np.ndarray, "pairs"]:
        """Compute the angles per position of the pairs of features."""
        if not self.low < self.high:
            raise ValueError(f"low: got {self.low}, must be less than high = {self.high}")
        frequencies = self.base ** (-np.arange(0, width, 2) / width)
        turns = self.original * frequencies / (2 * np.pi)  # of a pair, over the original context
        kept = np.clip((turns - self.low) / (self.high - self.low), 0, 1)
        return frequencies * (kept + (1 - kept) / self.factor)

    def query(self, x: Float[Array, "T H"], q: Rows) -> Float[Array, "T H"]:
        return positions.rotary(x, q.position, frequencies=jnp.asarray(self.frequencies(x.shape[-1])))

    key = query


class alibi(Mechanism):
    """s - slope |j - i + 1/4|, with one slope per head; the 1/4 distinguishes the two directions.

    Source: Press et al. 2022, section 3; both directions: Ruoss et al. 2023.
    """

    def setup(self, layer: Layer, rngs: nnx.Rngs):
        self.num_heads = layer.num_heads

    def score(self, q: Rows, k: Rows):
        slope = positions.alibi_slopes(self.num_heads)[q.head]
        return lambda s, q, k: s - slope * jnp.abs(distance(q, k) + 0.25)


class t5(Mechanism):
    """s + b(j - i), with b learned: one number per head and bucket of distances.

    Args:
      num_buckets: number of buckets.
      max_distance: keys that are farther share the last bucket.
      bidirectional: half of the buckets are for keys after the query; otherwise these share one.
      per_stack: the layers of a stack share one table, as in the source; otherwise each has its own.

    Source: Raffel et al. 2020, section 2.1.
    """

    num_buckets: int = setting(32, between(2, 65_536))
    max_distance: int = setting(128, between(1, 1_000_000))
    bidirectional: bool = True
    per_stack: bool = False

    @property
    def scope(self) -> str:
        return "stack" if self.per_stack else "layer"

    def setup(self, layer: Layer, rngs: nnx.Rngs):
        shape = (layer.num_heads, self.num_buckets)
        self.table = HeadParam(jax.random.normal(rngs.params(), shape) * layer.width**-0.5)

    def score(self, q: Rows, k: Rows):
        settings = {name: getattr(self, name) for name in ("num_buckets", "max_distance", "bidirectional")}
        return lambda s, q, k: s + self.table[...][positions.relative_buckets(distance(q, k), **settings)]


class shaw(Mechanism):
    """s + scale q_i r(j - i), with one learned row r `[H]` per distance, shared by all heads. Values stay as they are.

    Args:
      clip: the longest distance with its own row; longer ones share the last row.

    Source: Shaw et al. 2018, section 3.2.
    """

    clip: int = setting(16, between(0, 65_536))

    def setup(self, layer: Layer, rngs: nnx.Rngs):
        shape = (2 * self.clip + 1, layer.head_width)
        self.table = nnx.Param(jax.random.normal(rngs.params(), shape) * layer.head_width**-0.5)
        self.layer_scale = layer.scale

    def score(self, q: Rows, k: Rows):
        terms = self.layer_scale * q.vectors @ self.table[...].T  # [T 2 clip + 1], in float32

        def added(s, q, k):
            return s + terms[q.row, jnp.clip(distance(q, k), -self.clip, self.clip) + self.clip]

        return added


class transformer_xl(Mechanism):
    """s + scale (u k_j + (q_i + v) R(j - i)), with R a linear map of sinusoids; s holds q_i k_j.

    Source: Dai et al. 2019, section 3.3.
    """

    def setup(self, layer: Layer, rngs: nnx.Rngs):
        keys, shape = jax.random.split(rngs.params(), 3), (layer.num_heads, layer.head_width)
        relative = jax.random.normal(keys[0], (layer.width, *shape)) * layer.width**-0.5
        self.relative = HeadParam(jnp.moveaxis(relative, 1, 0))  # [N D H]
        self.u = HeadParam(0.02 * jax.random.normal(keys[1], shape))
        self.v = HeadParam(0.02 * jax.random.normal(keys[2], shape))
        self.width, self.layer_scale = layer.width, layer.scale

    def score(self, q: Rows, k: Rows):
        first = k.token[0] - q.token[-1]
        steps = first + jnp.arange(len(q.row) + len(k.row) - 1)  # every j - i, ascending: [T+S-1]
        distances = distance(Rows(jnp.zeros(1, int)), Rows(steps, table=k.table))
        relative = positions.sinusoidal(distances, self.width) @ self.relative[...]
        terms = self.layer_scale * (q.vectors + self.v[...]) @ relative.T  # [T T+S-1]
        content = self.layer_scale * k.vectors @ self.u[...]  # [S]

        def added(s, q, k):
            return s + content[k.row] + terms[q.row, k.token - q.token - first]

        return added
