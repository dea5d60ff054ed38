"""Compiling for devices that this machine does not have; without their compilers these tests are skipped."""

from collections.abc import Callable

import devices
import pytest
from jax.sharding import Mesh


@pytest.fixture(autouse=True)
def _optimized(optimized):
    """Compile as outside of the tests."""


@pytest.fixture(scope="session")
def mesh_of() -> Callable[[str], Mesh]:
    """`mesh_of(name)`: the mesh of these devices; skips the test where their compiler is not installed."""

    def make(name: str) -> Mesh:
        if (reason := devices.missing(name)) is not None:
            pytest.skip(reason)
        devices.for_no_device()
        return devices.mesh_of(name)

    return make
