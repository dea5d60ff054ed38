"""Two processes on loopback train as one does."""

import functools
import json
import os
import signal
import socket
import subprocess
import sys

import pytest

from attn.training import meshes


@pytest.fixture(scope="module")
def flags(tiny):
    small = tiny | {"training.steps": "30", "training.steps_per_call": "10", "training.evaluate_every": "20"}
    return [f"--config.{key}={value}" for key, value in small.items()]


@pytest.fixture(scope="module")
def command(repository, flags):
    return [sys.executable, str(repository / "train.py"), f"--config={repository}/configs/copy.py", *flags]


@pytest.fixture(scope="module")
def pairs_command(repository, flags, tmp_path_factory):
    """The same on a file of pairs: cubes, with dashes before them."""
    path = tmp_path_factory.mktemp("pairs") / "numbers.tsv"
    path.write_text("".join(f"{n}\t{'-' * (n % 7 + 1)}{n}\n" for n in (k**3 for k in range(800))))
    synthetic = [flag for flag in flags if not flag.startswith("--config.task")]
    of_pairs = [f"--config.data.path={path}", "--config.evaluation.beam_width=2"]
    of_pairs += ["--config.model.num_encoder_layers=1", "--config.model.num_decoder_layers=1"]
    config = f"--config={repository}/configs/pairs.py"
    return [sys.executable, str(repository / "train.py"), config, *synthetic, *of_pairs]


def start(command, folder, devices, **variables):
    environment = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"} | variables
    words, pipe = [*command, f"--workdir={folder}"], subprocess.PIPE
    listen = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # what starts the tests may ignore ^C
    return subprocess.Popen(words, env=environment, stdout=pipe, stderr=pipe, text=True, preexec_fn=listen)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.nightly
@pytest.mark.parametrize("learnt", ["command", "pairs_command"])
def test_two_processes_have_the_losses_of_one(learnt, tmp_path, request):
    command = request.getfixturevalue(learnt)
    cluster = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": "2"}
    flags = [*command, "--distributed=on"]
    pair = [start(flags, tmp_path / "two", 1, JAX_PROCESS_ID=str(number), **cluster) for number in (0, 1)]
    outputs = [process.communicate(timeout=300) for process in pair]
    assert [process.returncode for process in pair] == [0, 0], outputs
    one = start(command, tmp_path / "one", 2)
    alone = one.communicate(timeout=300)
    assert one.returncode == 0, alone

    rows = {run: [json.loads(row) for row in (tmp_path / run / "metrics.jsonl").open()] for run in ("one", "two")}
    assert [row["step"] for row in rows["two"]] == [10, 20, 30]
    assert [row["loss"] for row in rows["two"]] == [row["loss"] for row in rows["one"]]
    assert rows["two"][1]["exact_match"] == rows["one"][1]["exact_match"]
    summaries = {run: json.loads((tmp_path / run / "summary.json").read_text()) for run in ("one", "two")}
    assert len(summaries["two"]["devices"]) == 2
    for name in ("exact_match", "token_accuracy", "examples_evaluated", "samples", "beam"):
        assert summaries["one"][name] == summaries["two"][name]
    # One host writes and speaks.
    assert "held-out exact match" in outputs[0][0]
    assert "held-out exact match" not in outputs[1][0]


@pytest.mark.nightly
def test_a_batch_that_hosts_cannot_share_is_refused(command, tmp_path):
    cluster = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": "2"}
    flags = [*command, "--distributed=on", "--config.training.batch_size=31"]
    pair = [start(flags, tmp_path / "odd", 1, JAX_PROCESS_ID=str(number), **cluster) for number in (0, 1)]
    outputs = [process.communicate(timeout=300) for process in pair]
    assert [process.returncode for process in pair] == [2, 2]
    for _, err in outputs:
        assert "config.training.batch_size: got 31" in err
        assert "Traceback" not in err
    assert not (tmp_path / "odd").exists()


def test_the_chips_of_a_slice_share_the_batch_or_are_named(monkeypatch):
    """All of them are used, unlike those of one host: a part of a slice cannot work alone."""
    monkeypatch.setattr(meshes.jax, "process_count", lambda: 16)
    copies = functools.partial(meshes._num_copies, shape=meshes.MeshShape(), platform="tpu")
    assert [copies(batch, chips) for batch, chips in ((32, 16), (32, 32), (128, 64), (256, 256))] == [16, 32, 64, 256]
    for batch, chips, other in ((32, 64, 64), (128, 256, 256), (100, 64, 128)):
        with pytest.raises(meshes.DistributedError, match=rf"got {batch}, .* multiple of {chips} .*such as {other}\)"):
            copies(batch, chips)


@pytest.mark.parametrize(
    ("name", "text"), [("JAX_NUM_PROCESSES", "²"), ("JAX_NUM_PROCESSES", "0"), ("JAX_PROCESS_ID", "-1")]
)
def test_what_is_no_count_is_named(monkeypatch, name, text):
    monkeypatch.setenv(name, text)
    with pytest.raises(meshes.DistributedError, match=f"^{name}: got {text!r}, must be a whole number at least"):
        meshes.start_hosts("auto")


SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0"}


@pytest.mark.some(1)
@pytest.mark.parametrize("number", ["0", "1"])
def test_a_process_whose_others_do_not_come_says_so_and_leaves(command, tmp_path, number):
    """The first waits for the others to join, the others for the first to answer."""
    _, script, *flags = command
    impatient = "import runpy, sys; from attn.training import meshes; meshes._PATIENCE = 2; del sys.argv[0]; "
    program = impatient + f"runpy.run_path({script!r}, run_name='__main__')"
    cluster = SLURM | {"SLURM_PROCID": number, "JAX_COORDINATOR_PORT": str(free_port())}
    process = start([sys.executable, "-c", program, script, *flags], tmp_path / "run", 1, **cluster)
    out, err = process.communicate(timeout=300)
    waiting, failed = err.splitlines()
    assert (process.returncode, out) == (2, "")
    assert waiting.startswith("waiting for the other processes of the cluster (") and "SLURM_NTASKS=2" in waiting
    assert "Ctrl-C stops, --distributed=off trains without them" in waiting
    assert failed.startswith("error: --distributed=auto: not all processes of the cluster joined within 2 s")
    assert not (tmp_path / "run").exists()


@pytest.mark.nightly
def test_interrupted_while_it_waits_for_others_it_leaves_at_once(command, tmp_path):
    cluster = SLURM | {"SLURM_PROCID": "0", "JAX_COORDINATOR_PORT": str(free_port())}
    process = start(command, tmp_path / "run", 1, **cluster)
    assert process.stderr.readline().startswith("waiting for the other processes")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)  # it would wait 300 s
    assert (process.returncode, err) == (130, "stopped before the run began\n")


@pytest.mark.some(1)
@pytest.mark.parametrize("mode", ["on", "auto"])
def test_half_a_cluster_is_named(command, tmp_path, mode):
    process = start([*command, f"--distributed={mode}"], tmp_path / "x", 1, JAX_NUM_PROCESSES="2")
    _, err = process.communicate(timeout=300)
    assert (process.returncode, err.count("\n")) == (2, 1)
    assert "JAX_COORDINATOR_ADDRESS" in err
