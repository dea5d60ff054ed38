"""Masks and scores that capture arrays, traced or not: under every transformation, and gradients to what they hold."""

import functools

import attention_cases as cases
import attention_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attn
from attn import masks, positions, scores

T, S, H, HV = 7, 10, 2, 3
I, J = cases.positions(T, S)
KEY = jax.random.key(5)


def head(dtype="float32"):
    return cases.normal((T, H), (S, H), (S, HV), dtype=dtype)


def table(*batch, dtype="float32"):
    return cases.normal((*batch, T + S - 1), dtype=dtype, seed=1)[0]


def integers_and_bools():
    """Return the arrays that a mask captures: a shift and the keys that are always visible."""
    return jnp.int32(2), jnp.asarray(np.random.default_rng(2).random(S) < 0.3)


def capturing(query, key, value, table, shift, always, seed, implementation):
    """Attention whose mask and score capture integers, bools, a random key, what was made from it, and floats."""
    noise = jax.random.normal(jax.random.fold_in(seed, 1), (S,), table.dtype)

    def mask(i, j):
        return (j <= i + shift) | always[j] | (table[j] > 1.5)

    def score(s, i, j):
        s = s + jnp.where(always[j], 1, 0.5) * table[j - i + T - 1] + noise[j]
        return s * jax.random.uniform(seed, (), s.dtype, 0.5, 2)

    return attn.attention(query, key, value, mask=mask, score=score, implementation=implementation)


def of_floats(implementation, shift, always):
    return lambda *floats: capturing(*floats, shift, always, KEY, implementation)


def objective(implementation, shift, always):
    return lambda *floats: jnp.sum(jnp.sin(of_floats(implementation, shift, always)(*floats)))


FLOATS = (0, 1, 2, 3)  # query, key, value, table


def jitted(implementation):
    run = jax.jit(functools.partial(capturing, implementation=implementation))
    return run(*head(), table(), *integers_and_bools(), KEY)


def gradient(implementation):
    run = jax.grad(objective(implementation, *integers_and_bools()), argnums=FLOATS)
    return jax.jit(run)(*head(), table())


def tangent(implementation):
    floats = *head(), table()
    still = [jnp.zeros_like(x) for x in floats[:3]]  # nothing moves but what is captured
    call = of_floats(implementation, *integers_and_bools())
    return jax.jit(lambda *tangents: jax.jvp(call, floats, tangents)[1])(*still, floats[3])


def batch_of_tables(implementation):
    call = of_floats(implementation, *integers_and_bools())
    return jax.jit(jax.vmap(call, in_axes=(None, None, None, 0)))(*head(), table(3))


def batch_of_queries(implementation):
    call = of_floats(implementation, *integers_and_bools())
    query, key, value = head()
    return jax.jit(jax.vmap(call, in_axes=(0, None, None, None)))(jnp.stack([query, -query]), key, value, table())


def batch_of_gradients(implementation):
    query, key, value = head()

    def one(query, table, shift, always, seed):
        call = lambda *floats: jnp.sum(capturing(*floats, shift, always, seed, implementation) ** 2)  # noqa: E731
        return jax.grad(call, argnums=FLOATS)(query, key, value, table)

    shift, always = integers_and_bools()
    batch = jax.vmap(one, in_axes=(0, 0, 0, 0, 0))
    arguments = jnp.stack([query, -query]), table(2), jnp.stack([shift, 0 * shift]), jnp.stack([always, ~always])
    return jax.jit(batch)(*arguments, jax.random.split(KEY))


def second_order(implementation):
    floats = *head(), table()
    gradient = jax.grad(objective(implementation, *integers_and_bools()), argnums=FLOATS)
    return jax.jit(lambda *floats: jax.jvp(gradient, floats, floats)[1])(*floats)


TRANSFORMED = jitted, gradient, tangent, batch_of_tables, batch_of_queries, batch_of_gradients, second_order


@pytest.mark.some(3)
@pytest.mark.parametrize("implementation", [n for n in cases.complete_implementations() if n != "reference"])
@pytest.mark.parametrize("transformed", TRANSFORMED, ids=lambda f: f.__name__)
def test_functions_that_capture_are_transformed_as_in_the_reference(transformed, implementation):
    found, expected = (jax.tree.leaves(transformed(name)) for name in (implementation, "reference"))
    for ours, theirs in zip(found, expected, strict=True):
        assert np.any(theirs) and ours.shape == theirs.shape and ours.dtype == theirs.dtype
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=1e-5)


