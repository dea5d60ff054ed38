"""`attn.interop.dot_product_attention` against `jax.nn.dot_product_attention`."""

import functools
import inspect
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attn
from attn import masks, scores
from attn.functional import mods
from attn.functional.implementations import IMPLEMENTATIONS
from attn.interop import arrays, dot_product_attention

B, T, S, N, K, H = 2, 5, 7, 6, 3, 11
ROUNDINGS = 32 * np.finfo(np.float32).eps  # sums of 11 products and 7 weights, in another order
CLOSE = {"rtol": ROUNDINGS, "atol": ROUNDINGS}


# Compiling takes most of the time here, and half of that goes into making fast code.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def ours(query, key, value, **arguments):
    return jax.device_get(quick_jit(functools.partial(dot_product_attention, **arguments))(query, key, value))


def theirs(query, key, value, **arguments):
    return jax.device_get(quick_jit(functools.partial(jax.nn.dot_product_attention, **arguments))(query, key, value))


def normal(*shape, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def bools(*shape, seed=1) -> np.ndarray:
    return np.random.default_rng(seed).random(shape) < 0.6


def inputs(T=T, S=S, N=N, K=K, dtype="float32") -> list:
    """Query, key and value, and a cotangent for the output."""
    shapes = [(B, T, N, H), (B, S, K, H), (B, S, K, H), (B, T, N, H)]
    return [normal(*shape, seed=seed).astype(dtype) for seed, shape in enumerate(shapes)]


def visible(T, S, N, mask=None, is_causal=False, query_seq_lengths=None, key_value_seq_lengths=None, **rest):
    """Which pairs the arguments leave, `[B N T S]`, by NumPy."""
    seen = np.ones((B, N, T, S), bool) if mask is None else np.broadcast_to(mask, (B, N, T, S))
    i, j = np.arange(T)[:, None], np.arange(S)[None, :]
    if is_causal:
        seen = seen & (j <= i)
    if (window := rest.get("local_window_size")) is not None:
        left, right = window if isinstance(window, tuple) else (window, window)
        seen = seen & (i - left <= j) & (j <= i + right)
    if query_seq_lengths is not None:
        seen = seen & (i < np.reshape(query_seq_lengths, (B, 1, 1, 1)))
    if key_value_seq_lengths is not None:
        seen = seen & (j < np.reshape(key_value_seq_lengths, (B, 1, 1, 1)))
    return seen


def run(function, arrays, arguments, rows):
    """The output, the residual, and the gradients of query, key, value and bias, for cotangents on `rows` alone."""
    *arrays, cotangent = arrays
    cotangent = np.where(rows[..., None], cotangent, 0)
    differentiated = jnp.issubdtype(jnp.result_type(arguments.get("bias", 0)), jnp.floating)
    biases = [arguments["bias"]] if differentiated else []

    def attend(query, key, value, *bias):
        given = arguments | dict(zip(["bias"], bias))
        return function(query, key, value, return_residual=True, **given)

    def call(arrays, cotangent):
        (out, residual), pullback = jax.vjp(attend, *arrays)
        return out, residual, pullback((cotangent, jnp.zeros_like(residual)))

    return jax.device_get(quick_jit(call)([*arrays, *biases], cotangent))


def compare(arguments, T=T, S=S, N=N, K=K, implementation=None):
    """Ours and JAX's agree on output, residual and gradients, of rows that see a key."""
    rows = visible(T, S, N, **arguments).any(-1).swapaxes(1, 2)
    assert rows.any()
    arrays = inputs(T, S, N, K)
    expected = run(jax.nn.dot_product_attention, arrays, arguments, rows)
    given = arguments | {"implementation": implementation}
    assert_close(run(dot_product_attention, arrays, given, rows), expected, rows)


def assert_close(results, expected, rows):
    for a, b in zip(results[:2], expected[:2], strict=True):
        np.testing.assert_allclose(a[rows], b[rows], **CLOSE)
    for a, b in zip(results[2], expected[2], strict=True):
        np.testing.assert_allclose(a, b, **CLOSE)


CASES = {
    "plain": {},
    "bias": {"bias": normal(B, N, T, S)},
    "integer bias": {"bias": np.arange(T * S).reshape(T, S) % 3},
    "mask": {"mask": bools(B, N, T, S)},
    "fewer axes": {"bias": normal(N, T, S), "mask": bools(S)},
    "fewer still": {"bias": np.float32(0.7), "mask": bools(T, S)},
    "scale": {"scale": 0.37},
    "causal": {"is_causal": True},
    "window": {"local_window_size": 2},
    "lopsided window": {"local_window_size": (1, 3)},
    "window to the right alone": {"local_window_size": (-1, 3)},
    "query lengths": {"query_seq_lengths": np.array([3, 5], np.int32)},
    "key lengths": {"key_value_seq_lengths": np.array([7, 4], np.int32)},
    "everything": {
        "bias": normal(1, N, T, S),
        "mask": bools(B, 1, T, S),
        "scale": 0.37,
        "is_causal": True,
        "query_seq_lengths": np.array([5, 4], np.int32),
        "key_value_seq_lengths": np.array([6, 3], np.int32),
        "local_window_size": (3, 1),
    },
}


@pytest.mark.some(5)
@pytest.mark.parametrize("case", CASES)
def test_agrees(case):
    compare(CASES[case])


@functools.cache
def jax_with_full_mask_and_bias():
    """JAX's output, residual and gradients for a mask and a bias of all four axes."""

    @quick_jit
    def call(arrays, cotangent, mask):
        def attend(query, key, value, bias):
            return jax.nn.dot_product_attention(query, key, value, bias, mask, return_residual=True)

        (out, residual), pullback = jax.vjp(attend, *arrays)
        return out, residual, pullback((cotangent, jnp.zeros_like(residual)))

    return call


@pytest.mark.some(3)
@pytest.mark.parametrize("axes", [axes for axes in itertools.product((0, 1), repeat=4) if sum(axes) % 2 == 0], ids=str)
def test_broadcasts_of_mask_and_bias(axes):
    """An axis that the mask has, the bias lacks; JAX gets both spread out. Every three axes meet in every way."""
    full = (B, N, T, S)
    mask = bools(*np.where(axes, full, 1), seed=2) | (sum(axes) == 0)
    bias = normal(*np.where(axes, 1, full), seed=3)
    rows = visible(T, S, N, mask).any(-1).swapaxes(1, 2)
    *arrays, cotangent = inputs()
    cotangent = np.where(rows[..., None], cotangent, 0)
    spread = [*arrays, np.broadcast_to(bias, full)]
    expected = jax_with_full_mask_and_bias()(spread, cotangent, np.broadcast_to(mask, full))
    out, residual, gradients = jax.device_get(expected)
    summed = gradients[3].sum(tuple(np.flatnonzero(axes)), keepdims=True)
    results = run(dot_product_attention, [*arrays, cotangent], {"mask": mask, "bias": bias}, rows)
    assert_close(results, (out, residual, [*gradients[:3], summed]), rows)


@pytest.mark.parametrize("T, S", [(7, 5), (1, 7), (5, 1)])
def test_positions_count_from_the_first_key_whatever_the_lengths(T, S):
    compare({"is_causal": True, "local_window_size": (4, 0), "key_value_seq_lengths": np.array([S, 1])}, T=T, S=S)


@pytest.mark.parametrize("N, K", [(1, 1), (3, 3), (5, 1)])
def test_heads(N, K):
    compare({"bias": normal(B, N, 1, S), "mask": bools(B, N, T, 1)}, N=N, K=K)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_rounds_only_its_results(dtype):
    """JAX's results in float32 on the same values, rounded once; gradients once for each of the heads of a group."""
    arguments = CASES["everything"]
    rows = visible(T, S, N, **arguments).any(-1).swapaxes(1, 2)
    arrays = inputs(dtype=dtype)
    out, residual, gradients = run(dot_product_attention, arrays, arguments, rows)
    wide = run(jax.nn.dot_product_attention, [x.astype("float32") for x in arrays], arguments, rows)
    like_jax = jax.eval_shape(functools.partial(jax.nn.dot_product_attention, return_residual=True), *arrays[:3])
    assert (out.dtype, residual.dtype) == tuple(x.dtype for x in like_jax)
    half = float(jnp.finfo(dtype).eps) / 2

    def close(x, exact, roundings):
        x, exact = np.asarray(x, "float64"), np.asarray(exact, "float64")
        np.testing.assert_allclose(x, exact, rtol=half, atol=(roundings - 1) * half * np.abs(exact).max() + 1e-5)

    close(out[rows], wide[0][rows], 1)
    close(residual[rows], wide[1][rows], 1)
    for x, exact in zip(gradients, wide[2], strict=True):
        close(x, exact, 1 + N // K)


def test_float64_is_computed_in_float64():
    with jax.enable_x64(True):
        query, key, value, _ = inputs(N=K, dtype="float64")
        out = ours(query, key, value)
        s = np.einsum("btnh,bsnh->bnts", query, key) / np.sqrt(H)
        p = np.exp(s) / np.exp(s).sum(-1, keepdims=True)
        np.testing.assert_allclose(out, np.einsum("bnts,bsnh->btnh", p, value), rtol=1e-13, atol=1e-13)


def test_signature_is_jax_s():
    def parameters(function):
        return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]

    assert parameters(dot_product_attention) == parameters(jax.nn.dot_product_attention)


def test_without_a_batch_axis():
    query, key, value, _ = inputs()
    arguments = {"bias": normal(N, T, S), "mask": bools(T, S), "key_value_seq_lengths": np.array([5])}
    single = ours(query[0], key[0], value[0], return_residual=True, **arguments)
    batched = ours(query[:1], key[:1], value[:1], return_residual=True, **arguments)
    assert [x.shape for x in single] == [(T, N, H), (T, N)]
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b[0]), single, batched)


