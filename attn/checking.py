"""Checks every implementation of attention on the device at hand: values, gradients, semantics, and times.

Values and gradients are compared with the equation in float64 on the CPU, for masks and scores of every kind. A kernel
is preferred on a kind of device if all of its values are right there, and it is faster than XLA's programs, forward and
backward, at every length. `attn/functional/checked` keeps such results; "auto" and "fastest" read them.
"""

import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from attn.functional import (
    Dropout,
    Unsupported,
    masks,
    multi_head_attention,
    per_head,
    positions,
    scores,
    sharding,
)
from attn.functional.implementations import IMPLEMENTATIONS

KERNELS = ("pallas_tpu", "pallas_gpu", "cudnn")  # those that have to be checked before "auto" chooses them
TOLERANCES = {"float32": 1e-5, "bfloat16": 2e-2}  # of the largest value; products of float32 in full precision
N, K, H, Hv = 4, 2, 64, 32  # of the values
SIZE = 200, 333  # lengths of the values, for which kernels pad
# On each platform; the second for several tiles in which nothing is padded.
SIZES = {"cpu": (SIZE,), "gpu": (SIZE, (256, 384)), "tpu": (SIZE, (1024, 1536))}


@dataclasses.dataclass(frozen=True)
class Case:
    """A mask and a score as functions of learned arrays and of T and S, `(arrays, T, S) -> mask` or score, or None."""

    mask: Callable | None = None
    score: Callable | None = None
    dropout: float = 0.0


def _arrays(T: int, S: int) -> dict[str, np.ndarray]:
    """Draw the arrays that scores capture."""
    rng = np.random.default_rng(1)
    return {
        "slopes": np.linspace(0.02, 0.2, N),
        "cap": np.asarray(3.0),
        "table": rng.normal(size=(N, 32)),
        "distances": rng.normal(size=T + S - 1),
        "by_key": rng.normal(size=S),
        "by_query": rng.normal(size=T) / 2,
        "dense": rng.normal(size=(T, S)),
    }


def _buckets(table, s, i, j):
    return s + table[positions.relative_buckets(j - i)].astype(s.dtype)


def _by_position(arrays, T, S):
    return lambda s, i, j: s * jnp.exp(arrays["by_query"][i]).astype(s.dtype) + arrays["by_key"][j].astype(s.dtype)


