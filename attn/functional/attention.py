"""Scaled dot-product attention as pure functions: one head of one sequence, and many heads by `jax.vmap`.

    attention(Q, K, V) = softmax(Q K^T / sqrt(d_k)) V

Axes: `T` queries, `S` keys, `N` query heads, `K` key/value heads, `H` width of a head, `Hv` width of a value.
There is no batch axis: use `jax.vmap`. Nothing here is jitted: the caller jits.

Source: Vaswani et al. 2017, section 3.2.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num

from attn.functional import closures, dtypes, mods, reference, tiles
from attn.functional.dropout import Dropout
from attn.functional.implementations import Call, choose
from attn.functional.masks import Mask, PerHeadMask, as_mask
from attn.functional.mods import PerHead
from attn.functional.scores import PerHeadScore, Score, as_score


def attention(
    query: Float[Array, "T H"],
    key: Float[Array, "S H"],
    value: Float[Array, "S Hv"],
    *,
    mask=None,
    score=None,
    scale=None,
    dropout: Dropout | None = None,
    implementation: str = "auto",
    return_logsumexp: bool = False,
) -> Float[Array, "T Hv"] | tuple[Float[Array, "T Hv"], Float[Array, "T"]]:
    """Attention for one head of one sequence.

        out_i = sum_j softmax_j(score(scale q_i . k_j, i, j)) v_j     over the keys j with mask(i, j)

    Args:
      query: `[T H]`, the rows of Q.
      key: `[S H]`, the rows of K, in the query's dtype.
      value: `[S Hv]`, the rows of V.
      mask: function `(i, j) -> bool` of integer positions, True = may attend; see `attn.masks`.
      score: function `(s, i, j) -> s` of scaled scores and positions; see `attn.scores`.
      scale: real scalar; 1 / sqrt(H) unless given.
      dropout: `attn.Dropout(rate, key)`, on the weights.
      implementation: "auto", "fastest", or a name in the registry.
      return_logsumexp: also return log sum_j exp(score_ij), before dropout.

    Returns:
      `[T Hv]` in the value's dtype; with `return_logsumexp` also `[T]`, in float32 or wider. A query that may
      attend to nothing gets 0, and -inf; what no query may attend to never matters, not even NaN (in gradients, as
      long as products with it do not overflow). Softmax and sums are computed in float32, or in float64 where
      queries and keys are float64.

    Raises:
      TypeError: mixed or non-real dtypes, a mask that is not boolean, an array in place of a function.
      ValueError: wrong ranks or lengths, an offset that is missing although T != S, an unknown implementation.
      attn.Unsupported: the named implementation cannot serve the call.

    Source: Vaswani et al. 2017, equation 1.
    """
    query, key, value = _check_arrays(("T H", query), ("S H", key), ("S Hv", value))
    mask, score = _without_marks(as_mask(mask)), dtypes.widened(_without_marks(as_score(score)))
    scale = _check_scale(scale, query.shape[-1])
    _check_dropout(dropout)
    key, value = tiles.gathered(key), tiles.gathered(value)
    call = Call(query, key, value, mask, score, scale, dropout, return_logsumexp)
    attend = choose(implementation, call).attend
    mask, score = _at(mask, score, query.shape[0], key.shape[0])
    out, normalizer = attend(query, key, value, mask=mask, score=score, scale=scale, dropout=dropout)
    out = out.astype(value.dtype)
    return (out, normalizer.logsumexp()) if return_logsumexp else out


def attention_weights(
    query: Float[Array, "T H"],
    key: Float[Array, "S H"],
    *,
    mask=None,
    score=None,
    scale=None,
    rows: Int[Array, "R"] | None = None,
) -> Float[Array, "T S"] | Float[Array, "R S"]:
    """What each query gives to each key: softmax_j(score(scale q_i . k_j, i, j)).

    Args:
      query, key, mask, score, scale: as for `attention`.
      rows: `[R]` query positions; only their rows are computed. All of them unless given.

    Returns:
      `[T S]`, or `[R S]` for chosen rows, in float32 or wider. Rows sum to 1; one without a visible key is 0.

    Raises:
      TypeError, ValueError: as `attention`; also for rows that are not integers in 0..T-1.

    Source: Vaswani et al. 2017, equation 1, without the values.
    """
    query, key = _check_arrays(("T H", query), ("S H", key))
    mask, score = _without_marks(as_mask(mask)), dtypes.widened(_without_marks(as_score(score)))
    scale = _check_scale(scale, query.shape[-1])
    mask, score = _at(mask, score, query.shape[0], key.shape[0])
    rows = _check_rows(rows, query.shape[0])
    query, key = tiles.gathered(query), tiles.gathered(key)
    return reference.weights(query[rows], key, rows, mask=mask, score=score, scale=scale)


def multi_head_attention(
    query: Float[Array, "T N H"],
    key: Float[Array, "S K H"],
    value: Float[Array, "S K Hv"],
    *,
    mask=None,
    score=None,
    scale=None,
    dropout: Dropout | None = None,
    implementation: str = "auto",
    return_logsumexp: bool = False,
) -> Float[Array, "T N Hv"] | tuple[Float[Array, "T N Hv"], Float[Array, "T N"]]:
    """`attention` for N heads at once, by `jax.vmap`; the projections around it belong to the model.

        out[:, n] = attention(query[:, n], key[:, n // (N/K)], value[:, n // (N/K)])

    Args:
      query: `[T N H]`.
      key, value: `[S K H]` and `[S K Hv]`, where K divides N: grouped queries share a key/value head.
      mask, score: as for `attention`, shared by all heads; those marked by `attn.per_head` differ by head.
      scale, dropout, implementation, return_logsumexp: as for `attention`.

    Returns:
      `[T N Hv]`; with `return_logsumexp` also `[T N]`.

    Raises:
      TypeError, ValueError, attn.Unsupported: as `attention`; ValueError also where K does not divide N, or a
        marked array's leading axis is not N.

    Source: Vaswani et al. 2017, section 3.2.2; grouped queries: Ainslie et al. 2023.
    """
    query, key, value = _check_arrays(("T N H", query), ("S K H", key), ("S K Hv", value))
    scale = _check_scale(scale, query.shape[-1])
    _check_dropout(dropout)
    mask, score = as_mask(mask), dtypes.widened(as_score(score))
    (one_mask, one_score), _ = mods.split_heads((mask, score), query.shape[1])
    one = as_mask(one_mask), as_score(one_score)
    chosen = choose(implementation, Call(query, key, value, *one, scale, dropout, return_logsumexp))
    at_once = chosen.heads_at_once(query.shape[1])
    settings = {"implementation": implementation, "return_logsumexp": return_logsumexp, "at_once": at_once}
    is_ours = not mods.holds_function(mask) and not mods.holds_function(score)
    is_loop = at_once < query.shape[1]  # which outside of any jit compiles at each call
    all_heads = _all_heads_compiled if is_ours and is_loop else _all_heads
    return all_heads(query, key, value, mask, score, scale, dropout, **settings)


def _all_heads(query, key, value, mask, score, scale, dropout, *, implementation, return_logsumexp, at_once):
    def one_head(query, mask, score, dropout, key, value):
        options = {"implementation": implementation, "return_logsumexp": return_logsumexp}
        return attention(query, key, value, mask=mask, score=score, scale=scale, dropout=dropout, **options)

    return _over_heads(one_head, query, (key, value), mask, score, dropout, axis=1, at_once=at_once)


_all_heads_compiled = jax.jit(_all_heads, static_argnames=("implementation", "return_logsumexp", "at_once"))


def multi_head_attention_weights(
    query: Float[Array, "T N H"],
    key: Float[Array, "S K H"],
    *,
    mask=None,
    score=None,
    scale=None,
    rows: Int[Array, "R"] | None = None,
) -> Float[Array, "N T S"] | Float[Array, "N R S"]:
    """`attention_weights` for N heads at once, by `jax.vmap`.

    Args:
      query: `[T N H]`.
      key: `[S K H]`, where K divides N.
      mask, score, scale, rows: as for `attention_weights`; masks and scores may be marked by `attn.per_head`.

    Returns:
      `[N T S]`, or `[N R S]` for chosen rows.

    Raises:
      TypeError, ValueError: as `multi_head_attention`.

    Source: Vaswani et al. 2017, section 3.2.2.
    """
    query, key = _check_arrays(("T N H", query), ("S K H", key))

    def one_head(query, mask, score, dropout, key):
        return attention_weights(query, key, mask=mask, score=score, scale=scale, rows=rows)

    return _over_heads(one_head, query, (key,), as_mask(mask), dtypes.widened(as_score(score)), None, axis=0)


def per_head(mod):
    """Mark a mask or a score whose array leaves carry a leading axis N: one slice for each query head.

    Unmarked ones are shared by all heads; both kinds combine: `per_head(padding(lengths)) & causal()`.

    Args:
      mod: a mask, a score, or another callable pytree, with at least one array leaf.

    Returns:
      A mask or score for `multi_head_attention` and `multi_head_attention_weights`.

    Raises:
      TypeError: not callable, or no array leaf.
      ValueError: marked already; later, if a leading axis is not N, or in one-head `attention`.
    """
    mods.check_per_head(mod)
    if isinstance(mod, Mask):
        return PerHeadMask(mod)
    return PerHeadScore(mod) if isinstance(mod, Score) else PerHeadCallable(mod)


@mods.register
class PerHeadCallable(PerHeadMask, PerHeadScore):
    """A marked callable of the user's own, which may turn out to be a mask (`&`, `|`, `~`) or a score (`>>`)."""


def _over_heads(one_head, query, memory: tuple, mask, score, dropout, *, axis: int, at_once: int | None = None):
    """Run `one_head(query, mask, score, dropout, *memory)` for every head; head n reads group n // (N/K) of the memory.

    Args:
      query: `[T N H]`.
      memory: arrays `[S K ...]`.
      axis: where the axis of heads goes in the results.
      at_once: how many heads run together, the others after them; all unless given.
    """
    N, K = query.shape[1], memory[0].shape[1]
    at_once = N if at_once is None else at_once
    bare, is_marked = mods.split_heads((mask, score), N)
    leaves, structure = jax.tree.flatten(bare)
    given = [x.dtype for x in memory]

    def one(of_head, memory):
        query, head, marked = of_head
        memory = [x.astype(dtype) for x, dtype in zip(memory, given)]
        marked = iter(marked)
        its_leaves = [next(marked) if m else leaf for m, leaf in zip(is_marked, leaves, strict=True)]
        its_dropout = None if dropout is None else dropout.for_head(head)
        return one_head(query, *structure.unflatten(its_leaves), its_dropout, *memory)

    marked = [leaf for m, leaf in zip(is_marked, leaves, strict=True) if m]
    heads = None if dropout is None else jnp.arange(N)
    of_heads = jnp.moveaxis(query, 1, 0), *_sharded_as(query, (heads, marked))
    # In 32 bits, since the gradient of what heads share is a sum over them.
    memory = [jnp.moveaxis(x, 1, 0) for x in (memory if N == K else dtypes.widened(memory))]
    if N == K:
        memory = _sharded_as(query, memory)
        results = _each(lambda both: one(*both), (of_heads, memory), at_once)
    else:  # the memory is there once for all heads of a group
        in_groups = jax.tree.map(lambda x: x.reshape(K, N // K, *x.shape[1:]), of_heads)
        of_group = math.gcd(at_once, N // K)

        def group(both):
            of_heads, memory = both
            return _each(lambda of_head: one(of_head, memory), of_heads, of_group)

        results = _each(group, (in_groups, memory), math.gcd(at_once // of_group, K))
        results = jax.tree.map(lambda x: x.reshape(N, *x.shape[2:]), results)
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, axis), results)


def _each(function, xs, at_once: int):
    """`function(x)` for each along the leading axis, so many at once."""
    number = len(jax.tree.leaves(xs)[0])
    if number == 1:  # a batch axis of one would cost memory and time
        return jax.tree.map(lambda x: x[None], function(jax.tree.map(lambda x: x[0], xs)))
    if at_once == number:
        return jax.vmap(function)(xs)
    converted, captured = closures.convert(function, jax.tree.map(lambda x: x[0], xs))
    return jax.lax.map(lambda x: converted(captured, x), xs, batch_size=at_once if at_once > 1 else None)


def _sharded_as(query: Array, tree):
    """Arrays with a leading axis of heads, sharded as the query's: on an explicit mesh `jax.vmap` needs it so."""
    heads = jax.typeof(query).sharding.spec[1]
    return jax.tree.map(lambda x: tiles.sharded_along(x, heads), tree)


def _at(mask: Mask | None, score: Score | None, T: int, S: int):
    return (None if mask is None else mask.at(T, S)), (None if score is None else score.at(T, S))


def _without_marks(mod):
    for part in mods.parts(mod):
        if isinstance(part, PerHead):
            raise ValueError(
                f"{mods.describe(part)} differs by head: use it in multi_head_attention, not with one head"
            )
    return mod


def _check_arrays(*arguments: tuple[str, object]) -> list[Array]:
    """Check query, key and, if given, value: kinds, ranks, dtypes and the sizes that must agree."""
    named = dict(zip(("query", "key", "value"), arguments))
    for name, (axes, array) in named.items():
        if not dtypes.is_array(array):
            raise TypeError(f"{name} must be an array of shape [{axes}], got {type(array).__name__}")
        if len(array.shape) != len(axes.split()):
            hint = "; use jax.vmap for further axes" if len(array.shape) > len(axes.split()) else ""
            raise ValueError(f"{name} must have shape [{axes}], got {tuple(array.shape)}{hint}")
        if 0 in array.shape:
            raise ValueError(f"{name} must have shape [{axes}] with no axis of length 0, got {tuple(array.shape)}")
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(f"{name} must be a real floating-point array, got {array.dtype}")
        if array.dtype.itemsize < 2:
            raise TypeError(f"{name} must have floats of 16 bits or more, got {array.dtype}: convert it first")
    query, key, *value = arrays = [jnp.asarray(array) for _, array in arguments]
    if query.dtype != key.dtype:
        raise TypeError(f"query and key must have one dtype, got {query.dtype} and {key.dtype}")
    if query.shape[-1] != key.shape[-1]:
        raise ValueError(f"query and key must agree on the width H, got {query.shape} and {key.shape}")
    for v in value:
        if key.shape[:-1] != v.shape[:-1]:
            axes = " and ".join(named["key"][0].split()[:-1])
            raise ValueError(f"key and value must agree on {axes}, got {key.shape} and {v.shape}")
    if query.ndim == 3 and query.shape[1] % key.shape[1]:
        raise ValueError(
            f"the N = {query.shape[1]} query heads must be a multiple of the K = {key.shape[1]} key/value heads"
        )
    return arrays


def _check_scale(scale, width: int) -> float | Num[Array, ""]:
    if scale is None:
        return width**-0.5
    mods.check_real("scale", scale)
    if jnp.shape(scale) != ():
        raise TypeError(f"scale must be a scalar, got shape {jnp.shape(scale)}; use score= for more")
    scale = dtypes.as_real(scale)
    return scale if isinstance(scale, (int, float)) else dtypes.widened(jnp.asarray(scale))


def _check_dropout(dropout):
    if dropout is not None and not isinstance(dropout, Dropout):
        raise TypeError(f"dropout must be attn.Dropout(rate, key) or None, got {dropout!r}")


def _check_rows(rows, T: int) -> Int[Array, "R"]:
    if rows is None:
        return jnp.arange(T, dtype=jnp.int32)
    rows = rows if dtypes.is_array(rows) else jnp.asarray(rows)
    if not jnp.issubdtype(rows.dtype, jnp.integer):
        raise TypeError(f"rows must be integers, got {rows.dtype}")
    if len(rows.shape) != 1 or rows.shape[0] == 0:
        raise ValueError(f"rows must have shape [R] with R > 0, got {tuple(rows.shape)}")
    if not isinstance(rows, jax.core.Tracer):
        known = np.asarray(rows)  # in NumPy, since under jit even a comparison of known arrays is traced
        if (known < 0).any() or (known >= T).any():
            raise ValueError(f"rows must lie in 0..{T - 1}, got {known}")
    return jnp.asarray(rows, jnp.int32)  # a narrow integer could not hold row + offset
