"""Asking a run: answers, tables, pictures, and one line for what cannot be asked."""

import io
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from matplotlib.image import imread

import attn
from attn import cli
from attn.inspection.views import view_frames
from attn.studies.probes import untrained
from attn.tasks.vocabulary import InputError
from attn.training import checkpoints
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
        (["inspect", "RUN", "3", "--output", "/proc/x.html"], ["--output=/proc/x.html", "cannot be written"]),
        (["inspect", "RUN", "3", "--training", "--output", "x.png"], ["x.png", ".html", "--training"]),
        (["inspect", "RUN", "3", "--compare", "RUN", "--output", "x.svg"], ["x.svg", ".html", "--compare"]),
        (["inspect", "RUN", "--training"], ["--training", "INPUT"]),
        (["inspect", "RUN", "--effects"], ["--effects", "INPUT"]),
        (["inspect", "RUN", "--compare", "EMPTY"], ["--compare=", "INPUT"]),
        (["inspect", "RUN", "3", "--output", "x.html", "--compare", "EMPTY"], ["EMPTY", "not a run's folder"]),
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


def payload(page) -> dict:
    """The data of a page."""
    _, _, rest = page.read_text().partition('id="attn-data">')
    return json.loads(rest.partition("</script>")[0])


def test_inspect_writes_a_page(copy_run, tmp_path, capsys):
    page = tmp_path / "page.html"
    assert cli.main(["inspect", str(copy_run), "3 1 4 1 5", "--output", str(page)]) == 0
    assert capsys.readouterr().out == f"wrote {page}\n"
    shown = payload(page)
    assert (len(shown["runs"]), len(shown["frames"])) == (1, 1)
    cross = next(kind for kind in shown["kinds"] if kind["name"] == "cross")
    assert cross["rows"]["names"] == cross["columns"]["names"] == ["3", "1", "4", "1", "5", "end"]


def test_a_page_has_a_slider_through_training_and_a_second_run_beside(copy_run, tmp_path, capsys):
    """The second one was trained for fewer steps and is damaged: the steps that both have, and their ends."""
    other, page = shutil.copytree(copy_run, tmp_path / "other"), tmp_path / "page.html"
    (other / "snapshots/00000001.safetensors").write_bytes(b"damaged")
    words = ["inspect", str(copy_run), "3 1 4 1 5", "--training", "--output", str(page)]
    assert cli.main(words) == 0
    steps = [f"step {step:,}" for step, _ in attn.load(copy_run).history()]
    assert (payload(page)["frames"], len(payload(page)["runs"])) == (steps, 1)
    assert cli.main([*words, "--compare", str(other)]) == 0
    out, err = capsys.readouterr()
    assert out.count("\n") == 2 and err.count("\n") == 1 and "is left out" in err
    steps.remove("step 1")
    assert (payload(page)["frames"], payload(page)["runs"]) == (steps, ["copy", "other"])
    assert cli.main(["inspect", str(copy_run), "3 1", "--compare", str(other)]) == 0
    assert payload(copy_run / "inspect.html")["frames"] == [""]
    (copy_run / "inspect.html").unlink()  # others use the run too


def test_a_page_sorts_heads_by_what_they_do_for_the_task(copy_run, tmp_path, capsys):
    """The effect is that of evaluating without the head, and known of the last frame, which is the run."""
    page, run = tmp_path / "page.html", attn.load(copy_run)
    words = ["inspect", str(copy_run), "3 1 4 1 5", "--training", "--effects", "--output", str(page)]
    assert cli.main(words) == 0, capsys.readouterr().err
    by_name = {measure["name"]: measure["values"][0] for measure in payload(page)["measures"]}
    kinds = [kind["name"] for kind in payload(page)["kinds"]]
    mass, effect = by_name["mass on the true source"], by_name["effect on exact match"]
    weights = run.look("3 1 4 1 5").weights["cross"][0]  # [N T S]: the answer is the source
    expected = weights[:, np.arange(5), np.arange(5)].mean(axis=1)
    np.testing.assert_allclose(mass[-1][kinds.index("cross")], expected, atol=1e-6)
    assert mass[-1][kinds.index("encoder")] == [None] * len(weights)
    assert all(number is None for frame in effect[:-1] for kind in frame for number in kind)
    without = attn.interventions.ablate(run, [("cross", 0, 1)]).evaluate(range(1, 7), 20)
    change = without.overall().exact_match.value() - run.evaluate(range(1, 7), 20).overall().exact_match.value()
    assert effect[-1][kinds.index("cross")][1] == pytest.approx(change, abs=0.02)


