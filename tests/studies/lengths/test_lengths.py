"""The whole of `attn lengths`: the files that it writes, that nothing is done twice, and errors."""

import dataclasses
import json
import re
import runpy
import shutil
import subprocess
import sys

import numpy as np
import pytest

import attn
from attn import cli
from attn.studies.jobs import Trainer
from attn.studies.lengths import page
from attn.studies.lengths.evaluation import Evaluator
from attn.studies.lengths.running import read, token_accuracy
from attn.studies.lengths.study import Grid, Row, Study
from attn.studies.report import BEGIN, END
from attn.tasks.sequences import Task
from attn.training.config import ConfigError

FILE = """
from attn.studies.lengths.study import Grid, Row, Study

SIZES = dict(width=16, num_heads=4, num_encoder_layers=1, num_decoder_layers=1, feed_forward_width=16)
POINTING = {"encoder": "none", "decoder": "none", "cross": "anchored(queries=False)"}


def get_study():
    rows = {
        "pointer": Row(SIZES | {"mechanism": POINTING}, tasks=("copy",), seeds=2),
        "lstm": Row(
            dict(name="lstm", width=8), prior="order", ends=("given",), tasks=("reverse",), seeds=1, budgets=(4,)
        ),
    }
    grid = Grid(within=(4,), beyond=(9, 12), each=8, exact=(12,), strings=60, structured=10, far=20, far_strings=3)
    return Study(
        rows,
        config={"optimizer": {"learning_rate": 1e-2, "warmup_fraction": 0.0}, "training": {"batch_size": 8}},
        budgets=(BUDGETS),
        tasks=("copy", "reverse"),
        longest=6,
        grid=grid,
    )
"""


def write(folder, budgets="2, 3"):
    path = folder / "study.py"
    path.write_text(FILE.replace("(BUDGETS)", f"({budgets})"))
    return path


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Return a study's file, and a folder for its results."""
    folder = tmp_path_factory.mktemp("lengths")
    return write(folder), folder / "out"


@pytest.fixture(scope="module")
def done(study):
    """Return the same, with all results."""
    assert run(*study) == 0
    return study


def run(config, output, *more):
    return cli.main(["lengths", "--config", str(config), "--output", str(output), *more])


def test_a_row_is_measured_once_and_written(study, tmp_path, capsys, monkeypatch):
    config, _ = study
    assert run(config, tmp_path, "--only", "lstm") == 0
    result = json.loads((tmp_path / "lstm.json").read_text())["lstm-reverse-2-seed0"]
    assert result["steps"] == 4 and not result["exact_at_longest"]  # nothing is learned in four steps
    for each in result["ends"]["given"]["tokens"].values():
        assert each["confirmed_alike"] == each["strings"] >= 7
    assert (tmp_path / "lengths.md").read_text().count("| `lstm` | order | given |") == 1
    assert (tmp_path / "lengths.png").stat().st_size > 10_000
    monkeypatch.setattr(Trainer, "train", lambda *_: pytest.fail("trained again"))
    assert run(config, tmp_path, "--only", "lstm") == 0
    assert "1 models in 1 rows, of which 0 are missing" in capsys.readouterr().out


@pytest.mark.nightly
def test_it_writes_every_row_the_tables_and_the_figure(done):
    _, output = done
    pointer = json.loads((output / "pointer.json").read_text())
    assert set(pointer) == {"pointer-copy-2-seed0", "pointer-copy-2-seed1"}
    for result in pointer.values():
        assert result["steps"] == 3 and not result["exact_at_longest"]  # nothing is learned in three steps
        assert len(result["seconds"]["training"]) == 2
        for counts in result["ends"].values():
            assert set(counts["tokens"]) == {"4", "9", "12"} and set(counts["exact"]) == {"12"}
            for each in counts["tokens"].values():
                assert each["confirmed_alike"] == each["strings"] >= 7
    assert json.loads((output / "lstm.json").read_text())["lstm-reverse-2-seed0"]["steps"] == 4
    given = pointer["pointer-copy-2-seed0"]["ends"]["given"]["tokens"]["9"]
    learned = pointer["pointer-copy-2-seed0"]["ends"]["learned"]["tokens"]["9"]
    assert (given["tokens"], learned["tokens"]) == (8 * 9, 8 * 10)  # without end tokens, and with them
    text = (output / "lengths.md").read_text()
    assert text.count("| `pointer` |") == 2 and text.count("| `lstm` | order | given |") == 1
    assert "### reverse, 2 symbols" in text and (output / "lengths.png").stat().st_size > 10_000


