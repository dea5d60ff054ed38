"""Scores that positions change, and what a layer learns for them.

A score is made by `(learned, query [T N H], key [S N H], places) -> (s, i, j) -> s`, for all heads at once; what is
learned, by `(key, width, num_heads, head_width) -> {name: array}`.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Float

from attn.functional import per_head, positions
from attn.nn.places import Places, Side, counted

Learned = Mapping[str, Array]
Query = Float[Array, "T N H"]
Key = Float[Array, "S N H"]

CLIP = 16  # distances beyond share a row: k of Shaw et al. 2018, section 4.1
_BUCKETS = 32  # of T5
NEAR = 14  # T5's buckets, made to end at two more, hold one distance each up to here; all that are farther share one
_PACE = 4.0  # a line's numbers have farther to go than other parameters


def anchored_score(slopes_at_first: Callable, *, keys: bool, queries: bool, frozen: bool) -> Callable:
    """s - slope |idx - tau - c|; see `attn.nn.encodings.anchored`."""

    def score(learned, query, key, places: Places):
        num_heads = query.shape[1]
        slopes = slopes_at_first(num_heads) if frozen else jax.nn.softplus(learned["slope"])
        shifts = learned.get("shift", jnp.zeros(num_heads))
        idx, tau = counted(places, num_heads, keys=keys, queries=queries)

        def of_head(slope, shift, idx, tau, s, i, j):
            return s - slope * jnp.abs(idx[j] - tau[i] - shift)

        return per_head(Partial(of_head, slopes, shifts, idx, tau))

    return score


def anchored_parameters(slopes_at_first: Callable, *, frozen: bool, shift: bool) -> Callable | None:
    """What the slopes' softplus is given, unless they are frozen, and c, unless there is none."""

    def parameters(key, width, num_heads, head_width):
        learned = {} if frozen else {"slope": _inverse_softplus(slopes_at_first(num_heads))}
        return learned | ({"shift": jnp.zeros(num_heads)} if shift else {})

    return None if frozen and not shift else parameters


def t5_parameters(key: Array, width: int, num_heads: int, head_width: int) -> Learned:
    """A number for each head and bucket of distances, at first near zero."""
    return {"table": jax.random.normal(key, (num_heads, _BUCKETS)) * width**-0.5}


def t5_score(learned: Learned, query: Query, key: Key, places: Places) -> Callable:
    """s + b(j - i), with b learned, one number for each bucket: Raffel et al. 2020, section 2.1."""

    def of_head(table, s, i, j):
        return s + table[positions.relative_buckets(places.distance(i, j), num_buckets=_BUCKETS)]

    return per_head(Partial(of_head, learned["table"]))


def anchored_t5_score(learned: Learned, query: Query, key: Key, places: Places) -> Callable:
    """s + b(idx - tau), as T5, with idx and tau counted from the start by some heads and from the end by others.

    b has a number for each distance up to `NEAR`, either way; all that are farther share one.
    """
    idx, tau = counted(places, query.shape[1])

    def of_head(table, idx, tau, s, i, j):
        return s + table[positions.relative_buckets(idx[j] - tau[i], num_buckets=_BUCKETS, max_distance=NEAR + 2)]

    return per_head(Partial(of_head, learned["table"], idx, tau))


def line_parameters(key: Array, width: int, num_heads: int, head_width: int) -> Learned:
    """Lines that at first stand still, spread over the keys, with slopes so soft that most keys are seen."""
    spread = (jnp.arange(num_heads) + 0.5) / num_heads
    lines = jnp.stack([jnp.zeros(num_heads), spread, jnp.zeros(num_heads)], axis=-1)
    return {"line": lines / _PACE, "slope": jnp.full(num_heads, _inverse_softplus(0.3) / _PACE)}


def line_score(learned: Learned, query: Query, key: Key, places: Places) -> Callable:
    """s - slope |j - (a t + b n + c)| among n keys: where a head looks is a line, of which a, b and c are learned."""
    tau = places.queries.from_start()
    known = jnp.stack(jnp.broadcast_arrays(tau, places.keys.length, 1), axis=-1).astype(query.dtype)
    lines = jnp.einsum("tf,nf->nt", known, _PACE * learned["line"])
    slopes, idx = jax.nn.softplus(_PACE * learned["slope"]), places.keys.from_start()

    def of_head(slope, line, s, i, j):
        return s - slope * jnp.abs(idx[j] - line[i])

    return per_head(Partial(of_head, slopes, lines))


def alibi_score(learned: Learned, query: Query, key: Key, places: Places) -> Callable:
    """s - slope |j - i + 1/4|: Press et al. 2022, section 3; in both directions, told apart as by Ruoss et al. 2023."""
    slopes = positions.alibi_slopes(query.shape[1])
    return per_head(Partial(lambda slope, s, i, j: s - slope * jnp.abs(places.distance(i, j) + 0.25), slopes))


def shaw_parameters(key: Array, width: int, num_heads: int, head_width: int) -> Learned:
    """A row for each distance from -CLIP to CLIP, shared by all heads."""
    return {"table": jax.random.normal(key, (2 * CLIP + 1, head_width)) * head_width**-0.5}


def shaw_score(learned: Learned, query: Query, key: Key, places: Places) -> Callable:
    """s + q_i r(j - i) / sqrt(H), r a learned row for each distance up to `CLIP`: Shaw et al. 2018, section 3.2.

    Values are left as they are.
    """
    rows = jnp.einsum("tnh,rh->ntr", query, learned["table"].astype(query.dtype)) / query.shape[-1] ** 0.5

    def of_head(rows, s, i, j):
        return s + rows[i, jnp.clip(places.distance(i, j), -CLIP, CLIP) + CLIP]

    return per_head(Partial(of_head, rows))


def transformer_xl_parameters(key: Array, width: int, num_heads: int, head_width: int) -> Learned:
    """The linear map R, and what every query adds for content, u, and for distance, v."""
    keys, shape = jax.random.split(key, 3), (num_heads, head_width)
    return {
        "relative": jax.random.normal(keys[0], (width, *shape)) * width**-0.5,
        "u": 0.02 * jax.random.normal(keys[1], shape),
        "v": 0.02 * jax.random.normal(keys[2], shape),
    }


def transformer_xl_score(learned: Learned, query: Query, key: Key, places: Places) -> Callable:
    """s + (u k_j + (q_i + v) R(p_j - p_i)) / sqrt(H), with R a linear map of sinusoids; s holds q_i k_j.

    Source: Dai et al. 2019, section 3.3.
    """
    first = places.keys.index[0] - places.queries.index[-1]
    steps = first + jnp.arange(len(query) + len(key) - 1)  # every j - i, in order
    one = Places(Side(jnp.zeros(1, int), None, None), Side(steps, None, places.keys.drawn), places.visible)
    distances = one.distance(0, jnp.arange(len(steps)))
    width = learned["relative"].shape[0]
    relative = jnp.einsum("rd,dnh->rnh", positions.sinusoidal(distances, width), learned["relative"])
    rows = jnp.einsum("tnh,rnh->ntr", query + learned["v"], relative) / query.shape[-1] ** 0.5
    content = jnp.einsum("nh,snh->ns", learned["u"], key) / query.shape[-1] ** 0.5

    def of_head(rows, content, s, i, j):
        return s + content[j] + rows[i, places.keys.index[j] - places.queries.index[i] - first]

    return per_head(Partial(of_head, rows, content))


def _inverse_softplus(x):
    """ln(e^x - 1), of which softplus is x."""
    return jnp.log(jnp.expm1(x))
