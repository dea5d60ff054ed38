"""Scores made from vectors: what is computed from a head's queries and keys once, and read by every tile."""

import attention_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.tree_util import Partial
from traces import equations

import attn
from attn import masks, mechanisms, per_head, scores
from attn.functional.implementations import IMPLEMENTATIONS, Implementation
from attn.mechanisms.registry import MECHANISMS
from attn.nn.decoder_only import DecoderOnly, DecoderOnlySettings

T, S, N, K, H, HV, C = 5, 7, 4, 2, 3, 2, 2
I, J = cases.positions(T, S)
ROWS = np.clip(J - I, -C, C) + C
(TABLES, U) = cases.normal((N, 2 * C + 1, H), (N, H), seed=2)


def shaw(table, query, key):
    """Relative keys, Shaw et al. 2018: q_i r(j - i)."""
    products = query @ table.T
    return lambda s, i, j: s + products[i, jnp.clip(j - i, -C, C) + C]


def shaw_as_pytree(table, query, key):
    return Partial(lambda products, s, i, j: s + products[i, jnp.clip(j - i, -C, C) + C], query @ table.T)


def content(u, query, key):
    """The key's own term, Dai et al. 2019: u k_j; with an offset that is unset."""
    return scores.relative_bias(jnp.zeros(T + S - 1), 0) >> Partial(lambda terms, s, i, j: s + terms[j], key @ u)


def heads():
    return cases.normal((T, N, H), (S, K, H), (S, K, HV))


def of_head(query, key, value, table, u):
    """(weights, out) of both scores together by dense products."""
    s = query @ key.T / H**0.5 + jnp.take_along_axis(query @ table.T, jnp.asarray(ROWS), axis=1) + (key @ u)[None, :]
    p = jax.nn.softmax(s, axis=1)
    return p, p @ value


