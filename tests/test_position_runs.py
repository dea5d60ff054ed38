"""Runs with positions of other kinds go through the same trainer, decoding, evaluation and pictures."""

import pytest
from matplotlib.image import imread

import attn
from attn import cli, experiment

TINY = {
    "task.symbols": "4",
    "task.max_length": "6",
    "training.steps": "400",
    "evaluation.examples": "200",
    "optimizer.learning_rate": "3e-3",
}
RUNS = {
    "anchored": (
        "reverse",
        {"model.positions": "anchored_once", "model.positions.cross": "anchored", "model.width": "32"},
    ),
    "tape": (
        "tape",
        {"model.positions": "anchored", "model.width": "32", "model.num_heads": "4", "model.num_layers": "2"},
    ),
}


@pytest.fixture(scope="module", params=RUNS)
def run(request, repository, tmp_path_factory) -> attn.runs.Run:
    config, settings = RUNS[request.param]
    folder = tmp_path_factory.mktemp("positions") / request.param
    path, settings = str(repository / f"configs/{config}.py"), TINY | settings
    if request.param == "tape":
        settings |= {"training.batch_size": "32", "model.dropout": "0.0"}
    assert experiment.run(experiment.Request(path, settings, str(folder), False, "off")) == 0
    return attn.load(folder)


def test_it_is_exact_within_and_far_beyond_the_lengths_of_training(run):
    lengths = [4, 6] if run.config.model.name == "tape" else [4, 6, 50]
    assert run.evaluate(lengths, 50).overall().exact_match.value() == 1.0


def test_a_beam_answers_as_well(run):
    texts = ["1 2 3 2", "4 4 1"]
    greedy, beam = run.predict(texts), run.predict(texts, beam_width=3)
    assert greedy == beam == ["2 3 2 1", "1 4 4"]


def test_it_is_drawn_and_told_of(run, tmp_path, capsys):
    assert cli.main(["inspect", str(run.folder), "1 2 3", "--output", str(tmp_path / "map.png")]) == 0
    assert imread(tmp_path / "map.png").ndim == 3
    maps = run.look("1 2 3")
    assert (maps.influence is not None) == (run.config.model.name == "tape")
    assert cli.main(["inspect", str(run.folder)]) == 0
    assert run.config.model.name in capsys.readouterr().out


def test_an_input_beyond_the_range_of_drawn_positions_is_refused(repository, tmp_path, capsys):
    settings = TINY | {"training.steps": "20", "model.positions": "randomized_rotary", "model.positions.range": "9"}
    request = experiment.Request(str(repository / "configs/copy.py"), settings, str(tmp_path / "run"), False, "off")
    assert experiment.run(request) == 0
    assert cli.main(["predict", str(tmp_path / "run"), " ".join("1" * 9)]) == 2
    assert "input 1: 9 tokens are more than the positions can encode, at most 8" in capsys.readouterr().err
