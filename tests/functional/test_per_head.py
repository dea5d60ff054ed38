"""Masks and scores that differ by head: marks, combination with shared ones, grouped queries, errors."""

import functools

import attention_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

import attn
from attn import masks, per_head, positions, scores

T, S, N, K, H, HV = 3, 5, 4, 2, 2, 7
LENGTHS, SLOPES = jnp.array([2, 5, 1, 4]), jnp.array([0.1, 0.9, 0.5, 0.3])
LEFTS = jnp.array([0, 1, 2, 3])
PARTIAL = jax.tree_util.Partial(lambda n, i, j: (i + j) % n != 0, jnp.array([2, 3, 4, 5]))
PARTIAL_SCORE = jax.tree_util.Partial(lambda t, s, i, j: s * t, SLOPES)


def heads():
    return cases.normal((T, N, H), (S, K, H), (S, K, HV))


def partial_of(partial, n):
    return functools.partial(partial.func, partial.args[0][n])


# For each: what the multi-head call gets, and what head n alone gets.
MIXED = {
    "mask": ({"mask": per_head(masks.padding(LENGTHS))}, lambda n: {"mask": masks.padding(LENGTHS[n])}),
    "with a shared mask": (
        {"mask": per_head(masks.padding(LENGTHS)) & masks.causal(2)},
        lambda n: {"mask": masks.padding(LENGTHS[n]) & masks.causal(2)},
    ),
    "with a shared array": (
        {"mask": ~(masks.padding(jnp.int32(2)) | per_head(masks.sliding_window(LEFTS, 0, 1)))},
        lambda n: {"mask": ~(masks.padding(2) | masks.sliding_window(LEFTS[n], 0, 1))},
    ),
    "within": (
        {"mask": per_head(masks.padding(LENGTHS) & ~masks.sliding_window(LEFTS, 0, 1) & (lambda i, j: j != i))},
        lambda n: {"mask": masks.padding(LENGTHS[n]) & ~masks.sliding_window(LEFTS[n], 0, 1) & (lambda i, j: j != i)},
    ),
    "with a function": (
        {"mask": (lambda i, j: j != i) & per_head(masks.padding(LENGTHS))},
        lambda n: {"mask": masks.padding(LENGTHS[n]) & (lambda i, j: j != i)},
    ),
    "two": (
        {"mask": per_head(masks.padding(LENGTHS)) | per_head(masks.sliding_window(LEFTS, 0, 1))},
        lambda n: {"mask": masks.padding(LENGTHS[n]) | masks.sliding_window(LEFTS[n], 0, 1)},
    ),
    "score": (
        {"score": per_head(scores.alibi(SLOPES, 2)), "mask": masks.causal(2)},
        lambda n: {"score": scores.alibi(SLOPES[n], 2), "mask": masks.causal(2)},
    ),
    "chain": (
        {"score": scores.softcap(2.0) >> per_head(scores.alibi(SLOPES, 2)) >> (lambda s, i, j: 2 * s)},
        lambda n: {"score": scores.softcap(2.0) >> scores.alibi(SLOPES[n], 2) >> (lambda s, i, j: 2 * s)},
    ),
    "mask and score": (
        {"score": per_head(scores.softcap(SLOPES)), "mask": per_head(masks.padding(LENGTHS))},
        lambda n: {"score": scores.softcap(SLOPES[n]), "mask": masks.padding(LENGTHS[n])},
    ),
    "partial": ({"mask": per_head(PARTIAL)}, lambda n: {"mask": partial_of(PARTIAL, n)}),
    "partial, negated": (
        {"mask": ~per_head(PARTIAL) | masks.causal(0)},
        lambda n: {"mask": lambda i, j: ~partial_of(PARTIAL, n)(i, j) | (j <= i)},
    ),
    "partial score": ({"score": per_head(PARTIAL_SCORE)}, lambda n: {"score": partial_of(PARTIAL_SCORE, n)}),
    "partial score, chained": (
        {"score": per_head(PARTIAL_SCORE) >> scores.softcap(1.0)},
        lambda n: {"score": lambda s, i, j: scores.softcap(1.0)(s * SLOPES[n], i, j)},
    ),
}


