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

config, overrides, folder = json.loads(sys.argv[1])
EVENTS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "shutil.rmtree"}

def train(at, resume):
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
    at, resume = json.loads(line)
    reader, writer = os.pipe()
    if not (child := os.fork()):
        os.dup2(2, 1)
        status, seen = train(at, resume)
        os.write(writer, str(seen).encode())
        os._exit(status)
    os.close(writer)
    _, status = os.waitpid(child, 0)
    print(json.dumps([os.waitstatus_to_exitcode(status), os.read(reader, 100).decode()]), flush=True)
    os.close(reader)
"""


class Trainer:
    """A process that trains a run in forks of itself."""

    def __init__(self, repository, tiny, folder):
        short = {"training.steps": "50", "training.checkpoint_every": "20", "training.steps_per_dispatch": "10"}
        given = [str(repository / "configs/copy.py"), tiny | short | {"evaluation.examples": "20"}, str(folder)]
        self.folder = folder
        self._process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, json.dumps(given)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def train(self, at: int) -> tuple[int, int]:
        """Train until the end, or until moment `at`; returns the exit status, and how many moments there were."""
        resume = (self.folder / "config.json").exists()
        self._process.stdin.write(json.dumps([at, resume]) + "\n")
        self._process.stdin.flush()
        status, seen = json.loads(self._process.stdout.readline())
        return status, int(seen or 0)

    def close(self) -> str:
        """End the process; returns all that the trainings wrote on stderr, and on stdout."""
        return self._process.communicate(timeout=60)[1]


def digests(folder) -> list[dict]:
    """The SHA-256 of every array of every checkpoint; that they hold is tested with checkpoints."""
    paths = sorted((folder / "checkpoints").glob("*/digests.json"))
    return [(path.parent.name, json.loads(path.read_text())["arrays"]) for path in paths]


def rows_without_speed(folder) -> list[dict]:
    rows = read(Folder(folder).metrics)
    assert rows_of_events(folder) == in_float32(rows)
    return [{name: value for name, value in row.items() if name != "tokens_per_second"} for row in rows]


@pytest.fixture(scope="module")
def unbroken(repository, tiny, tmp_path_factory):
    """The folder of a run that was not killed, and how many moments it has."""
    trainer = Trainer(repository, tiny, tmp_path_factory.mktemp("unbroken") / "run")
    status, moments = trainer.train(0)
    assert status == 0, trainer.close()
    trainer.close()
    assert len(rows_without_speed(trainer.folder)) == 5
    return trainer.folder, moments


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("seed", range(int(os.environ.get("ATTN_KILLED_RUNS", "2"))))
def test_a_run_that_is_killed_ends_as_one_that_is_not(repository, tiny, tmp_path, unbroken, seed):
    whole, moments = unbroken
    rng = random.Random(seed)
    trainer = Trainer(repository, tiny, tmp_path / "run")
    killed = [trainer.train(rng.randrange(1, moments))[0] for _ in range(2)]
    assert killed[0] == -signal.SIGKILL and set(killed) <= {-signal.SIGKILL, 0}
    status, _ = trainer.train(0)
    said = trainer.close()
    assert status == 0, said
    assert "damaged" not in said and "Traceback" not in said
    assert digests(trainer.folder) == digests(whole)
    assert rows_without_speed(trainer.folder) == rows_without_speed(whole)
    names = [sorted(path.name for path in folder.rglob("*")) for folder in (trainer.folder, whole)]
    known = [{name for name in each if len(name) < 30 and "tfevents" not in name} for each in names]
    assert known[0] == known[1]  # nothing is left over
