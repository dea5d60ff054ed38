"""Scaled dot-product attention as pure functions: one head of one sequence, and many heads by `jax.vmap`.

    attention(Q, K, V) = softmax(Q K^T / sqrt(d_k)) V

Each function checks its arguments, chooses an implementation and calls it: `reference.py` is the equation.

Axes: `T` queries, `S` keys, `N` query heads, `K` key/value heads, `H` width of a head, `Hv` width of a value.
There is no batch axis: use `jax.vmap`. The caller jits. For calls outside of any `jit`, only these parts are compiled:
the softmax of the reference, the blocks of one head in `blockwise`, and the loop over heads on a CPU.

Source: Vaswani et al. 2017, section 3.2.
"""

from jaxtyping import Array, Float, Int

from attn.functional import checks, contract, dtypes, heads, mods, reference
from attn.functional.contract import Call
from attn.functional.dropout import Dropout, check_dropout
from attn.functional.implementations import choose
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
    """Compute attention for one head of one sequence.

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
      `[T Hv]` in the value's dtype; with `return_logsumexp` also `[T]`, in float32 or wider. A query without a
      visible key gets output 0 and logsumexp -inf. Keys and values that no query may attend to do not affect outputs,
      even if they are NaN (nor gradients, as long as products with them do not overflow). Softmax and sums are
      computed in float32, or in float64 where queries and keys are float64.

    Raises:
      TypeError: mixed or non-real dtypes, a mask that is not boolean, an array in place of a function.
      ValueError: wrong ranks or lengths, an unset offset although T != S, an unknown implementation.
      attn.Unsupported: the named implementation cannot serve the call.

    Source: Vaswani et al. 2017, equation 1.
    """
    query, key, value = checks.check_arrays(("T H", query), ("S H", key), ("S Hv", value))
    call = call_of_one_head(query, key, value, mask, score, scale, dropout)
    chosen = choose(implementation, call, return_logsumexp=return_logsumexp)
    out, normalizer = heads.attend_one(chosen, call)
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
    """Return the weights that each query gives to each key: softmax_j(score(scale q_i . k_j, i, j)).

    Args:
      query, key, mask, score, scale: as for `attention`.
      rows: `[R]` query positions; only their rows are computed. All unless given.

    Returns:
      `[T S]`, or `[R S]` for chosen rows, in float32 or wider. Rows sum to 1; a row without a visible key is 0.

    Raises:
      TypeError, ValueError: as `attention`; also for rows that are not integers in 0..T-1.

    Source: Vaswani et al. 2017, equation 1, without the values.
    """
    query, key = checks.check_arrays(("T H", query), ("S H", key))
    call = call_of_one_head(query, key, key[:, :0], mask, score, scale)
    return reference.weights(contract.resolve(call), checks.check_rows(rows, call.T))


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
    """Compute `attention` for N heads, by `jax.vmap`; the projections around it belong to the model.

        out[:, n] = attention(query[:, n], key[:, n // (N/K)], value[:, n // (N/K)])

    Args:
      query: `[T N H]`.
      key, value: `[S K H]` and `[S K Hv]`, where K divides N: grouped queries share a key/value head.
      mask, score: as for `attention`, shared by all heads unless marked by `attn.per_head`.
      scale, dropout, implementation, return_logsumexp: as for `attention`.

    Returns:
      `[T N Hv]`; with `return_logsumexp` also `[T N]`.

    Raises:
      TypeError, ValueError, attn.Unsupported: as `attention`; ValueError also where K does not divide N, or a
        marked array's leading axis is not N.

    Source: Vaswani et al. 2017, section 3.2.2; grouped queries: Ainslie et al. 2023.
    """
    query, key, value = checks.check_arrays(("T N H", query), ("S K H", key), ("S K Hv", value))
    call = call_of_heads(query, key, value, mask, score, scale, dropout)
    chosen = choose(implementation, call, return_logsumexp=return_logsumexp)
    out, normalizer = heads.attend_heads(chosen, call, return_normalizer=return_logsumexp)
    return (out, normalizer.logsumexp()) if return_logsumexp else out


def multi_head_attention_weights(
    query: Float[Array, "T N H"],
    key: Float[Array, "S K H"],
    *,
    mask=None,
    score=None,
    scale=None,
    rows: Int[Array, "R"] | None = None,
) -> Float[Array, "N T S"] | Float[Array, "N R S"]:
    """Compute `attention_weights` for N heads, by `jax.vmap`.

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
    query, key = checks.check_arrays(("T N H", query), ("S K H", key))
    call = call_of_heads(query, key, key[..., :0], mask, score, scale)
    rows = checks.check_rows(rows, call.T)

    def one_head(query, mask, score, dropout, key):
        head = Call(query, key, key[:, :0], mask, score, call.scale)
        return reference.weights(contract.resolve(head), rows)

    return heads.map_heads(one_head, call, (key,), axis=0)


def per_head(mod):
    """Mark a mask or a score whose array leaves have a leading axis N: one slice per query head.

    Unmarked masks and scores are shared by all heads; both kinds combine: `per_head(padding(lengths)) & causal()`.

    Args:
      mod: a mask, a score, or another callable pytree, with at least one array leaf.

    Returns:
      A mask or score for `multi_head_attention` and `multi_head_attention_weights`.

    Raises:
      TypeError: not callable, or no array leaf.
      ValueError: marked already. Later, in the attention functions: a leading axis that is not N, or only one head.
    """
    mods.check_per_head(mod)
    if isinstance(mod, Mask):
        return PerHeadMask(mod)
    return PerHeadScore(mod) if isinstance(mod, Score) else PerHeadCallable(mod)


@mods.register
class PerHeadCallable(PerHeadMask, PerHeadScore):
    """A user's callable marked by `per_head`: usable as a mask (`&`, `|`, `~`) or as a score (`>>`)."""


def call_of_heads(query, key, value, mask, score, scale, dropout=None) -> Call:
    """Check the arguments other than the arrays, and fill in unset offsets."""
    check_dropout(dropout)
    scale = checks.check_scale(scale, query.shape[-1])
    call = Call(query, key, value, as_mask(mask), dtypes.widened(as_score(score)), scale, dropout)
    return contract.resolve_offsets(call)


def call_of_one_head(query, key, value, mask, score, scale, dropout=None) -> Call:
    """Make the call of one head, which takes no marks of `per_head`."""
    for mod in (mask, score):
        for part in mods.parts(mod):
            if isinstance(part, PerHead):
                raise ValueError(
                    f"{checks.describe(part)} differs by head: use it in multi_head_attention, not with one head"
                )
    return call_of_heads(query, key, value, mask, score, scale, dropout)
