"""The oracle itself: its gradient against finite differences, its value against softmax written out."""

import attention_oracle as oracle
import numpy as np
import pytest


def softcap_and_bias(s, i, j):
    tanh = np.tanh(s / 2)
    return 2 * tanh + 0.3 * np.cos(i * 5 + j), 1 - tanh**2, 1 + tanh**2


def heads():
    rng = np.random.default_rng(0)
    q, k, v = rng.normal(size=(3, 2)), rng.normal(size=(5, 2)), rng.normal(size=(5, 7))
    visible = rng.random((3, 5)) < 0.7
    visible[1] = False
    keep = np.where(rng.random((3, 5)) < 0.5, 0, 2.0)
    return {
        "plain": oracle.Head(q, k, v),
        "everything": oracle.Head(q, k, v, visible, softcap_and_bias, 1.3, keep),
    }


@pytest.mark.parametrize("name", ["plain", "everything"])
def test_the_oracles_gradient_agrees_with_finite_differences(name):
    head, rng = heads()[name], np.random.default_rng(1)
    g, gl = rng.normal(size=(3, 7)), rng.normal(size=3)

    def objective():
        out, logsumexp = oracle.forward(head)
        return np.sum(out * g) + np.sum(np.where(np.isfinite(logsumexp), logsumexp, 0) * gl)

    for array, gradient in zip((head.query, head.key, head.value), oracle.backward(head, g, gl)):
        for place in np.ndindex(array.shape):
            before, step = array[place], 1e-6
            array[place] = before + step
            above = objective()
            array[place] = before - step
            below = objective()
            array[place] = before
            assert gradient[place] == pytest.approx((above - below) / (2 * step), abs=1e-8, rel=1e-7)


def test_the_oracle_is_softmax_written_out():
    head = heads()["plain"]
    e = np.exp(head.query @ head.key.T / np.sqrt(2))
    out, logsumexp = oracle.forward(head)
    np.testing.assert_allclose(out, e @ head.value / e.sum(1, keepdims=True), rtol=1e-14)
    np.testing.assert_allclose(logsumexp, np.log(e.sum(1)), rtol=1e-14)


def test_the_error_measure_sees_one_unit_in_the_last_place():
    head = heads()["plain"]
    out = oracle.forward(head)[0]
    off = out.copy()
    off[0, 0] += 8 * 2.0**-24 * (1 + oracle.largest_score(head)) * np.abs(out).max()
    assert oracle.error(out, out, np.abs(out).max(), head, "float32") == 0
    assert oracle.error(off, out, np.abs(out).max(), head, "float32") == pytest.approx(8)