def test_without_the_residual():
    arrays = inputs()[:3]
    out, _ = ours(*arrays, is_causal=True, return_residual=True)
    np.testing.assert_array_equal(ours(*arrays, is_causal=True), out)


@pytest.mark.parametrize("function", [dot_product_attention, jax.nn.dot_product_attention])
def test_no_gradient_through_the_residual(function):
    query, key, value, _ = inputs()
    gradient = jax.grad(lambda key: function(query, key, value, return_residual=True)[1].sum())
    assert not np.any(quick_jit(gradient)(key))


def test_values_of_another_width():
    query, key, value, _ = inputs()
    np.testing.assert_allclose(ours(query, key, value[..., :3]), theirs(query, key, value)[..., :3], **CLOSE)


def test_a_traced_scale_is_differentiated():
    *arrays, cotangent = inputs()

    def gradient(function):
        return quick_jit(jax.grad(lambda scale: jnp.vdot(function(*arrays, scale=scale), cotangent)))(0.37)

    np.testing.assert_allclose(gradient(dot_product_attention), gradient(jax.nn.dot_product_attention), **CLOSE)


def test_under_vmap():
    """One more axis on every array, against a loop."""
    query, key, value, _ = (np.stack([x, 2 * x, -x]) for x in inputs())
    arrays = [query, key, value, normal(3, 1, N, 1, S), bools(3, B, 1, T, S), np.array([[3, 5], [7, 1], [2, 2]])]

    def call(query, key, value, bias, mask, lengths):
        return dot_product_attention(query, key, value, bias, mask, key_value_seq_lengths=lengths, is_causal=True)

    together, one = quick_jit(jax.vmap(call))(*arrays), quick_jit(call)
    for index in range(3):
        np.testing.assert_allclose(together[index], one(*(x[index] for x in arrays)), **CLOSE)


