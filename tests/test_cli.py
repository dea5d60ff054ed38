"""Asking a run: answers, tables, pictures, and one line for what cannot be asked."""

import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from matplotlib.image import imread

import attn
from attn import cli
from attn.studies.probes import untrained
from attn.tasks.vocabulary import InputError
from attn.training.config import to_mapping
from attn.training.flags import load_config


def test_predict_prints_one_answer_an_input_in_order(copy_run, capsys):
    assert cli.main(["predict", str(copy_run), "3 1 4 1 5", "6", " 2  2 "]) == 0
    assert capsys.readouterr().out == "3 1 4 1 5\n6\n2 2\n"
    assert cli.main(["predict", str(copy_run), "--beam", "2", "6", "2 2"]) == 0  # options may stand between
    assert capsys.readouterr().out == "6\n2 2\n"


def test_predict_reads_standard_input(copy_run, capsys, monkeypatch):
    lines = [" ".join(str(1 + (k * j) % 6) for j in range(1 + k % 6)) for k in range(300)]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\n".join(lines).encode())))
    assert cli.main(["predict", str(copy_run)]) == 0
    assert capsys.readouterr().out.splitlines() == lines


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["predict", "RUN", "3 9"], ["input 1", "'9'", "1..6"]),
        (["predict", "RUN", "3", "4 x"], ["input 2", "'x'"]),
        (["predict", "RUN", ""], ["input 1", "empty"]),
        (["predict", "RUN"], ["no input"]),
        (["predict", "/nonexistent/run", "3"], ["/nonexistent/run", "does not exist"]),
        (["predict", "EMPTY", "3"], ["not a run's folder"]),
        (["predict", "DAMAGED", "3"], ["config.json"]),
        (["predict", "UNFINISHED", "3"], ["no checkpoint yet"]),
        (["predict", "PATHLESS", "3"], ["PATHLESS", "vocabulary.json"]),
        (["evaluate", "RUN", "--lengths", "0:4"], ["--lengths", "0:4"]),
        (["evaluate", "RUN", "--lengths", "1:200000"], ["1:200000", "from 1 to 100,000"]),
        (["evaluate", "RUN", "--lengths", "5:4"], ["--lengths", "5:4"]),
        (["evaluate", "RUN", "--lengths", "a"], ["--lengths", "a"]),
        (["evaluate", "RUN", "--examples", "0"], ["--examples", "0"]),
        (["evaluate", "RUN", "--output", "/nonexistent/x"], ["/nonexistent"]),
        (["evaluate", "RUN", "--output", ".."], ["--output=..", "must name files"]),
        (["evaluate", "RUN", "--output", ""], ["--output=", "must name files"]),
        (["evaluate", "RUN", "--output", "/proc/x"], ["--output=/proc/x.json", "cannot be written"]),
        (["inspect", "RUN", "--output", "x.png"], ["x.png", "INPUT"]),
        (["inspect", "RUN", "3", "--output", ""], ["--output=", "ending"]),
        (["inspect", "RUN", "3", "--output", "/proc/x.png"], ["--output=/proc/x.png", "cannot be written"]),
        (["predict", "RUN", "3", "--beam", "0"], ["--beam", "'0'"]),
        (["evaluate", "RUN", "--part", "test"], ["part 'test'", "generated"]),
        (["inspect", "RUN", "7"], ["'7'"]),
        (["inspect", "RUN", "3", "--output", "x.docx"], ["x.docx", ".png"]),
        (["inspekt", "RUN"], ["inspekt", "inspect"]),
        ([], ["COMMAND"]),
    ],
)
def test_what_cannot_be_asked_is_one_line_and_status_2(copy_run, tmp_path, capsys, monkeypatch, words, said):
    for name in ("EMPTY", "DAMAGED", "UNFINISHED", "PATHLESS"):
        (tmp_path / name).mkdir()
    (tmp_path / "DAMAGED/config.json").write_text('{"task": ')
    (tmp_path / "UNFINISHED/config.json").write_text((copy_run / "config.json").read_text())
    (tmp_path / "PATHLESS/config.json").write_text('{"data": {"source": "pairs"}}')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    try:
        status = cli.main([str(copy_run) if word == "RUN" else word for word in words])
    except SystemExit as left:  # argparse's way
        status = left.code
    captured = capsys.readouterr()
    assert (status, captured.out, captured.err.count("\n")) == (2, "", 1)
    for word in said:
        assert word in captured.err


def test_predict_without_a_standard_input_asks_for_one(copy_run, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)  # as after `<&-`
    assert cli.main(["predict", str(copy_run)]) == 2
    assert "no input" in capsys.readouterr().err


