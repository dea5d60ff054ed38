"""Helpers for the tests of `attn.interop.dot_product_attention`: arguments, and a comparison with jax.nn's function."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from interop_cases import normal, quick_jit

from attn.interop import dot_product_attention

B, T, S, N, K, H = 2, 5, 7, 6, 3, 11
ROUNDINGS = 32 * np.finfo(np.float32).eps  # sums of 11 products and 7 weights, in another order
CLOSE = {"rtol": ROUNDINGS, "atol": ROUNDINGS}


def ours(query, key, value, **arguments):
    """Return what our function returns, jitted; `arguments` are fixed at compile time."""
    return jax.device_get(quick_jit(functools.partial(dot_product_attention, **arguments))(query, key, value))


def theirs(query, key, value, **arguments):
    """Return what jax.nn's function returns, jitted; `arguments` are fixed at compile time."""
    return jax.device_get(quick_jit(functools.partial(jax.nn.dot_product_attention, **arguments))(query, key, value))


def bools(*shape, seed=1) -> np.ndarray:
    """Return random bools, of which about 60 % are True."""
    return np.random.default_rng(seed).random(shape) < 0.6


def inputs(T=T, S=S, N=N, K=K, dtype="float32") -> list:
    """Return random query, key and value, and a cotangent for the output."""
    shapes = [(B, T, N, H), (B, S, K, H), (B, S, K, H), (B, T, N, H)]
    return [normal(*shape, seed=seed).astype(dtype) for seed, shape in enumerate(shapes)]


def visible(T, S, N, mask=None, is_causal=False, query_seq_lengths=None, key_value_seq_lengths=None, **rest):
    """Return which queries see which keys under these arguments, `[B N T S]`, computed in NumPy."""
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
    """Return output, residual, and gradients of query, key, value and bias; the cotangent is zero outside `rows`."""
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
    """Assert that our output, residual and gradients equal those of jax.nn at rows that see a key."""
    rows = visible(T, S, N, **arguments).any(-1).swapaxes(1, 2)
    assert rows.any()
    arrays = inputs(T, S, N, K)
    expected = run(jax.nn.dot_product_attention, arrays, arguments, rows)
    given = arguments | {"implementation": implementation}
    assert_close(run(dot_product_attention, arrays, given, rows), expected, rows)


def assert_close(results, expected, rows):
    """Compare output and residual at `rows`, and all gradients."""
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
