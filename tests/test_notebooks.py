"""Every notebook runs from top to bottom, and its two forms say the same."""

import pathlib
import re

import jupytext
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((pathlib.Path(__file__).parent.parent / "notebooks").glob("*.py"))


def test_there_are_notebooks():
    assert [path.stem for path in NOTEBOOKS] == [
        "01_train_and_look",
        "02_attention_by_hand",
        "03_heads_and_positions",
        "04_recurrence_vs_attention",
        "05_invent_a_variant",
        "06_foundation",
        "07_look_inside",
    ]


def by_day_or_night(path):
    """Those that train take most of a minute."""
    trains = re.search(r'"steps"|training\.steps', path.read_text())
    return pytest.param(path, id=path.stem, marks=pytest.mark.nightly if trains else ())


@pytest.mark.parametrize("path", [by_day_or_night(path) for path in NOTEBOOKS])
def test_the_notebook_runs(path):
    notebook = jupytext.read(path)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(path.parent)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_both_forms_are_the_same_and_outputs_are_stripped(path):
    script, notebook = jupytext.read(path), jupytext.read(path.with_suffix(".ipynb"))
    assert [(cell.cell_type, cell.source) for cell in script.cells] == [
        (cell.cell_type, cell.source) for cell in notebook.cells
    ]
    assert all(not cell.get("outputs") and not cell.get("execution_count") for cell in notebook.cells)
