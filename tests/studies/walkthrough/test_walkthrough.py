"""The whole walkthrough: the files that it writes, that nothing is measured twice, and errors."""

import dataclasses
import json
import re
import signal
import subprocess
import sys

import pytest
from matplotlib.figure import Figure

from attn import cli
from attn.studies.jobs import Trainer, configured
from attn.studies.walkthrough import parallel, running
from attn.studies.walkthrough.claims import Check, Claim, Sizes
from attn.studies.walkthrough.registry import CLAIMS

TINY = {
    "bottleneck": dict(
        lengths=(5, 6),
        trained_to=7,
        distance=9,
        probed=(5, 6),
        widths=(32, 33),
        compared=(32,),
        longer=2,
        steps=10,
        each=5,
        fitted=40,
    ),
    "access": dict(max_length=8, steps=10, each=5),
    "scaling": dict(widths=(4, 64), pairs=200, queries=8, keys=8, trained_width=16, max_length=4, steps=10),
    "heads": dict(max_length=5, length=5, steps=10, num_heads=2, each=5),
    "cross": dict(max_length=5, length=5, steps=10),
    "positions": dict(width=8, max_length=8, steps=10, shifts=(1, 2)),
    "parallel": dict(lengths=(4, 8), tokens=16, rounds=1),
    "reading": dict(max_length=5, steps=10, length=5, strings=8),
    "blocks": dict(max_length=4, steps=10, num_layers=1, each=5),
    "atoms": dict(reactions=2),
}


def smaller(claim: Claim, **sizes) -> Claim:
    return dataclasses.replace(claim, quick=Sizes(**vars(claim.quick) | sizes))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


