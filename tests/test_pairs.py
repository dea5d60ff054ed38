"""Pairs from file to answer, as a user would: train, ask, look, evaluate, resume, and what is refused."""

import dataclasses
import io
import json
import os
import pathlib
import random
import shlex
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import nnx

import attn
from attn import cli, commands, experiment
from attn.inspection import pictures
from attn.tasks.examples import Questions, decoder_input, padded
from attn.tasks.vocabulary import Pieces
from attn.training import data, meshes
from attn.training.flags import load_config
from attn.training.folders import Folder
from attn.training.meshes import replicate
from attn.training.progress import readable
from attn.training.state import initial_state, model_structure
from attn.training.steps import Report, build_step_programs, example_loss

SMALL = {
    "model.width": "32",
    "model.feed_forward_width": "64",
    "model.num_encoder_layers": "1",
    "model.num_decoder_layers": "1",
    "model.dropout": "0.0",
    "optimizer.learning_rate": "5e-3",
    "training.steps": "500",
    "training.batch_size": "32",
    "training.steps_per_call": "20",
    "training.evaluate_every": "250",
    "training.checkpoint_every": "250",
    "evaluation.beam_width": "2",
}


def write_pairs(path, number=3_000, seed=0, longest=8) -> str:
    """Words of a to f, each with its letters in capitals; a word that ends with a may also lose it."""
    rng = random.Random(seed)
    words = dict.fromkeys("".join(rng.choices("abcdef", k=rng.randint(1, longest))) for _ in range(number))
    lines = [f"{word}\t{word.upper()}\n" for word in words]
    lines += [f"{word}\t{word[:-1].upper()}\n" for word in words if len(word) > 1 and word.endswith("a")]
    path.write_text("".join(lines))
    return str(path)


def request(repository, path, folder, *, resume=False, **overrides):
    overrides = SMALL | overrides | ({} if resume else {"data.path": str(path)})
    return experiment.Request(
        None if resume else str(repository / "configs/pairs.py"), overrides, str(folder), resume, "off"
    )


@pytest.fixture(scope="module")
def pairs_file(once):
    return str(once("capitals.tsv", write_pairs))


@pytest.fixture(scope="module")
def pairs_run(repository, pairs_file, trained):
    """The folder of a finished run on pairs."""
    return trained("pairs", str(repository / "configs/pairs.py"), SMALL | {"data.path": pairs_file})


def test_it_learns_and_any_accepted_answer_is_right(pairs_run):
    summary = json.loads((pairs_run / "summary.json").read_text())
    assert summary["exact_match"] > 0.9
    assert summary["error_rate"] < 0.05
    assert summary["beam"]["width"] == 2 and summary["beam"]["exact_match"] > 0.9
    for sample in summary["samples"]:
        word = sample["input"]
        accepted = {word.upper(), word[:-1].upper() if word.endswith("a") and len(word) > 1 else word.upper()}
        assert set(sample["accepted"]) == accepted
        assert sample["right"] == (sample["answer"] in accepted)


def test_it_answers_and_says_what_it_does_not_know(pairs_run, capsys):
    run = attn.load(pairs_run)
    assert run.predict(["abc", "fed"]) == ["ABC", "FED"]
    assert run.predict(["abc", "fed"], beam_width=3) == ["ABC", "FED"]
    assert cli.main(["predict", str(pairs_run), "abc", "axa", "--beam", "2"]) == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines()[0] == "ABC"
    assert captured.err == "input 2: 'x' not in the vocabulary, read as unknown\n"


def test_standard_input_is_read_as_a_file_of_pairs_is(pairs_run, capsys, monkeypatch):
    """Lines end at LF or CRLF alone: a line separator of Unicode is a character as any other."""
    text = "\ufeffabc\r\nfe\u2028d\nfed"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    assert cli.main(["predict", str(pairs_run)]) == 0
    captured = capsys.readouterr()
    answers = captured.out.splitlines()
    assert len(answers) == 3 and answers[0] == "ABC" and answers[2] == "FED"
    assert captured.err == "input 2: '\\u2028' not in the vocabulary, read as unknown\n"