def _segments(arrays, T, S):
    return masks.segments(jnp.arange(T) // 70, jnp.arange(S) // 110)


CASES = {
    "full": Case(),
    "causal": Case(lambda arrays, T, S: masks.causal(S - T)),
    "causal, traced": Case(lambda arrays, T, S: masks.causal(jnp.int32(S - T))),
    "window": Case(lambda arrays, T, S: masks.sliding_window(50, 5, offset=40)),
    "padding per head": Case(lambda arrays, T, S: per_head(masks.padding(jnp.arange(N) * 80))),
    "packed documents": Case(_segments),
    "own mask": Case(lambda arrays, T, S: masks.causal(S - T) & (lambda i, j: (i + j) % 3 != 0)),
    "ALiBi": Case(
        lambda arrays, T, S: masks.causal(S - T),
        lambda arrays, T, S: per_head(scores.alibi(arrays["slopes"], offset=S - T)),
    ),
    "soft cap": Case(None, lambda arrays, T, S: scores.softcap(arrays["cap"])),
    "T5's buckets": Case(None, lambda arrays, T, S: per_head(jax.tree_util.Partial(_buckets, arrays["table"]))),
    "relative bias": Case(None, lambda arrays, T, S: scores.relative_bias(arrays["distances"], offset=0)),
    "by position": Case(None, _by_position),
    "dense bias": Case(lambda arrays, T, S: masks.causal(S - T), lambda arrays, T, S: scores.dense(arrays["dense"])),
    "dropout": Case(lambda arrays, T, S: masks.causal(S - T), dropout=0.3),
}


def implementations() -> list[str]:
    """Return the names of the implementations that run on the device at hand."""
    platform = sharding.platform()
    return [name for name, each in IMPLEMENTATIONS.items() if each.backends is None or platform in each.backends]


# Values and gradients


def errors(name: str, case: Case, dtype: str, size: tuple[int, int] = SIZE) -> dict[str, float]:
    """Return the largest error of each result, relative to the result's largest value.

    Args:
      name: of an implementation.
      case: a mask and a score.
      dtype: of queries, keys and values; a key of `TOLERANCES`.
      size: the lengths T and S.

    Raises:
      Unsupported: the implementation does not serve the case.
    """
    has_logsumexp = "logsumexp" in IMPLEMENTATIONS[name].features
    with jax.default_matmul_precision("default" if dtype == "bfloat16" else "highest"):
        found = _results(name, case, dtype, has_logsumexp, *size)
    expected = _expected(case, has_logsumexp, *size)
    return {key: relative_error(found[key], exact) for key, exact in expected.items() if np.any(exact)}


@functools.cache  # every implementation and dtype is compared with the same numbers
def _expected(case: Case, has_logsumexp: bool, T: int, S: int) -> dict[str, np.ndarray]:
    """Compute the results by the equation in float64 on the CPU."""
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        return _results("reference", case, "float64", has_logsumexp, T, S)


def outcome(name: str, title: str, dtype: str, size: tuple[int, int] = SIZE) -> dict:
    """Return whether an implementation serves a case of `CASES`, whether it is right, and its errors or the reason."""
    # The gradient of a number that all pairs share is a sum over them: roundings grow with the root of their number.
    allowed = TOLERANCES[dtype] * (math.prod(size) / math.prod(SIZE)) ** 0.5

    def check() -> dict:
        found = errors(name, CASES[title], dtype, size)
        return {"right": max(found.values()) <= allowed, "errors": found}

    return _attempt(check)


def semantics_outcome(name: str) -> dict:
    """Return whether an implementation keeps what is guaranteed of hidden keys, and each guarantee or the reason."""

    def check() -> dict:
        found = semantics(name)
        return {"right": all(found.values()), "guarantees": found}

    return _attempt(check)


def _attempt(check: Callable[[], dict]) -> dict:
    """Return the outcome of a check, also where the implementation does not serve it, or fails."""
    try:
        return {"served": True, **check()}
    except Unsupported as error:
        return {"served": False, "right": True, "reason": str(error)}
    except Exception as error:  # a kernel that does not compile is a result as well
        return {"served": True, "right": False, "failed": f"{type(error).__name__}: {error}".splitlines()[0]}


def describe(found: dict) -> str:
    """Return an outcome in one line."""
    if not found["served"]:
        return f"not served: {found['reason']}"
    if "failed" in found:
        return f"FAILED: {found['failed']}"
    worst, error = max(found["errors"].items(), key=lambda each: each[1])
    return f"{'right' if found['right'] else 'WRONG'}, {worst} {error:.1e}"


def relative_error(found, expected) -> float:
    """Return the largest error, relative to the largest expected value; infinity for a NaN that is not expected."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected)
    finite = np.isfinite(expected)
    differs = not np.array_equal(np.where(finite, 0, found), np.where(finite, 0, expected))
    if differs or np.isnan(found[finite]).any():  # the largest of several errors would not show a NaN
        return np.inf
    return float(np.abs(found[finite] - expected[finite]).max() / np.abs(expected[finite]).max())


def _results(name: str, case: Case, dtype: str, has_logsumexp: bool, T: int, S: int) -> dict[str, np.ndarray]:
    """Compute the output, the logsumexp if it is served, and all gradients."""
    wide = "float64" if dtype == "float64" else "float32"
    # Numbers of bfloat16, which every dtype represents exactly: so results differ by their computation alone.
    rng = np.random.default_rng(0)
    drawn = [rng.normal(size=shape) for shape in ((T, N, H), (S, K, H), (S, K, Hv), (T, N, Hv), (T, N))]
    query, key, value, dout, dlogsumexp = (jnp.asarray(np.asarray(x, jnp.bfloat16), dtype) for x in drawn)
    arrays = {key: jnp.asarray(np.asarray(x, jnp.bfloat16), wide) for key, x in _arrays(T, S).items()}

    @jax.jit
    def gradients(query, key, value, arrays):
        def objective(query, key, value, arrays):
            results = multi_head_attention(
                query,
                key,
                value,
                mask=case.mask and case.mask(arrays, T, S),
                score=case.score and case.score(arrays, T, S),
                dropout=Dropout(case.dropout, jax.random.key(3)) if case.dropout else None,
                implementation=name,
                return_logsumexp=has_logsumexp,
            )
            out, *rest = results if has_logsumexp else (results,)
            total = jnp.sum(out.astype(wide) * dout.astype(wide))
            for logsumexp in rest:
                total += jnp.sum(jnp.where(logsumexp == -jnp.inf, 0, logsumexp) * dlogsumexp.astype(wide))
            return total, dict(zip(("out", "logsumexp"), (out, *rest)))

        return jax.grad(objective, (0, 1, 2, 3), has_aux=True)(query, key, value, arrays)

    (dquery, dkey, dvalue, darrays), results = gradients(query, key, value, arrays)
    results |= {"dquery": dquery, "dkey": dkey, "dvalue": dvalue}
    return {
        key: np.asarray(x, np.float64) for key, x in (results | {f"d{key}": x for key, x in darrays.items()}).items()
    }


# Semantics


def semantics(name: str) -> dict[str, bool]:
    """Return whether the implementation keeps what docs/attention.md guarantees of rows and keys that are hidden."""
    rng, (_, S) = np.random.default_rng(2), _sizes()[-1]
    query, key, value = (jnp.asarray(rng.normal(size=(n, 1, H)), jnp.bfloat16) for n in (S, S, S))
    hidden = S - 1

    @functools.partial(jax.jit, static_argnames="mask")
    def call(query, key, value, mask):
        def objective(*arrays):
            out = multi_head_attention(*arrays, mask=mask, implementation=name)
            return jnp.sum(out.astype(jnp.float32) ** 2), out

        gradients, out = jax.grad(objective, (0, 1, 2), has_aux=True)(query, key, value)
        return [out, *gradients]

    def of(mask, key, value):
        return [np.asarray(x, np.float32) for x in call(query, key, value, mask)]

    nothing, padded = masks.padding(0), masks.padding(hidden)
    clean, dirty = of(padded, key, value), of(padded, key.at[hidden].set(np.nan), value.at[hidden].set(np.inf))
    seen = of(masks.causal(), key, value.at[S // 2, 0, 0].set(np.nan))[0]
    return {
        "a query without a visible key gets 0": not any(np.any(x) for x in of(nothing, key, value)),
        "NaN and infinity in hidden keys reach nothing": all(map(np.array_equal, clean, dirty)),
        "NaN in a visible value reaches the rows that see it": bool(np.isnan(seen[S // 2 :, 0, 0]).all()),
    }


# Times


def times(names: Sequence[str], length: int, *, width: int = 128, heads: int = 8, rounds: int = 5) -> dict:
    """Measure causal attention in bfloat16, in turns: {name: {"forward": seconds, "backward": seconds}}.

    An implementation that does not serve the call, or for which the device's memory is too small, is left out.
    """
    rng = np.random.default_rng(3)
    arrays = [jnp.asarray(rng.normal(size=(length, heads, width)), jnp.bfloat16) for _ in range(3)]

    def forward(name, *arrays):
        return multi_head_attention(*arrays, mask=masks.causal(), implementation=name)

    def backward(name, *arrays):
        return jax.grad(lambda *arrays: jnp.sum(forward(name, *arrays).astype(jnp.float32)), (0, 1, 2))(*arrays)

    calls, best = {}, {}
    for name in names:
        try:
            for direction, function in (("forward", forward), ("backward", backward)):
                calls[name, direction] = jax.jit(functools.partial(function, name))
                jax.block_until_ready(calls[name, direction](*arrays))
        except (Unsupported, jax.errors.JaxRuntimeError):
            calls = {key: call for key, call in calls.items() if key[0] != name}
    for _ in range(rounds):
        for key, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call(*arrays))
            best[key] = min(best.get(key, np.inf), time.perf_counter() - start)
    return {name: {d: best[name, d] for d in ("forward", "backward")} for name in names if (name, "forward") in best}


# The whole check


def run(lengths: Sequence[int], say: Callable[[str], None]) -> dict:
    """Check the device at hand, and return the results as they are written to JSON.

    Args:
      lengths: of the sequences whose times are measured.
      say: is called with each line of the report.
    """
    names = implementations()
    values = {name: dict(_values_of(name, say)) for name in names}
    right = {name: all(each["right"] for each in cases.values() if each["served"]) for name, cases in values.items()}
    seconds = {}
    for length in lengths:
        seconds[length] = times(names, length)
        for name, each in seconds[length].items():
            forward, backward = each["forward"], each["backward"]
            say(f"{name:12} {length} positions: forward {forward:.6f} s, with backward {backward:.6f} s")
    preferred = [name for name in names if name in KERNELS and right[name] and _is_faster(name, seconds)]
    return {
        "device_kind": sharding.device_kind(),
        "platform": sharding.platform(),
        "jax": jax.__version__,
        "values": values,
        "seconds": {str(length): each for length, each in seconds.items()},
        "preferred": preferred,
    }


def _values_of(name: str, say) -> Iterator[tuple[str, dict]]:
    """Check all cases of one implementation: (case, its results)."""
    for (T, S), title, dtype in itertools.product(_sizes(), CASES, TOLERANCES):
        found = outcome(name, title, dtype, (T, S))
        say(f"{name:12} {title:18} {dtype:8} {T:4} x {S:<4}  {describe(found)}")
        yield f"{title}, {dtype}, {T} x {S}", found
    found = semantics_outcome(name)
    if "guarantees" not in found:
        say(f"{name:12} hidden keys: {describe(found)}")
        yield "semantics", found
        return
    for title, holds in found["guarantees"].items():
        say(f"{name:12} {title}: {'yes' if holds else 'NO'}")
        yield title, {"served": True, "right": holds}


def _sizes() -> tuple[tuple[int, int], ...]:
    return SIZES.get(sharding.platform(), SIZES["cpu"])


def _is_faster(name: str, seconds: dict) -> bool:
    """Return whether a kernel was faster than all of XLA's programs at every length, in both directions."""

    def is_faster(each: dict, direction: str) -> bool:
        others = [other[direction] for key, other in each.items() if key not in KERNELS]
        return name in each and all(each[name][direction] < other for other in others)

    return bool(seconds) and all(is_faster(each, d) for each in seconds.values() for d in ("forward", "backward"))
