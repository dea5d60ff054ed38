"""Maps an implementation over heads: one at a time, several at a time, or all at once."""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array

from attn.functional import closures, contract, dtypes, mods, scores
from attn.functional.contract import Call
from attn.functional.implementations import Implementation, Unsupported, name_of
from attn.functional.masks import as_mask
from attn.functional.scores import PerHeadScore, Score, as_score
from attn.functional.sharding import gathered, sharded_along


def attend_one(chosen: Implementation, call: Call):
    """Compute the attention of one head: (out `[T Hv]`, normaliser of `[T]` or None)."""
    call = contract.resolve(call)
    if not chosen.all_heads:
        return _attend(chosen, call)
    arrays = {name: getattr(call, name)[:, None] for name in ("query", "key", "value")}
    return jax.tree.map(lambda x: x[:, 0], _attend(chosen, call._replace(**arrays)))


def _attend(chosen: Implementation, call: Call):
    """Run an implementation; check the shapes of its results, since a wrong one might broadcast to a wrong value."""
    result, rows = chosen.attend(call), call.query.shape[:-1]
    out, shapes = (*rows, call.value.shape[-1]), jax.tree.map(jnp.shape, result)
    if shapes not in ((out, None), (out, (rows, rows))):
        raise ValueError(
            f"implementation {name_of(chosen)!r}: attend returned shapes {shapes}, must return (out, normaliser) of "
            f"shapes {out}, and {rows} for its peak and its total, or None"
        )
    if not jnp.issubdtype(result[0].dtype, jnp.floating):
        raise ValueError(f"implementation {name_of(chosen)!r}: attend returned {result[0].dtype}, must be floats")
    return result


def attend_heads(chosen: Implementation, call: Call, *, return_normalizer: bool):
    """Compute the attention of N heads: (out `[T N Hv]`, normaliser of `[T N]`; None unless wanted)."""
    N = call.query.shape[1]
    at_once = N if chosen.all_heads else chosen.heads_at_once(N)
    # Outside of any jit a loop over heads would compile at each call, so it is jitted here. Not with a user's function:
    # it may read a variable that has changed, which the cache would not notice.
    is_compiled = at_once < N and not mods.holds_function(call.mask) and not mods.holds_function(call.score)
    run = _attend_heads_compiled if is_compiled else _attend_heads
    return run(chosen, call, return_normalizer=return_normalizer, at_once=at_once)


def _attend_heads(chosen: Implementation, call: Call, *, return_normalizer: bool, at_once: int):
    def results(out, normalizer):
        return out.astype(call.value.dtype), normalizer if return_normalizer else None

    if chosen.all_heads:
        return results(*_attend(chosen, call if chosen.reads_marks else _resolve_vectors_of_all(chosen, call)))

    def one_head(query, mask, score, dropout, key, value):
        return results(*attend_one(chosen, Call(query, key, value, mask, score, call.scale, dropout)))

    return map_heads(one_head, call, (call.key, call.value), axis=1, at_once=at_once)


_attend_heads_compiled = jax.jit(_attend_heads, static_argnames=("chosen", "return_normalizer", "at_once"))