@pytest.mark.nightly
def test_what_is_no_utf8_is_answered_and_what_cannot_be_printed_is_shown(pairs_run):
    command = [sys.executable, "-m", "attn.cli", "predict", str(pairs_run), b"a\xff", "--", "-b"]
    done = subprocess.run(command, env=os.environ | {"PYTHONIOENCODING": "ascii"}, capture_output=True, text=True)
    assert (done.returncode, len(done.stdout.splitlines())) == (0, 2)
    said = ["input 1: '\\ufffd' not in the vocabulary, read as unknown", "input 2: '-' not in the vocabulary"]
    assert [line.startswith(start) for line, start in zip(done.stderr.splitlines(), said)] == [True, True]


def test_the_next_command_is_one_that_works(tmp_path):
    for folder in (tmp_path, pathlib.Path("-x"), pathlib.Path("~x/my run")):
        for text in ("a b", "-5", "it's"):
            # Of several samples the first that can be typed: no unknown piece, no control character.
            words = experiment._next(folder, ["a\ufffdb", "a\x1b[2J", text, "c"])
            arguments = cli._parse(shlex.split(shlex.join(words[words.index("predict") :])))
            assert (arguments.inputs, pathlib.Path(arguments.run)) == ([text], folder)
        words = experiment._next(folder, ["a\ufffdb"])
        assert pathlib.Path(cli._parse(words[words.index("inspect") :]).run) == folder
        go_on = shlex.split(experiment._how_to_resume(Folder(folder)))[-1]
        assert pathlib.Path(os.path.expanduser(go_on.removeprefix("--workdir="))) == folder


def test_samples_are_those_that_can_be_asked_again():
    vocabulary = Pieces(tuple("abc\x07"), "characters", "characters", ((4, 4),))
    sources = ["a", "x", "ab", "a\x07", "abc", "axc", "abca", "xxxx"]
    tokens = [[*vocabulary.encode(source), vocabulary.end] for source in sources]
    lengths = np.array([len(source) for source in sources])
    questions = Questions(padded(tokens), lengths, padded(tokens), np.arange(len(sources)))
    rows = experiment._sample_rows(vocabulary, questions)
    assert [sources[row] for row in rows] == ["ab", "abc", "abca"]
    unknown = questions.chosen(np.array([1, 5]))
    assert sorted(experiment._sample_rows(vocabulary, unknown)) == [0, 1]  # better than none


@pytest.mark.nightly
def test_signs_of_mathematics_are_drawn_as_they_are(pairs_run, tmp_path):
    maps = attn.load(pairs_run).look("abc")._replace(source=["$", "^", "^", "$"], written=list("$_$ "))
    pictures.save(pictures.draw_maps(maps, "$^^$"), tmp_path / "maps.png")
    scores = attn.load(pairs_run).evaluate([3], 5)
    pictures.save(pictures.draw_lengths(scores, (1, 4), "$^^$"), tmp_path / "lengths.png")
    assert (tmp_path / "maps.png").stat().st_size > 10_000 and (tmp_path / "lengths.png").exists()


def test_a_damaged_summary_is_one_line(pairs_run, tmp_path, capsys):
    shutil.copytree(pairs_run, tmp_path / "run")
    damaged = tmp_path / "run/summary.json"
    whole = json.loads(damaged.read_text())
    inside = [{"samples": []}, {"samples": [{"input": 3}]}, {"seconds": {}}, {"lengths_evaluated": []}, {"beam": {}}]
    wrong = [json.dumps(whole | {name: None}) for name in ("steps", "exact_match", "lengths_evaluated", "samples")]
    wrong += [json.dumps(whole | values) for values in inside]
    for text in ('{"exact', "[]", '{"steps": 1}', *wrong):
        damaged.write_text(text)
        assert cli.main(["inspect", str(tmp_path / "run")]) == 2
        assert experiment.run(request(None, None, tmp_path / "run", resume=True)) == 2
        said = capsys.readouterr().err.splitlines()
        assert [line.split(": cannot be read")[0] for line in said] == [f"error: {damaged}"] * 2