def score_gradient(query, key, value, visible, bias, g) -> np.ndarray:
    """The gradient [T S] in the scores, before their bias or after, from the oracle's weights."""
    exact = oracle.Head(query, key, value, visible, lambda s, i, j: (s + bias[i, j], np.ones_like(s), np.ones_like(s)))
    p, dp = oracle.weights(exact), np.asarray(g, oracle.WIDE) @ np.asarray(value, oracle.WIDE).T
    return p * (dp - (p * dp).sum(axis=1, keepdims=True))


def gathered(ds, entry, length) -> np.ndarray:
    """The gradient of a table: the sum of the scores' over all pairs that read an entry."""
    return np.bincount(np.broadcast_to(entry, ds.shape).ravel(), ds.astype(float).ravel(), length)


# A table's length, the entry that a pair reads, and the score that does so.
TABLES = {
    "a closure": (T + S - 1, J - I + T - 1, lambda b: lambda s, i, j: s + b[j - i + T - 1]),
    "relative_bias": (T + S - 1, J - I + T - 1, lambda b: scores.relative_bias(b, 0)),
    "T5's buckets": (
        32,
        np.where(J > I, 16, 0) + np.minimum(abs(J - I), 8),  # these distances reach the first bucket of several
        lambda b: lambda s, i, j: s + b[positions.relative_buckets(j - i)],
    ),
    "by key": (S, J + 0 * I, lambda b: lambda s, i, j: s + b[j]),
}


@pytest.mark.some(2)
@pytest.mark.parametrize("name", TABLES)
def test_a_captured_table_gets_the_gradient_of_the_oracle(implementation, name):
    length, entry, build = TABLES[name]
    query, key, value = head()
    values, g = cases.normal((length,), (T, HV), seed=3)

    @jax.jit
    def gradient(values):
        options = {"mask": masks.causal(2), "score": build(values), "implementation": implementation}
        return jax.vjp(lambda v: attn.attention(query, key, value, **options | {"score": build(v)}), values)[1](g)[0]

    bias = np.asarray(values, oracle.WIDE)[entry]
    exact = gathered(score_gradient(query, key, value, J <= I + 2, bias, g), entry, length)
    assert np.any(exact) and not np.all(exact)  # some entries are read by hidden pairs alone
    np.testing.assert_allclose(gradient(values), exact, rtol=1e-5, atol=1e-5 * np.abs(exact).max())
    np.testing.assert_array_equal(gradient(values)[exact == 0], 0)


REACH = 1


def within_reach(i, j):
    return abs(i - j) <= REACH


class Reach:
    """An object with a mask as a method."""

    def __init__(self, reach):
        self.reach = reach

    def within(self, i, j):
        return abs(i - j) <= self.reach


def called(implementation, mask):
    return np.asarray(attn.attention(*head(), mask=mask, implementation=implementation))


@pytest.mark.some(2)
@pytest.mark.parametrize("kind", ["closure", "method", "global"])
def test_a_function_whose_surroundings_have_changed_is_read_again(implementation, kind, monkeypatch):
    holder, reach = Reach(1), 1
    if kind == "closure":
        mask = lambda i, j: abs(i - j) <= reach  # noqa: E731
    else:
        mask = {"method": holder.within, "global": within_reach}[kind]
    first = called(implementation, mask)
    reach = holder.reach = 3
    monkeypatch.setitem(globals(), "REACH", 3)
    expected, _ = oracle.forward(oracle.Head(*head(), abs(I - J) <= 3))
    np.testing.assert_allclose(called(implementation, mask), expected, rtol=1e-5, atol=1e-6)
    assert not np.allclose(first, expected, atol=1e-3)


def test_a_gradient_through_a_method_reaches_what_its_object_holds(implementation):
    class Bias:
        def score(self, s, i, j):
            return s + self.table[j - i + T - 1]

    bias = Bias()

    def objective(values):
        bias.table = values
        return jnp.sum(jnp.sin(attn.attention(*head(), score=bias.score, implementation=implementation)))

    def pure(values):
        score = lambda s, i, j: s + values[j - i + T - 1]  # noqa: E731
        return jnp.sum(jnp.sin(attn.attention(*head(), score=score, implementation="reference")))

    objective(2 * table())  # leaves nothing behind
    found, expected = jax.grad(objective)(table()), jax.grad(pure)(table())
    assert np.any(expected)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
