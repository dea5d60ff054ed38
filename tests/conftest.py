"""Shapes and dtypes of every annotated function are enforced while the tests run."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jaxtyping
import pytest
from jaxtyping import install_import_hook

jax.config.update("jax_num_cpu_devices", 2)  # before the backend starts, so that meshes are real ones

hook = install_import_hook("attn", "beartype.beartype")


@pytest.fixture
def untyped():
    """Turn the enforcement off, to see what a bad call gets from the function itself."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
