"""`attn lengths` as a whole: what it writes, what it does not do twice, and what it refuses."""

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
from attn.lengths import page
from attn.lengths.asking import Examiner
from attn.lengths.running import accuracy, read
from attn.lengths.table import Asked, Row, Table
from attn.tasks.sequences import KINDS, Task
from attn.training.config import ConfigError
from attn.walkthrough.bench import Bench

FILE = """
from attn.lengths.table import Asked, Row, Table

SIZES = dict(width=16, num_heads=4, num_encoder_layers=1, num_decoder_layers=1, feed_forward_width=16)
POINTING = {"encoder": "none", "decoder": "none", "cross": "anchored_to_source"}


def get_table():
    rows = {
        "pointer": Row(SIZES | {"positions": POINTING}, tasks=("copy",), seeds=2),
        "lstm": Row(
            dict(name="lstm", width=8), builds_in="order", ends=("given",), tasks=("reverse",), seeds=1, budgets=(4,)
        ),
    }
    asked = Asked(within=(4,), beyond=(9, 12), each=8, exact=(12,), strings=60, structured=10, far=20, far_strings=3)
    return Table(
        rows,
        config={"optimizer": {"learning_rate": 1e-2, "warmup_fraction": 0.0}, "training": {"batch_size": 8}},
        budgets=(BUDGETS),
        tasks=("copy", "reverse"),
        longest=6,
        asked=asked,
    )
"""


def write(folder, budgets="2, 3"):
    path = folder / "table.py"
    path.write_text(FILE.replace("(BUDGETS)", f"({budgets})"))
    return path


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """A table's file, and a folder for its results."""
    folder = tmp_path_factory.mktemp("lengths")
    return write(folder), folder / "out"


@pytest.fixture(scope="module")
def done(table):
    """The same, with all of them."""
    assert run(*table) == 0
    return table


def run(config, output, *more):
    return cli.main(["lengths", "--config", str(config), "--output", str(output), *more])


def test_a_row_is_measured_once_and_written(table, tmp_path, capsys, monkeypatch):
    config, _ = table
    assert run(config, tmp_path, "--only", "lstm") == 0
    found = json.loads((tmp_path / "lstm.json").read_text())["lstm-reverse-2-seed0"]
    assert found["steps"] == 4 and not found["exact_at_longest"]  # nothing is learnt in four steps
    for each in found["ends"]["given"]["tokens"].values():
        assert each["confirmed_alike"] == each["strings"] >= 7
    assert (tmp_path / "lengths.md").read_text().count("| `lstm` | order | given |") == 1
    assert (tmp_path / "lengths.png").stat().st_size > 10_000
    monkeypatch.setattr(Bench, "trained", lambda *_: pytest.fail("trained again"))
    assert run(config, tmp_path, "--only", "lstm") == 0
    assert "1 models in 1 rows, of which 0 are missing" in capsys.readouterr().out


@pytest.mark.nightly
def test_it_writes_every_row_the_tables_and_the_figure(done):
    _, output = done
    pointer = json.loads((output / "pointer.json").read_text())
    assert set(pointer) == {"pointer-copy-2-seed0", "pointer-copy-2-seed1"}
    for found in pointer.values():
        assert found["steps"] == 3 and not found["exact_at_longest"]  # nothing is learnt in three steps
        assert len(found["seconds"]["training"]) == 2
        for counts in found["ends"].values():
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
def test_what_is_there_is_not_done_again(done, capsys, monkeypatch):
    config, output = done
    before = {path: path.stat().st_mtime_ns for path in output.glob("*.json")}
    monkeypatch.setattr(Bench, "trained", lambda *_: pytest.fail("trained again"))
    assert run(config, output) == 0
    assert "3 models in 2 rows, of which 0 are missing" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in output.glob("*.json")} == before


