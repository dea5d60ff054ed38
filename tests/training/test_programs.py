"""Compiled programs are kept for later processes, and what cannot be kept is compiled."""

import os
import subprocess
import sys
import zlib

import pytest

from attn.training import programs

PROGRAM = """
import jax, jax.numpy as jnp
from attn.training.programs import keep_programs
hits = []
jax.monitoring.register_event_listener(lambda event, **kw: hits.append(event.endswith("/cache_hits")))
keep_programs()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
print(jax.config.jax_compilation_cache_dir, float(jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((2, 2)))[0, 0]), sum(hits))
"""


def answer(home, **environment) -> tuple[str, float, int]:
    """The folder, a number that a program computes, how many programs were loaded; nothing may be said on stderr."""
    mine = {"JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "XDG_CACHE_HOME"}
    kept = {name: value for name, value in os.environ.items() if name not in mine}
    words = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(words, env=kept | {"HOME": str(home), **environment}, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    folder, number, loaded = done.stdout.split()
    return folder, pytest.approx(float(number)), int(loaded)


def test_a_later_process_loads_what_one_has_compiled_and_compiles_what_is_damaged(tmp_path):
    folder, number, loaded = answer(tmp_path)
    assert folder.startswith(str(tmp_path / ".cache/attn/programs/")) and loaded == 0
    *same, count = answer(tmp_path)
    assert same == [folder, number] and count > 1
    assert answer("/proc/nowhere", XDG_CACHE_HOME=str(tmp_path / ".cache")) == (folder, number, count)
    (kept,) = [path for path in (tmp_path / ".cache/attn").glob("programs/*/*-cache") if "lambda" in path.name]
    kept.write_bytes(kept.read_bytes()[:-20])
    assert answer(tmp_path) == (folder, number, count - 1)
    assert answer(tmp_path) == (folder, number, count)


def test_the_oldest_beyond_a_limit_are_deleted(tmp_path, monkeypatch):
    for age in range(4):
        (path := tmp_path / f"{age}-cache").write_bytes(zlib.compress(os.urandom(100)))
        os.utime(path, (1e9 - age, 1e9 - age))
    monkeypatch.setattr(programs, "_LIMIT", 250)
    programs._sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0-cache", "1-cache"]


@pytest.mark.nightly
def test_nothing_is_kept_where_it_cannot_be_or_elsewhere_where_jax_is_told_so(tmp_path):
    assert answer("/proc/nowhere")[0] == "None"
    (tmp_path / ".cache").touch()  # a file in the way
    assert answer(tmp_path)[0] == "None"
    assert answer(tmp_path, JAX_COMPILATION_CACHE_DIR=str(tmp_path / "own"))[0] == str(tmp_path / "own")
    assert answer(tmp_path, JAX_COMPILATION_CACHE_DIR=str(tmp_path / ".cache"))[0] == str(tmp_path / ".cache")
    assert answer(tmp_path / "empty", JAX_ENABLE_COMPILATION_CACHE="0")[0] == "None"
    assert not (tmp_path / "empty").exists()