@pytest.mark.some(2)
@pytest.mark.parametrize("name", MIXED)
def test_each_head_gets_its_own(implementation, name):
    query, key, value = heads()
    many, one = MIXED[name]
    out, logsumexp = attn.multi_head_attention(
        query, key, value, **many, implementation=implementation, return_logsumexp=True
    )
    weights = attn.multi_head_attention_weights(query, key, **many)
    for n in range(N):
        group = n // (N // K)
        expected = attn.attention(query[:, n], key[:, group], value[:, group], **one(n), return_logsumexp=True)
        np.testing.assert_allclose(out[:, n], expected[0], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(logsumexp[:, n], expected[1], rtol=1e-5, atol=1e-6)
        alone = attn.attention_weights(query[:, n], key[:, group], **one(n))
        np.testing.assert_allclose(weights[n], alone, rtol=1e-5, atol=1e-6)


def test_a_slope_learns_from_its_own_head_alone(implementation, strict):
    query, key, value = cases.normal((T, N, H), (S, K, H), (S, K, HV), dtype="float64")
    slopes = positions.alibi_slopes(N)

    def out(slopes):
        score = per_head(scores.alibi(slopes, 2))
        return (attn.multi_head_attention(query, key, value, score=score, implementation=implementation) ** 2).sum(
            (0, 2)
        )

    jacobian = jax.jit(jax.jacobian(out))(slopes)
    np.testing.assert_array_equal(jacobian * (1 - np.eye(N)), 0)
    call, step = jax.jit(out), 1e-6
    for n in range(N):
        e = np.eye(N)[n] * step
        difference = (call(slopes + e) - call(slopes - e))[n] / (2 * step)
        assert jacobian[n, n] != 0
        np.testing.assert_allclose(jacobian[n, n], difference, rtol=1e-7, atol=1e-9)


def test_marks_pass_through_jit_and_vmap():
    query, key, value = heads()
    call = lambda mask: attn.multi_head_attention(query, key, value, mask=mask)  # noqa: E731
    lengths = jnp.stack([LENGTHS, LENGTHS[::-1]])
    batch = jax.jit(jax.vmap(call))(per_head(masks.padding(lengths)) & masks.causal(2))
    for b in range(2):
        expected = call(per_head(masks.padding(lengths[b])) & masks.causal(2))
        np.testing.assert_allclose(batch[b], expected, rtol=1e-5, atol=1e-6)


def test_what_holds_no_array_cannot_differ_by_head(untyped):
    for mod in (masks.causal(), masks.padding(3), scores.softcap(2.0), lambda i, j: j <= i):
        with pytest.raises(TypeError, match="holds no array"):
            per_head(mod)


@pytest.mark.parametrize("bad", [3, None, jnp.ones(4), "causal"])
def test_what_is_not_callable_cannot_be_marked(untyped, bad):
    with pytest.raises(TypeError, match="mask or a score"):
        per_head(bad)


def test_marking_twice_is_refused():
    marked = per_head(masks.padding(LENGTHS))
    for mod in (marked, ~marked, marked & masks.causal(), per_head(scores.alibi(SLOPES)) >> scores.softcap(2.0)):
        with pytest.raises(ValueError, match="marked already"):
            per_head(mod)


WRONG_AXES = {
    "too few": {"mask": per_head(masks.padding(jnp.array([1, 2])))},
    "groups": {"mask": masks.causal(2) & ~per_head(masks.padding(jnp.arange(K)))},
    "a scalar": {"mask": per_head(masks.padding(jnp.int32(2)))},
    "one of two": {"mask": per_head(masks.padding(LENGTHS) & masks.padding(jnp.int32(2)))},
    "a score": {"score": per_head(scores.alibi(jnp.ones(3), 2))},
}


@pytest.mark.parametrize("name", WRONG_AXES)
def test_a_leading_axis_that_is_not_the_heads_is_refused(name):
    query, key, value = heads()
    with pytest.raises(ValueError, match="N = 4 query heads"):
        attn.multi_head_attention(query, key, value, **WRONG_AXES[name])
    with pytest.raises(ValueError, match="N = 4 query heads"):
        attn.multi_head_attention_weights(query, key, **WRONG_AXES[name])


@pytest.mark.parametrize("name", MIXED)
def test_one_head_takes_nothing_that_differs_by_head(name):
    query, key, value = heads()
    with pytest.raises(ValueError, match="multi_head_attention"):
        attn.attention(query[:, 0], key[:, 0], value[:, 0], **MIXED[name][0])
    with pytest.raises(ValueError, match="multi_head_attention"):
        attn.attention_weights(query[:, 0], key[:, 0], **MIXED[name][0])


def test_a_mark_cannot_be_called_by_hand():
    with pytest.raises(ValueError, match="multi_head_attention"):
        per_head(masks.padding(LENGTHS))(0, 0)


@pytest.mark.parametrize("extra", [2, 0.5])
def test_a_marked_partial_may_hold_plain_numbers(extra):
    query, key, value = heads()
    mod = jax.tree_util.Partial(lambda n, extra, i, j: j < n + extra, LENGTHS, extra)
    out = attn.multi_head_attention(query, key, value, mask=per_head(mod))
    for n in range(N):
        mask = lambda i, j, n=n: j < LENGTHS[n] + extra  # noqa: E731
        expected = attn.attention(query[:, n], key[:, n // 2], value[:, n // 2], mask=mask)
        np.testing.assert_allclose(out[:, n], expected, rtol=1e-5, atol=1e-6)


def test_arrays_of_every_mod_may_carry_the_heads():
    query, key, value = heads()
    bias, table = cases.normal((N, T, S), (N, T + S - 1))
    array = jnp.asarray(np.random.default_rng(0).random((N, T, S)) < 0.7)
    for kind, build, arrays in (
        ("mask", masks.dense, array),
        ("score", scores.dense, bias),
        ("score", lambda table: scores.relative_bias(table, 0), table),
    ):
        out = attn.multi_head_attention(query, key, value, **{kind: per_head(build(arrays))})
        for n in range(N):
            one = attn.attention(query[:, n], key[:, n // 2], value[:, n // 2], **{kind: build(arrays[n])})
            np.testing.assert_allclose(out[:, n], one, rtol=1e-5, atol=1e-6)


def test_grouped_queries_share_their_keys_in_memory(implementation):
    """One query of many heads reads a long memory, as in decoding: no array is as large as a copy for each head."""
    S, N, K = 4096, 16, 2
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1, N, 8), (S, K, 8), (S, K, 8))]
    call = lambda *a: attn.multi_head_attention(*a, mask=masks.padding(S - 5), implementation=implementation)  # noqa: E731
    temporary = jax.jit(call).lower(*arrays).compile().memory_analysis().temp_size_in_bytes
    assert temporary < 4 * S * N * 8


@pytest.mark.some(1)
@pytest.mark.parametrize("sharded", ["grouped", "all", "queries", "keys and values"])
@pytest.mark.skipif(jax.device_count() < 2, reason="one device")
def test_heads_may_be_sharded_on_an_explicit_mesh(implementation, sharded):
    N, K, T, H = 4, 2 if sharded == "grouped" else 4, 5, 3
    arrays = cases.normal((T, N, H), (T, K, H), (T, K, H))

    def call(query, key, value):
        mask = masks.causal() & per_head(masks.padding(jnp.array([5, 3, 0, 4])))
        dropout = attn.Dropout(0.3, jax.random.key(0))
        return attn.multi_head_attention(query, key, value, mask=mask, dropout=dropout, implementation=implementation)

    both = lambda *a: (call(*a), jax.grad(lambda *a: jnp.sum(call(*a) ** 2), argnums=(0, 1, 2))(*a))  # noqa: E731
    expected = jax.tree.leaves(jax.jit(both)(*arrays))
    queries, memory = (
        PartitionSpec(None, None if sharded == other else "heads") for other in ("keys and values", "queries")
    )
    specs = queries, memory, memory
    with jax.set_mesh(jax.make_mesh((2,), ("heads",), axis_types=(AxisType.Explicit,))):
        found = jax.tree.leaves(jax.jit(both)(*map(jax.device_put, arrays, specs)))
        for x, spec in zip(found, (queries, *specs)):
            assert x.sharding.spec == PartitionSpec(*spec, None)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(np.asarray(ours), theirs, rtol=1e-5, atol=1e-6)
