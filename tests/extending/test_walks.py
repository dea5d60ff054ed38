"""Additions from a file outside of the package train, resume, answer, are drawn, and decode as the full pass does."""

import dataclasses
import importlib
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from matplotlib.image import imread
from right_answers import RIGHT

import attn
from attn import cli, experiment
from attn.functional.implementations import IMPLEMENTATIONS
from attn.tasks import Generated
from attn.tasks.sequences import Task
from attn.tasks.vocabulary import before
from attn.training.checks import check_runs
from attn.training.config import from_mapping

MINE = pathlib.Path(__file__).parent / "mine"
SMALL = {
    "task.symbols": "5",
    "task.max_length": "5",
    "model.width": "24",
    "model.feed_forward_width": "32",
    "training.steps": "10",
    "training.stop_when_exact": "0",
    "training.evaluate_every": "10",
    "training.checkpoint_every": "10",
    "training.steps_per_call": "10",
    "evaluation.examples": "40",
    "evaluation.intermediate_examples": "40",
    "evaluation.batch_size": "40",
}
TWO_STACKS = {"model.num_encoder_layers": "1", "model.num_decoder_layers": "1"}
ONE_TEXT = {"model.name": "decoder_only", "model.num_layers": "2"}
WALKS = {  # module, settings, most lines
    "temperature": ("temperature", TWO_STACKS | {"model.mechanism": "temperature + rotary"}, 12),
    "temperature_decoder_only": ("temperature", ONE_TEXT | {"model.mechanism": "rotary + temperature"}, 12),
    "learned_rotary": ("learned_rotary", TWO_STACKS | {"model.mechanism": "learned_rotary"}, 15),
    "unit_queries": ("unit_queries", TWO_STACKS | {"model.mechanism": "sinusoidal + unit_queries"}, 15),
    "fourier": ("fourier", TWO_STACKS | {"model.mechanism": "fourier"}, 15),
    "near": ("nearest", TWO_STACKS | {"model.mechanism": "rotary + near"}, 15),
    "near_decoder_only": ("nearest", ONE_TEXT | {"model.mechanism": "rotary + near"}, 15),
    "model": ("causal_model", {"model.name": "causal_model"}, 60),
    "sort": ("tasks", TWO_STACKS | {"task.name": "ascending"}, 8),
    "parity": ("tasks", TWO_STACKS | {"task.name": "parity"}, 8),
    "plus": ("tasks", TWO_STACKS | {"task.name": "plus"}, 8),
    "kernel": ("tiled", TWO_STACKS | {"model.implementation": "tiled"}, 110),
}
BY_DAY = ("model", "kernel")  # a mechanism is trained by day in a process of its own, below
walks = pytest.mark.parametrize(
    "walk", [pytest.param(name, marks=() if name in BY_DAY else pytest.mark.nightly) for name in WALKS]
)


def lines_of(name: str) -> int:
    """The lines of a file of `mine`, or, of those with several tasks, of the longest one."""
    text = (MINE / f"{name}.py").read_text()
    return max(len(part.splitlines()) for part in (text.split("\n\n\n")[1:] if name == "tasks" else [text]))


def fresh(*words: str, **options) -> subprocess.CompletedProcess:
    """Run Python in a process of its own."""
    options = {"cwd": MINE.parents[2], "capture_output": True, "text": True} | options
    return subprocess.run([sys.executable, *words], **options)


@walks
def test_it_trains_resumes_answers_and_is_drawn(walk, write_module, tmp_path, capsys):
    name, settings, most_lines = WALKS[walk]
    assert lines_of(name) <= most_lines
    folder, overrides = tmp_path / "run", SMALL | settings | {"imports": write_module(name)}
    request = experiment.Request(str(MINE.parents[2] / "configs/reverse.py"), overrides, str(folder), False, "off")
    assert experiment.run(request) == 0
    resumed = fresh("train.py", "--resume", f"--workdir={folder}", "--config.training.steps=20")
    assert resumed.returncode == 0, resumed.stderr
    assert attn.load(folder).step == 20
    answered = fresh("-m", "attn.cli", "predict", str(folder), "1 2 3", "4")
    assert answered.returncode == 0, answered.stderr
    capsys.readouterr()
    for command in (
        ["predict", str(folder), "--beam", "3", "1 2 3", "4"],
        ["evaluate", str(folder), "--lengths", "2:3", "--examples", "8"],
        ["inspect", str(folder), "1 2 3", "--output", str(tmp_path / "map.png")],
    ):
        assert cli.main(command) == 0, capsys.readouterr().err
    assert imread(tmp_path / "map.png")[..., :3].std() > 0.02
    assert_cached_decoding_equals_the_full_pass(attn.load(folder))


