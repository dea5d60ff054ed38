"""Shared by the tests of attention functions: helpers on the path, the registry as a parameter, settings of JAX."""

import contextlib
import dataclasses
import functools
import sys
from pathlib import Path

import jax
import pytest

sys.path.append(str(Path(__file__).parent))  # for attention_cases, attention_oracle and implementation_suite

import attention_cases as cases
from implementation_suite import pytest_runtest_call  # noqa: F401  a hook of pytest
from interpreted import register_kernels

from attn.functional import blockwise
from attn.functional.implementations import IMPLEMENTATIONS

IMPLEMENTATIONS["blockwise"] = dataclasses.replace(
    IMPLEMENTATIONS["blockwise"], attend=functools.partial(blockwise.attend, block_size=cases.BLOCK_SIZE)
)
register_kernels(cases.BLOCK_SIZE)


@pytest.fixture(params=cases.implementations())
def implementation(request):
    """Each implementation of the registry that runs here; tests of what it does not declare are skipped."""
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


def pytest_collection_modifyitems(items):
    """Leave to the night what kernels share: by day each test of all implementations runs one case in one of them."""
    kernels = [name for name in cases.implementations() if cases.is_kernel(name)]
    groups = {}
    for item in items:
        callspec = getattr(item, "callspec", None)
        name = callspec.params.get("implementation") if callspec else None
        if name in kernels and item.get_closest_marker("served") is None:
            groups.setdefault((item.module.__name__, item.originalname), []).append((name, item))
    for number, group in enumerate(groups.values()):
        chosen = kernels[number % len(kernels)]
        first = next((item for name, item in group if name == chosen), None)
        for _, item in group:
            if item is not first:
                item.add_marker(pytest.mark.nightly)
