"""Processes that are killed at any moment: the run goes on, and ends as one that was never killed."""

import json
import os
import random
import signal
import subprocess
import sys

import pytest
from event_rows import in_float32, rows_of_events

from attn.training.folders import Folder
from attn.training.rows import read

# Trains in forks of one process, so that JAX is imported once. A fork kills itself with SIGKILL at a moment that is
# counted in what Python does to files of the run's folder, and in rows: so every moment can be hit, and hit again.
PROGRAM = """
import json, os, signal, sys
from attn import experiment
from attn.training.rows import RowFiles

config, overrides = json.loads(sys.argv[1])
EVENTS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "shutil.rmtree"}

def train(folder, at, resume):
    seen = 0
    def moment(*_):
        nonlocal seen
        seen += 1
        if seen == at:
            os.kill(os.getpid(), signal.SIGKILL)
    def audit(event, given):
        if event in EVENTS and any(folder in str(word) for word in given):
            moment()
    write = RowFiles.write
    RowFiles.write = lambda files, row: (moment(), write(files, row), moment())
    sys.addaudithook(audit)
    if resume:
        status = experiment.run(experiment.Request(None, {}, folder, True, "off"))
    else:
        status = experiment.run(experiment.Request(config, overrides, folder, False, "off"))
    return status, seen

for line in sys.stdin:
    folder, at, resume = json.loads(line)
    reader, writer = os.pipe()
    if not (child := os.fork()):
        os.dup2(2, 1)
        status, seen = train(folder, at, resume)
        os.write(writer, str(seen).encode())
        os._exit(status)
    os.close(writer)
    _, status = os.waitpid(child, 0)
    print(json.dumps([os.waitstatus_to_exitcode(status), os.read(reader, 100).decode()]), flush=True)
    os.close(reader)
"""


@pytest.fixture(scope="module")
def train(repository, tiny):
    """`(folder, at) -> (exit status, moments)`: train until the end, or until moment `at`."""
    short = {"training.steps": "50", "training.checkpoint_every": "20", "training.steps_per_call": "10"}
    given = json.dumps([str(repository / "configs/copy.py"), tiny | short | {"evaluation.examples": "20"}])
    words, pipe = [sys.executable, "-c", PROGRAM, given], subprocess.PIPE
    with subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True) as process:

        def run(folder, at: int) -> tuple[int, int]:
            process.stdin.write(json.dumps([str(folder), at, (folder / "config.json").exists()]) + "\n")
            process.stdin.flush()
            status, seen = json.loads(process.stdout.readline())
            return status, int(seen or 0)

        yield run


def digests(folder) -> list[dict]:
    """The SHA-256 of every array of every checkpoint; that they hold is tested with checkpoints."""
    paths = sorted((folder / "checkpoints").glob("*/digests.json"))
    return [(path.parent.name, json.loads(path.read_text())["arrays"]) for path in paths]


def snapshots(folder) -> dict[str, bytes]:
    """The content of every snapshot."""
    return {path.name: path.read_bytes() for path in sorted((folder / "snapshots").iterdir())}


def rows_without_speed(folder) -> list[dict]:
    rows = read(Folder(folder).metrics)
    assert rows_of_events(folder) == in_float32(rows)
    return [{name: value for name, value in row.items() if name != "tokens_per_second"} for row in rows]


@pytest.fixture(scope="module")
def unbroken(train, tmp_path_factory):
    """The folder of a run that was not killed, and how many moments it has."""
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    status, moments = train(folder, 0)
    assert (status, len(rows_without_speed(folder))) == (0, 5)
    assert len(snapshots(folder)) == 16
    return folder, moments


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("kills", [1, pytest.param(2, marks=pytest.mark.nightly)])  # of the run, and of what goes on
@pytest.mark.parametrize("seed", range(int(os.environ.get("ATTN_KILLED_RUNS", "1"))))
def test_a_run_that_is_killed_ends_as_one_that_is_not(train, tmp_path, unbroken, seed, kills):
    whole, moments = unbroken
    rng, run = random.Random(seed), tmp_path / "run"
    killed = [train(run, rng.randrange(1, moments))[0] for _ in range(kills)]
    assert killed[0] == -signal.SIGKILL and set(killed) <= {-signal.SIGKILL, 0}
    assert train(run, 0)[0] == 0
    assert digests(run) == digests(whole)
    assert snapshots(run) == snapshots(whole)
    assert rows_without_speed(run) == rows_without_speed(whole)
    # Nothing is left half-written or half-removed, and nothing was taken for damaged.
    assert [*run.rglob(".*"), *run.glob("checkpoints/*[!0-9]*")] == []
