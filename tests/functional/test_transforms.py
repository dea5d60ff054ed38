"""Every public function under JAX's transformations, with float64, no NaN and no silent broadcasting of ranks."""

import attention_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import complete_implementations
from jax.test_util import check_grads

import attn
from attn import masks, per_head, positions, scores

T, S, N, K, H, HV = 3, 5, 4, 2, 2, 7
ONE, MANY = [(T, H), (S, H), (S, HV)], [(T, N, H), (S, K, H), (S, K, HV)]
I, J = (jnp.asarray(x) for x in cases.positions(T, S))
EMPTY_ROW = (lambda i, j: i != 1) & masks.causal(1)


def finite(call):
    """`call` with the logsumexp of empty rows, -inf, left out of finite differences."""
    return lambda *a: jax.tree.map(lambda x: jnp.where(x == -jnp.inf, 0, x), call(*a))


def everything(implementation):
    def call(query, key, value, slope, cap, scale):
        score = scores.alibi(slope, 2) >> scores.softcap(cap)
        options = {"mask": EMPTY_ROW, "score": score, "scale": scale, "return_logsumexp": True}
        dropout = attn.Dropout(0.4, jax.random.key(0))
        return attn.attention(query, key, value, dropout=dropout, implementation=implementation, **options)

    return call


def heads(implementation):
    def call(query, key, value, slopes):
        mask = per_head(masks.padding(jnp.array([2, 5, 0, 4]))) & masks.causal(2)
        score = per_head(scores.alibi(slopes, 2))
        return attn.multi_head_attention(query, key, value, mask=mask, score=score, implementation=implementation)

    return call


def head_weights(query, key, bias):
    options = {"mask": EMPTY_ROW, "score": scores.dense(bias), "rows": jnp.array([2, 1])}
    return attn.multi_head_attention_weights(query, key, **options)


def every_score(s, x, table, bias):
    return (
        scores.softcap(2 + x)(s, I, J),
        scores.alibi(x)(s, I, J),
        scores.relative_bias(table, 0, T)(s, I, J),
        scores.dense(bias)(s, I, J),
        (scores.alibi(x) >> scores.softcap(2 + x) >> (lambda s, i, j: s * x))(s, I, J),
    )


def every_position(times, table, x, heads):
    return (
        positions.sinusoidal(times, 5),
        positions.learned(jnp.array([2, 0, 2]), table),
        positions.rotary(x, times, fraction=0.6, scale=2.0),
        positions.rotary(heads, times),
    )


# Each: a function of float64 arrays, and their shapes.
FUNCTIONS = {
    "attention_weights": (lambda q, k: attn.attention_weights(q, k, mask=EMPTY_ROW), ONE[:2]),
    "multi_head_attention_weights": (head_weights, [*MANY[:2], (T, S)]),
    "scores": (every_score, [(T, S), (), (T + S - 1,), (T, S)]),
    "positions": (every_position, [(T,), (T, H), (T, 7), (T, N, 6)]),
}
for _name in complete_implementations():
    FUNCTIONS |= {
        f"attention, {_name}": (everything(_name), [*ONE, (), (), ()]),
        f"multi_head_attention, {_name}": (heads(_name), [*MANY, (N,)]),
    }
every_function = pytest.mark.parametrize("name", FUNCTIONS)


def function_and_arrays(name, *batch):
    call, shapes = FUNCTIONS[name]
    return finite(call), cases.normal(*((*batch, *shape) for shape in shapes), dtype="float64")


def assert_all_close(ours, expected):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        assert a.dtype == np.float64 and np.all(np.isfinite(a))
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-13)


# By day many heads have their derivatives from one head's, and from the tests of marks per head.
@pytest.mark.some(3)
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.nightly if n.startswith("multi_head_attention,") else ()) for n in FUNCTIONS],
)
def test_derivatives_of_both_orders_and_modes_agree_with_finite_differences(strict, name):
    call, arrays = function_and_arrays(name)
    check_grads(jax.jit(call), arrays, order=2, modes=["fwd", "rev"], atol=1e-6, rtol=1e-6, eps=1e-5)


@pytest.mark.some(3)
@every_function
def test_nested_vmap_under_jit_is_a_plain_loop(strict, name):
    call, arrays = function_and_arrays(name, 2)
    first = jnp.stack([arrays[0], 2 * arrays[0], -arrays[0]])  # the outer vmap maps one argument alone
    axes = (0, *(None,) * (len(arrays) - 1))
    batch, alone = jax.jit(jax.vmap(jax.vmap(call), in_axes=axes))(first, *arrays[1:]), jax.jit(call)
    for outer, inner in np.ndindex(3, 2):
        one = alone(first[outer, inner], *(x[inner] for x in arrays[1:]))
        assert_all_close(jax.tree.map(lambda x, at=(outer, inner): x[at], batch), one)


