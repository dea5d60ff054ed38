"""The tests that every implementation passes for what it declares, and the refusals of the rest.

Tests take the fixture `implementation`; those that need more than reverse mode are marked
`derivatives("forward", ...)`. To run them over an implementation of your own, register it, let the fixture return its
name, and import the tests; see tests/extending/test_implementation.py.
"""

import attention_cases as cases
import attention_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attn
from attn.functional.implementations import FEATURES, IMPLEMENTATIONS

BOUND = 4  # in units of eps (1 + max|s|) max(oracle on absolute values)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Skip a test where a partial implementation lacks a derivative, or where one refuses the call.

    Complete implementations serve every call of the tests marked `served`.
    """
    name = getattr(item, "funcargs", {}).get("implementation")
    has_to_serve = cases.is_complete(name) and item.get_closest_marker("served") if name in IMPLEMENTATIONS else True
    if has_to_serve or name in ("reference", "blockwise"):
        return (yield)
    needed = {each for mark in item.iter_markers("derivatives") for each in mark.args}
    if missing := needed - IMPLEMENTATIONS[name].derivatives:
        pytest.skip(f"{name} has no derivatives of the kinds {sorted(missing)}")
    try:
        return (yield)
    except attn.Unsupported as error:
        pytest.skip(str(error))


def draw_head(case: cases.Case, seed: int, magnitude: float):
    """Arrays in the case's dtype, the values of mask and score, a scale, cotangents."""
    rng = np.random.default_rng(seed)
    T, S, H, Hv = case.shape
    wide = "float64" if case.dtype == "float64" else "float32"
    arrays = [rng.normal(size=size) * magnitude for size in ((T, H), (S, H))] + [rng.normal(size=(S, Hv))]
    arrays = [jnp.asarray(x, case.dtype) for x in arrays]
    mask_values, score_values = ([cases.rounded(x, wide) for x in twin.draw(rng, T, S)] for twin in twins(case))
    scale = cases.rounded(rng.uniform(0.2, 1.5), wide)
    cotangents = jnp.asarray(rng.normal(size=(T, Hv)), case.dtype), jnp.asarray(rng.normal(size=T), wide)
    return arrays, mask_values, score_values, scale, cotangents


def twins(case):
    return cases.MASKS[case.mask], cases.SCORES[case.score]


def oracle_head(case, arrays, mask_values, score_values, scale) -> oracle.Head:
    mask, score = twins(case)
    visible = mask.numpy(mask_values, *cases.positions(*case.shape[:2]))
    score_values = [np.asarray(x, oracle.WIDE) if np.asarray(x).dtype.kind == "f" else x for x in score_values]
    return oracle.Head(*arrays, visible, lambda s, i, j: score.numpy(score_values, s, i, j), scale)


def errors(case, head, got, gradients, cotangents) -> dict[str, float]:
    """C for each result; logsumexp in its own, wider dtype and, being the logarithm of a sum, against 1 at least."""
    g, gl = (np.asarray(x).astype(oracle.WIDE) for x in cotangents)
    expected, magnitude = oracle.forward(head), oracle.forward(head, absolute=True)
    found = {"out": oracle.error(got[0], expected[0], magnitude[0].max(), head, case.dtype)}
    if len(got) > 1:
        found["logsumexp"] = oracle.error(got[1], expected[1], max(1, magnitude[1].max()), head, got[1].dtype)
    exact, sizes = oracle.backward(head, g, gl), oracle.backward(head, g, gl, absolute=True)
    for name, ours, theirs, size in zip(("dquery", "dkey", "dvalue"), gradients, exact, sizes):
        found[name] = oracle.error(ours, theirs, size.max(), head, case.dtype)
    return found


