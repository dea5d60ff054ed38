"""Helpers for the tests of `attn.interop.flax_attention_fn`: sizes, tolerances and masks."""

import functools

import jax
import numpy as np
from interop_cases import quick_jit

B, T, S, N, H, D = 2, 5, 7, 3, 11, 6
ROUNDINGS = 64 * np.finfo(np.float32).eps  # projections of 6 to 33 features around the attention
CLOSE = {"rtol": ROUNDINGS, "atol": ROUNDINGS}


def some_key_each(*shape):
    """Return a random mask of this shape in which every query sees at least the first key."""
    mask = np.random.default_rng(3).random(shape) < 0.6
    mask[..., 0] = True
    return mask


def attend(function, arrays, **arguments):
    """Return the output of a jitted function of `arrays`; `arguments` are fixed at compile time."""
    return jax.device_get(quick_jit(functools.partial(function, **arguments))(*arrays))
