"""One writer per run: who holds a run's folder is named, and a lock that a killed process left is not in the way."""

import json
import os
import shutil
import socket
import subprocess
import sys

import pytest

from attn import experiment
from attn.training import locks


def hold(folder, ending: str) -> subprocess.Popen:
    """Start a process that holds the lock until it ends, once it has it."""
    program = f"""
import os, pathlib, sys
from attn.training import locks
with locks.held(pathlib.Path({str(folder)!r})):
    print("held", flush=True)
    sys.stdin.read()
    {ending}
"""
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", program], stdin=pipe, stdout=pipe, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def test_a_live_run_is_not_resumed_and_a_killed_one_is(tmp_path, copy_run, capsys):
    run = shutil.copytree(copy_run, tmp_path / "run")
    process = hold(run, "os._exit(9)")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    more = experiment.Request(None, {"training.steps": "500"}, str(run), True, "off")
    assert experiment.run(more) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert f"{run}: process {process.pid} on {socket.gethostname()} is training it" in err
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    for attempt in (lambda: locks.held(run).__enter__(), lambda: locks.check_free(run)):
        with pytest.raises(locks.LockError, match=f"process {process.pid} on "):
            attempt()
    process.kill()
    process.communicate()
    assert json.loads((run / "lock.json").read_text())["pid"] == process.pid  # stale
    locks.check_free(run)
    with locks.held(run):
        assert json.loads((run / "lock.json").read_text())["pid"] == os.getpid()
        with pytest.raises(locks.LockError, match=f"process {os.getpid()} on "):
            locks.check_free(run)
    assert not (run / "lock.json").exists()


def test_where_the_file_system_has_no_flock_the_text_tells(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "fcntl", None)
    with locks.held(tmp_path), pytest.raises(locks.LockError, match=f"process {os.getpid()} on "):
        locks.check_free(tmp_path)
    others = {"host": socket.gethostname(), "pid": os.getpid(), "started": 1.0}  # the number is another process's now
    (tmp_path / "lock.json").write_text(json.dumps(others))
    locks.check_free(tmp_path)


def test_another_host_is_named_with_the_file_to_delete(tmp_path):
    (tmp_path / "lock.json").write_text(json.dumps({"host": "elsewhere", "pid": 3, "started": 1.0}))
    with pytest.raises(locks.LockError, match=r"process 3 on elsewhere may be .* delete .*lock\.json"):
        locks.check_free(tmp_path)
    with pytest.raises(locks.LockError, match="elsewhere"), locks.held(tmp_path):
        pass
    assert "elsewhere" in (tmp_path / "lock.json").read_text()


@pytest.mark.parametrize(
    "text", ["", "\xff{", "[]", '{"host": "x"}', "null", "[" * 100_000, '{"host": "x", "pid": 1e999, "started": 0}']
)
def test_a_damaged_lock_is_stale(tmp_path, text):
    (tmp_path / "lock.json").write_bytes(text.encode("latin-1"))
    locks.check_free(tmp_path)
    with locks.held(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []
