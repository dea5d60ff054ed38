"""The launcher prints the commands that it would run."""

import os
import shlex
import subprocess

import pytest


def launch(repository, *words, **variables):
    environment = {"PATH": os.environ["PATH"]} | variables
    script = str(repository / "launch/tpu_vm.sh")
    return subprocess.run(["bash", script, *words], env=environment, capture_output=True, text=True)


def test_a_dry_run_prints_commands_made_from_variables(repository):
    done = launch(
        repository,
        "--dry_run",
        PROJECT="my-project",
        ZONE="us-z1",
        NAME="mine",
        ACCELERATOR_TYPE="v5litepod-16",
        REPOSITORY="https://example.com/attn.git",
        TRAIN_ARGS="--config=configs/copy.py --config.training.seed=3",
    )
    assert done.returncode == 0, done.stderr
    commands = [shlex.split(line) for line in done.stdout.splitlines() if not line.startswith("#")]
    assert [command[:5] for command in commands] == [["gcloud", "compute", "tpus", "tpu-vm", "create"]] + [
        ["gcloud", "compute", "tpus", "tpu-vm", "ssh"]
    ] * 3
    for command in commands:
        assert {"mine", "--project=my-project", "--zone=us-z1"} <= set(command)
    assert "--accelerator-type=v5litepod-16" in commands[0]
    assert all("--worker=all" in command for command in commands[1:])
    assert "https://example.com/attn.git" in commands[2][-1]
    assert commands[3][-1].endswith("--distributed=auto --config=configs/copy.py --config.training.seed=3")


@pytest.mark.parametrize(
    ("words", "variables", "said"),
    [
        (["--dry_run"], {"ZONE": "z"}, "PROJECT"),
        (["--dry_run"], {"PROJECT": "p"}, "ZONE"),
        (["--dryrun"], {"PROJECT": "p", "ZONE": "z"}, "--dryrun"),
    ],
)
def test_what_is_missing_is_one_line_and_status_2(repository, words, variables, said):
    done = launch(repository, *words, **variables)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert said in done.stderr
