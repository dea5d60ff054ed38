"""The numbers of the full run in docs/walkthrough.md and the README are those of its JSON files."""

import functools
import html
import json
import pathlib
import re
import runpy
import shutil

import pytest

from attn import cli
from attn.studies.walkthrough.claims import verdict
from attn.studies.walkthrough.registry import CLAIMS
from attn.studies.walkthrough.running import read, sizes_of

ROOT = pathlib.Path(__file__).parents[3]
BENCHMARK = runpy.run_path(str(ROOT / "benchmarks/walkthrough.py"))
RESULTS = ROOT / BENCHMARK["RESULTS"]


@functools.cache
def measured(name):
    """Return the recorded measurement of a claim, and its checks."""
    result = read(RESULTS, name)
    return result, CLAIMS[name].check(result.numbers)


@pytest.mark.parametrize("name", CLAIMS)
def test_the_records_are_of_the_full_sizes_and_their_verdicts_follow(name):
    result, checks = measured(name)
    assert not result.quick and result.sizes == sizes_of(name, quick=False)
    assert json.loads((RESULTS / f"{name}.json").read_text())["verdict"] == verdict(checks)


@pytest.mark.parametrize("name", CLAIMS)
def test_the_document_lists_every_check_with_its_result(name):
    text = (ROOT / "docs/walkthrough.md").read_text()
    _, checks = measured(name)
    [section] = re.findall(rf"^## {CLAIMS[name].title}: {verdict(checks)}\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.M)
    assert [line for line in section.splitlines() if line.startswith("- ")] == [*map(BENCHMARK["line"], checks)]
    assert f"walkthrough/{name}.png" in section


@pytest.mark.nightly
def test_every_claim_is_drawn_from_its_records_on_one_page(tmp_path):
    shutil.copytree(RESULTS, tmp_path, dirs_exist_ok=True)
    assert cli.main(["walkthrough", "--output", str(tmp_path)]) == 0  # all is measured already
    page = (tmp_path / "index.html").read_text()
    assert page.count("<img") > len(CLAIMS) and all(html.escape(claim.title) in page for claim in CLAIMS.values())


def test_the_readme_gives_the_verdicts():
    rows = re.findall(
        r"^\| .*\(attn/studies/walkthrough/(\w+)\.py\) \| ([\w ]+) \|", (ROOT / "README.md").read_text(), re.M
    )
    assert dict(rows) == {name: verdict(measured(name)[1]) for name in CLAIMS}