def test_a_claim_that_cannot_be_measured_says_what_is_missing(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(CLAIMS, "atoms", dataclasses.replace(CLAIMS["atoms"], missing=lambda: "pip install it"))
    assert cli.main(["walkthrough", "--quick", "--only", "atoms", "--output", str(tmp_path)]) == 0
    assert "atoms is not measured: pip install it" in capsys.readouterr().out
    assert not (tmp_path / "atoms.json").exists()


@pytest.mark.nightly
@pytest.mark.parametrize("name", CLAIMS)
def test_every_claim_is_measured_checked_and_drawn(name, tmp_path, models, monkeypatch, capsys):
    """At sizes at which nothing is learned: the numbers say nothing about the claim."""
    if CLAIMS[name].missing() is not None:
        pytest.skip(CLAIMS[name].missing())
    monkeypatch.setitem(CLAIMS, name, smaller(CLAIMS[name], **TINY[name]))
    (tmp_path / "runs").symlink_to(models)  # claims share them
    assert cli.main(["walkthrough", "--quick", "--only", name, "--output", str(tmp_path)]) == 0
    values = json.loads((tmp_path / f"{name}.json").read_text())
    assert values["verdict"] in ("holds", "holds in part", "does not hold", "undecided")
    assert values["checks"] and all(
        check["least"] is not None or check["most"] is not None for check in values["checks"]
    )
    page = (tmp_path / "index.html").read_text()
    assert page.count("<figure>") == 1 and page.count("<img") > 1
    for check in values["checks"]:
        assert f"{check['measured']:.4g}" in page or not isinstance(check["measured"], float)
    out = capsys.readouterr().out
    assert values["verdict"] in out and values["checks"][-1]["says"] in out


@pytest.mark.parametrize("name", [name for name in CLAIMS if name != "atoms"])  # which trains nothing
def test_the_settings_of_every_claim_exist(name, monkeypatch, tmp_path):
    """By day no model is trained: the settings of the first one are checked, and the measurement is stopped."""

    class Stopped(Exception):
        pass

    def check(settings):
        configured(settings)
        raise Stopped

    monkeypatch.setattr(Trainer, "train", lambda trainer, settings, watch=None: check(settings))
    monkeypatch.setattr(parallel, "Step", lambda settings, length, batch: check(settings))
    with pytest.raises(Stopped):
        CLAIMS[name].measure(smaller(CLAIMS[name], **TINY[name]).quick, Trainer(tmp_path))


def test_quick_sizes_are_the_full_ones_reduced():
    for claim in CLAIMS.values():
        full, quick = vars(claim.full), vars(claim.quick)
        assert full.keys() == quick.keys()
        assert any(full[name] != quick[name] for name in full)
        if "seeds" in full and "steps" in full:
            assert len(full["seeds"]) == 3 and full["steps"] > quick["steps"]


def test_help_names_the_claims(capsys):
    with pytest.raises(SystemExit):
        cli.main(["walkthrough", "--help"])
    assert ",".join(CLAIMS) in "".join(capsys.readouterr().out.split())


@pytest.fixture
def measured(monkeypatch) -> list:
    """Replace the registry by one claim that is measured without work; return the sizes of its measurements."""
    measured = []

    def measure(sizes, trainer):
        measured.append(sizes)
        return {"x": 2.0}

    def draw(numbers):
        """Nothing, against <nothing>."""
        return Figure()

    made = dataclasses.replace(
        CLAIMS["access"],
        title="Made <up>",
        measure=measure,
        check=lambda numbers: [Check("x", numbers["x"], least=1.0), Check("-x", -numbers["x"], least=1.0)],
        draw=draw,
        tables=lambda numbers: [],
    )
    for name in reversed(list(CLAIMS)):
        monkeypatch.delitem(CLAIMS, name)
    monkeypatch.setitem(CLAIMS, "made", made)
    return measured


def test_a_measured_claim_is_not_measured_again(measured, tmp_path, capsys):
    for _ in range(2):
        assert cli.main(["walkthrough", "--output", str(tmp_path / "a")]) == 0
    assert len(measured) == 1
    out = capsys.readouterr().out
    assert "is measured already" in out and "holds in part" in out


def test_the_page_loads_nothing_and_names_reduced_sizes(measured, tmp_path):
    assert cli.main(["walkthrough", "--quick", "--output", str(tmp_path)]) == 0
    page = (tmp_path / "index.html").read_text()
    assert "Made &lt;up&gt;" in page
    assert not re.search(r"<script|<link|@import|src=\"(?!data:)|url\(", page)
    assert "A quick run" in page and "(full: " in page
    assert 'alt="Nothing, against &lt;nothing&gt;."' in page
    assert measured == [CLAIMS["made"].quick]


def test_the_page_is_the_same_from_the_same_numbers(measured, tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        running.walk(tmp_path / folder, ["made"], quick=True)
    (tmp_path / "b" / "made.json").write_text((tmp_path / "a" / "made.json").read_text())
    (tmp_path / "b" / "index.html").unlink()
    running.walk(tmp_path / "b", ["made"], quick=True)
    assert (tmp_path / "a" / "index.html").read_text() == (tmp_path / "b" / "index.html").read_text()


def test_numbers_of_other_sizes_are_not_overwritten(measured, tmp_path, capsys):
    assert cli.main(["walkthrough", "--output", str(tmp_path)]) == 0
    before = (tmp_path / "made.json").read_text()
    assert cli.main(["walkthrough", "--quick", "--output", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert "made.json" in err and "without --quick" in err
    assert (tmp_path / "made.json").read_text() == before


def test_spaces_after_commas_are_not_part_of_a_name(measured, tmp_path):
    assert cli.main(["walkthrough", "--only", "made, made", "--output", str(tmp_path)]) == 0
    assert len(measured) == 1


@pytest.mark.nightly
def test_interrupted_while_it_compiles_it_says_how_to_resume(repository, tmp_path):
    """In a separate process, which must end by itself and not by a crash."""
    # A process that was started in the background ignores SIGINT, and so do its children.
    listen = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    words = ["walkthrough", "--quick", "--only", "parallel", "--output", str(tmp_path)]
    words = [sys.executable, "-u", "-c", f"{listen}; from attn import cli; cli.script()", *words]
    with subprocess.Popen(words, cwd=repository, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while "timing" not in process.stdout.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "stopped; the same command resumes from there\n")
    assert (tmp_path / "index.html").exists()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"quick": true}', "null"])
def test_a_damaged_file_is_named(measured, tmp_path, capsys, text):
    (tmp_path / "made.json").write_text(text)
    assert cli.main(["walkthrough", "--output", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert "made.json" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--only", "scalin"], ["--only", "'scalin'", "did you mean 'scaling'"]),
        (["--only", ""], ["--only", "''", "bottleneck"]),
        (["--output", "FILE"], ["FILE", "must be a folder"]),
        (["--output", ""], ["--output", "''", "must be a path"]),
        (["--output", "/proc/x"], ["/proc/x"]),
    ],
)
def test_a_bad_argument_is_one_line_and_status_2(tmp_path, capsys, words, expected):
    (tmp_path / "FILE").write_text("")
    words = [str(tmp_path / word) if word == "FILE" else word for word in words]
    assert cli.main(["walkthrough", *words]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    for word in expected:
        assert word in err
