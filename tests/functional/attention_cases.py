"""Masks and scores in two forms, ours and NumPy's, with values drawn from a seed; and random heads."""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable

import attention_oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attn
from attn import masks, scores
from attn.functional import blockwise
from attn.functional.implementations import DERIVATIVES, FEATURES, IMPLEMENTATIONS

# Undoes the flag that tests/conftest.py may set, for one program.
AS_USERS_DO = {"xla_cpu_use_fusion_emitters": True} if "fusion_emitters" in os.environ.get("XLA_FLAGS", "") else None
DTYPES = ("float32", "bfloat16", "float16", "float64")


BLOCK_SIZE = 4  # of blockwise in the tests, so that small arrays are many blocks, and most are not full


def implementations() -> list[str]:
    """Return everything in the registry that runs on this backend."""
    backend = jax.default_backend()
    return [name for name, each in IMPLEMENTATIONS.items() if each.backends is None or backend in each.backends]


def is_complete(name: str) -> bool:
    """Return whether an implementation declares every feature and every derivative."""
    declared = IMPLEMENTATIONS[name]
    return declared.features.issuperset(FEATURES) and declared.derivatives.issuperset(DERIVATIVES)


def is_kernel(name: str) -> bool:
    """Return whether an implementation is a kernel, which the tests run in the interpreter of Pallas."""
    return name.startswith("pallas")


def complete_implementations() -> list[str]:
    """Return those of the registry that run here and declare every feature and every derivative."""
    return list(filter(is_complete, implementations()))


def use_real_blocks(monkeypatch):
    """Take blocks of the size that users get."""
    real = dataclasses.replace(IMPLEMENTATIONS["blockwise"], attend=blockwise.attend)
    monkeypatch.setitem(IMPLEMENTATIONS, "blockwise", real)


@contextlib.contextmanager
def heads_at_once(number: int):
    """Let blockwise attention run so many heads together."""
    with pytest.MonkeyPatch.context() as patch:
        changed = dataclasses.replace(IMPLEMENTATIONS["blockwise"], heads_at_once=lambda heads: number)
        patch.setitem(IMPLEMENTATIONS, "blockwise", changed)
        yield


def normal(*shapes, dtype="float32", seed=0) -> list:
    """Arrays of standard normal values."""
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def positions(T, S):
    """NumPy positions of a tile, [T 1] and [1 S]."""
    return np.arange(T)[:, None], np.arange(S)[None, :]


@dataclasses.dataclass(frozen=True)
class Twin:
    """A mask or a score: `draw(rng, T, S)` gives its values, `ours(values)` and `numpy(values)` its two forms."""

    draw: Callable
    ours: Callable
    numpy: Callable


def _draw_composed(rng, T, S):
    return [rng.integers(0, S), rng.integers(0, S), rng.integers(1, S + 1), rng.random((T, S)) < 0.3]


def _ours_composed(values):
    offset, always, length, array = values
    return (masks.causal(offset) | (lambda i, j: j == always)) & masks.padding(length) & ~masks.dense(array)


def _numpy_composed(values, i, j):
    offset, always, length, array = values
    return ((j <= i + offset) | (j == always)) & (j < length) & ~array[i, j]


def _ours_lambda_mask(values):
    modulus, visible = values
    return lambda i, j: ((i + 2 * j) % modulus != 0) | visible[j]


MASKS = {
    "none": Twin(lambda rng, T, S: [], lambda v: None, lambda v, i, j: (i >= 0) & (j >= 0)),
    "causal": Twin(
        lambda rng, T, S: [rng.integers(-2, S)], lambda v: masks.causal(v[0]), lambda v, i, j: j <= i + v[0]
    ),
    "padding": Twin(
        lambda rng, T, S: [rng.integers(0, S + 1)], lambda v: masks.padding(v[0]), lambda v, i, j: j < v[0]
    ),
    "prefix": Twin(
        lambda rng, T, S: [rng.integers(-2, 3), rng.integers(0, S)],
        lambda v: masks.causal(v[0]) | masks.prefix(v[1]),
        lambda v, i, j: (j <= i + v[0]) | (j < v[1]),
    ),
    "window": Twin(
        lambda rng, T, S: [rng.integers(0, 4), rng.integers(0, 3), rng.integers(-1, S)],
        lambda v: masks.sliding_window(v[0], v[1], v[2]),
        lambda v, i, j: (i + v[2] - v[0] <= j) & (j <= i + v[2] + v[1]),
    ),
    "segments": Twin(
        lambda rng, T, S: [np.sort(rng.integers(0, 3, T)), np.sort(rng.integers(0, 3, S))],
        lambda v: masks.segments(v[0], v[1]),
        lambda v, i, j: v[0][i] == v[1][j],
    ),
    "dense": Twin(
        lambda rng, T, S: [rng.random((T, S)) < 0.6], lambda v: masks.dense(v[0]), lambda v, i, j: v[0][i, j]
    ),
    "negation": Twin(
        lambda rng, T, S: [rng.integers(-3, 2)], lambda v: ~masks.causal(v[0]), lambda v, i, j: ~(j <= i + v[0])
    ),
    "lambda": Twin(
        lambda rng, T, S: [rng.integers(2, 4), rng.random(S) < 0.3],
        _ours_lambda_mask,
        lambda v, i, j: ((i + 2 * j) % v[0] != 0) | v[1][j],
    ),
    "composed": Twin(_draw_composed, _ours_composed, _numpy_composed),
}


