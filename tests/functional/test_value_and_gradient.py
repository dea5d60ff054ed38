"""Value and gradient of every implementation against the NumPy oracle, on values that hypothesis draws."""

import os

import attention_cases as cases
import attention_oracle as oracle
import implementation_suite as suite
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import attn

drawn = settings(
    deadline=None,
    max_examples=settings.default.max_examples // 10,  # for each of twelve signatures in each of four dtypes
    derandomize="CI" in os.environ,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
seeds = st.integers(0, 2**32 - 1)
magnitudes = st.integers(-10, 4).map(lambda exponent: 2.0**exponent)
GRID = [(name, case) for case in cases.cases() for name in cases.implementations()]
TYPICAL = [each for each in GRID if each[1] in cases.typical()]
NAMES = cases.implementations()
# A quarter of the cases, another one for each implementation.
BY_DAY = [each for k, each in enumerate(TYPICAL) if (k // len(NAMES) + k % len(NAMES)) % 4 == 0]
CASES = [pytest.param(*each, marks=() if each in BY_DAY else pytest.mark.nightly) for each in GRID]


@pytest.mark.served
@pytest.mark.parametrize("implementation, case", CASES, ids=lambda x: str(x))
@drawn
@given(seed=seeds, magnitude=magnitudes)
def test_value_and_gradient_agree_with_the_oracle(implementation, case, seed, magnitude):
    suite.check_value_and_gradient(implementation, case, seed, magnitude)


@pytest.mark.served
@pytest.mark.some(1)
@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_value_and_gradient_with_dropout_agree_with_the_oracle(implementation, dtype):
    case = cases.Case((5, 7, 3, 2), "none", "none", dtype)
    with jax.enable_x64(dtype == "float64"):
        arrays, *_, scale, cotangents = suite.draw_head(case, 0, 1.0)
        dropout = attn.Dropout(0.25, jax.random.key(3))
        keep = np.asarray(dropout.keep(*map(jnp.asarray, cases.positions(5, 7)))) / 0.75
        assert 0 < np.count_nonzero(keep) < keep.size

        def call(*arrays):
            options = {"dropout": dropout, "implementation": implementation, "scale": scale}
            return attn.attention(*arrays, return_logsumexp=True, **options)

        got, pullback = jax.vjp(jax.jit(call), *arrays)
        gradients = pullback(cotangents)
    head = oracle.Head(*arrays, scale=scale, keep=keep)
    found = suite.errors(case, head, got, gradients, cotangents)
    assert max(found.values()) <= suite.BOUND, found


@pytest.mark.served
@pytest.mark.some(3)
@pytest.mark.parametrize("score", [name for name in cases.SCORES if name != "none"])
def test_gradients_to_what_a_score_captures_are_differences_of_the_oracle(implementation, score):
    case = cases.Case((5, 7, 3, 2), "prefix", score, "float64")
    with jax.enable_x64(True):
        arrays, mask_values, score_values, scale, (g, gl) = suite.draw_head(case, 0, 1.0)
        floats = [n for n, x in enumerate(score_values) if np.asarray(x).dtype.kind == "f"]

        def total(moving):
            values = [moving[floats.index(n)] if n in floats else x for n, x in enumerate(score_values)]
            mask, function = cases.MASKS[case.mask].ours(mask_values), cases.SCORES[score].ours(values)
            options = {"mask": mask, "score": function, "scale": scale, "return_logsumexp": True}
            out, logsumexp = attn.attention(*arrays, **options, implementation=implementation)
            return jnp.vdot(out, g) + jnp.vdot(jnp.where(logsumexp == -jnp.inf, 0, logsumexp), gl)

        gradients = jax.jit(jax.grad(total))([jnp.asarray(score_values[n]) for n in floats])

    def exact_total(*values):
        out, logsumexp = oracle.forward(suite.oracle_head(case, arrays, mask_values, values, scale))
        return (out * np.asarray(g)).sum() + (np.where(logsumexp == -np.inf, 0, logsumexp) * np.asarray(gl)).sum()

    for n, found in zip(floats, gradients, strict=True):
        expected = oracle.finite_differences(exact_total, score_values, n)
        assert np.any(expected)
        np.testing.assert_allclose(found, expected, rtol=1e-7, atol=1e-8)
