"""The arguments of `attn.interop.dot_product_attention`: signature, names of implementations, refused values."""

import inspect

import jax
import numpy as np
import pytest
from interop_cases import normal, quick_jit
from jax_nn_cases import CASES, CLOSE, B, H, K, N, S, T, bools, compare, inputs, ours, theirs

import attn
from attn.functional.implementations import IMPLEMENTATIONS
from attn.interop import dot_product_attention


def test_signature_is_jax_s():
    def parameters(function):
        return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]

    assert parameters(dot_product_attention) == parameters(jax.nn.dot_product_attention)


class TestImplementation:
    @pytest.mark.parametrize("name", [None, "xla", "auto", "fastest"])
    def test_names(self, name):
        arrays = inputs()[:3]
        np.testing.assert_allclose(ours(*arrays, implementation=name), theirs(*arrays), **CLOSE)

    @pytest.mark.parametrize("name", [name for name, one in IMPLEMENTATIONS.items() if one.backends is None])
    def test_everything_by_each_of_ours(self, name):
        compare(CASES["everything"], implementation=name)

    def test_an_unknown_name(self):
        with pytest.raises(ValueError, match="unknown implementation 'abacus'; known: 'auto'"):
            dot_product_attention(*inputs()[:3], implementation="abacus")

    def test_one_that_is_not_here(self):
        with pytest.raises((ValueError, attn.Unsupported), match="cudnn"):
            dot_product_attention(*inputs()[:3], implementation="cudnn")


BAD = {
    "query": [
        (normal(T, H), ValueError, r"query must have shape \[B T N H\] or \[T N H\], got \(5, 11\)"),
        (None, TypeError, "query must be an array, got NoneType"),
        (normal(3, T, N, H), ValueError, "batch size B, got 3, 2, 2"),
        (normal(B, T, N, H + 1), ValueError, "query and key must agree on the width H"),
        (normal(B, T, 5, H), ValueError, "N = 5 query heads must be a multiple of the K = 3"),
        (np.ones((B, T, N, H), int), TypeError, "must have the query's dtype"),
    ],
    "key": [
        (normal(B, S, K, H).astype("float16"), TypeError, "key must have the query's dtype float32, got float16"),
        (normal(B, S + 1, K, H), ValueError, "key and value must agree on S and K"),
    ],
    "value": [
        (normal(B, S, K, H).astype("float16"), TypeError, "value must have the query's dtype float32, got float16"),
        (normal(B, S, N, H), ValueError, "key and value must agree on S and K"),
    ],
    "bias": [
        (
            normal(3, 1, T, S),
            ValueError,
            r"bias must broadcast to \[B N T S\] = \(2, 6, 5, 7\), got shape \(3,",
        ),
        (normal(1, B, N, T, S), ValueError, r"bias must broadcast to .* got shape \(1, 2, 6, 5, 7\)"),
        (bools(T, S), TypeError, "bias must be real numbers to add to the scores, got bool: bools belong in mask"),
        (np.ones((T, S), complex), TypeError, "bias must be real numbers"),
        ("ALiBi", TypeError, "bias must be an array, got str"),
    ],
    "mask": [
        (
            bools(B, K, T, S),
            ValueError,
            r"mask must broadcast to \[B N T S\] = \(2, 6, 5, 7\), got shape \(2, 3,",
        ),
        (normal(T, S), TypeError, "mask must be bool .* got float32: additive values belong in bias"),
        (attn.masks.causal(), TypeError, "mask must be an array, got causal"),
    ],
    "scale": [
        (np.ones(N, np.float32), TypeError, r"scale must be a scalar, got shape \(6,\)"),
        ("1/8", TypeError, "scale must be a real number, got 1/8"),
    ],
    "is_causal": [("yes", TypeError, "is_causal must be True or False, got yes")],
    "query_seq_lengths": [
        (np.array([3, 2, 1]), ValueError, r"query_seq_lengths must have shape \[B\] = \(2,\), got \(3,\)"),
        (np.array([3.0, 2.0]), TypeError, "query_seq_lengths must be integers, got float32"),
    ],
    "key_value_seq_lengths": [
        (3, ValueError, r"key_value_seq_lengths must have shape \[B\] = \(2,\), got \(\)"),
        (np.array([True, False]), TypeError, "key_value_seq_lengths must be integers, got bool"),
    ],
    "local_window_size": [
        ((1, 2, 3), ValueError, r"local_window_size must be one integer or \(left, right\), got \(1, 2, 3\)"),
        (np.array([1, 2]), ValueError, "local_window_size must be one integer or"),
        (1.5, TypeError, "local_window_size must be an integer"),
        (True, TypeError, "local_window_size must be an integer"),
    ],
    "return_residual": [(None, TypeError, "return_residual must be True or False, got None")],
}


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize("name, value, kind, message", [(n, *case) for n, cases in BAD.items() for case in cases])
def test_bad_calls(name, value, kind, message):
    arguments = dict(zip(("query", "key", "value"), inputs())) | {name: value}
    with pytest.raises(kind, match=message):
        dot_product_attention(**arguments)


@pytest.mark.usefixtures("untyped")
def test_lists_will_do_as_they_do_in_jax():
    lists = [x.tolist() for x in inputs()[:3]]
    arguments = {"key_value_seq_lengths": [7, 4], "local_window_size": [1, 2]}

    def call(function):
        return quick_jit(lambda: function(*lists, **arguments))()

    np.testing.assert_allclose(call(dot_product_attention), call(jax.nn.dot_product_attention), **CLOSE)