@pytest.mark.nightly
def test_existing_results_are_not_computed_again(done, capsys, monkeypatch):
    config, output = done
    before = {path: path.stat().st_mtime_ns for path in output.glob("*.json")}
    monkeypatch.setattr(Trainer, "train", lambda *_: pytest.fail("trained again"))
    assert run(config, output) == 0
    assert "3 models in 2 rows, of which 0 are missing" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in output.glob("*.json")} == before


@pytest.mark.nightly
def test_only_a_missing_model_is_trained(done, tmp_path):
    config, output = done
    saved = json.loads((output / "pointer.json").read_text())
    gone = saved.pop("pointer-copy-2-seed1")
    (tmp_path / "pointer.json").write_text(json.dumps(saved))
    (tmp_path / "runs").symlink_to(output / "runs")
    assert run(config, tmp_path, "--only", "pointer") == 0
    again = json.loads((tmp_path / "pointer.json").read_text())
    assert again["pointer-copy-2-seed1"]["ends"] == gone["ends"]
    assert again["pointer-copy-2-seed1"]["seconds"]["training"] == [None, None]  # both trainings existed
    assert {name: again[name] for name in saved} == saved

    again.pop("pointer-copy-2-seed0")  # only one seed is run: the file keeps the other
    (tmp_path / "pointer.json").write_text(json.dumps(again))
    assert run(config, tmp_path, "--only", "pointer", "--seeds", "1") == 0
    assert set(json.loads((tmp_path / "pointer.json").read_text())) == {"pointer-copy-2-seed0", "pointer-copy-2-seed1"}


@pytest.mark.nightly
def test_a_page_keeps_what_stands_around_the_tables(done, tmp_path):
    config, output = done
    path = tmp_path / "page.md"
    path.write_text(f"# Before\n{BEGIN}\nobsolete\n{END}\nafter\n")
    assert run(config, output, "--page", str(path)) == 0
    text = path.read_text()
    assert text.startswith(f"# Before\n{BEGIN}\n") and text.endswith(f"{END}\nafter\n")
    assert "obsolete" not in text and "`pointer`" in text and "(page.png)" in text
    assert (tmp_path / "page.png").exists()


@pytest.mark.nightly
def test_an_end_that_was_added_to_a_row_is_evaluated_on_existing_models(done, tmp_path):
    config, output = done
    saved = json.loads((output / "pointer.json").read_text())
    whole = saved["pointer-copy-2-seed0"]["ends"].copy()
    del saved["pointer-copy-2-seed0"]["ends"]["given"]
    saved["pointer-copy-2-seed0"]["seconds"]["training"] = [12.0, 34.0]
    (tmp_path / "pointer.json").write_text(json.dumps(saved))
    (tmp_path / "runs").symlink_to(output / "runs")
    assert run(config, tmp_path, "--only", "pointer") == 0
    now = json.loads((tmp_path / "pointer.json").read_text())["pointer-copy-2-seed0"]
    assert now["ends"] == whole and now["seconds"]["training"] == [12.0, 34.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "pointr"], "--only: got 'pointr', must be one of pointer, lstm (did you mean 'pointer'?)"),
        (["--config", "no.py"], "--config=no.py: does not exist"),
        (["--seeds", "0"], "'0' must be a whole number from 1 to 1,000"),
        (["--page", "README.md"], "has no lines"),
        (["--page", "no/such/page.md"], "--page=no/such/page.md: folder no/such does not exist"),
        (["--page", "page.png"], "--page=page.png: must end in .md"),
    ],
)
def test_a_bad_argument_is_one_line_and_status_2(arguments, message, study, capsys):
    config, output = study
    try:
        status = run(config, output, *arguments)
    except SystemExit as error:
        status = error.code
    assert status == 2
    [line] = capsys.readouterr().err.splitlines()
    assert message in line


@pytest.mark.nightly
def test_damaged_results_and_those_of_another_study_are_named(done, tmp_path, capsys):
    config, output = done
    (tmp_path / "pointer.json").write_text('{"pointer-copy-2-seed0": {}}')
    assert run(config, tmp_path) == 2
    assert re.search(r"pointer\.json: cannot be read .*; delete it to measure it again", capsys.readouterr().err)
    (tmp_path / "pointer.json").write_text("[]")
    assert run(config, tmp_path, "--only", "lstm") == 2  # before anything is trained
    assert re.search(r"pointer\.json: cannot be read", capsys.readouterr().err)
    other = write(tmp_path, "2, 4")
    assert run(other, output) == 2
    assert "was produced with different settings; delete it or choose another --output" in capsys.readouterr().err


