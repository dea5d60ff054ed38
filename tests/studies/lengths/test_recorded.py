"""The studies of the project: their rows can be trained, and their pages show the recorded results."""

import json
import pathlib
import re
import subprocess
import sys

import pytest

from attn.studies.lengths import page
from attn.studies.lengths.running import read
from attn.studies.report import replace_part
from attn.training.flags import run_file

ROOT = pathlib.Path(__file__).parents[3]
NAMES = ("lengths", "tape")


def recorded(name):
    """Return a study of the project, and its recorded results."""
    study, folder = run_file(ROOT / f"configs/{name}.py", "get_study"), ROOT / f"benchmarks/results/{name}"
    assert {path.stem for path in folder.glob("*.json")} <= set(study.rows)
    return study, {key: each for row in study.rows for key, each in read(study, row, folder).items()}


@pytest.mark.some(1)
@pytest.mark.parametrize("name", [*NAMES, "tape_longer", "tape_sweep"])
def test_every_row_can_be_trained(name):
    run_file(ROOT / f"configs/{name}.py", "get_study").check()


@pytest.mark.parametrize("name", NAMES)
def test_the_document_shows_the_results(name):
    text = (ROOT / f"docs/{name}.md").read_text()
    assert replace_part(text, page.write(*recorded(name), f"{name}.png")) == text


@pytest.mark.parametrize("name", NAMES)
def test_decoding_token_by_token_and_confirming_agree(name):
    for result in recorded(name)[1].values():
        for counts in result["ends"].values():
            assert all(each["confirmed_alike"] == each["strings"] for each in counts["tokens"].values())


# Runs the command, but shows the jobs instead of training their models; compares two models of the same parameters.
EXAMPLE = """
import jax.numpy as jnp
from flax import nnx
from attn import cli
from attn.studies.lengths import running
from attn.training.config import from_mapping
from attn.training.flags import run_file
from attn.training.state import build_model

def stop(noun, jobs, folder):
    print(*jobs)
    raise KeyboardInterrupt  # the user's, before anything is trained

running.run_jobs = stop
assert cli.main(["lengths", "--config=mine.py"]) == 130
study = run_file(__import__("pathlib").Path("mine.py"), "get_study")
print("prior:", study.prior("far_costs"))
settings, tokens = study.settings(study.jobs("far_costs")[0], 600), jnp.array([1, 2, 1])
logits = []
for mechanism in ("far_costs", "none"):
    config = from_mapping(settings | {"model": settings["model"] | {"mechanism": mechanism}})
    logits.append(build_model(config, config.task.vocabulary, nnx.Rngs(0))(tokens, tokens))
print("differ:", bool(jnp.abs(logits[0] - logits[1]).max() > 1e-4))
"""


def test_the_example_of_a_row_is_a_study_and_its_mechanism_matters(tmp_path):
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/lengths.md").read_text(), re.DOTALL | re.M)
    for name, code in zip(("my_mechanism.py", "mine.py"), blocks, strict=True):
        (tmp_path / name).write_text(code)
    # As the command does, -P leaves the current folder out of the path.
    done = subprocess.run([sys.executable, "-P", "-c", EXAMPLE], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "far_costs-copy-2-seed0 far_costs-reverse-2-seed0 far_costs-duplicate-2-seed0" in done.stdout
    assert done.stdout.endswith("prior: near keys count more than far ones\ndiffer: True\n")
    # From another folder the module is not found.
    (tmp_path / "my_mechanism.py").rename(tmp_path / "another.py")
    words = [sys.executable, "-P", "-m", "attn.cli", "lengths", "--config=mine.py"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "config.imports: 'my_mechanism' cannot be imported" in done.stderr and "PYTHONPATH" in done.stderr


@pytest.mark.parametrize("document", ["README.md", "docs/lengths.md", "docs/tape.md"])
def test_the_rows_that_documents_name_exist(document):
    lines = re.findall(r"^attn lengths .*--only (\S+)", (ROOT / document).read_text(), re.M)
    assert lines
    rows = [run_file(ROOT / f"configs/{name}.py", "get_study").rows for name in NAMES]
    for names in lines:
        assert any(set(names.split(",")) <= set(some) for some in rows)


def test_the_seconds_of_long_answers_are_the_recorded_ones():
    rows = json.loads((ROOT / "benchmarks/results/decoding.json").read_text())["rows"]
    text = " ".join((ROOT / "docs/lengths.md").read_text().split())
    many, one = ((row["token by token"], row["confirmed in one pass"]) for row in rows)
    assert f"1,000 symbols took {many[0]:.2f} s token by token and {many[1]:.2f} s to confirm" in text
    assert f"one of 10,000 took {one[0]:.2f} and {one[1]:.2f} s" in text
