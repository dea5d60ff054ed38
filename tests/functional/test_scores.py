"""Scores: each against its formula, chaining, leaves that learn, and bad arguments."""

import attention_cases as cases
import attention_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attn
from attn import scores

T, S, H, HV = 3, 5, 2, 7
I, J = cases.positions(T, S)
RNG = np.random.default_rng(0)
SCORE, TABLE, BIAS = (RNG.normal(size=shape).astype("float32") for shape in ((T, S), (T + S - 1,), (T, S)))
PLAIN = lambda s, i, j: s * 3 + i - j  # noqa: E731


def cap(x, s):
    return x * np.tanh(s / x)


def alibi(slope, offset, s):
    return s - slope * np.abs(I + offset - J)


FORMULAS = {
    "softcap": (scores.softcap(2.0), cap(2, SCORE)),
    "softcap of an integer": (scores.softcap(2), cap(2, SCORE)),
    "alibi": (scores.alibi(0.3, 2), alibi(0.3, 2, SCORE)),
    "alibi, array": (scores.alibi(jnp.float32(0.3), jnp.int32(-1)), alibi(0.3, -1, SCORE)),
    "alibi by hand": (scores.alibi(0.3), alibi(0.3, 0, SCORE)),
    "relative_bias": (scores.relative_bias(jnp.array(TABLE), 0, T), SCORE + TABLE[J - I + T - 1]),
    "relative_bias, offset": (scores.relative_bias(jnp.array(TABLE), -1, T - 1), SCORE + TABLE[J - I + T - 1]),
    "dense": (scores.dense(jnp.array(BIAS)), SCORE + BIAS),
    "alibi >> softcap": (scores.alibi(0.3, 2) >> scores.softcap(2.0), cap(2, alibi(0.3, 2, SCORE))),
    "softcap >> alibi": (scores.softcap(2.0) >> scores.alibi(0.3, 2), alibi(0.3, 2, cap(2, SCORE))),
    "then a function": (scores.softcap(2.0) >> PLAIN, cap(2, SCORE) * 3 + I - J),
    "a function first": (PLAIN >> scores.softcap(2.0), cap(2, SCORE * 3 + I - J)),
    "three": (
        scores.dense(jnp.array(BIAS)) >> PLAIN >> scores.softcap(2.0),
        cap(2, (SCORE + BIAS) * 3 + I - J),
    ),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_scores_called_by_hand_are_their_formulas(name):
    score, expected = FORMULAS[name]
    ours = score(jnp.array(SCORE), jnp.array(I), jnp.array(J))
    np.testing.assert_allclose(ours, expected, rtol=2e-6, atol=1e-6)
    np.testing.assert_allclose(score(jnp.asarray(SCORE[1, 3]), 1, 3), expected[1, 3], rtol=2e-6, atol=1e-6)


def softmax(s):
    e = np.exp(s - s.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("name", [name for name in FORMULAS if "by hand" not in name and "relative" not in name])
def test_attention_weights_are_the_softmax_of_the_formula(name):
    score, expected = FORMULAS[name]
    weights = attn.attention_weights(jnp.array(SCORE), jnp.eye(S), score=score, scale=1.0)
    np.testing.assert_allclose(weights, softmax(expected), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("offset", [0, jnp.int32(0)])
def test_a_relative_bias_reads_the_table_by_distance(offset):
    weights = attn.attention_weights(
        jnp.array(SCORE), jnp.eye(S), score=scores.relative_bias(jnp.array(TABLE), offset), scale=1.0
    )
    np.testing.assert_allclose(weights, softmax(SCORE + TABLE[J - I + T - 1]), rtol=1e-5, atol=1e-7)


def test_a_relative_bias_with_an_offset_reads_further_along():
    table = RNG.normal(size=T + S).astype("float32")
    score = scores.relative_bias(jnp.array(table), -1)
    weights = attn.attention_weights(jnp.array(SCORE), jnp.eye(S), score=score, scale=1.0)
    np.testing.assert_allclose(weights, softmax(SCORE + table[J - (I - 1) + T - 1]), rtol=1e-5, atol=1e-7)


def test_a_relative_bias_by_hand_has_distance_zero_in_the_middle():
    table = jnp.arange(9.0)
    assert scores.relative_bias(table)(jnp.float32(0), 3, 3) == 4
    assert scores.relative_bias(table)(jnp.float32(0), 3, 5) == 6
    assert scores.relative_bias(table)(jnp.float32(0), 3, 1) == 2


@pytest.mark.parametrize("offset, length", [(0, T + S - 2), (-1, T + S - 1)])
def test_a_relative_bias_whose_table_is_too_short_is_refused(offset, length):
    with pytest.raises(ValueError, match=r"relative_bias.*T = 3.*S = 5.*table"):
        attn.attention_weights(jnp.array(SCORE), jnp.eye(S), score=scores.relative_bias(jnp.ones(length), offset))


@pytest.mark.parametrize("name", FORMULAS)
def test_scores_survive_flattening(name):
    score, expected = FORMULAS[name]
    again = jax.tree.map(lambda leaf: leaf, score)
    assert jax.tree.structure(again) == jax.tree.structure(score) and str(again) == str(score)
    np.testing.assert_allclose(again(jnp.array(SCORE), jnp.array(I), jnp.array(J)), expected, rtol=2e-6, atol=1e-6)


def test_arrays_are_leaves_and_numbers_are_static():
    assert jax.tree.leaves(scores.softcap(2.0)) == jax.tree.leaves(scores.alibi(0.5, 1)) == []
    assert jax.tree.leaves(scores.alibi(jnp.float32(0.5), 1)) == [0.5]
    assert jax.tree.leaves(PLAIN >> scores.softcap(jnp.float32(3))) == [3]
    assert jax.tree.structure(scores.softcap(2.0)) != jax.tree.structure(scores.softcap(3.0))


def learnable():
    return {
        "softcap": scores.softcap(jnp.float64(1.5)),
        "alibi": scores.alibi(jnp.float64(0.3), 2),
        "relative_bias": scores.relative_bias(jnp.array(TABLE, float), 0),
        "dense": scores.dense(jnp.array(BIAS, float)),
        "chain": scores.dense(jnp.array(BIAS, float)) >> scores.softcap(jnp.float64(1.5)),
        "partial": jax.tree_util.Partial(lambda w, s, i, j: s * jnp.cos(w * (i - j)), jnp.float64(0.7)),
    }


@pytest.mark.some(3)
@pytest.mark.parametrize("name", ["softcap", "alibi", "relative_bias", "dense", "chain", "partial"])
def test_gradients_through_the_leaves_of_a_score(implementation, strict, name):
    score = learnable()[name]
    query, key, value, g = cases.normal((T, H), (S, H), (S, HV), (T, HV), dtype="float64")
    leaves, structure = jax.tree.flatten(score)

    @jax.jit
    def objective(*leaves):
        mod = structure.unflatten(leaves)
        out, logsumexp = attn.attention(
            query, key, value, score=mod, implementation=implementation, return_logsumexp=True
        )
        return jnp.sum(out * g) + jnp.sum(logsumexp**2)

    for index, gradient in enumerate(jax.jit(jax.grad(objective, argnums=tuple(range(len(leaves)))))(*leaves)):
        assert np.any(gradient)
        expected = oracle.finite_differences(objective, leaves, index)
        np.testing.assert_allclose(gradient, expected, rtol=1e-7, atol=1e-8)


def test_gradients_through_what_a_closure_captured(implementation, strict):
    query, key, value = cases.normal((T, H), (S, H), (S, HV), dtype="float64")

    @jax.jit
    def objective(temperature, bias):
        score = lambda s, i, j: s * temperature + bias[j]  # noqa: E731
        return jnp.sum(attn.attention(query, key, value, score=score, implementation=implementation) ** 2)

    leaves = [jnp.float64(0.7), jnp.array(BIAS[0], float)]
    for index, gradient in enumerate(jax.grad(objective, argnums=(0, 1))(*leaves)):
        np.testing.assert_allclose(gradient, oracle.finite_differences(objective, leaves, index), rtol=1e-7, atol=1e-8)


NEW_VALUES = {
    "softcap": lambda x: scores.softcap(jnp.float32(x)),
    "alibi": lambda x: scores.alibi(jnp.float32(x), jnp.int32(x)),
    "relative_bias": lambda x: scores.relative_bias(jnp.full(T + S - 1, x), 0),
    "dense": lambda x: scores.dense(jnp.full((T, S), x)) >> scores.softcap(2.0),
}


@pytest.mark.parametrize("name", NEW_VALUES)
def test_new_values_do_not_recompile(name):
    query, key = cases.normal((T, H), (S, H))
    traces = []

    @jax.jit
    def call(query, key, score):
        traces.append(score)
        return attn.attention_weights(query, key, score=score)

    for x in (1.0, 2.0, 3.0):
        call(query, key, NEW_VALUES[name](x))
    assert len(traces) == 1


def test_a_score_of_minus_infinity_counts_as_masked(implementation):
    query, key, value = cases.normal((T, H), (S, H), (S, HV))
    hidden = RNG.random((T, S)) < 0.5
    hidden[1] = True
    bias = jnp.where(hidden, -jnp.inf, 0.0)
    options = {"implementation": implementation, "return_logsumexp": True}
    by_score = attn.attention(query, key, value, score=scores.dense(bias), **options)
    by_mask = attn.attention(query, key, value, mask=attn.masks.dense(jnp.array(~hidden)), **options)
    for ours, expected in zip(by_score, by_mask):
        np.testing.assert_allclose(ours, expected, rtol=1e-6, atol=1e-7)
    assert not np.any(by_score[0][1]) and by_score[1][1] == -np.inf


def test_what_a_score_returns_at_a_masked_pair_never_matters(implementation):
    query, key, value = cases.normal((T, H), (S, H), (S, HV))
    mask = attn.masks.causal(1)

    @jax.jit
    def call(filler):
        score = lambda s, i, j: jnp.where(j <= i + 1, s, filler)  # noqa: E731
        out = lambda *a: attn.attention(*a, mask=mask, score=score, implementation=implementation)  # noqa: E731
        return out(query, key, value), *jax.grad(lambda *a: out(*a).sum(), argnums=(0, 1, 2))(query, key, value)

    for filler in (jnp.nan, jnp.inf, -jnp.inf, 1e30):
        for ours, expected in zip(call(filler), call(0.0)):
            np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize("dtype", ["bool", "int32", "float32", "float16"])
def test_closures_over_traced_values_of_any_dtype(implementation, dtype):
    query, key, value = cases.normal((T, H), (S, H), (S, HV))
    flags = np.array([1, 0, 1, 1, 0]).astype(dtype)

    @jax.jit
    def call(flags):
        score = lambda s, i, j: s + jnp.where(flags[j] != 0, 2.0, 0.0)  # noqa: E731
        return attn.attention(query, key, value, score=score, implementation=implementation)

    bias = jnp.broadcast_to(2.0 * (jnp.asarray(flags) != 0), (T, S)).astype("float32")
    np.testing.assert_allclose(
        call(jnp.asarray(flags)), attn.attention(query, key, value, score=scores.dense(bias)), rtol=1e-6, atol=1e-7
    )


def test_a_repr_never_fails(untyped):
    shown = [repr(score) for score, _ in FORMULAS.values()]
    shown += [repr(attn.per_head(scores.alibi(jnp.ones(4)))), repr(scores.dense(jnp.ones((2, T, S))))]
    shown += [repr(jax.tree.map(lambda leaf: None, score)) for score, _ in FORMULAS.values()]
    jax.jit(lambda x: shown.append(repr(scores.alibi(x, 1) >> scores.softcap(x))))(1.0)
    assert all(shown) and repr(scores.alibi(0.5) >> scores.softcap(30.0)) == "(alibi(slope=0.5) >> softcap(cap=30.0))"


# Bad arguments


@pytest.mark.parametrize("bad", [0, -1.0, float("nan")])
def test_a_cap_must_be_positive(bad):
    with pytest.raises(ValueError, match="cap must be positive"):
        scores.softcap(bad)


@pytest.mark.parametrize("bad", ["1", None, 1j, True, np.ones(2, bool)])
def test_caps_and_slopes_must_be_real(untyped, bad):
    with pytest.raises(TypeError, match="cap"):
        scores.softcap(bad)
    with pytest.raises(TypeError, match="slope"):
        scores.alibi(bad)


@pytest.mark.parametrize("bad", [1.5, "1", True])
def test_offsets_must_be_integers(untyped, bad):
    with pytest.raises(TypeError, match="offset"):
        scores.alibi(0.5, bad)
    with pytest.raises(TypeError, match="offset"):
        scores.relative_bias(jnp.ones(7), bad)


@pytest.mark.parametrize("bad", [[1.0], np.ones(3, int), None])
def test_tables_and_biases_must_be_arrays_of_floats(untyped, bad):
    with pytest.raises(TypeError, match="table"):
        scores.relative_bias(bad)
    with pytest.raises(TypeError, match=r"scores\.dense"):
        scores.dense(bad)


MISFITS = {
    "dense": (lambda: scores.dense(jnp.ones((S, T))), r"scores\.dense.*\(3, 5\).*\(5, 3\)"),
    "caps": (lambda: scores.softcap(jnp.ones(2)), r"cap.*scalar.*vmap.*per_head"),
    "slopes": (lambda: scores.alibi(jnp.ones(2), 0), r"slope.*scalar"),
    "offsets": (lambda: scores.alibi(0.5, jnp.array([1, 2])), r"offset.*scalar"),
    "table": (lambda: scores.relative_bias(jnp.ones((2, 7)), 0), r"table.*one axis"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_arrays_that_do_not_fit_are_explained(untyped, name):
    build, message = MISFITS[name]
    query, key, value = cases.normal((T, H), (S, H), (S, HV))
    with pytest.raises(ValueError, match=message):
        attn.attention(query, key, value, score=build())
    with pytest.raises(ValueError, match=message):
        attn.attention_weights(query, key, score=build() >> PLAIN)


def test_what_is_no_score_cannot_be_chained(untyped):
    for other in (jnp.ones((T, S)), 3, attn.masks.causal()):
        with pytest.raises(TypeError):
            scores.softcap(2.0) >> other
        with pytest.raises(TypeError):
            other >> scores.softcap(2.0)


def test_alibi_needs_no_promotion_of_integers(untyped):
    s = cases.normal((3, 4))[0]
    with jax.numpy_dtype_promotion("strict"):
        changed = scores.alibi(jnp.float32(0.5), 1)(s, jnp.arange(3)[:, None], jnp.arange(4)[None, :])
    expected = s - 0.5 * np.abs(np.arange(3)[:, None] + 1 - np.arange(4))
    np.testing.assert_allclose(changed, expected, rtol=1e-6)


def test_nothing_cannot_be_chained(untyped):
    for chained in (lambda: scores.softcap(2.0) >> None, lambda: None >> scores.softcap(2.0)):
        with pytest.raises(TypeError, match=r"unsupported operand.*NoneType"):
            chained()