@pytest.mark.nightly
def test_one_model_that_is_missing_is_made_up_for(done, tmp_path):
    config, output = done
    held = json.loads((output / "pointer.json").read_text())
    gone = held.pop("pointer-copy-2-seed1")
    (tmp_path / "pointer.json").write_text(json.dumps(held))
    (tmp_path / "runs").symlink_to(output / "runs")
    assert run(config, tmp_path, "--only", "pointer") == 0
    again = json.loads((tmp_path / "pointer.json").read_text())
    assert again["pointer-copy-2-seed1"]["ends"] == gone["ends"]
    assert again["pointer-copy-2-seed1"]["seconds"]["training"] == [None, None]  # both trainings were there
    assert {name: again[name] for name in held} == held

    again.pop("pointer-copy-2-seed0")  # one seed is asked for: the file keeps the other
    (tmp_path / "pointer.json").write_text(json.dumps(again))
    assert run(config, tmp_path, "--only", "pointer", "--seeds", "1") == 0
    assert set(json.loads((tmp_path / "pointer.json").read_text())) == {"pointer-copy-2-seed0", "pointer-copy-2-seed1"}


@pytest.mark.nightly
def test_a_page_keeps_what_stands_around_the_tables(done, tmp_path):
    config, output = done
    path = tmp_path / "page.md"
    path.write_text(f"# Before\n{page.BEGIN}\nold\n{page.END}\nafter\n")
    assert run(config, output, "--page", str(path)) == 0
    text = path.read_text()
    assert text.startswith(f"# Before\n{page.BEGIN}\n") and text.endswith(f"{page.END}\nafter\n")
    assert "old" not in text and "`pointer`" in text and "(page.png)" in text
    assert (tmp_path / "page.png").exists()


@pytest.mark.nightly
def test_an_end_that_a_row_asks_by_now_is_asked_of_models_that_are_there(done, tmp_path):
    config, output = done
    held = json.loads((output / "pointer.json").read_text())
    whole = held["pointer-copy-2-seed0"]["ends"].copy()
    del held["pointer-copy-2-seed0"]["ends"]["given"]
    held["pointer-copy-2-seed0"]["seconds"]["training"] = [12.0, 34.0]
    (tmp_path / "pointer.json").write_text(json.dumps(held))
    (tmp_path / "runs").symlink_to(output / "runs")
    assert run(config, tmp_path, "--only", "pointer") == 0
    now = json.loads((tmp_path / "pointer.json").read_text())["pointer-copy-2-seed0"]
    assert now["ends"] == whole and now["seconds"]["training"] == [12.0, 34.0]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--only", "pointr"], "--only: got 'pointr', must be one of pointer, lstm (did you mean 'pointer'?)"),
        (["--config", "no.py"], "--config=no.py: no such file"),
        (["--seeds", "0"], "'0' must be a whole number from 1 to 1,000"),
        (["--page", "README.md"], "has no lines"),
        (["--page", "no/such/page.md"], "--page=no/such/page.md: no such folder as no/such"),
        (["--page", "page.png"], "--page=page.png: must end in .md"),
    ],
)
def test_what_cannot_be_is_said_in_a_line(arguments, said, table, capsys):
    config, output = table
    try:
        status = run(config, output, *arguments)
    except SystemExit as error:
        status = error.code
    assert status == 2
    [line] = capsys.readouterr().err.splitlines()
    assert said in line


@pytest.mark.nightly
def test_damaged_results_and_those_of_another_table_are_named(done, tmp_path, capsys):
    config, output = done
    (tmp_path / "pointer.json").write_text('{"pointer-copy-2-seed0": {}}')
    assert run(config, tmp_path) == 2
    assert re.search(r"pointer\.json: cannot be read .*; delete it to do it again", capsys.readouterr().err)
    (tmp_path / "pointer.json").write_text("[]")
    assert run(config, tmp_path, "--only", "lstm") == 2  # before anything is trained
    assert re.search(r"pointer\.json: cannot be read", capsys.readouterr().err)
    other = write(tmp_path, "2, 4")
    assert run(other, output) == 2
    assert "of other settings; delete it to do it again, or give another --output" in capsys.readouterr().err


@pytest.mark.nightly
def test_results_of_other_settings_are_kept_though_more_is_asked_of_them_now(done, tmp_path, capsys):
    _, output = done
    held = json.loads((output / "pointer.json").read_text())
    for each in held.values():
        del each["ends"]["given"]
    text = json.dumps(held)
    (tmp_path / "pointer.json").write_text(text)
    assert run(write(tmp_path, "2, 4"), tmp_path, "--only", "pointer", "--seeds", "1") == 2
    assert "of other settings" in capsys.readouterr().err
    assert (tmp_path / "pointer.json").read_text() == text


