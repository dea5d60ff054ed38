"""The command line of training: every malformed call is one line, exit status 2, and nothing written."""

import importlib.util
import json
import os
import signal
import subprocess
import sys

import jax
import pytest
from absl import flags

from attn import experiment


@pytest.fixture(scope="module")
def train(repository):
    """The script as a module; absl's flags can be defined once in a process."""
    spec = importlib.util.spec_from_file_location("train", repository / "train.py")
    sys.modules["train"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def call(train, repository, tmp_path, monkeypatch, capsys):
    """Call the script with flags; returns (status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(repository / "configs")

    def main(*words):
        for name in ("config", "workdir", "resume", "distributed", "print_config"):
            flags.FLAGS[name].unparse()
        status = train.main(["train.py", *words])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return main


FILES = {
    "broken.py": "def get_config(:\n",
    "empty.py": "",
    "number.py": "def get_config():\n    return 3\n",
    "raises.py": "def get_config():\n    return {}['missing']\n",
    "unknown.py": "def get_config():\n    return {'task': {'nmae': 'copy'}}\n",
    "binary.py": "\0\0",
    "notacallable.py": "get_config = 3\n",
    "leaves.py": "import sys\nsys.exit(3)\n",
    "flat.py": "def get_config():\n    return {'task': 3}\n",
}
BAD_CALLS = {
    "--config.model.num_haeds=4": ["config.model.num_haeds", "did you mean 'num_heads'"],
    "--config.modle.num_heads=4": ["config.modle", "did you mean 'model'"],
    "--config.model.num_heads=four": ["config.model.num_heads", "'four'", "whole number"],
    "--config.model.num_heads=7": ["config.model.num_heads", "got 7", "64"],
    "--config.model.num_heads=0": ["config.model.num_heads", "got 0", "at least 1"],
    "--config.model.width=-64": ["config.model.width", "-64"],
    "--config.model.dropout=nan": ["config.model.dropout", "nan"],
    "--config.optimizer.beta1=hello": ["config.optimizer.beta1", "'hello'", "number"],
    "--config.model.tied_embeddings=maybe": ["config.model.tied_embeddings", "'maybe'", "true or false"],
    "--config.task.name=shuffle": ["config.task.name", "'shuffle'", "copy, reverse, duplicate"],
    "--config.model=small": ["config.model", "group"],
    "--config.model.width.x=1": ["config.model.width"],
    "--config.model.width": ["config.model.width", "value"],
    "--config.=1": ["config"],
    "--config=configs/pairs.py": ["config.data.path", "none given"],
    "--config.data.source=file": ["config.data.source", "'file'", "generated, tfds"],
    "--config.data.path=x.tsv": ["config.data.path", "'x.tsv'", "configs/pairs.py"],
    "--config.data.folder=x": ["config.data.folder", "tfds"],
    "--config=configs/pairs.py --config.data.path=empty.py": ["empty.py", "empty file"],
    "--config=configs/pairs.py --config.data.path=empty.py --config.data.tokens=letters": [
        "tokens",
        "letters",
        "words",
    ],
    "--config=configs/pairs.py --config.data.path=empty.py --config.task.symbols=3": ["config.task.symbols", "nothing"],
    "--confg=configs/copy.py": ["--confg", "did you mean 'config'"],
    "--resume=perhaps": ["resume", "perhaps"],
    "--distributed=some": ["distributed", "some", "auto"],
    "config.model.width=8": ["stray", "config.model.width=8"],
    "--config=configs/revrese.py": ["configs/revrese.py", "configs/reverse.py"],
    "--config=missing.py": ["missing.py", "does not exist"],
    "--config=configs": ["configs", "folder"],
    "--config=broken.py": ["broken.py", "line 1"],
    "--config=empty.py": ["empty.py", "get_config"],
    "--config=number.py": ["number.py", "returned 3"],
    "--config=raises.py": ["raises.py", "KeyError", "missing"],
    "--config=unknown.py": ["config.task.nmae", "did you mean 'name'"],
    "--config=binary.py": ["binary.py"],
    "--config=notacallable.py": ["notacallable.py", "get_config"],
    "--config=leaves.py": ["leaves.py", "SystemExit"],
    "--config=flat.py --config.task.name=copy": ["config.task", "got 3", "group"],
    "--config=": ["--config", "folder"],
    "--workdir=": ["--workdir", "a path"],
    "--config.optimizer.weight_decay=inf": ["config.optimizer.weight_decay", "inf"],
    "--workdir=~nosuchuser/run": ["--workdir", "~nosuchuser/run", "a path"],
    f"--print_config --workdir={'a' * 300}": ["aaa", "File name too long"],
    "--workdir=empty.py": ["empty.py", "file", "folder"],
    "--workdir=empty.py/run": ["empty.py", "file"],
    "--workdir=gs://bucket/run": ["--workdir", "gs://bucket/run", "not a URL"],
    "--workdir=gs:/bucket/run": ["--workdir", "gs:/bucket/run", "not a URL"],
    "--workdir=./gs://bucket/run": ["--workdir", "./gs://bucket/run", "not a URL"],
    "--resume --workdir=s3://bucket/run": ["--workdir", "s3://bucket/run", "not a URL"],
    "--workdir=nameless": ["--workdir=nameless", "holds the checkpoints of a run, but no config.json"],
    "--workdir=rows": ["--workdir=rows", "holds the metrics.jsonl of a run, but no config.json"],
    "--resume": ["runs", "--workdir"],
    "--resume --workdir=nowhere": ["nowhere", "does not exist"],
    "--resume --workdir=.": ["not a run's folder"],
}


@pytest.mark.parametrize("line", BAD_CALLS)
def test_a_malformed_call_is_one_line_and_status_2(call, tmp_path, line):
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "nameless/checkpoints/00000400").mkdir(parents=True)
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows/metrics.jsonl").write_text("")
    before = sorted(tmp_path.rglob("*"))
    status, out, err = call(*line.split())
    assert status == 2
    assert out == ""
    assert err.count("\n") == 1 and err.startswith("error: ")
    for word in BAD_CALLS[line]:
        assert word in err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.some(1)
@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--config.model.num_heads=7", "config.model.num_heads: got 7"),
        (
            "--distributed=on",
            "--distributed=on: no cluster to join",
        ),  # asked before JAX starts, so in a process of its own
    ],
)
def test_a_malformed_call_of_the_real_script_has_no_traceback(repository, tmp_path, flag, said):
    words = [sys.executable, str(repository / "train.py"), flag, f"--workdir={tmp_path / 'run'}"]
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "OMPI_", "JAX_COORD"))}
    done = subprocess.run(words, cwd=repository, env=kept, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert said in done.stderr
    assert not (tmp_path / "run").exists()


def test_print_config_prints_the_result_and_writes_nothing(call, tmp_path):
    status, out, err = call("--config=configs/copy.py", "--config.model.num_heads=8", "--print_config")
    assert (status, err) == (0, "")
    settings = json.loads(out)
    assert (settings["task"]["name"], settings["model"]["num_heads"]) == ("copy", 8)
    assert not (tmp_path / "runs").exists()


def test_help_names_every_flag(call):
    status, out, _ = call("--help")
    assert status == 0
    for name in ("--config", "--workdir", "resume", "--distributed", "print_config", "--config.SECTION.NAME"):
        assert name in out
    assert str(experiment.DEFAULT_CONFIG) in out


def test_flags_reach_the_experiment(call, monkeypatch):
    seen = []
    monkeypatch.setattr(experiment, "run", lambda request: seen.append(request) or 0)
    assert call("--workdir=w", "--resume", "--distributed=off", "--config.training.seed", "3")[0] == 0
    assert seen == [experiment.Request(None, {"training.seed": "3"}, "w", True, "off")]


def test_memory_that_does_not_suffice_is_one_line(call, monkeypatch):
    def train(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 27418603056 bytes.")

    monkeypatch.setattr(experiment, "train", train)
    status, _, err = call("--workdir=run", "--distributed=off")
    assert status == 1
    assert err == (
        "error: Out of memory allocating 27418603056 bytes; a smaller config.training.batch_size or model needs less\n"
    )


@pytest.mark.parametrize("stage", ["train", "draw", "summarise"])
def test_sigterm_is_one_line_at_every_stage(call, monkeypatch, stage):
    for name in ("train", "draw", "summarise"):
        stop = lambda *_, **__: signal.raise_signal(signal.SIGTERM)  # noqa: E731
        monkeypatch.setattr(experiment, name, stop if name == stage else lambda *_, **__: None)
    status, _, err = call("--workdir=run", "--distributed=off")
    assert (status, err) == (130, "stopped; resume with: python train.py --resume --workdir=run\n")