class TestNothingToAttendTo:
    """Where JAX returns the mean of the values."""

    def test_rows_are_zero(self):
        mask = np.ones((T, S), bool)
        mask[2] = False
        rows = np.ones((B, T, N), bool)
        with jax.debug_nans(True):
            out, residual, gradients = run(dot_product_attention, inputs(), {"mask": mask}, rows)
        assert not np.any(out[:, 2]) and np.all(residual[:, 2] == -np.inf)
        assert np.all(gradients[0][:, 2] == 0) and np.any(gradients[0][:, 1])
        others = np.arange(T) != 2
        np.testing.assert_allclose(out[:, others], theirs(*inputs()[:3], mask=mask)[:, others], **CLOSE)

    def test_a_length_of_zero(self):
        out = ours(*inputs()[:3], key_value_seq_lengths=np.array([0, S]))
        assert not np.any(out[0]) and np.all(np.any(out[1], axis=-1))

    @pytest.mark.parametrize("function", [ours, theirs])
    def test_queries_past_their_length_are_zero_there_and_here(self, function):
        out = function(*inputs()[:3], query_seq_lengths=np.array([3, T], np.int32))
        assert not np.any(out[0, 3:]) and np.all(np.any(out[0, :3], axis=-1)) and np.all(np.any(out[1], axis=-1))

    def test_a_bias_of_minus_infinity_masks(self):
        bias = np.where(bools(T, S), 0, -np.inf).astype(np.float32)
        arrays = inputs()[:3]
        np.testing.assert_allclose(ours(*arrays, bias=bias), ours(*arrays, mask=bools(T, S)), **CLOSE)


