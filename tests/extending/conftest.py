"""Fixtures of the tests of extensions: files of a user, in a temporary folder."""

import pathlib
import sys

import pytest

sys.path.append(str(pathlib.Path(__file__).parent.parent / "functional"))  # for the shared suite of implementations

from implementation_suite import pytest_runtest_call  # noqa: F401  a hook of pytest

from attn.functional.implementations import IMPLEMENTATIONS
from attn.mechanisms.registry import MECHANISMS
from attn.nn.models import MODELS
from attn.tasks.rules import RULES

MINE = pathlib.Path(__file__).parent / "mine"


@pytest.fixture
def write_module(tmp_path, monkeypatch):
    """`write_module(name)`: copy a file of `mine` to a folder on the path; forget afterwards what it registers.

    With `write_module(name, text)` the file has this text instead.
    """
    registries = IMPLEMENTATIONS, MECHANISMS, MODELS, RULES
    before, modules = [dict(registry) for registry in registries], []
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")

    def write(name: str, text: str | None = None) -> str:
        (tmp_path / f"mine_{name}.py").write_text((MINE / f"{name}.py").read_text() if text is None else text)
        modules.append(f"mine_{name}")
        return modules[-1]

    yield write
    for registry, known in zip(registries, before):
        registry.clear()
        registry.update(known)
    for module in modules:
        sys.modules.pop(module, None)