@pytest.mark.nightly
def test_incomplete_results_with_different_settings_are_refused_and_kept(done, tmp_path, capsys):
    _, output = done
    saved = json.loads((output / "pointer.json").read_text())
    for each in saved.values():
        del each["ends"]["given"]
    text = json.dumps(saved)
    (tmp_path / "pointer.json").write_text(text)
    assert run(write(tmp_path, "2, 4"), tmp_path, "--only", "pointer", "--seeds", "1") == 2
    assert "different settings" in capsys.readouterr().err
    assert (tmp_path / "pointer.json").read_text() == text


def test_a_page_without_marks_is_refused_before_anything_is_trained(study, tmp_path, capsys):
    config, _ = study
    for saved, message in [(b"mine", "has no lines"), (b"\xff", "not a text")]:
        (tmp_path / "lengths.md").write_bytes(saved)
        assert run(config, tmp_path) == 2
        assert message in capsys.readouterr().err
        assert (tmp_path / "lengths.md").read_bytes() == saved and not (tmp_path / "runs").exists()


@pytest.mark.nightly
def test_a_damaged_config_of_a_run_is_named_before_it_is_trained(done, tmp_path, capsys):
    config, output = done
    shutil.copytree(output / "runs", tmp_path / "runs")
    [run_folder] = (tmp_path / "runs").glob("reverse-lstm-*")
    (run_folder / "config.json").write_text("junk")
    shutil.rmtree(run_folder / "checkpoints")
    assert run(config, tmp_path, "--only", "lstm") == 2
    out, err = capsys.readouterr()
    assert "config.json" in err and "delete it to train it again" in err and "training " not in out


def test_a_wrong_row_is_refused():
    sizes = dict(width=16, num_heads=4)
    for row, message in [
        (
            Row(sizes | {"mechanism": "anchored"}),
            r"row 'it': .* reads the length of the answer.*: ends must be \('given',\)",
        ),
        (Row(sizes | {"mechanism": "rotry"}), r"row 'it': config.model.mechanism: got 'rotry'.*did you mean 'rotary'"),
        (Row(sizes, ends=("never",)), r"row 'it': ends: got 'never', must be one of learned, given"),
        (Row(sizes, tasks=("cpy",)), r"row 'it': config.task.name: got 'cpy'"),
        (
            Row(sizes | {"mechanism": "learned(1500)"}, tasks=("duplicate",)),
            r"row 'it': the grid has strings of 1,000 symbols, .* at most 749",
        ),
        (Row(sizes, seeds=0), r"row 'it': seeds: got 0, must be a whole number at least 1"),
        (Row(sizes, budgets=(0,)), r"row 'it': budgets: got \(0,\), must be a tuple"),
        (Row(sizes, ends=()), r"row 'it': ends: got \(\), must be a tuple"),
        (Row(sizes, far=("cpy",)), r"row 'it': far: got 'cpy', must be one of copy, reverse.*did you mean 'copy'"),
    ]:
        with pytest.raises(ConfigError, match=message):
            Study({"it": row}, config={}).check()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rows": {}}, r"rows: got \{\}, must be a dict with one row or more"),
        ({"rows": {"no/ne": Row({})}}, r"a row's name: got 'no/ne', must be of letters"),
        ({"grid": Grid(beyond=())}, r"grid: beyond: got \(\), must be a tuple"),
        ({"grid": Grid(beyond=(0, 12))}, r"grid: beyond: got \(0, 12\), must be a tuple"),
        ({"grid": Grid(each=0)}, r"grid: each: got 0, must be a whole number at least 1"),
    ],
)
def test_what_rows_share_is_checked(changed, message):
    with pytest.raises(ConfigError, match=message):
        Study(**({"rows": {"it": Row({"mechanism": "none"})}, "config": {}} | changed)).check()


TYPES = """
from attn.studies.lengths.study import Row, Study
for rows, more in [
    ({"it": Row({}, symbols=2)}, {}),
    ({"it": Row({}, tasks="copy")}, {}),
    ({"it": Row({}, seeds="2")}, {}),
    ({"it": Row(None)}, {}),
    ({"it": {}}, {}),
    ({"it": Row({})}, {"budgets": 5}),
    ({"it": Row({})}, {"grid": {}}),
]:
    try:
        Study(rows, config={}, **more).check()
    except ValueError as error:
        print(error)
"""


