"""The two passes of ring attention: one for the results, one for the gradients; see `ring`."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Bool, Int

from attn.functional import blockwise, dtypes, mods, sharding, survey, zigzag
from attn.functional.blocks import positions_in_blocks
from attn.functional.closures import Rebound
from attn.functional.contract import Call, Normalizer
from attn.functional.masks import as_mask
from attn.functional.masks import placed as placed_mask
from attn.functional.ring_functions import PairMask, PairScore
from attn.functional.scores import as_score
from attn.functional.scores import placed as placed_score


@dataclasses.dataclass(frozen=True, eq=False)
class Ring:
    """The passes, as the `derivatives.Forms` of a function of queries, keys, values, and arrays of functions.

    A device holds chunks of n queries and chunks of c keys. A pair is a chunk of queries and a chunk of keys, and
    is computed only if the mask shows some key of it to some query.

    Attributes:
      axis_name, devices: the mesh axis, and its number of devices U.
      rows: the order of the rows, "consecutive" or "zigzag".
      T, S, N, K: the lengths of the whole sequences, and the numbers of heads.
      captured: the traced arrays that functions capture.
      rebuild: (floats, fixed) -> ((mask, score, scale, dropout), replacements of `captured`).
      attend: the `attend` of an implementation that attends parts, for the pairs; None for `blockwise`.
    """

    axis_name: str
    devices: int
    rows: str
    T: int
    S: int
    N: int
    K: int
    captured: list
    rebuild: Callable
    attend: Callable | None = None

    def value(self, inputs: list[Array], fixed: list[Array]) -> list[Array]:
        """Compute (out `[chunks N n Hv]`, peak `[chunks N n]`, total `[chunks N n]`) of this device's queries.

        Args:
          inputs: queries `[chunks N n H]`, keys `[chunks K c H]`, values `[chunks K c Hv]`, floats of the functions.
          fixed: the other arrays of the functions, and the number of the first head.
        """
        queries, *memory = inputs[:3]
        functions = self.rebuild(inputs[3:], fixed)

        def combine(state, of_queries, of_keys, *pair):
            return _combine(state, self._pair(functions, *pair, *of_queries, *of_keys))

        def step(carry, t):
            state, memory = carry
            arriving = self._send(memory)  # on its way while this part is computed
            return (self._add_part(combine, state, (queries,), memory, functions, t), arriving), None

        (state, _), _ = lax.scan(step, (self._nothing(inputs), memory), jnp.arange(self.devices))
        return jax.tree.leaves(state)

    def like(self, inputs: list[Array], fixed: list[Array]) -> list[Array]:
        """Compute the same as `value`, with every derivative in memory O(T)."""

        # The derivative of `value` itself is right, but jax 0.10 computes wrong second derivatives of its loops, whose
        # carry goes through other custom derivatives.
        @jax.custom_jvp
        def call(inputs, fixed):
            return self.value(inputs, fixed)

        @functools.partial(call.defjvp, symbolic_zeros=True)
        def _(primals, tangents):
            results, wanted = call(*primals), [not isinstance(x, SymbolicZero) for x in tangents[0]]
            return results, self._tangents(*primals, results, tangents[0], wanted)

        return call(inputs, fixed)

    def _tangents(self, inputs, fixed, results, tangents, wanted) -> list[Array]:
        """Compute the tangents of the results: the sum of the share of each part, as in `blockwise`."""
        known = results[0], Normalizer(*results[1:])
        moving = [
            x.astype(like.dtype) if each else None for x, like, each in zip(tangents, dtypes.widened(inputs), wanted)
        ]
        functions = self.rebuild(inputs[3:], fixed)

        def add(state, of_queries, of_keys, *pair):
            (query, dquery, known), (memory, dmemory) = of_queries, of_keys
            inside = [query, *memory, *inputs[3:]]
            function, primals = self._share(inside, fixed, known, wanted, *pair)
            dinside = [x for x in (dquery, *dmemory, *moving[3:]) if x is not None]
            return jax.tree.map(jnp.add, state, jax.jvp(function, primals, dinside)[1])

        def step(carry, t):
            state, memory = carry
            arriving = self._send(memory)
            return (self._add_part(add, state, (inputs[0], moving[0], known), memory, functions, t), arriving), None

        memory = inputs[1:3], moving[1:3]
        (state, _), _ = lax.scan(jax.checkpoint(step), (self._nothing(inputs), memory), jnp.arange(self.devices))
        return jax.tree.leaves(state)

    def _nothing(self, inputs):
        """Return (out, normaliser) of no keys."""
        wide = dtypes.wide_dtype(inputs[0].dtype)
        zeros = jnp.zeros(inputs[0].shape[:-1], wide)
        out = jnp.zeros((*zeros.shape, inputs[2].shape[-1]), dtypes.wide_dtype(inputs[2].dtype, wide))
        return sharding.vary_alike(((out, Normalizer(zeros, zeros)), inputs))[0]

    def _add_part(self, add: Callable, state, of_queries, of_keys, functions, t):
        """Change the results of each chunk of queries by each chunk of the keys that are at hand in step t.

        Args:
          add: (results, of_queries, of_keys, needed, i, j) -> results of one pair.
          state: results of all chunks of queries.
          of_queries, of_keys: trees of arrays with a leading axis of chunks, queries or keys first.
          functions: from `rebuild`.
          t: the step.
        """
        queries, keys = jax.tree.leaves(of_queries)[0], jax.tree.leaves(of_keys)[0]
        first_i, first_j = self._first_positions(queries, keys, t)

        def row(x):
            state, of_queries, query, i = x

            def column(state, x):
                of_keys, key, j = x
                needed = self._needed_blocks(functions, query, key, i, j)
                update = lambda state: add(state, of_queries, of_keys, needed, i, j)  # noqa: E731
                return _if_any(needed, update, state), None

            return lax.scan(column, state, (of_keys, keys, first_j))[0]

        return lax.map(row, (state, of_queries, queries, first_i))

    def pullback(self, inputs, fixed, results, cotangents, wanted) -> list[Array]:
        """Compute the gradients of the wanted inputs, with those of keys and values travelling along.

        Args:
          inputs, fixed, results: as those of `value`.
          cotangents: those of the results.
          wanted: one bool per input.
        """
        known, dknown = ((out, Normalizer(peak, total)) for out, peak, total in (results, cotangents))

        def zeros():
            """Return zeros for each wanted gradient, else None; in float32 or wider."""
            found = [jnp.zeros(x.shape, dtypes.widened(x).dtype) if each else None for x, each in zip(inputs, wanted)]
            return sharding.vary_alike((found, inputs))[0]

        def step(carry, t):
            memory, dmemory, others = carry
            # Both are on their way while this part is computed; its share is added to the gradients that arrive.
            arriving, dmemory = self._send((memory, dmemory))
            gradients = [others[0], *zeros()[1:3], *others[1:]]
            of_queries, *part, of_floats = self._add_gradients(
                gradients, [inputs[0], *memory, *inputs[3:]], fixed, known, dknown, wanted, t
            )
            return (arriving, jax.tree.map(jnp.add, dmemory, part), [of_queries, *of_floats]), None

        start = inputs[1:3], zeros()[1:3], [zeros()[0], *zeros()[3:]]
        (_, dmemory, (dqueries, *dfloats)), _ = lax.scan(step, start, jnp.arange(self.devices))
        gradients = [dqueries, *self._send(dmemory), *dfloats]  # after U steps back at their owner
        return [gradient.astype(x.dtype) for x, gradient in zip(inputs, gradients) if gradient is not None]

    def _add_gradients(self, gradients, inputs, fixed, known, dknown, wanted, t):
        """Add to the gradients the share of the keys that are at hand in step t.

        Args:
          gradients, inputs: those of queries, keys, values and floats; the keys and values are those at hand.
          fixed, wanted: as those of `pullback`.
          known, dknown: (out, normaliser) over all keys, and their cotangents.
          t: the step.

        Returns:
          Gradients of queries, of keys, of values, and a list of those of floats.
        """
        (queries, *memory), floats = inputs[:3], inputs[3:]
        functions = self.rebuild(floats, fixed)
        first_i, first_j = self._first_positions(queries, memory[0], t)

        def row(carry, of_queries):
            dmemory, dfloats = carry
            query, dquery, known, dknown, i = of_queries

            def column(carry, of_keys):
                dquery, dfloats = carry
                memory, dmemory, j = of_keys
                needed = self._needed_blocks(functions, query, memory[0], i, j)

                def update(sums):
                    part = self._pair_gradients([query, *memory, *floats], fixed, known, dknown, wanted, needed, i, j)
                    return jax.tree.map(jnp.add, sums, part)

                dquery, dkey, dvalue, *dfloats = _if_any(needed, update, [dquery, *dmemory, *dfloats])
                return (dquery, dfloats), [dkey, dvalue]

            (dquery, dfloats), dmemory = lax.scan(column, (dquery, dfloats), (memory, dmemory, first_j))
            return (dmemory, dfloats), dquery

        dqueries, *dmemory = gradients[:3]
        of_queries = queries, dqueries, known, dknown, first_i
        (dmemory, dfloats), dqueries = lax.scan(row, (dmemory, gradients[3:]), of_queries)
        return dqueries, *dmemory, dfloats

    def _pair_gradients(self, inputs, fixed, known, dknown, wanted, *pair) -> list[Array | None]:
        """Compute the share of one pair in the gradients, None where not wanted; inputs without the axis of chunks."""
        function, primals = self._share(inputs, fixed, known, wanted, *pair)
        _, pull = jax.vjp(function, *primals)
        found = iter(pull(dknown))
        return [next(found) if each else None for each in wanted]

    def _send(self, tree):
        """Send arrays to the next device, and receive those of the one before."""
        next_device = [(device, (device + 1) % self.devices) for device in range(self.devices)]
        return jax.tree.map(lambda x: lax.ppermute(x, self.axis_name, next_device), tree)

    def _first_positions(self, queries, keys, t) -> tuple[Int[Array, "chunks"], Int[Array, "chunks"]]:
        """Return the positions of the first query of each chunk, and of the first key of those at hand in step t."""
        device = lax.axis_index(self.axis_name)
        owner = (device - t) % self.devices
        chunks = (zigzag.chunk_numbers(self.rows, each, self.devices) for each in (device, owner))
        return tuple(numbers * x.shape[2] for numbers, x in zip(chunks, (queries, keys)))

    def _needed_blocks(self, functions, query, key, i, j) -> Bool[Array, "row_blocks column_blocks"] | None:
        """Return the tiles of a pair that some head, and some example of a batch, needs; None for all."""
        (mask, *_), replacements = functions
        if mask is None:
            return None
        rows, columns = (positions_in_blocks(x.shape[1], blockwise.BLOCK_SIZE) for x in (query, key))
        marked, of_head = mods.unwrap_per_head(mask, self.N)

        def needed(slices):
            mask = self._placed(placed_mask, as_mask(of_head(slices)), replacements, i, j)
            return jnp.asarray(survey.needed_blocks(mask, rows, columns))

        return survey.any_of_batch(jax.vmap(needed)(marked).any(axis=0) if marked else needed([]))

    def _pair(self, functions, needed, i, j, query, key, value, known=None):
        """Compute (out, normaliser) of a pair for all heads; or return `known`, with the derivative of this pair.

        Args:
          functions: from `rebuild`.
          needed: from `_needed_blocks`.
          i, j: positions of the first query and of the first key.
          query, key, value: `[N n H]`, `[K c H]`, `[K c Hv]`.
          known: (out, normaliser) over all keys.
        """
        if self.attend is not None:
            return self._pair_by_kernels(functions, i, j, query, key, value, known)
        (mask, score, scale, dropout), replacements = functions
        marked, of_head = mods.unwrap_per_head((mask, score), self.N)

        def one_head(of_queries, of_keys):
            query, number, slices, known = of_queries
            mask, score = of_head(slices)
            call = Call(
                query,
                *of_keys,
                self._placed(placed_mask, as_mask(mask), replacements, i, j),
                self._placed(placed_score, as_score(score), replacements, i, j),
                scale,
                None if dropout is None else dropout.for_head(number).part(queries=i, keys=j),
            )
            return blockwise.attend_part(call, blockwise.BLOCK_SIZE, needed, known)

        of_queries, of_keys = (query, jnp.arange(self.N), marked, known), (key, value)
        if self.N == self.K:
            return jax.vmap(one_head)(of_queries, of_keys)
        by_group = jax.tree.map(lambda x: x.reshape(self.K, -1, *x.shape[1:]), of_queries)
        results = jax.vmap(jax.vmap(one_head, (0, None)))(by_group, of_keys)
        return jax.tree.map(lambda x: x.reshape(self.N, *x.shape[2:]), results)

    def _pair_by_kernels(self, functions, i, j, query, key, value, known):
        """Compute the same as `_pair` by an implementation of all heads."""
        (mask, score, scale, dropout), replacements = functions

        def by_rows(tree):
            return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), tree)

        def in_pair(kind, mod, placed):
            return None if mod is None else kind(mod, lambda mod: self._placed(placed, mod, replacements, i, j))

        mask, score = in_pair(PairMask, mask, placed_mask), in_pair(PairScore, score, placed_score)
        dropout = None if dropout is None else dropout.part(queries=i, keys=j)
        call = Call(*by_rows((query, key, value)), mask, score, scale, dropout)
        return by_rows(self.attend(call, known=by_rows(known)))

    def _share(self, inputs, fixed, known, wanted, *pair) -> tuple[Callable, list[Array]]:
        """Return a function that returns `known` with the derivative of one pair, and its arguments, the wanted inputs.

        Except for kernels, they are in float32 or wider, and so are its derivatives, which are to be added up.
        """
        inputs = inputs if self.attend is not None else dtypes.widened(inputs)

        def function(*moving):
            moving = iter(moving)
            query, key, value, *floats = [next(moving) if each else x for x, each in zip(inputs, wanted)]
            return self._pair(self.rebuild(floats, fixed), *pair, query, key, value, known)

        return function, [x for x, each in zip(inputs, wanted) if each]

    def _placed(self, placed: Callable, mod, replacements, i, j):
        """Return a mask or score of one head as a function of positions in a pair."""
        if mod is None:
            return None
        mod = _rebound(mod, self.captured, replacements) if self.captured else mod
        return placed(mod.resolve(self.T, self.S), i, j)


def _rebound(mod, captured: list, replacements: list):
    """Replace the arrays that functions in a mask or a score capture."""
    if not isinstance(mod, mods.Mod):
        return Rebound(mod, captured, replacements)
    fields = ((field.name, getattr(mod, field.name)) for field in dataclasses.fields(mod))
    inner = {name: _rebound(value, captured, replacements) for name, value in fields if callable(value)}
    return dataclasses.replace(mod, **inner) if inner else mod


def _if_any(needed, update: Callable, state):
    """Return update(state), or `state` if no tile is needed."""
    return update(state) if needed is None else lax.cond(needed.any(), update, lambda state: state, state)


def _combine(left, right):
    """Combine (out, normaliser) of two sets of keys: the sums of exp(score) relative to the larger of the two peaks.

    A constant added to all scores cancels, which it would not in logsumexps. The tangents of the peaks are zero, as in
    `blockwise`.
    """
    outs, normalizers = zip(left, right)
    peaks = [jnp.where(each.total == 0, -jnp.inf, each.peak) for each in normalizers]
    peak = jnp.maximum(*peaks)
    peak = jnp.where(peak == -jnp.inf, 0, peak)  # -inf - -inf would be NaN
    totals = [each.total * jnp.exp(own - peak) for each, own in zip(normalizers, peaks)]
    normalizer = Normalizer(peak, sum(totals))
    inverse = normalizer.inverse()
    # Each share is at most 1, so that no product overflows.
    out = sum(out * (total * inverse)[..., None] for out, total in zip(outs, totals))
    return out, normalizer