def test_a_run_names_what_it_cannot_be_asked(copy_run, untyped):
    run = attn.load(copy_run)
    for texts in ("3 1 4", ["3", 1], None, (text for text in ["3"])):
        with pytest.raises(ValueError, match=r"^texts: got .*, must be a list of texts"):
            run.predict(texts)
    with pytest.raises(ValueError, match=r"^beam_width: got 0, must be a whole number at least 1"):
        run.predict(["3"], beam_width=0)
    for lengths in ([], [0], 3):
        with pytest.raises(ValueError, match=r"^lengths: got .*, must be one or more whole numbers"):
            run.evaluate(lengths)
    with pytest.raises(ValueError, match=r"^examples: got 0"):
        run.evaluate([3], 0)
    assert run.evaluate(np.array([3, 4]), 2).overall().exact_match.count == 4


def test_evaluate_prints_a_table_and_writes_json_and_a_plot(copy_run, tmp_path, capsys):
    assert cli.main(["evaluate", str(copy_run), "--lengths", "1,5:8", "--output", str(tmp_path / "e")]) == 0
    lines = capsys.readouterr().out.splitlines()
    values = json.loads((tmp_path / "e.json").read_text())
    rows = values["by_length"]
    assert [row["length"] for row in rows] == [1, 5, 6, 7, 8]
    assert [row["sources"] for row in rows] == [1, 100, 100, 100, 100]
    assert [row["exact_match"] for row in rows[:3]] == [1.0, 1.0, 1.0]
    assert rows[-1]["exact_match"] < 0.5  # beyond its training length
    assert values["overall"]["sources"] == 401
    assert values["overall"]["exact_match"] == sum(row["exact_match"] * row["sources"] for row in rows) / 401
    table = [line.split() for line in lines[1:7]]
    assert [row[0] for row in table] == ["1", "5", "6", "7", "8", "all"]
    assert [float(row[2]) for row in table[:5]] == [round(row["exact_match"], 4) for row in rows]
    assert imread(tmp_path / "e.png").shape[2] in (3, 4)


def test_inspect_draws_every_layer_and_head(copy_run, tmp_path, capsys):
    path = tmp_path / "map.png"
    assert cli.main(["inspect", str(copy_run), "3 1 4 1 5", "--output", str(path)]) == 0
    assert str(path) in capsys.readouterr().out
    picture = imread(path)
    assert min(picture.shape[:2]) > 400
    assert picture[..., :3].std() > 0.05


def test_cross_attention_of_a_copy_is_the_diagonal(copy_run):
    maps = attn.load(copy_run).look("3 1 4 1 5")
    assert maps.source == ["3", "1", "4", "1", "5", "end"]
    assert maps.written == maps.source
    assert maps.read == ["begin", "3", "1", "4", "1", "5"]
    assert max(np.diagonal(head)[:5].mean() for head in maps.weights["cross"][0]) > 0.5


@pytest.mark.nightly  # by day a copy's diagonal
def test_cross_attention_of_a_reversal_is_the_anti_diagonal(repository, tiny, trained):
    run = attn.load(trained("reverse", str(repository / "configs/reverse.py"), tiny | {"training.steps": "800"}))
    assert run.predict(["3 1 4 1 5 2", "6 1"]) == ["2 5 1 4 1 3", "1 6"]
    cross = run.look("3 1 4 1 5 2").weights["cross"][0]  # [N T S]
    anti = [np.mean([head[t, 5 - t] for t in range(6)]) for head in cross]
    straight = [np.mean([head[t, t] for t in range(6)]) for head in cross]
    assert max(anti) > 0.5 > 2 * straight[int(np.argmax(anti))]


def test_learned_positions_bound_the_input(repository, tiny):
    learned = {"model.mechanism": "learned(9)"}
    run = untrained(to_mapping(load_config(str(repository / "configs/copy.py"), tiny | learned)))
    assert len(run.predict(["1 2 3 4 5 6 1 2"])) == 1
    with pytest.raises(InputError, match=r"input 2: 9 tokens.*at most 8"):
        run.predict(["1", "1 2 3 4 5 6 1 2 3"])
    with pytest.raises(InputError, match="at most 8"):
        run.evaluate([3, 9])


def test_an_interrupted_command_leaves_at_once_though_a_thread_works_and_nobody_reads():
    program = """
import threading, time
from attn import startup
threading.Thread(target=time.sleep, args=(60,)).start()
print("written")
startup.leave(130)
"""
    words, pipe = [sys.executable, "-c", program], subprocess.PIPE
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with subprocess.Popen(words, env=buffered, stdout=pipe, stderr=pipe) as process:
        process.stdout.close()
        assert (process.wait(timeout=30), process.stderr.read()) == (130, b"")