def dense(query, key, value, tables, us):
    groups = [n // (N // K) for n in range(N)]
    return jnp.stack(
        [of_head(query[:, n], key[:, g], value[:, g], tables[n], us[n])[1] for n, g in enumerate(groups)], 1
    )


def score_of(tables, us, shaw=shaw):
    return scores.from_vectors(Partial(shaw, tables)) >> scores.from_vectors(Partial(content, us))


def attend(implementation, shaw=shaw):
    def call(query, key, value, tables, us):
        score = per_head(score_of(tables, us, shaw))
        return attn.multi_head_attention(query, key, value, score=score, implementation=implementation)

    return call


def test_values_and_gradients_are_those_of_dense_scores(implementation):
    arguments = *heads(), TABLES, U

    def value_and_gradients(f):
        return jax.jit(lambda *a: (f(*a), jax.grad(lambda *a: jnp.sum(jnp.sin(f(*a))), range(len(a)))(*a)))(*arguments)

    (found, gradients), (expected, expected_gradients) = map(value_and_gradients, (attend(implementation), dense))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        assert np.any(theirs)
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.derivatives("second")
def test_second_derivatives_are_those_of_dense_scores(implementation):
    arguments = *heads(), TABLES, U

    def second(f):
        gradient = jax.grad(lambda *a: jnp.sum(jnp.sin(f(*a))), argnums=(0, 1, 2, 3, 4))
        return jax.jit(lambda *a: jax.jvp(gradient, a, a)[1])(*arguments)

    for ours, theirs in zip(second(attend(implementation)), second(dense), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_weights_are_those_of_dense_scores():
    query, key, value = heads()
    score = per_head(score_of(TABLES, U))
    rows = jnp.array([3, 1])
    found = attn.multi_head_attention_weights(query, key, score=score, rows=rows)
    for n in range(N):
        g = n // (N // K)
        p, _ = of_head(query[:, n], key[:, g], value[:, g], TABLES[n], U[n])
        np.testing.assert_allclose(found[n], p[rows], rtol=1e-5, atol=1e-6)
        one = attn.attention_weights(query[:, n], key[:, g], score=score_of(TABLES[n], U[n]))
        np.testing.assert_allclose(one, p, rtol=1e-5, atol=1e-6)


def test_it_is_made_once_per_head_and_outside_of_the_tiles(implementation):
    made = []

    def make(query, key):
        made.append((query.shape, key.shape))
        products = jnp.cbrt(query) @ jnp.ones((H, 2 * C + 1))
        return lambda s, i, j: s + products[i, 0]

    query, key, value = (x[:, 0] for x in heads())
    call = lambda *a: attn.attention(*a, score=scores.from_vectors(make), implementation=implementation)  # noqa: E731
    found = [around for equation, around in equations(call, query, key, value) if equation.primitive.name == "cbrt"]
    assert made == [((T, H), (S, H))] * (2 if cases.is_kernel(implementation) else 1)  # first to see if a kernel can
    assert len(found) == 1
    assert not any(outer.primitive.name in ("scan", "while", "cond") for outer in found[0])


def test_none_changes_nothing(implementation):
    query, key, value = (x[:, 0] for x in heads())
    nothing = scores.from_vectors(lambda query, key: None)
    plain = {"implementation": implementation, "mask": masks.causal(2)}
    out = attn.attention(query, key, value, score=nothing, **plain)
    np.testing.assert_array_equal(out, attn.attention(query, key, value, **plain))
    capped = attn.attention(query, key, value, score=scores.softcap(1.0), **plain)
    for score in (nothing >> scores.softcap(1.0), scores.softcap(1.0) >> nothing):
        np.testing.assert_array_equal(attn.attention(query, key, value, score=score, **plain), capped)


def test_unset_offsets_inside_are_resolved_and_other_positions_are_seen(implementation):
    query, key, value = (x[:, 0] for x in cases.normal((S, 1, H), (S, 1, H), (S, 1, HV)))
    made = scores.from_vectors(lambda query, key: scores.alibi(query[0, 0]))
    i, j = cases.positions(S, S)
    for score, shift in ((made, 0), (scores.placed(made, 2, 0), 2)):
        s = np.asarray(query @ key.T) / H**0.5 - float(query[0, 0]) * abs(i + shift - j)
        p = np.exp(s - s.max(axis=1, keepdims=True))
        expected = p / p.sum(axis=1, keepdims=True) @ np.asarray(value)
        out = attn.attention(query, key, value, score=score, implementation=implementation)
        np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="offset=S-T"):
        attn.attention(query[1:], key, value, score=made, implementation=implementation)


TILE = 4, 3


def in_tiles(score, T, S):
    """Make a score that evaluates another one in tiles of one shape, padded by the last rows and columns."""
    (r, c), rows, columns = TILE, -(-T // TILE[0]), -(-S // TILE[1])

    def whole(s, i, j):
        i, j = jnp.minimum(jnp.arange(rows * r), T - 1), jnp.minimum(jnp.arange(columns * c), S - 1)
        s = jnp.pad(s, ((0, rows * r - T), (0, columns * c - S)), mode="edge").reshape(rows, r, columns, c)
        tile = jax.vmap(lambda s, i, j: scores.evaluate(score, s, i[:, None], j[None, :]), (0, None, 0))
        tiles = jax.vmap(tile, (0, 0, None))(s.swapaxes(1, 2), i.reshape(rows, r), j.reshape(columns, c))
        return tiles.swapaxes(1, 2).reshape(rows * r, columns * c)[:T, :S]

    return scores.as_score(whole)


@pytest.fixture(params=["tile", "no tile"])
def all_heads(request, monkeypatch):
    """An implementation that takes all heads at once: the marks off, scores in tiles, and the reference under vmap."""
    from attn.functional import mods

    def attend(call):
        assert call.query.ndim == 3
        marked, score_of_head = mods.unwrap_per_head(call.score, call.query.shape[1])

        def one(query, key, value, slices):
            score = scores.as_score(score_of_head(slices))
            score = None if score is None else in_tiles(score, call.T, call.S)
            return IMPLEMENTATIONS["reference"].attend(call._replace(query=query, key=key, value=value, score=score))

        repeats = call.query.shape[1] // call.key.shape[1]
        key, value = (jnp.repeat(x, repeats, axis=1) for x in (call.key, call.value))
        return jax.vmap(one, in_axes=(1, 1, 1, 0), out_axes=1)(call.query, key, value, marked)

    tile = TILE if request.param == "tile" else None
    monkeypatch.setitem(IMPLEMENTATIONS, "all heads", Implementation(attend, all_heads=True, tile=tile))
    return "all heads"


def test_for_all_heads_at_once_it_becomes_a_marked_score(all_heads):
    arguments = *heads(), TABLES, U
    found, expected = jax.jit(attend(all_heads, shaw_as_pytree))(*arguments), jax.jit(dense)(*arguments)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    if IMPLEMENTATIONS[all_heads].tile is None:
        with pytest.raises(attn.Unsupported, match=r"captures arrays: .*Partial.* declares its tile"):
            attend(all_heads)(*arguments)
    else:  # the maker returns a function that captures arrays
        np.testing.assert_allclose(jax.jit(attend(all_heads))(*arguments), expected, rtol=1e-5, atol=1e-6)
    query, key, value = (x[:, 0] for x in heads())
    _, expected = of_head(query, key, value, TABLES[0], U[0])
    one = attn.attention(query, key, value, score=score_of(TABLES[0], U[0]), implementation=all_heads)
    np.testing.assert_allclose(one, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "mechanism",
    ["alibi", "t5 + softcap(2.0)", "shaw + alibi", "transformer_xl", "softcap(1.0)", "rotary", "lean + shaw"],
)
@pytest.mark.parametrize("all_heads", ["tile"], indirect=True)
def test_scores_of_mechanisms_reach_an_implementation_of_all_heads(mechanism, all_heads, monkeypatch):
    """A decoder-only model with a cache: logits, and gradients of all parameters, beside the reference."""
    lean = mechanisms.of(score=lambda s, i, j: s - 0.3 * jnp.abs(i - j))
    monkeypatch.setitem(MECHANISMS, "lean", lean)

    def run(implementation):
        settings = DecoderOnlySettings(
            "decoder_only", width=12, num_heads=3, num_layers=1, mechanism=mechanism, implementation=implementation
        )
        graphdef, params = nnx.split(DecoderOnly(9, settings, nnx.Rngs(0)))

        def loss(params):
            logits = nnx.merge(graphdef, params)(jnp.array([3, 1, 4, 0, 0]), jnp.array([7, 4, 1]))
            return jnp.sum(jnp.sin(logits)), logits

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)

    for found, expected in zip(*map(jax.tree.leaves, (run(all_heads), run("reference"))), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_bad_makers_are_explained(untyped):
    query, key, value = (x[:, 0] for x in heads())
    with pytest.raises(TypeError, match=r"function \(query, key\) -> score"):
        scores.from_vectors(jnp.ones(3))
    with pytest.raises(TypeError, match=r"scores\.dense"):
        attn.attention(query, key, value, score=scores.from_vectors(lambda query, key: query @ key.T))
    with pytest.raises(TypeError, match="give it to an attention function"):
        scores.from_vectors(lambda query, key: None)(query @ key.T, I, J)
    with pytest.raises(ValueError, match="differs by head"):
        attn.attention(query, key, value, score=per_head(scores.from_vectors(Partial(shaw, TABLES))))
