"""Shapes and dtypes of every annotated function are enforced while the tests run."""

import os
import pathlib
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    # A program that several tests compile, workers and subprocesses among them, is compiled once; new for every run.
    programs = tempfile.TemporaryDirectory(prefix="attn-programs-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = programs.name
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import jax
import jaxtyping
import pytest
from jaxtyping import install_import_hook

jax.config.update("jax_num_cpu_devices", 2)  # before the backend starts, so that meshes are real ones

hook = install_import_hook("attn", "typechecker.check")


@pytest.fixture
def untyped():
    """Turn the enforcement off, to see what a bad call gets from the function itself."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


TINY = {
    "task.symbols": "6",
    "task.max_length": "6",
    "model.width": "32",
    "model.feed_forward_width": "64",
    "training.steps": "400",
    "training.checkpoint_every": "200",
    "evaluation.examples": "1000",
    "evaluation.examples_on_the_way": "100",
    "evaluation.batch_size": "100",
}


@pytest.fixture(scope="session")
def repository() -> pathlib.Path:
    """The checkout."""
    return pathlib.Path(__file__).parent.parent


@pytest.fixture(scope="session")
def tiny() -> dict[str, str]:
    """Overrides that make any config small enough to train in a second."""
    return dict(TINY)


@pytest.fixture(scope="session")
def copy_run(repository, tmp_path_factory) -> pathlib.Path:
    """The folder of a finished run: a tiny model that has learnt to copy."""
    from attn import experiment

    folder = tmp_path_factory.mktemp("runs") / "copy"
    request = experiment.Request(str(repository / "configs/copy.py"), TINY, str(folder), False, "off")
    assert experiment.run(request) == 0
    return folder