def test_hidden_nan_reaches_nothing():
    """Past the lengths of keys and queries, in outputs and gradients."""
    lengths = {"query_seq_lengths": np.array([3, 5]), "key_value_seq_lengths": np.array([6, 2])}
    clean = inputs()
    query, key, value, cotangent = clean
    real_queries = np.arange(T) < lengths["query_seq_lengths"][:, None]
    real_keys = np.arange(S) < lengths["key_value_seq_lengths"][:, None]

    def spoil(x, real):
        return np.where(real[..., None, None], x, np.float32(np.nan))

    spoilt = [spoil(query, real_queries), spoil(key, real_keys), spoil(value, real_keys), cotangent]
    rows = np.ones((B, T, N), bool)
    results, expected = (run(dot_product_attention, arrays, lengths, rows) for arrays in (spoilt, clean))
    jax.tree.map(np.testing.assert_array_equal, results, expected)
    assert np.isfinite(results[0]).all()


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


def test_what_the_drop_ins_hand_on_compiles_once_outside_of_jit():
    """Ours may be cached between calls; a function or a class of the user's, which may read anything, may not."""
    mask, bias = arrays.spread_mask(jnp.ones((1, 3), bool)), arrays.spread_bias(jnp.ones((1, 3)))
    for ours in (mask & arrays.query_padding(jnp.int32(2)) | masks.causal(0), bias, bias >> scores.softcap(2.0)):
        assert not mods.holds_function(ours)
    theirs = type("theirs", (masks.causal,), {})
    for users in (mask & (lambda i, j: i == j), bias >> (lambda s, i, j: s), mods.register(theirs)(0)):
        assert mods.holds_function(users)


@pytest.mark.usefixtures("untyped")
def test_lists_will_do_as_they_do_in_jax():
    lists = [x.tolist() for x in inputs()[:3]]
    arguments = {"key_value_seq_lengths": [7, 4], "local_window_size": [1, 2]}

    def call(function):
        return quick_jit(lambda: function(*lists, **arguments))()

    np.testing.assert_allclose(call(dot_product_attention), call(jax.nn.dot_product_attention), **CLOSE)
