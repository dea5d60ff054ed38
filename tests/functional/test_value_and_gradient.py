"""Value and gradient of every implementation against the NumPy oracle, on values that hypothesis draws."""

import os

import attention_cases as cases
import attention_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import attn

BOUND = 4  # in units of eps (1 + max|s|) max(oracle on absolute values)
drawn = settings(
    deadline=None,
    max_examples=settings.default.max_examples // 10,  # for each of twelve signatures in each of four dtypes
    derandomize="CI" in os.environ,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
seeds = st.integers(0, 2**32 - 1)
magnitudes = st.integers(-10, 4).map(lambda exponent: 2.0**exponent)
GRID = [(name, case) for case in cases.cases() for name in cases.able_implementations(*case.features)]
TYPICAL = [each for each in GRID if each[1] in cases.typical()]
BY_DAY = [each for k, each in enumerate(TYPICAL) if k % 6 == 0 or k % 12 == 3]  # of either implementation some
CASES = [pytest.param(*each, marks=() if each in BY_DAY else pytest.mark.nightly) for each in GRID]


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
    wide = got[1].dtype
    found = {
        "out": oracle.error(got[0], expected[0], magnitude[0].max(), head, case.dtype),
        "logsumexp": oracle.error(got[1], expected[1], max(1, magnitude[1].max()), head, wide),
    }
    exact, sizes = oracle.backward(head, g, gl), oracle.backward(head, g, gl, absolute=True)
    for name, ours, theirs, size in zip(("dquery", "dkey", "dvalue"), gradients, exact, sizes):
        found[name] = oracle.error(ours, theirs, size.max(), head, case.dtype)
    return found


@pytest.mark.parametrize("implementation, case", CASES, ids=lambda x: str(x))
@drawn
@given(seed=seeds, magnitude=magnitudes)
def test_value_and_gradient_agree_with_the_oracle(implementation, case, seed, magnitude):
    with jax.enable_x64(case.dtype == "float64"):
        arrays, mask_values, score_values, scale, cotangents = draw_head(case, seed, magnitude)
        call = cases.value_and_gradient(implementation, case.mask, case.score)
        got, gradients = call(*arrays, mask_values, score_values, scale, cotangents)
    assert got[0].dtype == case.dtype and all(g.dtype == case.dtype for g in gradients)
    head = oracle_head(case, arrays, mask_values, score_values, scale)
    found = errors(case, head, got, gradients, cotangents)
    assert max(found.values()) <= BOUND, found


@pytest.mark.some(1)
@pytest.mark.parametrize("implementation", cases.able_implementations("dropout", "logsumexp"))
@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_value_and_gradient_with_dropout_agree_with_the_oracle(implementation, dtype):
    case = cases.Case((5, 7, 3, 2), "none", "none", dtype)
    with jax.enable_x64(dtype == "float64"):
        arrays, *_, scale, cotangents = draw_head(case, 0, 1.0)
        dropout = attn.Dropout(0.25, jax.random.key(3))
        keep = np.asarray(dropout.keep(*map(jnp.asarray, cases.positions(5, 7)))) / 0.75
        assert 0 < np.count_nonzero(keep) < keep.size

        def call(*arrays):
            options = {"dropout": dropout, "implementation": implementation, "scale": scale}
            return attn.attention(*arrays, return_logsumexp=True, **options)

        got, pullback = jax.vjp(jax.jit(call), *arrays)
        gradients = pullback(cotangents)
    head = oracle.Head(*arrays, scale=scale, keep=keep)
    found = errors(case, head, got, gradients, cotangents)
    assert max(found.values()) <= BOUND, found