def check_value_and_gradient(implementation: str, case: cases.Case, seed: int, magnitude: float = 1.0):
    """Compare value and gradient with the oracle's, for arrays drawn from a seed."""
    with jax.enable_x64(case.dtype == "float64"):
        arrays, mask_values, score_values, scale, cotangents = draw_head(case, seed, magnitude)
        call = cases.value_and_gradient(implementation, case.mask, case.score)
        has_logsumexp = "logsumexp" in IMPLEMENTATIONS[implementation].features
        wanted = cotangents if has_logsumexp else cotangents[0]
        got, gradients = call(*arrays, mask_values, score_values, scale, wanted)
    if not has_logsumexp:
        got, cotangents = (got,), (cotangents[0], np.zeros(case.shape[0]))
    assert got[0].dtype == case.dtype and all(g.dtype == case.dtype for g in gradients)
    head = oracle_head(case, arrays, mask_values, score_values, scale)
    found = errors(case, head, got, gradients, cotangents)
    assert max(found.values()) <= BOUND, found


OPTIONS = {
    "mask": {"mask": attn.masks.padding(2)},
    "score": {"score": attn.scores.softcap(2.0)},
    "dropout": {"dropout": attn.Dropout(0.5, jax.random.key(0))},
    "logsumexp": {"return_logsumexp": True},
}


@pytest.mark.parametrize("feature", FEATURES)
def test_what_is_not_declared_is_refused_and_what_is_declared_is_served(implementation, feature):
    for call, shapes in ((attn.attention, [(3, 8)] * 3), (attn.multi_head_attention, [(3, 4, 8)] * 3)):
        arrays = cases.normal(*shapes, dtype="float16")  # which every implementation serves
        run = lambda call=call, arrays=arrays: call(*arrays, **OPTIONS[feature], implementation=implementation)  # noqa: E731
        if feature in IMPLEMENTATIONS[implementation].features:
            assert np.all(np.isfinite(jax.tree.leaves(run())[0]))
        else:
            with pytest.raises(attn.Unsupported, match=f"'{implementation}' does not support {feature}"):
                run()


@pytest.mark.parametrize("N, K", [(1, 1), (6, 3), (4, 1)])
def test_many_heads_equal_one_at_a_time(implementation, N, K):
    query, key, value, g = cases.normal((5, N, 8), (7, K, 8), (7, K, 8), (5, N, 8), dtype="float16")
    lengths = jnp.arange(N) % 7 + 1
    mask = attn.per_head(attn.masks.padding(lengths))
    all_heads = lambda *a: attn.multi_head_attention(*a, mask=mask, implementation=implementation)  # noqa: E731
    out, pullback = jax.vjp(all_heads, query, key, value)
    dquery, dkey, dvalue = (np.asarray(x, float) for x in pullback(g))
    sums = np.zeros(dkey.shape), np.zeros(dvalue.shape)
    for n in range(N):
        group = n // (N // K)
        head = oracle.Head(query[:, n], key[:, group], value[:, group], np.arange(7) < int(lengths[n]))
        expected = oracle.backward(head, np.asarray(g[:, n], oracle.WIDE), np.zeros(5))
        close = {"rtol": 2.0**-8, "atol": 2.0**-8}
        np.testing.assert_allclose(np.asarray(out[:, n], float), oracle.forward(head)[0].astype(float), **close)
        np.testing.assert_allclose(dquery[:, n], expected[0].astype(float), **close)
        for total, one in zip(sums, expected[1:]):
            total[:, group] += one.astype(float)
    np.testing.assert_allclose(dkey, sums[0], rtol=2.0**-7, atol=2.0**-7)
    np.testing.assert_allclose(dvalue, sums[1], rtol=2.0**-7, atol=2.0**-7)


@pytest.mark.parametrize("kind, derivative", [("reverse", jax.grad), ("forward", jax.jacfwd), ("second", jax.hessian)])
def test_declared_derivatives_are_right_and_others_are_right_or_refused(implementation, kind, derivative):
    query, key, value = cases.normal((3, 8), (5, 8), (5, 8), dtype="float16")

    def of(name):
        return derivative(lambda query: jnp.sum(attn.attention(query, key, value, implementation=name) ** 2))(query)

    try:
        found = of(implementation)
    except (TypeError, NotImplementedError, ValueError) as error:  # as JAX raises them where a rule does not exist
        assert kind not in IMPLEMENTATIONS[implementation].derivatives, error
        return
    np.testing.assert_allclose(np.asarray(found, float), np.asarray(of("reference"), float), rtol=2.0**-7, atol=2.0**-7)