def test_a_damaged_vocabulary_is_one_line(pairs_run, tmp_path, capsys):
    shutil.copytree(pairs_run, tmp_path / "run")
    values = json.loads((pairs_run / "vocabulary.json").read_text())
    damages = [
        (values | {"source": "letters"}, "vocabulary (source and target: got 'letters'"),
        (values | {"longest_targets": []}, "vocabulary (longest_targets: got none"),
        (values | {"longest_targets": [[3, 3], [2, 3]]}, "vocabulary (longest_targets: got ((3, 3), (2, 3))"),
        (values | {"pieces": [*values["pieces"], "a"]}, "vocabulary (pieces: got 'a' twice, must have each once"),
        (values | {"pieces": 5}, "vocabulary ("),
    ]
    for damaged, said in damages:
        (tmp_path / "run/vocabulary.json").write_text(json.dumps(damaged))
        assert cli.main(["predict", str(tmp_path / "run"), "abc"]) == 2
        assert f"vocabulary.json: not a {said}" in capsys.readouterr().err


def test_a_damaged_config_is_one_line(pairs_run, tmp_path, capsys):
    shutil.copytree(pairs_run, tmp_path / "run")
    values = json.loads((pairs_run / "config.json").read_text())
    values["data"]["path"] = None
    (tmp_path / "run/config.json").write_text(json.dumps(values))
    assert cli.main(["evaluate", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err.startswith("error: config.data.path: none given")


def test_inspect_shows_data_and_vocabulary_and_draws(pairs_run, pairs_file, tmp_path, capsys):
    assert cli.main(["inspect", str(pairs_run)]) == 0
    said = capsys.readouterr().out
    assert "A B C D E F a b c d e f" in said
    assert pairs_file in said and "padding" in said and "exact match" in said
    assert cli.main(["inspect", str(pairs_run), "abc", "--output", str(tmp_path / "map.png")]) == 0
    assert (tmp_path / "map.png").stat().st_size > 10_000
    assert attn.load(pairs_run).look("abc").written == ["A", "B", "C", "end"]


def test_the_vocabulary_is_saved_with_the_run(pairs_run):
    vocabulary = attn.load(pairs_run).vocabulary
    assert isinstance(vocabulary, Pieces)
    assert json.loads((pairs_run / "vocabulary.json").read_text())["pieces"] == list("ABCDEFabcdef")


@pytest.mark.nightly
def test_evaluate_asks_the_test_part(pairs_run, tmp_path, capsys):
    stem = str(tmp_path / "e")
    assert cli.main(["evaluate", str(pairs_run), "--output", stem]) == 0
    overall = json.loads((tmp_path / "e.json").read_text())["overall"]
    summary = json.loads((pairs_run / "summary.json").read_text())
    assert overall == pytest.approx(
        {name: summary[name] for name in ("exact_match", "token_accuracy", "error_rate")}
        | {"sources": summary["examples_evaluated"]}
    )
    assert cli.main(["evaluate", str(pairs_run), "--examples", "3", "--output", stem]) == 0
    by_length = json.loads((tmp_path / "e.json").read_text())["by_length"]
    assert len(by_length) > 4 and max(row["sources"] for row in by_length) == 3
    words = ["--part", "validation", "--lengths", "5:6", "--examples", "9", "--beam", "2", "--output", stem]
    assert cli.main(["evaluate", str(pairs_run), *words]) == 0
    values = json.loads((tmp_path / "e.json").read_text())
    assert [(row["length"], row["sources"]) for row in values["by_length"]] == [(5, 9), (6, 9)]
    capsys.readouterr()
    assert cli.main(["evaluate", str(pairs_run), "--lengths", "8,70:71,80", "--examples", "1", "--output", stem]) == 0
    assert capsys.readouterr().err == "no sources of length 70 to 71, 80 are held out\n"
    bad = (
        (["--part", "train"], "'train'"),
        (["--part", ""], "part '' does not exist"),
        (["--lengths", "70"], "has one of these lengths"),
    )
    for words, said in bad:
        assert cli.main(["evaluate", str(pairs_run), *words, "--output", stem]) == 2
        assert said in capsys.readouterr().err


def test_control_characters_are_shown_as_escapes(pairs_run, capsys):
    """An answer is one line and cannot steer the terminal, whatever the data have taught a model of bytes."""
    run = attn.load(pairs_run)
    signs = "".join(dict.fromkeys("\x1b\n\t\x9b\u200dé" + "".join(map(chr, range(65, 71)))))
    vocabulary = Pieces(tuple(signs), "characters", "characters", ((1, 1),))
    assert vocabulary.write([1, 2, 3, 4, 5, 6]) == "\x1b\n\t\x9b\u200dé"
    assert readable(vocabulary.write([1, 2, 3, 4, 5, 6])) == "\\x1b\\n\\t\\x9b\u200dé"
    wild = dataclasses.replace(run, vocabulary=dataclasses.replace(run.vocabulary, pieces=tuple(signs)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(commands, "_load", lambda _: wild)
        assert cli.main(["predict", "RUN", "ABC", "AB"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    sample = {"input": "a\x1b[2J", "answer": "b\n", "accepted": ["c\r"], "right": False}
    summary = json.loads((pairs_run / "summary.json").read_text()) | {"samples": [sample]}
    experiment.report(summary, Folder(pairs_run))
    said = capsys.readouterr().out
    assert "a\\x1b[2J  ->  b\\n   (wrong, should be c\\r)" in said
    assert not {"\x1b", "\r"} & set(said)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_while_it_reads_it_says_so_and_writes_nothing(repository, pairs_file, tmp_path, monkeypatch, number):
    def read(*_, **__):
        signal.raise_signal(number)
        raise AssertionError("it should have stopped")

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(attn.tasks, "load", read)
    assert experiment.run(request(repository, pairs_file, tmp_path / "run")) == 130
    assert not (tmp_path / "run").exists()
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_bad_file_is_one_line_and_nothing_is_written(repository, tmp_path, capsys):
    (tmp_path / "bad.tsv").write_text("a\tb\nc\n")
    assert experiment.run(request(repository, tmp_path / "bad.tsv", tmp_path / "run")) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == f"error: {tmp_path / 'bad.tsv'}: line 2 has no TAB; a line is source TAB target\n"
    assert not (tmp_path / "run").exists()


def test_too_long_for_learned_positions_is_one_line(repository, pairs_file, tmp_path, capsys):
    learned = {"model.mechanism": "learned(8)"}
    assert experiment.run(request(repository, pairs_file, tmp_path / "run", **learned)) == 2
    assert "config.model.mechanism: tells 8 positions apart, must tell 9 apart" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.nightly
def test_a_run_neither_resumes_nor_is_evaluated_with_other_pairs(repository, tmp_path, capsys):
    path = tmp_path / "pairs.tsv"
    write_pairs(path, 600, longest=4)  # one or two buckets, each of which is compiled
    short = {"training.steps": "20", "training.checkpoint_every": "20", "evaluation.beam_width": "1"}
    run = tmp_path / "run"
    assert experiment.run(request(repository, path, run, **short)) == 0
    moved = path.rename(tmp_path / "moved.tsv")
    more = short | {"training.steps": "40"}
    assert experiment.run(request(repository, path, run, resume=True, **short | {"data.path": str(moved)})) == 0
    assert cli.main(["evaluate", str(run)]) == 0
    moved.rename(path)
    assert experiment.run(request(repository, path, run, resume=True, **more | {"data.path": str(path)})) == 0
    own = more | {"data.validation": write_pairs(tmp_path / "own.tsv", 50, seed=1)}
    capsys.readouterr()
    assert experiment.run(request(repository, path, run, resume=True, **own)) == 2
    assert f"own.tsv: differs from what {run} began with as validation part" in capsys.readouterr().err
    with path.open("a") as file:
        file.write("zzz\tZZZ\n")
    assert experiment.run(request(repository, path, run, resume=True, **more | {"training.steps": "60"})) == 2
    assert f"{path}: differs from what {run} began with as training part" in capsys.readouterr().err
    assert cli.main(["evaluate", str(run)]) == 2
    assert f"{path}: differs from what {run} began with as training part" in capsys.readouterr().err


@pytest.fixture(scope="module")
def small_config(repository, pairs_file):
    overrides = SMALL | {"data.path": pairs_file, "training.steps_per_call": "4"}
    return load_config(str(repository / "configs/pairs.py"), overrides)


@pytest.mark.nightly
def test_a_step_is_that_of_the_bucket_alone(small_config):
    """Cutting a batch to its bucket inside the program changes nothing: losses are those of a plain call."""
    loaded = data.load(small_config)
    batches = loaded.batches(32, small_config.training.seed)
    mesh = meshes.data_mesh(32)
    programs = build_step_programs(small_config, loaded, mesh)
    state = jax.jit(lambda: initial_state(small_config, loaded.vocabulary))()
    model = nnx.merge(model_structure(small_config, loaded.vocabulary)[0], state.params)
    begin = loaded.vocabulary.begin
    losses = jax.jit(jax.vmap(lambda example: example_loss(model, example, decoder_input(example.target, begin), None)))
    steps = [next(k for k in range(500) if batches.batch(k)[0] == b) for b in range(len(batches.buckets))]
    for step in steps:
        _, examples = batches.batch(step)
        expected: Report = jax.tree.map(lambda x: float(x.sum()), losses(jax.tree.map(np.asarray, examples)))
        one = batches.stacked(step, step + 1, 4, mesh.size)
        fresh = replicate(jax.device_get(state), mesh)
        _, report = programs(fresh, replicate(np.int32(1), mesh), one)
        assert report.loss.count == expected.loss.count
        np.testing.assert_allclose(report.loss.sum, expected.loss.sum, rtol=1e-5)
        assert report.tokens == expected.tokens == sum((tokens != 0).sum() for tokens in examples)


@pytest.mark.nightly
def test_one_device_and_two_take_the_same_steps_on_buckets_of_odd_sizes(repository, tmp_path):
    rows = [*((f"{k:02d}", "aa") for k in range(52)), ("x" * 50, "y" * 40)]  # two buckets, which are two programs
    (tmp_path / "p.tsv").write_text("".join(f"{source}\t{target}\n" for source, target in rows))
    overrides = SMALL | {"data.path": str(tmp_path / "p.tsv"), "training.batch_size": "8", "model.dropout": "0.2"}
    config = load_config(str(repository / "configs/pairs.py"), overrides | {"training.steps_per_call": "12"})
    loaded = data.load(config)
    batches = loaded.batches(8, config.training.seed)
    assert 1 in batches.sizes and any(size % 2 and size > 1 for size in batches.sizes)
    assert {batches.batch(step)[0] for step in range(12)} == set(range(len(batches.sizes)))
    state = jax.device_get(jax.jit(lambda: initial_state(config, loaded.vocabulary))())
    ends = []
    for devices in (1, 2):
        mesh = jax.sharding.Mesh(np.array(jax.devices()[:devices]), (meshes.DATA,))
        start = replicate(state, mesh)
        stacked = batches.stacked(0, 12, 12, devices)
        ends.append(build_step_programs(config, loaded, mesh)(start, replicate(np.int32(12), mesh), stacked))
    (one, report), (two, both) = ends
    assert float(report.tokens) == float(both.tokens)
    np.testing.assert_allclose(float(report.loss.value()), float(both.loss.value()), rtol=1e-5)
    for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(two.params)):
        np.testing.assert_allclose(a, b, atol=2e-4)


def test_in_a_notebook_the_same_data_come_from_one_call(small_config, pairs_file):
    loaded, own = data.load(small_config), attn.tasks.load("pairs", path=pairs_file)
    assert loaded.vocabulary == own.vocabulary
    for step in range(20):
        for a, b in zip(
            jax.tree.leaves(loaded.batches(32, 0).batch(step)), jax.tree.leaves(own.batches(32, 0).batch(step))
        ):
            np.testing.assert_array_equal(a, b)
    for part in ("validation", "test"):
        for a, b in zip(loaded.questions(part, None, 0), own.questions(part, None, 0)):
            np.testing.assert_array_equal(a, b)