def test_a_second_run_reads_the_answer_of_the_first(repository, tiny, trained, copy_run):
    """What the decoder reads is the same, so that the rows are; the other way around it would be a reversal."""
    other = attn.load(trained("reverse", str(repository / "configs/reverse.py"), tiny | {"training.steps": "800"}))
    view = attn.load(copy_run).view("3 1 4", compare=other)
    ours, theirs = (next(iter(frames.values())) for frames in view.runs.values())
    assert [kind.rows.names for kind in ours] == [kind.rows.names for kind in theirs]
    cross = [next(kind.layers[0] for kind in kinds if kind.name == "cross") for kinds in (ours, theirs)]
    assert cross[0].shape == cross[1].shape and abs(cross[0] - cross[1]).max() > 0.1


def test_models_of_other_tokens_are_not_compared(repository, copy_run, tmp_path, capsys):
    recorded = repository / "tests/pretrained/recorded"
    words = ["--output", str(tmp_path / "page.html"), "--compare"]
    pixels = np.random.default_rng(0).normal(size=(1, 9, 9)).astype(np.float32)
    np.save(tmp_path / "pixels.npy", pixels)
    vit = [str(recorded / "vit_plain"), str(tmp_path / "pixels.npy")]
    assert cli.main(["inspect", *vit, *words[:2]]) == 0
    assert payload(tmp_path / "page.html")["kinds"][0]["picture"] is not None
    assert cli.main(["inspect", *vit, *words, str(recorded / "vit_plain")]) == 0
    assert len(payload(tmp_path / "page.html")["runs"]) == 2
    assert cli.main(["inspect", *vit, "--training", *words[:2]]) == 2
    capsys.readouterr()
    assert cli.main(["inspect", str(copy_run), "3 1", *words, str(recorded / "vit_plain")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "vit_plain: a picture is needed" in error
    assert cli.main(["inspect", *vit, *words, str(copy_run)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"{copy_run}: a run reads text, not a picture" in error
    run = attn.load(copy_run)
    maps = run.look("3 1")
    for other, word in (({"source": ["3", "2", "end"]}, "source"), ({"written": ["1", "3", "end"]}, "answer")):
        with pytest.raises(InputError, match=rf"^compare: .* the {word} is '3 1 end' for A and '.*' for B$"):
            view_frames({"": maps}, {"": maps._replace(**other)}, ("runs/A", "runs/B"), "")
    layers = {name: np.repeat(weights, 2, axis=0) for name, weights in maps.weights.items()}
    with pytest.raises(InputError, match=r"^compare: 'A' has .*, but 'B' has .* must be of the same sizes$"):
        view_frames({"": maps}, {"": maps._replace(weights=layers)}, ("A", "B"), "")


def test_without_snapshots_it_says_that_there_is_no_slider(copy_run, tmp_path, capsys):
    alone, page = shutil.copytree(copy_run, tmp_path / "alone"), tmp_path / "page.html"
    shutil.rmtree(alone / "snapshots")
    for step in checkpoints.steps(alone / "checkpoints")[:-1]:
        shutil.rmtree(alone / f"checkpoints/{step:08d}")
    assert cli.main(["inspect", str(alone), "3 1 4", "--training", "--output", str(page)]) == 0
    assert capsys.readouterr().err.startswith("no slider: no earlier step was kept")
    assert payload(page)["frames"] == [""]


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
