"""The passes of ring attention for all heads: some heads at a time, and rows in the order that balances the work.

A pass of a ring keeps a dozen arrays of the keys' size: those at hand and those under way, with their gradients, in
float32. So the heads take turns, and these arrays are those of one turn. The rows are moved to zig-zag order within a
turn as well.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from attn.functional import dtypes, sharding, zigzag
from attn.functional.ring_functions import Functions
from attn.functional.ring_passes import Ring

# The fewest numbers of a device's keys in a turn: in shorter messages latency would count, not bandwidth.
TURN = 2**18


def turns_of(K: int, rows: int, width: int) -> int:
    """Return how many turns K heads of keys take; each turn has as few heads as `TURN` allows.

    Args:
      K: the number of key/value heads.
      rows, width: of a device's keys of one head.
    """
    return next((K // heads for heads in range(1, K) if K % heads == 0 and heads * rows * width >= TURN), 1)


@dataclasses.dataclass(frozen=True, eq=False)
class Heads:
    """The passes, as the `derivatives.Forms` of a function of queries, keys, values, and arrays of functions.

    Attributes:
      ring: the passes for all heads at once.
      turns: the number of turns.
      is_exchanged: whether rows are moved to zig-zag order and back.
      functions: mask, score, scale and dropout.
    """

    ring: Ring
    turns: int
    is_exchanged: bool
    functions: Functions

    def value(self, inputs: list[Array], fixed: list[Array]) -> list[Array]:
        """Compute (out `[n N Hv]`, peak `[n N]`, total `[n N]`) of this device's n queries.

        Args:
          inputs: queries `[n N H]`, keys `[c K H]`, values `[c K Hv]`, floats of the functions.
          fixed: the other arrays of the functions.
        """
        query, _, value = inputs[:3]
        (n, N, _), wide = query.shape, dtypes.wide_dtype(query.dtype)
        start = [jnp.zeros((n, N, value.shape[-1]), value.dtype), *[jnp.zeros((n, N), wide)] * 2]

        def of_turn(turn):
            ring, some_inputs, some_fixed = self._arguments(turn, inputs, fixed)
            return self._results(ring.value(some_inputs, some_fixed), value.dtype)

        return self._in_turns(of_turn, sharding.vary_alike((start, inputs))[0], [1, 1, 1])

    def like(self, inputs: list[Array], fixed: list[Array]) -> list[Array]:
        """Compute the same as `value`, with every derivative, all heads at once by `blockwise`."""
        whole = dataclasses.replace(self, turns=1, ring=dataclasses.replace(self.ring, attend=None))
        ring, inputs, fixed = whole._arguments(0, inputs, fixed)
        return whole._results(ring.like(inputs, fixed), inputs[2].dtype)

    def pullback(self, inputs, fixed, results, cotangents, wanted) -> list[Array]:
        """Compute the gradients of the wanted inputs.

        Args:
          inputs, fixed, results: as those of `value`.
          cotangents: those of the results.
          wanted: one bool per input.
        """
        axes = [1, 1, 1, *(0 if each else None for each in self.functions.of_kind("float"))]
        axes = [axis for axis, each in zip(axes, wanted) if each]
        rows = sum(wanted[:3])  # the number of gradients that are rows of this device

        def of_turn(turn):
            ring, some_inputs, some_fixed = self._arguments(turn, inputs, fixed)
            known = [dtypes.widened([self._rows(x, turn) for x in each]) for each in (results, cotangents)]
            gradients = ring.pullback(some_inputs, some_fixed, *known, wanted)
            return [*map(self._back, gradients[:rows]), *gradients[rows:]]

        start = [jnp.zeros_like(x) for x, each in zip(inputs, wanted) if each]
        return self._in_turns(of_turn, sharding.vary_alike((start, inputs))[0], axes)

    def _in_turns(self, of_turn: Callable, start: list[Array], axes: Sequence[int | None]) -> list[Array]:
        """Compute the arrays of all heads: those of each turn, written along their axis of heads, or their sum."""
        if self.turns == 1:
            return of_turn(0)

        def step(arrays, turn):
            return [_with(*each, turn) for each in zip(arrays, of_turn(turn), axes)], None

        return lax.scan(step, start, jnp.arange(self.turns))[0]

    def _arguments(self, turn, inputs, fixed) -> tuple[Ring, list[Array], list[Array]]:
        """Return the ring of the heads of a turn, and its inputs and fixed arrays."""
        ring = dataclasses.replace(self.ring, N=self.ring.N // self.turns, K=self.ring.K // self.turns)
        (rows, floats), kinds = (inputs[:3], inputs[3:]), ("float", "fixed")
        floats, fixed = (
            [self._heads(x, turn, 0) if each else x for x, each in zip(arrays, self.functions.of_kind(kind))]
            for arrays, kind in zip((floats, fixed), kinds)
        )
        first_head = jnp.int32(turn * ring.N)
        return ring, [*(self._rows(x, turn) for x in rows), *floats], [*fixed, first_head]

    def _results(self, results: list[Array], dtype) -> list[Array]:
        """Return the results of some heads in the order of the given rows, the output in this dtype."""
        out, *normalizer = results
        return list(map(self._back, (out.astype(dtype), *normalizer)))

    def _heads(self, x: Array, turn, axis: int) -> Array:
        """Return the heads of a turn."""
        count = x.shape[axis] // self.turns
        return x if self.turns == 1 else lax.dynamic_slice_in_dim(x, turn * count, count, axis)

    def _rows(self, x: Array, turn) -> Array:
        """Return the heads of a turn in chunks, `[chunks heads n ...]`, of an array `[rows heads ...]`."""
        x = self._heads(x, turn, 1)
        x = zigzag.to_zigzag(x, self.ring.axis_name) if self.is_exchanged else x
        chunks = 2 if self.ring.rows == "zigzag" else 1
        return jnp.moveaxis(x.reshape(chunks, len(x) // chunks, *x.shape[1:]), 2, 1)

    def _back(self, x: Array) -> Array:
        """Return an array `[rows heads ...]` from one in chunks: the inverse of `_rows`."""
        x = jnp.moveaxis(x, 1, 2)
        x = x.reshape(-1, *x.shape[2:])
        return zigzag.from_zigzag(x, self.ring.axis_name) if self.is_exchanged else x


def _with(array: Array, part: Array, axis: int | None, turn) -> Array:
    """Return an array with the heads of a turn written, or, without an axis of heads, with their summand added."""
    return array + part if axis is None else lax.dynamic_update_slice_in_dim(array, part, turn * part.shape[axis], axis)
