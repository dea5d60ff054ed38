"""A child process's job in attention.py: its settings, its random arrays, and its messages."""

import sys
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

MASKS = ("causal", "full")


class Job(NamedTuple):
    """The settings of one child process."""

    section: str  # a key of SECTIONS in attention_peers.py
    setup: str = ""  # "one_thread", "one_process", "whole_machine" or "gpu"
    contestants: tuple[str, ...] = ()
    implementation: str = "blockwise"  # of attn, in the sections that compare attn with itself
    lengths: tuple[int, ...] = ()
    masks: tuple[str, ...] = MASKS
    checked_length: int = 1024
    batch: int = 1
    heads: int = 8
    width: int = 64
    dtype: str = "float32"
    rounds: int = 30
    seconds: float = 4.0
    memory_gib: float = 6.0
    seed: int = 1


class LeftOut(Exception):
    """A contestant cannot take part in a case; the message gives the reason."""


def draw(job: Job, T: int) -> list[np.ndarray]:
    """Draw query, key, value and cotangent, `[B T N H]`: float32 numbers that the job's dtype represents exactly."""
    random = np.random.default_rng(job.seed)
    drawn = random.standard_normal((4, job.batch, T, job.heads, job.width), np.float32)
    return list(drawn.astype(jnp.dtype(job.dtype)).astype(np.float32))


def error_line(error: Exception) -> str:
    """Return the error as one line of at most 200 characters and, unless it is `LeftOut`, its type."""
    words = " ".join(str(error).split())[:200]
    return words if isinstance(error, LeftOut) else f"{type(error).__name__}: {words}"


def say(line: str):
    """Print progress to stderr, which keeps it apart from the results."""
    print(line, file=sys.stderr, flush=True)
