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


GIVEN = {"PROJECT": "p", "ZONE": "z", "REPOSITORY": "r"}


@pytest.mark.parametrize(
    ("type_", "version", "chips"),
    [
        ("v5litepod-8", "v2-alpha-tpuv5-lite", None),
        ("v5litepod-256", "v2-alpha-tpuv5-lite", 256),
        ("v6e-16", "v2-alpha-tpuv6e", 16),
        ("v5p-8", "v2-alpha-tpuv5", None),
        ("v5p-16", "v2-alpha-tpuv5", 8),
        ("v4-8", "tpu-ubuntu2204-base", None),
    ],
)
def test_the_type_chooses_the_version_and_several_hosts_must_share_the_batch(repository, type_, version, chips):
    """Names of https://cloud.google.com/tpu/docs/runtimes; a v4 and a v5p are named by cores, two per chip."""
    done = launch(repository, "--dry_run", ACCELERATOR_TYPE=type_, **GIVEN)
    assert done.returncode == 0, done.stderr
    assert f"--accelerator-type={type_} --version={version}\n" in done.stdout
    told = f"# {chips} chips on several hosts: --config.training.batch_size must be a multiple of {chips}\n"
    assert (told in done.stdout) == (chips is not None) == ("several hosts" in done.stdout)
    mine = launch(repository, "--dry_run", ACCELERATOR_TYPE=type_, RUNTIME_VERSION="mine", **GIVEN)
    assert "--version=mine\n" in mine.stdout


def test_a_check_comes_before_training_and_its_results_are_fetched(repository):
    done = launch(repository, "--dry_run", "--check", **GIVEN)
    commands = [shlex.split(line) for line in done.stdout.splitlines() if not line.startswith("#")]
    assert commands[3][-1].endswith("attn check --output check.json")
    assert commands[4][4:7] == ["scp", "attn:attn/check.json", "check-v5litepod-8.json"]
    assert "train.py" in commands[5][-1]


@pytest.mark.parametrize(
    ("words", "variables", "said"),
    [
        (["--dry_run"], {"ZONE": "z"}, "PROJECT"),
        (["--dry_run"], {"PROJECT": "p"}, "ZONE"),
        (["--dryrun"], {"PROJECT": "p", "ZONE": "z"}, "--dryrun"),
        (["--dry_run"], GIVEN | {"ACCELERATOR_TYPE": "tpu-8"}, "got tpu-8, must be v5litepod-N, v6e-N, v5p-N or v4-N"),
        (["--dry_run"], GIVEN | {"ACCELERATOR_TYPE": "v5p"}, "got v5p, must end with a number"),
        (["--dry_run"], GIVEN | {"ACCELERATOR_TYPE": "v6e-3"}, "got v6e-3, must end with 1, 4, 8, 16"),
        (["--dry_run"], GIVEN | {"ACCELERATOR_TYPE": "v5p-4"}, "got v5p-4, must end with a multiple of 8"),
        (["--check"], GIVEN | {"ACCELERATOR_TYPE": "v5litepod-16"}, "v5litepod-16 has several hosts"),
    ],
)
def test_what_is_missing_is_one_line_and_status_2(repository, words, variables, said):
    done = launch(repository, *words, **variables)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert said in done.stderr