def map_heads(
    one_head: Callable, call: Call, memory: tuple, *, axis: int, at_once: int | None = None, of_queries: tuple = ()
):
    """Map `one_head(query, mask, score, dropout, *memory)` over N heads; head n reads group n // (N/K) of the memory.

    Args:
      one_head: function of one head's arrays and mods.
      call: the call of all heads.
      memory: arrays `[S K ...]` of the call: keys, or keys and values.
      axis: axis of the heads in the results.
      at_once: number of heads that run together, in a loop over such groups; all heads unless given.
      of_queries: further arrays `[T N ...]`; `one_head` gets those of its head after the memory.
    """
    query, N, K = call.query, call.query.shape[1], memory[0].shape[1]
    at_once = N if at_once is None else at_once
    marked, mods_of_head = mods.unwrap_per_head((call.mask, call.score), N)
    memory_dtypes = [x.dtype for x in memory]

    def one(of_head, memory):
        (query, *of_queries), head, slices = of_head
        memory = [x.astype(dtype) for x, dtype in zip(memory, memory_dtypes)]
        mask, score = mods_of_head(slices)
        dropout = None if call.dropout is None else call.dropout.for_head(head)
        return one_head(query, as_mask(mask), as_score(score), dropout, *memory, *of_queries)

    heads = None if call.dropout is None else jnp.arange(N)
    # From here on the axis of heads is the leading one.
    queries = [jnp.moveaxis(x, 1, 0) for x in (query, *of_queries)]
    of_heads = queries, *_sharded_as(query, (heads, marked))
    # In float32, since the gradient of an array that heads share is a sum over them.
    memory = [jnp.moveaxis(x, 1, 0) for x in (memory if N == K else dtypes.widened(memory))]
    if N == K:
        memory = _sharded_as(query, memory)
        results = _map_in_groups(lambda both: one(*both), (of_heads, memory), at_once)
    else:  # the heads of a group read the same memory, which is not repeated
        by_group = jax.tree.map(lambda x: x.reshape(K, N // K, *x.shape[1:]), of_heads)  # [K N/K ...]
        at_once_in_group = math.gcd(at_once, N // K)

        def group(both):
            of_heads, memory = both
            return _map_in_groups(lambda of_head: one(of_head, memory), of_heads, at_once_in_group)

        results = _map_in_groups(group, (by_group, memory), math.gcd(at_once // at_once_in_group, K))
        results = jax.tree.map(lambda x: x.reshape(N, *x.shape[2:]), results)
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, axis), results)


def _map_in_groups(function, xs, at_once: int):
    """Map `function(x)` along the leading axis, `at_once` entries at a time."""
    length = len(jax.tree.leaves(xs)[0])
    if length == 1:  # a batch axis of one would cost memory and time
        return jax.tree.map(lambda x: x[None], function(jax.tree.map(lambda x: x[0], xs)))
    if at_once == length:
        return jax.vmap(function)(xs)
    converted, captured = closures.convert(function, jax.tree.map(lambda x: x[0], xs))
    return jax.lax.map(lambda x: converted(captured, x), xs, batch_size=at_once if at_once > 1 else None)


def _sharded_as(query: Array, tree):
    """Shard arrays with a leading axis of heads like the query: on an explicit mesh `jax.vmap` requires it."""
    heads = jax.typeof(query).sharding.spec[1]
    return jax.tree.map(lambda x: sharded_along(x, heads), tree)


def _resolve_vectors_of_all(chosen: Implementation, call: Call) -> Call:
    """Replace scores made from vectors by one marked score, for an implementation that takes all heads at once."""
    if not any(isinstance(part, scores.from_vectors) for part in mods.nested(call.score)):
        return call
    users_functions = [part.call for part in mods.nested(call.score) if isinstance(part, scores.function)]
    N, K = call.query.shape[1], call.key.shape[1]
    marked, score_of_head = mods.unwrap_per_head(call.score, N)

    def as_pytree(score: Score) -> Score:
        """Turn the arrays captured by new plain functions into leaves: captured, they would leak out of `jax.vmap`."""
        if isinstance(score, scores.chain):
            return scores.chain(*(as_pytree(as_score(part)) for part in (score.first, score.second)))
        if isinstance(score, scores.placed):
            return dataclasses.replace(score, mod=as_pytree(score.mod))
        if not isinstance(score, scores.function) or jax.tree.leaves(score) or score.call in users_functions:
            return score
        if chosen.tile is None:
            raise Unsupported(
                "a score made from vectors captures arrays: return a pytree, such as jax.tree_util.Partial(function, "
                "arrays), or choose an implementation that declares its tile or takes one head at a time"
            )
        (r, c), wide = chosen.tile, dtypes.wide_dtype(call.query.dtype)
        tile = (((r, c), wide), ((r, 1), jnp.int32), ((1, c), jnp.int32))
        function, captured = closures.convert(score.call, *(jax.ShapeDtypeStruct(*each) for each in tile))
        return scores.function(Partial(function, captured))

    def of_head(slices, query, key):
        score = scores.resolve_vectors(as_score(score_of_head(slices)), query, key)
        return None if score is None else as_pytree(score.resolve(call.T, call.S))

    keys = jnp.repeat(gathered(call.key), N // K, axis=1)
    score = jax.vmap(of_head, in_axes=(0, 1, 1))(marked, gathered(call.query), keys)
    return call._replace(score=None if score is None else PerHeadScore(score))
