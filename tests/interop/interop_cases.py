"""Helpers for the tests of both drop-ins: random arrays, and a `jax.jit` that compiles quickly."""

import functools

import jax
import numpy as np

# Compilation takes most of the time of these tests, and optimization of the code is half of it.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def normal(*shape, seed=0) -> np.ndarray:
    """Return float32 values of the standard normal distribution."""
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)