def test_a_page_without_a_place_for_the_tables_is_named_before_anything_is_trained(table, tmp_path, capsys):
    config, _ = table
    for held, said in [(b"mine", "has no lines"), (b"\xff", "not a text")]:
        (tmp_path / "lengths.md").write_bytes(held)
        assert run(config, tmp_path) == 2
        assert said in capsys.readouterr().err
        assert (tmp_path / "lengths.md").read_bytes() == held and not (tmp_path / "runs").exists()


@pytest.mark.nightly
def test_a_damaged_config_of_a_run_is_named_before_it_is_trained(done, tmp_path, capsys):
    config, output = done
    shutil.copytree(output / "runs", tmp_path / "runs")
    [run_folder] = (tmp_path / "runs").glob("reverse-lstm-*")
    (run_folder / "config.json").write_text("junk")
    shutil.rmtree(run_folder / "checkpoints")
    assert run(config, tmp_path, "--only", "lstm") == 2
    said = capsys.readouterr()
    assert "config.json" in said.err and "delete it to train it again" in said.err and "training " not in said.out


def test_a_table_that_cannot_be_is_refused_before_anything_is_trained():
    sizes = dict(width=16, num_heads=4)
    for row, said in [
        (Row(sizes | {"positions": "anchored"}), r"row 'it': 'anchored' must be told the length .*\('given',\)"),
        (Row(sizes | {"positions": "rotry"}), r"row 'it': config.model.positions: got 'rotry'.*did you mean 'rotary'"),
        (Row(sizes, ends=("never",)), r"row 'it': ends: got 'never', must be one of learned, given"),
        (Row(sizes, tasks=("cpy",)), r"row 'it': config.task.name: got 'cpy'"),
        (
            Row(sizes | {"positions": "learned", "max_length": 1_500}, tasks=("duplicate",)),
            r"row 'it': strings of 1,000 symbols .* at most 749",
        ),
        (Row(sizes, seeds=0), r"row 'it': seeds: got 0, must be a whole number at least 1"),
        (Row(sizes, budgets=(0,)), r"row 'it': budgets: got \(0,\), must be a tuple"),
        (Row(sizes, ends=()), r"row 'it': ends: got \(\), must be a tuple"),
        (Row(sizes, far=("cpy",)), r"row 'it': far: got 'cpy', must be one of copy, reverse.*did you mean 'copy'"),
    ]:
        with pytest.raises(ConfigError, match=said):
            Table({"it": row}, config={}).check()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"rows": {}}, r"rows: got \{\}, must be a dict with one row or more"),
        ({"rows": {"no/ne": Row({})}}, r"a row's name: got 'no/ne', must be of letters"),
        ({"asked": Asked(beyond=())}, r"asked: beyond: got \(\), must be a tuple"),
        ({"asked": Asked(beyond=(0, 12))}, r"asked: beyond: got \(0, 12\), must be a tuple"),
        ({"asked": Asked(each=0)}, r"asked: each: got 0, must be a whole number at least 1"),
    ],
)
def test_what_a_table_shares_is_checked_too(changed, said):
    with pytest.raises(ConfigError, match=said):
        Table(**({"rows": {"it": Row({"positions": "none"})}, "config": {}} | changed)).check()


TYPES = """
from attn.lengths.table import Row, Table
for rows, more in [
    ({"it": Row({}, symbols=2)}, {}),
    ({"it": Row({}, tasks="copy")}, {}),
    ({"it": Row({}, seeds="2")}, {}),
    ({"it": Row(None)}, {}),
    ({"it": {}}, {}),
    ({"it": Row({})}, {"budgets": 5}),
    ({"it": Row({})}, {"asked": {}}),
]:
    try:
        Table(rows, config={}, **more).check()
    except ValueError as error:
        print(error)
"""


def test_types_are_checked_where_no_test_checks_them():
    done = subprocess.run([sys.executable, "-c", TYPES], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "row 'it': symbols: got 2, must be a tuple such as (1, 2) or None",
        "row 'it': tasks: got 'copy', must be a tuple such as ('one', 'two') or None",
        "row 'it': seeds: got '2', must be a whole number at least 1",
        "row 'it': model: got None, must be dict",
        "row 'it': got {}, must be Row",
        "budgets: got 5, must be a tuple such as (1, 2)",
        "asked: got {}, must be Asked",
    ]


