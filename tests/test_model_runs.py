"""Runs of every kind of model and position go through the same trainer, decoding, evaluation and pictures."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.image import imread

import attn
from attn import cli, commands, experiment
from attn.inspection.influence import influence
from attn.studies.probes import untrained
from attn.tasks.examples import decoder_input
from attn.training.config import to_mapping
from attn.training.flags import load_config

TINY = {"task.symbols": "4", "training.steps": "400", "evaluation.examples": "200"}
LSTM = {"task.max_length": "4", "model.width": "32", "optimizer.learning_rate": "1e-2"}
ANCHORED = {"task.max_length": "6", "model.width": "32", "optimizer.learning_rate": "3e-3"}
POINTER = {
    "imports": "attn.studies.mechanisms",
    "model.mechanism": "anchored(keys=False, queries=False)",
    "model.mechanism.cross": "anchored",
}
TAPE = {"model.mechanism": "anchored", "model.num_heads": "4", "model.num_layers": "2", "model.dropout": "0.0"}

RUNS = {
    "lstm": ("lstm", LSTM | {"model.attention": "none"}),
    "lstm_additive": ("lstm", LSTM | {"model.attention": "additive"}),
    "lstm_multiplicative": ("lstm", LSTM | {"model.attention": "multiplicative"}),
    "anchored": ("reverse", ANCHORED | POINTER),
    "tape": ("tape", ANCHORED | TAPE | {"training.batch_size": "32"}),
}


# By day the tests of `attn lengths` train an LSTM, and many others Transformers.
ALL = [pytest.param(name, marks=pytest.mark.nightly) for name in RUNS]


@pytest.fixture(scope="module", params=ALL)
def run(request, repository, trained) -> attn.runs.Run:
    config, settings = RUNS[request.param]
    return attn.load(trained(request.param, str(repository / f"configs/{config}.py"), TINY | settings))


def test_it_learns_the_lengths_of_training(run):
    recurrent = run.config.model.name == "lstm"
    exact = run.evaluate([1, 2, 3] if recurrent else [4, 6], 50).overall().exact_match.value()
    assert exact > 0.9 if recurrent else exact == 1.0


@pytest.mark.nightly
@pytest.mark.parametrize("run", ["anchored"], indirect=True)
def test_anchored_positions_reach_far_beyond_them(run):
    assert run.evaluate([50], 50).overall().exact_match.value() == 1.0


def test_a_beam_answers_as_well(run):
    if run.config.model.name == "lstm":
        texts, right = ["1 2 3", "4 4"], ["3 2 1", "4 4"]
    else:
        texts, right = ["1 2 3 2", "4 4 1"], ["2 3 2 1", "1 4 4"]
    greedy, beam = run.predict(texts), run.predict(texts, beam_width=3)
    assert greedy == beam == right


def test_it_is_drawn_and_told_of(run, tmp_path, capsys):
    assert cli.main(["inspect", str(run.folder), "1 2 3", "--output", str(tmp_path / "map.png")]) == 0
    assert imread(tmp_path / "map.png").ndim == 3
    assert cli.main(["inspect", str(run.folder)]) == 0
    assert run.config.model.name in capsys.readouterr().out


def test_without_cross_attention_influence_is_shown_instead(run):
    maps = run.look("1 2 3")
    model = run.config.model
    if run.model.maps and getattr(model, "attention", "some") != "none":
        assert maps.influence is None and maps.weights
        sizes = (model.num_decoder_layers, model.num_heads) if model.name == "transformer" else (1, 1)
        assert maps.weights["cross"].shape == (*sizes, 4, 4)
    else:
        assert maps.weights == {}
        assert maps.influence.shape == (4, 4)


@pytest.mark.parametrize("run", [case for case in ALL if case.values[0].startswith("lstm")], indirect=True)
def test_influence_is_the_slope_of_the_logits(run):
    """Beside finite differences, in every direction of one embedding, of one step's logits."""
    source = jnp.array([1, 2, 3, run.vocabulary.end])
    read = decoder_input(jnp.array([3, 2, 1, run.vocabulary.end]), run.vocabulary.begin)
    found = influence(run.model, source, read, jnp.array([2]))
    width, eps = 32, 1e-2

    @jax.jit
    def logits(shift):
        return run.model(source, read, shift=shift)[2]

    for j in range(len(source)):
        nudges = jnp.zeros((width, len(source), width)).at[jnp.arange(width), j, jnp.arange(width)].set(eps)
        slopes = (jax.vmap(logits)(nudges) - jax.vmap(logits)(-nudges)) / (2 * eps)
        np.testing.assert_allclose(found[0, j], np.linalg.norm(slopes), rtol=2e-2)


def test_an_input_beyond_the_range_of_drawn_positions_is_refused(repository, monkeypatch, capsys):
    settings = {
        "task.max_length": "6",
        "imports": "attn.studies.mechanisms",
        "model.mechanism": "randomized(rotary, 9)",
    }
    config = load_config(str(repository / "configs/copy.py"), TINY | settings)
    monkeypatch.setattr(commands, "_load", lambda _: untrained(to_mapping(config)))
    assert cli.main(["predict", "RUN", " ".join("1" * 9)]) == 2
    assert "input 1: 9 tokens are more than the positions can encode, at most 8" in capsys.readouterr().err


def test_a_run_moves_to_a_machine_without_its_implementation(copy_run, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(copy_run, folder)
    config = json.loads((folder / "config.json").read_text())
    config["model"]["implementation"] = "cudnn"  # as if it had been trained on a GPU
    (folder / "config.json").write_text(json.dumps(config))
    assert cli.main(["predict", str(folder), "1 2"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "implementation 'cudnn' does not support" in error
    assert experiment.run(experiment.Request(None, {"model.implementation": "auto"}, str(folder), True, "off")) == 0
    capsys.readouterr()
    assert cli.main(["predict", str(folder), "1 2"]) == 0
    assert capsys.readouterr().out == "1 2\n"
