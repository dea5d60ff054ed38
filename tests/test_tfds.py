"""TFDS data sets as a user trains on them: from preparing to the long strings, and an error for any other strings."""

import json
import re

import numpy as np
import pytest

import attn
from attn import cli, experiment
from attn.tasks import builders
from attn.tasks.examples import Questions, padded
from attn.tasks.sequences import Task
from attn.training.folders import Folder

SMALL = {"data.source": "tfds", "task.symbols": "3", "training.steps": "100"}


@pytest.fixture(scope="module")
def where(tmp_path_factory):
    return tmp_path_factory.mktemp("tfds-run")


@pytest.fixture(scope="module")
def run(repository, tiny, where):
    """The folder of a finished run, on data prepared in TFDS's folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TFDS_DATA_DIR", str(where / "data"))
        request = experiment.Request(
            str(repository / "configs/reverse.py"), tiny | SMALL, str(where / "run"), False, "off"
        )
        assert experiment.run(request) == 0
    return where / "run"


def resumed(run, **overrides) -> int:
    return experiment.run(experiment.Request(None, {"training.steps": "120"} | overrides, str(run), True, "off"))


@pytest.mark.nightly
def test_the_samples_of_the_report_are_short(run):
    """TFDS shuffles, so that questions do not come in the order of their lengths."""
    summary = json.loads((run / "summary.json").read_text())
    lengths = [len(sample["input"].split()) for sample in summary["samples"]]
    assert len(set(lengths)) == 3 and lengths == sorted(lengths)


@pytest.mark.nightly
def test_the_run_knows_where_its_data_lie(run, where):
    assert Folder(run).config().data.folder == str(where / "data")


@pytest.mark.nightly
def test_it_is_evaluated_on_any_part(run, tmp_path, capsys):
    for part, lengths in (("test_long", range(7, 25)), ("test", range(1, 7)), ("validation", range(1, 7))):
        words = ["--part", part, "--examples", "3", "--output", str(tmp_path / part)]
        assert cli.main(["evaluate", str(run), *words]) == 0
        rows = json.loads((tmp_path / f"{part}.json").read_text())["by_length"]
        assert {row["length"] for row in rows} <= set(lengths) and len(rows) >= 4
        assert max(row["sources"] for row in rows) == 3
    assert cli.main(["evaluate", str(run), "--part", "train"]) == 2
    assert "part 'train' does not exist; the parts are validation, test, test_long" in capsys.readouterr().err


@pytest.mark.nightly
def test_it_neither_resumes_nor_is_evaluated_with_other_strings(run, where, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(builders, "_SEED", 7)
        other = str(where / "other")
        assert resumed(run, **{"data.folder": other}) == 2
    message = "began with as test part (by its SHA-256); start another run for it"
    assert message in capsys.readouterr().err
    (where / "data").rename(where / "kept")
    (where / "other").rename(where / "data")
    with pytest.raises(attn.training.folders.RunError, match=re.escape(message)):
        attn.load(run).evaluate(part="test")
    (where / "data").rename(where / "other")
    (where / "kept").rename(where / "data")
    assert resumed(run) == 0


def test_samples_are_of_three_lengths_each_once():
    vocabulary = Task().vocabulary

    def sampled(*lengths):
        strings = padded([[1] * length + [vocabulary.end] for length in lengths])
        questions = Questions(strings, np.array(lengths), strings, np.arange(len(lengths)))
        return experiment._sample_rows(vocabulary, questions)

    assert sampled(9, 30, 1, 5, 1) == [3, 0, 2]  # nearest to 4, 8 and 12 of those left
    assert sampled(4, 4) == [0, 1]