def assert_cached_decoding_equals_the_full_pass(run):
    """Over a batch of sources of several lengths, token by token with a cache, on one device and on two."""
    sources = jnp.array([[1, 2, 3, run.vocabulary.end, 0], [4, run.vocabulary.end, 0, 0, 0]] * 2)
    inputs = jnp.array([[run.vocabulary.begin, 3, 2, 1]] * 4)
    graphdef, params = nnx.split(run.model)

    def full(params, source, inputs):
        return nnx.merge(graphdef, params)(source, inputs)

    def cached(params, source, inputs):
        model = nnx.merge(graphdef, params)
        cache, _ = model.start(source, len(inputs))
        logits = []
        for token in inputs:
            row, cache, _ = model.extend(token[None], cache)
            logits.append(row[0])
        return jnp.stack(logits)

    alone = jnp.stack([jax.jit(full)(params, *one) for one in zip(sources, inputs)])
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    shards = jax.sharding.NamedSharding(mesh, jax.P("data"))
    for function in (full, cached):
        batched = jax.jit(jax.vmap(function, in_axes=(None, 0, 0)))
        np.testing.assert_allclose(batched(params, sources, inputs), alone, atol=2e-5)
        two = jax.device_put((sources, inputs), shards)
        np.testing.assert_allclose(batched(params, *two), alone, atol=2e-5)


def test_a_run_names_its_import_and_is_opened_with_it_in_a_fresh_process(write_module, tmp_path):
    module, folder = write_module("temperature"), tmp_path / "run"
    settings = SMALL | TWO_STACKS | {"model.mechanism": "rotary + temperature"}
    settings = [f"--config.{key}={value}" for key, value in settings.items()]
    done = fresh("train.py", f"--imports={module}", f"--workdir={folder}", *settings)
    assert done.returncode == 0, done.stderr
    predict = "-m", "attn.cli", "predict"
    assert fresh(*predict, str(folder), "1 2 3").returncode == 0
    # A mistake that came later is one line that names the file's.
    text = (tmp_path / f"{module}.py").read_text()
    (tmp_path / f"{module}.py").write_text(text.replace("self.log[...]", "self.lag[...]"))
    mistaken = fresh(*predict, str(folder), "1 2 3")
    assert mistaken.returncode == 2 and mistaken.stderr.count("\n") == 1
    assert "no attribute 'lag'" in mistaken.stderr and f", line 12 of {tmp_path / module}.py" in mistaken.stderr
    # Without the module one line says which one is missing.
    without = {"env": {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}}
    lost = fresh(*predict, str(folder), "1 2 3", cwd=tmp_path.parent, **without)
    assert lost.returncode == 2 and lost.stderr.count("\n") == 1
    assert f"'{module}' cannot be imported" in lost.stderr and "its folder must be in PYTHONPATH" in lost.stderr
    # A file of that name in the run's folder is not executed.
    (folder / f"{module}.py").write_text("raise SystemExit('it ran')")
    refused = fresh(*predict, ".", "1 2 3", cwd=folder, **without)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
    assert f"'{module}' is found in the folder of a run" in refused.stderr and "it ran" not in refused.stderr


@pytest.mark.nightly
def test_the_shared_tests_of_models_pick_up_a_model_from_outside():
    words = "-m", "pytest", "-p", "causal_model", "tests/nn", "-k", "causal_model", "-m", ""
    environment = os.environ | {"PYTHONPATH": str(MINE), "PYTEST_ADDOPTS": "-p no:xdist"}
    done = fresh(*words, env=environment)
    assert done.returncode == 0, done.stdout[-3000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= 8


def test_the_sums_of_the_file_are_right(write_module):
    importlib.import_module(write_module("tasks"))
    task = Task("plus", symbols=3, max_length=7)
    questions = Generated(task).questions("test", 300, 0)
    for source, length, target in zip(questions.sources, questions.lengths, questions.targets):
        assert before(task.vocabulary.end, target) == RIGHT["add"](source[:length].tolist(), 3)


@pytest.mark.parametrize("name", ["reference", "blockwise"])
def test_the_implementation_of_attention_is_a_setting(name, monkeypatch):
    calls = []
    known = IMPLEMENTATIONS[name]

    def counting(*arrays, **options):
        calls.append(name)
        return known.attend(*arrays, **options)

    monkeypatch.setitem(IMPLEMENTATIONS, name, dataclasses.replace(known, attend=counting))
    config = from_mapping({"model": {"implementation": name}})
    check_runs(config, Generated(config.task))
    assert calls
