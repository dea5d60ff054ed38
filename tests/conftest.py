"""Shapes and dtypes of every annotated function are enforced while the tests run."""

import fcntl
import gc
import importlib.metadata
import os
import pathlib
import signal
import tempfile
from collections.abc import Callable

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most of the time is XLA's, which compiles in a third of it without LLVM's optimisations and with its simpler emitters.
# Tests that are about what is compiled ask for the fixture `optimized`; `make nightly` compiles all as users do.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
if os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1" and importlib.metadata.version("jaxlib").startswith("0.10."):
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false")  # newer versions have no such flag
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")  # no stack of each operation
# A program that several tests compile, workers and subprocesses among them, is compiled once. The folder is new for
# every run; with JAX_COMPILATION_CACHE_DIR one of your own is kept, and the next run is faster.
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    programs = tempfile.TemporaryDirectory(prefix="attn-programs-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = programs.name

import jax
import jaxtyping
import pytest
from hypothesis import settings
from jaxtyping import install_import_hook
from opened_pages import browser, opened  # noqa: F401  one browser per worker, for all tests of pages

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in the background of a script
    signal.signal(signal.SIGINT, signal.default_int_handler)
# Before the backend starts, so that meshes are real ones. test_ring_work.py runs tests with more.
jax.config.update("jax_num_cpu_devices", int(os.environ.get("ATTN_TEST_DEVICES", "2")))

settings.register_profile("nightly", max_examples=300)
hook = install_import_hook("attn", "typechecker.check")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Leave to the night all but n cases of each test marked `some(n)`: n for each implementation, evenly spread."""
    cases = {}
    for item in items:
        if (mark := item.get_closest_marker("some")) is not None:
            implementation = item.callspec.params.get("implementation")
            cases.setdefault((item.module, item.originalname, implementation), (mark.args[0], []))[1].append(item)
    for few, group in cases.values():
        by_day = {k * len(group) // few for k in range(few)}
        for number, item in enumerate(group):
            if number not in by_day:
                item.add_marker(pytest.mark.nightly)


def pytest_collection_finish():
    """Leave out of every later garbage collection what the imports have made, which stays, and collect less often."""
    gc.freeze()
    gc.set_threshold(100_000)


MOST_MAPS = 40_000  # memory maps of a process, of 65,530 that Linux allows: each compiled program has some
_ended = 0  # tests


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown():
    """Forget the compiled programs of a worker before they take all memory maps, beyond which XLA crashes."""
    global _ended
    _ended += 1
    maps = pathlib.Path("/proc/self/maps")  # on Linux alone
    if _ended % 50 == 0 and maps.exists() and maps.read_bytes().count(b"\n") > MOST_MAPS:
        jax.clear_caches()


@pytest.fixture
def optimized():
    """Compile as outside of the tests, with all optimisations."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


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
    "model.num_encoder_layers": "1",  # half as long to compile as two
    "model.num_decoder_layers": "1",
    "training.steps": "400",
    "training.checkpoint_every": "200",
    "evaluation.examples": "1000",
    "evaluation.intermediate_examples": "100",
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
def once(tmp_path_factory) -> Callable[[str, Callable[[pathlib.Path], None]], pathlib.Path]:
    """`once(name, make)`: call `make(folder)` in one worker only; return the folder, which no test may change."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # of all workers

    def made(name: str, make: Callable[[pathlib.Path], None]) -> pathlib.Path:
        folder, done = root / "made" / name, root / "made" / f"{name}-done"
        folder.parent.mkdir(exist_ok=True)
        with folder.with_name(f"{name}-lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # others wait here until it is made; the lock ends with its file
            if not done.exists():
                make(folder)
                done.touch()
        return folder

    return made


@pytest.fixture(scope="session")
def trained(once) -> Callable[[str, str, dict[str, str]], pathlib.Path]:
    """`trained(name, config, overrides)`: return the folder of a finished run, which one worker trains for all."""
    from attn import experiment

    def run(name: str, config: str, overrides: dict[str, str]) -> pathlib.Path:
        def make(folder: pathlib.Path):
            assert experiment.run(experiment.Request(config, overrides, str(folder), False, "off")) == 0

        return once(name, make)

    return run


@pytest.fixture(scope="session")
def copy_run(repository, trained) -> pathlib.Path:
    """The folder of a finished run: a tiny model that has learned to copy."""
    return trained("copy", str(repository / "configs/copy.py"), TINY)