@pytest.mark.some(2)
@every_function
def test_checkpoint_changes_no_gradient(strict, name):
    call, arrays = function_and_arrays(name)

    def gradient(call):
        objective = lambda *a: sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(call(*a)))  # noqa: E731
        return jax.jit(jax.grad(objective, argnums=tuple(range(len(arrays)))))(*arrays)

    plain, again = gradient(call), gradient(jax.checkpoint(call))
    assert_all_close(again, plain)
    assert any(np.any(g) for g in plain)


INTEGERS = {
    "causal": lambda n: masks.causal(n)(I, J),
    "padding": lambda n: masks.padding(n)(I, J),
    "prefix": lambda n: masks.prefix(n)(I, J),
    "sliding_window": lambda n: masks.sliding_window(n, n, n)(I, J),
    "segments": lambda n: masks.segments(jnp.arange(T) // n, jnp.arange(S) // n)(I, J),
    "masks.dense": lambda n: masks.dense(jnp.ones((T, S), bool) & (n > 2))(I, J),
    "composed": lambda n: (~masks.causal(n) | masks.padding(n) & (lambda i, j: i != j))(I, J),
    "relative_buckets": lambda n: positions.relative_buckets(n * (J - I)),
    "randomized": lambda n: positions.randomized(jax.random.key(n), 5, 11),
    "none": lambda n: positions.none(jnp.arange(T) + n, 2),
    "Dropout": lambda n: attn.Dropout(0.5, jax.random.key(0)).for_head(n).keep(I, J),
}


@pytest.mark.some(5)
@pytest.mark.parametrize("name", INTEGERS)
def test_functions_of_integers_jit_and_vmap(strict, name):
    call, numbers = INTEGERS[name], jnp.arange(1, 5).reshape(2, 2)
    batch = jax.jit(jax.vmap(jax.vmap(call)))(numbers)
    for b in np.ndindex(2, 2):
        np.testing.assert_array_equal(batch[b], call(numbers[b]))


def test_alibi_slopes_under_jit(strict):
    np.testing.assert_allclose(jax.jit(lambda: positions.alibi_slopes(8))(), 2.0 ** -np.arange(1, 9), rtol=1e-7)


LONG = 150  # from about 100 on XLA fuses a softmax and its derivative otherwise


def jacobian(query, key, value) -> np.ndarray:
    """d out[i, h] / d query[i, :] by hand, in float64: `[T Hv H]`."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    e = np.exp(query @ key.T / np.sqrt(H))
    p = e / e.sum(axis=1, keepdims=True)
    centred = value[None, :, :] - (p @ value)[:, None, :]
    return np.einsum("ij,ijh,jd->ihd", p, centred, key) / np.sqrt(H)


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("implementation", complete_implementations())
def test_compiled_cotangents_may_be_batched_where_the_weights_are_not(implementation):
    query, key, value = cases.normal((LONG, H), (LONG, H), (LONG, HV))
    call = lambda query, value: attn.attention(query, key, value, implementation=implementation)  # noqa: E731
    expected = jacobian(query, key, value)
    found = jax.jit(jax.jacrev(lambda query: call(query, value)[7]))(query)
    np.testing.assert_allclose(found[:, 7], expected[7], rtol=1e-4, atol=1e-6)
    assert not np.any(np.delete(found, 7, axis=1))

    scales = jnp.array([1.0, -2.0, 0.5])
    gradient = jax.grad(lambda query, value: call(query, value).sum())
    found = jax.jit(jax.vmap(gradient, in_axes=(None, 0)))(query, scales[:, None, None] * value)
    expected = np.asarray(scales)[:, None, None] * expected.sum(axis=1)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.nightly
@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("implementation", complete_implementations())
def test_a_compiled_hessian_is_the_same_in_three_modes(implementation):
    """Not in reverse over forward: XLA of jaxlib 0.10 compiles that wrongly for a CPU, without attention too."""
    query, key, value = cases.normal((LONG, H), (LONG, H), (LONG, HV))

    def objective(x):
        score = lambda s, i, j: x[0] * jnp.tanh(s / x[1]) - x[2] * abs(i - j) / LONG  # noqa: E731
        out = attn.attention(query, key, value, mask=masks.causal(), score=score, implementation=implementation)
        return jnp.sum(jnp.sin(out))

    x = jnp.array([1.5, 2.0, 0.5])
    modes = (jax.jacfwd, jax.jacfwd), (jax.jacfwd, jax.jacrev), (jax.jacrev, jax.jacrev)
    first, *others = (jax.jit(outer(inner(objective)))(x) for outer, inner in modes)
    assert np.all(first != 0)
    for other in others:
        np.testing.assert_allclose(other, first, rtol=1e-4, atol=1e-4)
