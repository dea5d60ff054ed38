"""The benchmarks can be started; what they measure is not tested."""

import os
import pathlib
import subprocess
import sys

import pytest

FILES = sorted((pathlib.Path(__file__).parent.parent / "benchmarks").glob("*.py"))
SCRIPTS = [file for file in FILES if "argparse" in file.read_text()]  # the others are modules of these


@pytest.mark.some(2)
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_help_helps(script):
    words = [sys.executable, str(script), "--help"]
    done = subprocess.run(words, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--output" in done.stdout
