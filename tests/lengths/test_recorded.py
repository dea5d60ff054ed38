"""The tables of the project: they can be trained, and their pages say what the files of results hold."""

import json
import pathlib
import re

import jax.numpy as jnp
import pytest
from flax import nnx

from attn.lengths import page
from attn.lengths.running import read
from attn.nn.encodings import ENCODINGS
from attn.training.config import from_mapping
from attn.training.flags import run_file
from attn.training.state import build_model

ROOT = pathlib.Path(__file__).parent.parent.parent
NAMES = ("lengths", "tape")


def recorded(name):
    """A table of the project, and what is recorded of its rows."""
    table, folder = run_file(ROOT / f"configs/{name}.py", "get_table"), ROOT / f"benchmarks/results/{name}"
    assert {path.stem for path in folder.glob("*.json")} <= set(table.rows)
    return table, {key: each for row in table.rows for key, each in read(table, row, folder).items()}


@pytest.mark.some(1)
@pytest.mark.parametrize("name", [*NAMES, "tape_longer", "tape_sweep"])
def test_every_row_can_be_trained(name):
    run_file(ROOT / f"configs/{name}.py", "get_table").check()


@pytest.mark.parametrize("name", NAMES)
def test_the_document_holds_what_was_measured(name):
    text = (ROOT / f"docs/{name}.md").read_text()
    assert page.into(text, page.write(*recorded(name), f"{name}.png")) == text


@pytest.mark.parametrize("name", NAMES)
def test_what_was_written_token_by_token_is_confirmed_alike(name):
    for found in recorded(name)[1].values():
        for counts in found["ends"].values():
            assert all(each["confirmed_alike"] == each["strings"] for each in counts["tokens"].values())


@pytest.mark.nightly
def test_the_example_of_a_row_is_a_table_and_its_encoding_matters(tmp_path):
    [code] = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/lengths.md").read_text(), re.DOTALL | re.M)
    (tmp_path / "mine.py").write_text(code)
    try:
        table = run_file(tmp_path / "mine.py", "get_table")
        table.check()
        settings, tokens = table.settings(table.trainings("far_costs")[0], 600), jnp.array([1, 2, 1])
        logits = []
        for positions in ("far_costs", "none"):  # of the same parameters
            config = from_mapping(settings | {"model": settings["model"] | {"positions": positions}})
            logits.append(build_model(config, config.task.vocabulary, nnx.Rngs(0))(tokens, tokens))
        assert jnp.abs(logits[0] - logits[1]).max() > 1e-4
    finally:
        del ENCODINGS["far_costs"]


@pytest.mark.parametrize("document", ["README.md", "docs/lengths.md", "docs/tape.md"])
def test_the_rows_that_documents_name_are_there(document):
    lines = re.findall(r"^attn lengths .*--only (\S+)", (ROOT / document).read_text(), re.M)
    assert lines
    rows = [run_file(ROOT / f"configs/{name}.py", "get_table").rows for name in NAMES]
    for names in lines:
        assert any(set(names.split(",")) <= set(some) for some in rows)


def test_the_seconds_of_long_answers_are_those_that_were_measured():
    rows = json.loads((ROOT / "benchmarks/results/decoding.json").read_text())["rows"]
    text = " ".join((ROOT / "docs/lengths.md").read_text().split())
    many, one = ((row["token by token"], row["confirmed in one pass"]) for row in rows)
    assert f"1,000 symbols took {many[0]:.2f} s token by token and {many[1]:.2f} s to confirm" in text
    assert f"one of 10,000 took {one[0]:.2f} and {one[1]:.2f} s" in text
