"""The benchmarks can be started; what they measure is not tested."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
FILES = sorted((ROOT / "benchmarks").glob("*.py"))
SCRIPTS = [file for file in FILES if "parse_args" in file.read_text()]  # the others are modules of these


@pytest.mark.some(2)
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_help_helps(script):
    words = [sys.executable, str(script), "--help"]
    done = subprocess.run(words, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--output" in done.stdout


def test_the_tokens_per_second_of_smollm2_are_the_recorded_ones():
    values = json.loads((ROOT / "benchmarks/results/smollm2.json").read_text())
    ours, torch = (1 / values["seconds_per_token"][name] for name in ("ours", "torch"))
    text = " ".join((ROOT / "benchmarks/README.md").read_text().split())
    assert f"writes {ours:.1f} tokens per second with our key/value cache and {torch:.1f} with the library" in text
    assert f"{values['ratio']:.2f} times as many" in text


def test_the_message_of_a_training_step_is_the_recorded_one():
    programs = json.loads((ROOT / "benchmarks/results/programs.json").read_text())["programs"]["reverse"]
    text = (ROOT / "benchmarks/README.md").read_text()
    for chips in (4, 16, 64, 256):
        row = programs[f"v5e-{chips}"]["advance"]
        assert list(row["collectives"]) == ["all-reduce"]
        sent, peak = row["collectives"]["all-reduce"], row["peak"] / 2**20
        assert f"| {chips} | {sent['count']} | {sent['bytes']:,} | {peak:.1f} |" in text
    assert f"| 1 | none | | {programs['v5e-1']['advance']['peak'] / 2**20:.1f} |" in text


def test_the_page_on_accelerators_shows_the_recorded_bundles():
    devices = json.loads((ROOT / "benchmarks/results/bundles.json").read_text())
    page = (ROOT / "docs/accelerators.md").read_text()
    shown = [[int(n.replace(",", "")) for n in pair] for pair in re.findall(r"([\d,]+) : ([\d,]+) = ", page)]
    recorded = {
        each["whole"] for programs in devices.values() for p in programs.values() for each in p["kernels"].values()
    }
    assert len(shown) == 14 and {n for pair in shown for n in pair} <= recorded
    ratios = [float(n) for n in re.findall(r" = (\d\.\d\d) \|", page)]
    assert ratios == [round(ours / theirs, 2) for ours, theirs in shown]