def _plus(bias):
    return lambda s: (s + bias, np.ones_like(s), np.ones_like(s))


def _numpy_softcap(cap, s):
    tanh = np.tanh(s / cap)
    return cap * tanh, 1 - tanh**2, 1 + tanh**2


def _numpy_alibi(values, s, i, j):
    return _plus(-values[0] * np.abs(i + values[1] - j))(s)


def _draw_dense_score(rng, T, S):
    return [np.where(rng.random((T, S)) < 0.15, -np.inf, rng.normal(size=(T, S)))]


def _ours_lambda_score(values):
    temperature, bias, power = values
    return lambda s, i, j: s * temperature + bias[j] * power


def _numpy_lambda_score(values, s, i, j):
    temperature, bias, power = values
    return s * temperature + bias[j] * power, np.full_like(s, temperature), np.full_like(s, np.abs(temperature))


SCORES = {
    "none": Twin(lambda rng, T, S: [], lambda v: None, lambda v, s, i, j: attention_oracle.identity(s, i, j)),
    "softcap": Twin(
        lambda rng, T, S: [rng.uniform(0.5, 5)],
        lambda v: scores.softcap(v[0]),
        lambda v, s, i, j: _numpy_softcap(v[0], s),
    ),
    "alibi": Twin(
        lambda rng, T, S: [rng.uniform(0, 2), rng.integers(-2, 3)], lambda v: scores.alibi(v[0], v[1]), _numpy_alibi
    ),
    "relative_bias": Twin(
        lambda rng, T, S: [rng.normal(size=T + S - 1), T],
        lambda v: scores.relative_bias(v[0], offset=0),
        lambda v, s, i, j: _plus(v[0][j - i + v[1] - 1])(s),
    ),
    "dense": Twin(_draw_dense_score, lambda v: scores.dense(v[0]), lambda v, s, i, j: _plus(v[0][i, j])(s)),
    "chained": Twin(
        lambda rng, T, S: [rng.uniform(0, 2), rng.integers(-2, 3), rng.uniform(0.5, 5)],
        lambda v: scores.alibi(v[0], v[1]) >> scores.softcap(v[2]),
        lambda v, s, i, j: _numpy_softcap(v[2], _numpy_alibi(v, s, i, j)[0]),
    ),
    "lambda": Twin(
        lambda rng, T, S: [rng.uniform(0.5, 2), rng.normal(size=S), rng.integers(1, 3)],
        _ours_lambda_score,
        _numpy_lambda_score,
    ),
}

# T, S, H, Hv: distinct primes, so that no two axes can be taken for one another; and lengths of one.
SIGNATURES = (
    ((5, 7, 3, 2), "none"),
    ((7, 5, 2, 3), "causal"),
    ((3, 11, 5, 2), "padding"),
    ((11, 13, 2, 3), "prefix"),
    ((7, 13, 3, 5), "window"),
    ((13, 5, 7, 3), "segments"),
    ((2, 7, 5, 3), "dense"),
    ((11, 3, 2, 7), "negation"),
    ((5, 2, 11, 3), "lambda"),
    ((3, 7, 2, 13), "composed"),
    ((1, 7, 3, 2), "padding"),
    ((5, 1, 3, 2), "causal"),
)


@dataclasses.dataclass(frozen=True)
class Case:
    """Shapes, a mask, a score and a dtype: one compilation."""

    shape: tuple[int, int, int, int]
    mask: str
    score: str
    dtype: str

    def __str__(self):
        return f"{self.dtype}-{'x'.join(map(str, self.shape))}-{self.mask}-{self.score}"


def cases() -> list[Case]:
    """Every mask in every dtype; the scores take turns, so that each meets every dtype and several masks."""
    names = list(SCORES)
    return [
        Case(shape, mask, names[(index + 2 * turn) % len(names)], dtype)
        for turn, dtype in enumerate(DTYPES)
        for index, (shape, mask) in enumerate(SIGNATURES)
    ]


def typical() -> list[Case]:
    """Those of every change: every mask and every score in float32, and a fifth of the others in any dtype."""
    found = [case for number, case in enumerate(cases()) if case.dtype == "float32" or number % 5 == 0]
    assert {case.dtype for case in found} == set(DTYPES)
    float32 = [case for case in found if case.dtype == "float32"]
    assert {case.mask for case in float32} == set(MASKS) and {case.score for case in float32} == set(SCORES)
    return found


@functools.cache
def value_and_gradient(implementation: str, mask: str, score: str):
    """Jitted as users do: out, or (out, logsumexp) where it is declared, and (dq, dk, dv) for given cotangents."""
    return_logsumexp = "logsumexp" in IMPLEMENTATIONS[implementation].features

    @functools.partial(jax.jit, compiler_options=AS_USERS_DO)
    def call(query, key, value, mask_values, score_values, scale, cotangents):
        def one(query, key, value):
            return attn.attention(
                query,
                key,
                value,
                mask=MASKS[mask].ours(mask_values),
                score=SCORES[score].ours(score_values),
                scale=scale,
                implementation=implementation,
                return_logsumexp=return_logsumexp,
            )

        primal, pullback = jax.vjp(one, query, key, value)
        return primal, pullback(cotangents)

    return call


def rounded(x, dtype) -> np.ndarray:
    """A NumPy array whose values fit `dtype` exactly."""
    x = np.asarray(x)
    return x.astype(dtype) if x.dtype.kind == "f" else x