def test_types_are_checked_without_the_import_hook_of_the_tests():
    done = subprocess.run([sys.executable, "-c", TYPES], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "row 'it': symbols: got 2, must be a tuple such as (1, 2) or None",
        "row 'it': tasks: got 'copy', must be a tuple such as ('one', 'two') or None",
        "row 'it': seeds: got '2', must be a whole number at least 1",
        "row 'it': model: got None, must be dict",
        "row 'it': got {}, must be Row",
        "budgets: got 5, must be a tuple such as (1, 2)",
        "grid: got {}, must be Grid",
    ]


class Oracle(Evaluator):
    """An evaluator whose model gives the correct answers, with every tenth symbol changed or none."""

    def __init__(self, task: Task, errs: bool):
        self.task, self.end, self.errs = task, "given", errs

    def decoded(self, questions):
        answers = questions.targets.copy()
        if self.errs:
            answers[:, ::10] = self.task.vocabulary.begin
        return answers

    def confirmed(self, questions):
        return (self.decoded(questions) == questions.targets).all(1)


@pytest.mark.parametrize("name", ["copy", "reverse", "duplicate"])
def test_correct_tokens_and_strings_are_counted(name):
    task, symbols = Task(name, symbols=2), 8 * 50 * (2 if name == "duplicate" else 1)
    right, wrong = Oracle(task, errs=False), Oracle(task, errs=True)
    all_right = {"strings": 8, "exact": 8, "tokens": symbols, "right": symbols, "confirmed_alike": 8}
    assert right.tokens(50, 8) == all_right
    assert wrong.tokens(50, 8) == all_right | {"exact": 0, "right": symbols * 9 // 10}
    assert right.exact(50, 60) == {"strings": 60, "exact": 60}
    assert wrong.exact(50, 60) == {"strings": 50, "exact": 0}  # no more than needed
    assert right.structured(9)["one odd"] == {"strings": 9, "exact": 9}
    assert wrong.structured(9)["one odd"] == {"strings": 9, "exact": 0}


@pytest.mark.nightly
def test_lengths_share_programs(done):
    _, output = done
    evaluator = Evaluator(attn.load(next((output / "runs").glob("copy-transformer-seed0-*"))), "given")
    for length in (9, 33, 64):
        evaluator.tokens(length, 3)
    assert evaluator.decode._cache_size() == evaluator.confirm._cache_size() == 1
    evaluator.exact(65, 3)
    assert evaluator.confirm._cache_size() == 2


@pytest.mark.nightly
def test_the_seconds_of_an_interrupted_training_are_not_known(done):
    config, output = done
    study = runpy.run_path(str(config))["get_study"]()
    first, second = result = list(read(study, "pointer", output).values())
    first["seconds"]["training"], second["seconds"]["training"] = [1.0, None], [5.0, 3.0]
    named = {str(number): each for number, each in enumerate(result)}
    assert page.tables(study, named).count("(3) | 3 |") == 2
    second["seconds"]["training"] = [5.0, None]
    assert page.tables(study, named).count("(3) | not known |") == 2


def test_rows_of_another_device_are_named():
    on = [("far", "cpu"), ("near", "cpu"), ("far", "cpu"), ("near", "TPU v5")]
    results = {str(n): {"row": row, "machine": {"devices": [device] * 2}} for n, (row, device) in enumerate(on)}
    assert page._devices(results) == "on cpu; `near` on TPU v5"


def test_accuracy_is_the_mean_over_lengths():
    result = {"ends": {"given": {"tokens": {"10": {"right": 5, "tokens": 10}, "100": {"right": 100, "tokens": 100}}}}}
    assert token_accuracy(result, "given", [10, 100]) == 0.75


def test_a_spread_is_best_median_and_worst_and_only_100_reads_as_100():
    assert page._spread([0.01, 0.09, 0.03]) == "9.0 / 3.0 / 1.0"
    assert page._spread([1.0, 1.0]) == "100.0"
    assert page._percent(99.97) == "< 100"


@pytest.mark.nightly
def test_seeds_limit_every_row(done, capsys):
    config, output = done
    assert run(config, output, "--seeds", "1") == 0
    assert "2 models in 2 rows" in capsys.readouterr().out


@pytest.mark.nightly
def test_results_are_read_from_the_folder(done):
    config, output = done
    study = runpy.run_path(str(config))["get_study"]()
    study.check()
    assert len(read(study, "pointer", output)) == 2
    fewer = dataclasses.replace(study, rows={"pointer": dataclasses.replace(study.rows["pointer"], seeds=1)})
    assert len(read(fewer, "pointer", output)) == 1
    assert np.isfinite(
        [token_accuracy(each, "given", (9, 12)) for each in read(study, "pointer", output).values()]
    ).all()
