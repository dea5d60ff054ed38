"""The bits that a linear probe reads, compared with information that is known."""

import numpy as np
import pytest

from attn.studies.readout import Readings, linear_bits

STRINGS = 4_000


def readings(rng, mean: float, count: int = STRINGS) -> Readings:
    """Return symbols 0 and 1, a number that is -mean or mean plus noise, and two numbers that say nothing."""
    symbols = rng.integers(0, 2, (count, 2))
    vectors = rng.normal(size=(count, 3)) * [1, 1, 50] + [0, 0, 7]
    vectors[:, 0] += mean * (2 * symbols[:, 0] - 1)
    return Readings(vectors, symbols)


@pytest.mark.parametrize("mean", [0.3, 1.0, 2.0])
def test_the_bits_of_a_noisy_symbol_are_its_mutual_information(mean):
    """I(X; S) of S = +-mean plus a normal number, integrated; the true posterior of X is linear in S."""
    s = np.linspace(-12, 12, 20_001)
    up, down = (np.exp(-((s - m) ** 2) / 2) / np.sqrt(2 * np.pi) for m in (mean, -mean))
    both = (up + down) / 2
    information = np.trapezoid((up * np.log2(up / both) + down * np.log2(down / both)) / 2, s)
    rng = np.random.default_rng(0)
    bits = linear_bits(readings(rng, mean), readings(rng, mean), 2)
    np.testing.assert_allclose(bits, [information, 0], atol=0.03)


def test_symbols_that_the_vector_holds_are_read_and_others_are_not():
    rng = np.random.default_rng(1)
    symbols = rng.integers(0, 4, (STRINGS, 3))
    held = np.eye(4)[symbols[:, :2]].reshape(STRINGS, 8)
    vectors = held @ rng.normal(size=(8, 8))
    half = STRINGS // 2
    bits = linear_bits(*(Readings(vectors[part], symbols[part]) for part in (slice(half), slice(half, None))), 4)
    np.testing.assert_allclose(bits, [2, 2, 0], atol=0.05)


def test_many_numbers_that_say_nothing_are_not_read():
    """As wide a state, as many strings and positions as in the walkthrough's claim on the bottleneck."""
    rng = np.random.default_rng(3)
    noise = [Readings(rng.normal(size=(k, 256)), rng.integers(0, 4, (k, 40))) for k in (2_000, 1_000)]
    assert abs(linear_bits(*noise, 4).sum()) < 1


def test_a_probe_that_is_wrong_on_held_out_strings_reads_less_than_nothing():
    rng = np.random.default_rng(2)
    fitted = readings(rng, 1.0)
    bits = linear_bits(fitted, Readings(fitted.vectors, 1 - fitted.symbols), 2)
    assert bits[0] < -1