class Oracle(Examiner):
    """An examiner whose model writes the right answers, with every tenth symbol changed or none."""

    def __init__(self, task: Task, errs: bool):
        self.task, self.end, self.errs = task, "given", errs

    def written(self, questions):
        answers = questions.targets.copy()
        if self.errs:
            answers[:, ::10] = self.task.vocabulary.begin
        return answers

    def confirmed(self, questions):
        return (self.written(questions) == questions.targets).all(1)


@pytest.mark.parametrize("task", ["copy", "reverse", "duplicate"])
def test_what_is_right_is_counted(task):
    asked, symbols = Task(task, symbols=2), 8 * 50 * KINDS[task].times
    right, wrong = Oracle(asked, errs=False), Oracle(asked, errs=True)
    all_right = {"strings": 8, "exact": 8, "tokens": symbols, "right": symbols, "confirmed_alike": 8}
    assert right.tokens(50, 8) == all_right
    assert wrong.tokens(50, 8) == all_right | {"exact": 0, "right": symbols * 9 // 10}
    assert right.exact(50, 60) == {"strings": 60, "exact": 60}
    assert wrong.exact(50, 60) == {"strings": 50, "exact": 0}  # no more than needed
    assert right.structured(9)["one odd"] == {"strings": 9, "exact": 9}
    assert wrong.structured(9)["one odd"] == {"strings": 9, "exact": 0}


@pytest.mark.nightly
def test_no_length_compiles_a_program_of_its_own(done):
    _, output = done
    examiner = Examiner(attn.load(next((output / "runs").glob("copy-transformer-seed0-*"))), "given")
    for length in (9, 33, 64):
        examiner.tokens(length, 3)
    assert examiner.write._cache_size() == examiner.check._cache_size() == 1
    examiner.exact(65, 3)
    assert examiner.check._cache_size() == 2


@pytest.mark.nightly
def test_the_seconds_of_a_training_that_was_stopped_are_not_known(done):
    config, output = done
    table = runpy.run_path(str(config))["get_table"]()
    first, second = found = list(read(table, "pointer", output).values())
    first["seconds"]["training"], second["seconds"]["training"] = [1.0, None], [5.0, 3.0]
    named = {str(number): each for number, each in enumerate(found)}
    assert page.tables(table, named).count("(3) | 3 |") == 2
    second["seconds"]["training"] = [5.0, None]
    assert page.tables(table, named).count("(3) | not known |") == 2


def test_rows_that_were_measured_on_another_device_are_named():
    on = [("far", "cpu"), ("near", "cpu"), ("far", "cpu"), ("near", "TPU v5")]
    found = {str(number): {"row": row, "machine": {"devices": [device] * 2}} for number, (row, device) in enumerate(on)}
    assert page._devices(found) == "on cpu; `near` on TPU v5"


def test_accuracy_is_the_mean_over_lengths():
    found = {"ends": {"given": {"tokens": {"10": {"right": 5, "tokens": 10}, "100": {"right": 100, "tokens": 100}}}}}
    assert accuracy(found, "given", [10, 100]) == 0.75


def test_a_spread_is_best_median_and_worst_and_rounds_down_what_is_not_all():
    assert page._spread([1.0, 9.0, 3.0]) == "9.0 / 3.0 / 1.0"
    assert page._spread([100.0, 100.0]) == "100.0"
    assert page._percent(99.97) == "< 100"


@pytest.mark.nightly
def test_seeds_limit_every_row(done, capsys):
    config, output = done
    assert run(config, output, "--seeds", "1") == 0
    assert "2 models in 2 rows" in capsys.readouterr().out


@pytest.mark.nightly
def test_a_folder_gives_back_what_it_holds(done):
    config, output = done
    table = runpy.run_path(str(config))["get_table"]()
    table.check()
    assert len(read(table, "pointer", output)) == 2
    fewer = dataclasses.replace(table, rows={"pointer": dataclasses.replace(table.rows["pointer"], seeds=1)})
    assert len(read(fewer, "pointer", output)) == 1
    assert np.isfinite([accuracy(each, "given", (9, 12)) for each in read(table, "pointer", output).values()]).all()
