"""What the tests of the heart share: their helpers on the path, the registry as a parameter, strict settings of JAX."""

import contextlib
import sys
from pathlib import Path

import jax
import pytest

sys.path.append(str(Path(__file__).parent))  # for attention_oracle and attention_cases

from attention_cases import complete_implementations

from attn.functional import blockwise

blockwise.BLOCK = 4  # so that small arrays are many blocks, and most are not full


@pytest.fixture(params=complete_implementations())
def implementation(request):
    """Each implementation of the registry that runs here and has every feature and derivative."""
    return request.param


@pytest.fixture
def x64():
    """Float64 is allowed."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def debug_nans():
    """A NaN anywhere is an error."""
    with jax.debug_nans(True):
        yield


@pytest.fixture
def strict():
    """Float64, no NaN anywhere, no silent broadcasting of ranks."""
    with contextlib.ExitStack() as settings:
        settings.enter_context(jax.enable_x64(True))
        settings.enter_context(jax.debug_nans(True))
        settings.enter_context(jax.numpy_rank_promotion("raise"))
        yield
