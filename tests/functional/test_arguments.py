"""Bad arguments: wrong ranks, lengths of 0, sizes that do not agree, and the messages about them."""

import re

import jax.numpy as jnp
import numpy as np
import pytest
from small_cases import HV, H, S, T, head, heads

import attn

FUNCTIONS = {
    attn.attention: ([(T, H), (S, H), (S, HV)], ["T H", "S H", "S Hv"]),
    attn.attention_weights: ([(T, H), (S, H)], ["T H", "S H"]),
    attn.multi_head_attention: ([(T, 4, H), (S, 2, H), (S, 2, HV)], ["T N H", "S K H", "S K Hv"]),
    attn.multi_head_attention_weights: ([(T, 4, H), (S, 2, H)], ["T N H", "S K H"]),
}
ARGUMENTS = [(function, index) for function, (shapes, _) in FUNCTIONS.items() for index in range(len(shapes))]


@pytest.mark.parametrize("function, argument", ARGUMENTS, ids=lambda x: getattr(x, "__name__", x))
def test_a_wrong_rank_is_explained(untyped, function, argument):
    shapes, axes = FUNCTIONS[function]
    name, expected = ("query", "key", "value")[argument], axes[argument]
    for shape in ((11, *shapes[argument]), shapes[argument][1:], ()):
        arrays = [jnp.zeros(shape if index == argument else usual) for index, usual in enumerate(shapes)]
        with pytest.raises(ValueError, match=re.escape(f"{name} must have shape [{expected}], got {shape}")):
            function(*arrays)


@pytest.mark.parametrize("function, argument", ARGUMENTS, ids=lambda x: getattr(x, "__name__", x))
def test_a_length_of_zero_is_explained(untyped, function, argument):
    shapes, axes = FUNCTIONS[function]
    name, expected = ("query", "key", "value")[argument], axes[argument]
    for axis in range(len(shapes[argument])):
        shape = (*shapes[argument][:axis], 0, *shapes[argument][axis + 1 :])
        arrays = [jnp.zeros(shape if index == argument else usual) for index, usual in enumerate(shapes)]
        with pytest.raises(ValueError) as caught:
            function(*arrays)
        for said in (name, f"[{expected}]", str(shape)):
            assert said in str(caught.value)


@pytest.mark.parametrize("function, argument", ARGUMENTS, ids=lambda x: getattr(x, "__name__", x))
@pytest.mark.parametrize("bad", [None, 1.0, [[1.0]]], ids=str)
def test_what_is_no_array_is_named(untyped, function, argument, bad):
    shapes, axes = FUNCTIONS[function]
    arrays = [bad if index == argument else jnp.zeros(usual) for index, usual in enumerate(shapes)]
    with pytest.raises(TypeError, match=re.escape(f"{('query', 'key', 'value')[argument]} must be an array")) as caught:
        function(*arrays)
    assert axes[argument] in str(caught.value)


@pytest.mark.parametrize("function", [attn.attention, attn.multi_head_attention])
def test_sizes_that_must_agree_are_named(untyped, function):
    shapes, _ = FUNCTIONS[function]
    query, key, value = (jnp.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError, match=r"query and key must agree on the width H") as caught:
        function(query[..., :1], key, value)
    assert str(key.shape) in str(caught.value) and str(query[..., :1].shape) in str(caught.value)
    with pytest.raises(ValueError, match=r"key and value must agree on S") as caught:
        function(query, key, value[1:])
    assert str(key.shape) in str(caught.value) and str(value[1:].shape) in str(caught.value)


def test_key_and_value_must_agree_on_their_heads(untyped):
    query, key, value = heads()
    with pytest.raises(ValueError, match=r"key and value must agree on S and K"):
        attn.multi_head_attention(query, key, value[:, :1])


def test_numpy_arrays_are_welcome(untyped):
    query, key, value = head()
    ours = attn.attention(*map(np.asarray, (query, key, value)))
    np.testing.assert_array_equal(ours, attn.attention(query, key, value))
