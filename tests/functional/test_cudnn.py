"""cuDNN's kernel as far as it can be tested without a GPU: what it refuses, and how masks are passed to it."""

import re

import attention_cases as cases
import attention_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attn
from attn import masks, per_head, scores
from attn.functional import checked, cudnn
from attn.functional.contract import Call
from attn.functional.implementations import IMPLEMENTATIONS, choose

T, H = 13, 8
I, J = cases.positions(T, T)


def head(T=T, S=T, width=H, dtype="bfloat16"):
    return cases.normal((T, width), (S, width), (S, width), dtype=dtype)


def call(arrays=None, mask=None, score=None, scale=0.5, dropout=None) -> Call:
    return Call(*(arrays or head()), masks.as_mask(mask), score, scale, dropout)


def mixed(*dtypes):
    return [x.astype(dtype) for x, dtype in zip(head(), dtypes)]


REFUSED = {
    "float32": (call(head(dtype="float32")), "dtypes float32"),
    "queries apart": (call(mixed("float32", "bfloat16", "bfloat16")), "dtypes bfloat16, float32"),
    "values apart": (call(mixed("bfloat16", "bfloat16", "float16")), "dtypes bfloat16, float16"),
    "a width of 12": (call(head(width=12)), "widths 12 "),
    "a width of 136": (call(head(width=136)), "widths 136 "),
    "values of another width": (call([*head()[:2], head(width=16)[2]]), "widths 8, 16 "),
    "a scale that is an array": (call(scale=jnp.float32(0.5)), "a scale that is an array"),
    "a function": (call(mask=lambda i, j: j <= i), "mask <lambda>"),
    "one beside causal": (call(mask=masks.causal() & (lambda i, j: j != 1)), r"mask \(causal\(\) & <lambda>\)"),
    "or": (call(mask=masks.causal() | masks.prefix(3)), r"mask \(causal\(\) \| prefix"),
    "not": (call(mask=~masks.causal()), "mask ~causal"),
    "not, inside": (call(mask=masks.padding(3) & ~masks.causal()), "mask .*~causal"),
    "dense": (call(mask=masks.dense(jnp.asarray(J <= I))), "mask dense"),
    "segments": (call(mask=masks.segments(jnp.arange(T), jnp.arange(T))), "mask segments"),
    "causal, placed": (call(mask=masks.causal(1)), r"mask causal\(offset=1\)"),
    "causal, placed by an array": (call(mask=masks.causal(jnp.int32(0))), "mask causal"),
    "causal over more keys": (call(head(5, 7), mask=masks.causal(2)), "mask causal"),
    "a window with a right side": (call(mask=masks.sliding_window(2, 1)), "mask sliding_window"),
    "a window of an array": (call(mask=masks.sliding_window(jnp.int32(2), 0)), "mask sliding_window"),
    "a window to an array": (call(mask=masks.sliding_window(2, jnp.int32(0))), "mask sliding_window"),
    "a window, placed": (call(mask=masks.sliding_window(2, 0, 1)), "mask sliding_window"),
    "a negative window": (call(mask=masks.sliding_window(-1, 0)), "mask sliding_window"),
    "two lengths": (call(mask=masks.padding(3) & masks.padding(4)), "mask .*padding"),
    "a window and padding": (call(mask=masks.sliding_window(3, 0) & masks.padding(6)), "mask .*padding"),
    "two windows": (call(mask=masks.sliding_window(2, 0) & masks.sliding_window(3, 0)), "mask .*sliding_window"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_kernel_does_not_know_is_refused_in_words(name):
    given, reason = REFUSED[name]
    assert re.match(reason, cudnn.unsupported_reason(given))


# Name: T, S, the mask, what it shows.
SERVED = {
    "nothing masked": (T, T, None, (I >= 0) & (J >= 0)),
    "nothing masked, more keys": (5, T, None, (I[:5] >= 0) & (J >= 0)),
    "causal": (T, T, masks.causal(), J <= I),
    "padding": (T, T, masks.padding(6), (J < 6) & (I >= 0)),
    "padding of more keys": (5, T, masks.padding(6), (J < 6) & (I[:5] >= 0)),
    "traced padding": (T, T, masks.padding(jnp.uint8(9)), (J < 9) & (I >= 0)),
    "padding beyond the keys": (T, T, masks.padding(T + 4), (J >= 0) & (I >= 0)),
    "padding of everything": (T, T, masks.padding(jnp.int32(0)), (J < 0) & (I >= 0)),
    "padding below zero": (T, T, masks.padding(-3), (J < 0) & (I >= 0)),
    "window": (T, T, masks.sliding_window(3, 0), (I - 3 <= J) & (J <= I)),
    "window of nothing but the query's place": (T, T, masks.sliding_window(0, 0), I == J),
    "causal and padding": (T, T, masks.causal() & masks.padding(jnp.int32(6)), (J <= I) & (J < 6)),
}


@pytest.mark.parametrize("name", SERVED)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_what_the_kernel_knows_is_not_refused(name, dtype):
    T, S, mask, _ = SERVED[name]
    for scale in (None, 0.5, 1, np.float64(2)):
        assert cudnn.unsupported_reason(call(head(T, S, dtype=dtype), mask, scale=scale)) is None
    assert cudnn.unsupported_reason(call(head(T, S, width=128, dtype=dtype), mask)) is None


def test_a_traced_length_is_not_refused_and_a_traced_scale_is():
    found = []

    @jax.jit
    def run(length, scale):
        mask = masks.causal() & masks.padding(length)
        found.extend(cudnn.unsupported_reason(call(mask=mask, scale=s)) for s in (0.5, scale))
        return length

    run(3, 0.5)
    assert found[0] is None and "scale" in found[1]


def test_two_traced_lengths_are_refused():
    found = []

    @jax.jit
    def run(length, other):
        found.append(cudnn.unsupported_reason(call(mask=masks.padding(length) & masks.padding(other))))
        return length

    run(3, 4)
    assert "padding" in found[0]


@pytest.fixture
def gpu(monkeypatch):
    """Let the registry choose as on a GPU."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")


# What a call uses, and whether the logsumexp is asked for.
FEATURES = {
    "score": (call(score=scores.softcap(2.0)), False),
    "dropout": (call(dropout=attn.Dropout(0.5, jax.random.key(0))), False),
    "logsumexp": (call(), True),
}


@pytest.mark.parametrize("feature", FEATURES)
def test_features_beside_a_mask_are_lacking_on_a_gpu_too(gpu, feature):
    given, return_logsumexp = FEATURES[feature]
    with pytest.raises(attn.Unsupported, match=f"'cudnn' does not support {feature}; these do: blockwise, reference"):
        choose("cudnn", given, return_logsumexp=return_logsumexp)
    assert choose("fastest", given, return_logsumexp=return_logsumexp) is not IMPLEMENTATIONS["cudnn"]


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_said_to_who_names_the_kernel_and_left_to_others_else(gpu, name):
    given, reason = REFUSED[name]
    with pytest.raises(attn.Unsupported, match=f"'cudnn' does not support {reason}.*; these do: blockwise, reference"):
        choose("cudnn", given)
    assert choose("fastest", given) is IMPLEMENTATIONS["reference"]


def test_the_kernel_is_not_chosen_on_a_device_on_which_it_has_not_been_checked(gpu):
    assert choose("fastest", call()) is not IMPLEMENTATIONS["cudnn"]


def test_the_kernel_is_for_who_needs_no_more_than_reverse_mode(gpu, monkeypatch):
    monkeypatch.setattr(checked, "preferred", lambda device_kind: {"cudnn"})
    for mask in (None, masks.causal() & masks.padding(jnp.int32(5))):
        assert choose("fastest", call(mask=mask)) is choose("cudnn", call(mask=mask)) is IMPLEMENTATIONS["cudnn"]
        assert choose("auto", call(mask=mask)) is IMPLEMENTATIONS["reference"]


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="a GPU")
def test_elsewhere_the_kernel_is_refused_for_the_backend():
    backend = jax.default_backend()
    with pytest.raises(attn.Unsupported, match=rf"'cudnn' .*backend '{backend}'.*these do: blockwise, reference"):
        attn.attention(*head(), implementation="cudnn")
    query, key, value = (x[:, None] for x in head())
    with pytest.raises(attn.Unsupported, match=rf"'cudnn' .*backend '{backend}'.*these do: blockwise, reference"):
        attn.multi_head_attention(query, key, value, mask=masks.causal(), implementation="cudnn")


# How a call is put to jax.nn.dot_product_attention


@pytest.fixture
def translated(monkeypatch):
    """`jax.nn.dot_product_attention` computes by XLA what it is asked to compute by the kernel."""
    theirs = jax.nn.dot_product_attention

    def by_xla(*arrays, implementation, **options):
        assert implementation == "cudnn"
        return theirs(*arrays, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", by_xla)


@jax.jit
def call_and_pull_back(mask, weight, *arrays):
    out, pullback = jax.vjp(lambda *a: cudnn.attend(Call(*a, mask, None, 0.4))[0], *arrays)
    return out, *pullback(weight)


def with_gradients(mask, arrays, weight):
    """Output, and the gradients of its weighted sum, in float32 and NumPy."""
    query, key, _ = arrays
    mask = None if mask is None else mask.resolve(len(query), len(key))
    return [np.asarray(x, np.float32) for x in call_and_pull_back(mask, weight, *arrays)]


@pytest.mark.some(4)
@pytest.mark.parametrize("name", SERVED)
def test_masks_put_to_the_kernel_show_what_they_say(translated, name):
    T, S, mask, visible = SERVED[name]
    arrays, (weight,) = head(T, S), cases.normal((T, H), dtype="bfloat16", seed=1)
    exact = oracle.Head(*arrays, visible, scale=0.4)
    expected = oracle.forward(exact)[0], *oracle.backward(exact, np.asarray(weight).astype(oracle.WIDE), np.zeros(T))
    found = with_gradients(mask, arrays, weight)
    for ours, theirs in zip(found, expected, strict=True):
        theirs = theirs.astype(float)
        # Eight bits: a rounding each of the weights, of the result, and of what the gradient sums up.
        np.testing.assert_allclose(ours, theirs, rtol=2.0**-6, atol=2.0**-7 * np.abs(theirs).max())
    out, dquery, dkey, dvalue = found
    empty, unseen = ~exact.visible.any(axis=1), ~exact.visible.any(axis=0)
    assert not np.any(out[empty]) and not np.any(dquery[empty]), "a query that may attend to nothing gets 0"
    assert not np.any(dkey[unseen]) and not np.any(dvalue[unseen])


@pytest.mark.parametrize("length", [0, 1, 6])
def test_what_lies_behind_the_padding_is_never_read(translated, length):
    (query, key, value), (weight,) = head(), cases.normal((T, H), dtype="bfloat16", seed=1)
    mask = masks.causal() & masks.padding(jnp.int32(length))
    fillers = 0, np.nan, np.inf
    filled = ((query, key.at[length:].set(x), value.at[length:].set(x)) for x in fillers)
    expected, *found = (with_gradients(mask, arrays, weight) for arrays in filled)
    for ours, theirs in zip(found[0] + found[1], expected + expected):
        np.testing.assert_array_equal(ours, theirs)
        assert np.all(np.isfinite(theirs))
    assert np.any(expected[0]) == np.any(expected[3]) == (length > 0)


def test_queries_that_may_attend_to_nothing_may_be_nan(translated):
    (query, key, value), (weight,) = head(), cases.normal((T, H), dtype="bfloat16", seed=1)
    for found in with_gradients(masks.padding(jnp.int32(0)), (query.at[2].set(np.nan), key, value), weight):
        np.testing.assert_array_equal(found, 0)


def test_heads_examples_and_lengths_of_each_go_through_vmap(translated, gpu):
    B, N, K = 3, 4, 2
    query, key, value = cases.normal((B, T, N, H), (B, T, K, H), (B, T, K, H), dtype="bfloat16")
    lengths = jnp.array([[13, 2, 0, 7], [1, 13, 5, 6], [0, 0, 3, 9]])

    def run(implementation):
        def one(query, key, value, lengths):
            mask = masks.causal() & per_head(masks.padding(lengths))
            return attn.multi_head_attention(query, key, value, mask=mask, implementation=implementation)

        return jax.jit(jax.vmap(one))(query, key, value, lengths).astype(np.float32)

    found, expected = run("cudnn"), run("reference")
    np.testing.assert_allclose(found, expected, rtol=2.0**-6, atol=2.0**-7 * np.abs(expected).max())
    assert not np.any(found[0, :, 2]) and np.any(found[0, :, 3])
