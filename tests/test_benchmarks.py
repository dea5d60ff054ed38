"""The benchmarks can be started; what they measure is not for tests."""

import os
import pathlib
import subprocess
import sys

import pytest

SCRIPTS = sorted((pathlib.Path(__file__).parent.parent / "benchmarks").glob("*.py"))


@pytest.mark.some(2)
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_help_helps(script):
    if "argparse" not in script.read_text():
        pytest.skip("not a script of its own")
    words = [sys.executable, str(script), "--help"]
    done = subprocess.run(words, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--output" in done.stdout
