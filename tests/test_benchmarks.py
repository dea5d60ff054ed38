"""The benchmarks can be started; what they measure is not tested."""

import json
import os
import pathlib
import re
import subprocess
import sys

import communication
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


def test_the_numbers_of_the_viewer_are_the_recorded_ones():
    rows = json.loads((ROOT / "benchmarks/results/viewer.json").read_text())["rows"]
    text = (ROOT / "benchmarks/README.md").read_text()
    for name in ("6 x 8 of 64 x 64", "12 x 12 of 512 x 512", "12 x 12 of 512 x 512, exact", "8 of 32,768 x 32,768"):
        assert f"| {name} | {rows[name]['first_picture_seconds']:.2f} | {rows[name]['page_bytes'] / 1e6:.2f} |" in text
    assert f"after {rows['50 views on one page']['all_pictures_seconds']:.1f} s" in text
    # What pages must reach; a test does not time, it reads what was measured.
    for name in ("12 x 12 of 512 x 512", "8 of 32,768 x 32,768"):
        assert rows[name]["first_picture_seconds"] < 1
    assert rows["6 x 8 of 64 x 64"]["page_bytes"] < 300_000


def test_the_message_of_a_training_step_is_the_recorded_one():
    programs = json.loads((ROOT / "benchmarks/results/programs.json").read_text())["programs"]["reverse"]
    text = (ROOT / "benchmarks/README.md").read_text()
    for chips in (4, 16, 64, 256):
        row = programs[f"v5e-{chips}"]["advance"]
        assert list(row["collectives"]) == ["all-reduce"]
        sent, peak = row["collectives"]["all-reduce"], row["peak"] / 2**20
        assert f"| {chips} | {sent['count']} | {sent['bytes']:,} | {peak:.1f} |" in text
    assert f"| 1 | none | | {programs['v5e-1']['advance']['peak'] / 2**20:.1f} |" in text


def test_the_page_on_accelerators_shows_how_the_recorded_messages_grow():
    page = (ROOT / "docs/accelerators.md").read_text()
    assert len(communication.by_devices()) == 7
    assert all(row in page for row in communication.by_devices() + communication.by_parameters())
    for kind in communication.CHIPS:
        name = "an H100" if kind == "h100" else f"a {kind}"
        assert f"{communication.tokens_to_hide(kind):,.0f} on {name}" in " ".join(page.split())
    # A ring of two sends half of the message twice; many chips send nearly all of it twice.
    assert [communication.sent(100, chips) for chips in (1, 2, 4)] == [0, 100, 150]


def test_the_page_on_accelerators_says_which_programs_are_recorded():
    programs = json.loads((ROOT / "benchmarks/results/programs.json").read_text())["programs"]
    page = " ".join((ROOT / "docs/accelerators.md").read_text().replace("> ", "").split())
    configs = [file.stem for file in (ROOT / "configs").glob("*.py") if "def get_config" in file.read_text()]
    assert set(programs) == set(configs)
    rows = [row for devices in programs.values() for device in devices.values() for row in device.values()]
    assert not any("error" in row for row in rows) and "None of these was refused" in page
    complete = {"pack", "draw", "advance", "unpack", "decode"}
    shown = {}
    for words, devices in re.findall(r"\| (all \d+|configs/reverse\.py) \| ([\w, -]+) \|", page):
        shown |= dict.fromkeys(devices.split(", "), set(configs) if words == f"all {len(configs)}" else {"reverse"})
    recorded = {name: set() for devices in programs.values() for name in devices}
    for config, devices in programs.items():
        for name, found in devices.items():
            recorded[name] |= {config} if complete <= set(found) else set()
    assert shown == recorded
    seconds = [each["advance"]["cpu_seconds"] for each in programs["tape"].values() if "cpu_seconds" in each["advance"]]
    assert f"takes {min(seconds):.0f} to {max(seconds):.0f} seconds of a core" in page


def test_the_page_on_accelerators_shows_the_recorded_registers():
    recorded = json.loads((ROOT / "benchmarks/results/registers.json").read_text())
    page = (ROOT / "docs/accelerators.md").read_text()
    cases = [case for dtypes in recorded.values() for widths in dtypes.values() for case in widths.values()]
    kernels = [kernel for case in cases for each in case.values() for kernel in each.values()]
    assert len(kernels) == 3 * 2 * 2 * 7 * 3 and not any(kernel["spills"] for kernel in kernels)
    widths = recorded["h100-1"]["bfloat16"]
    for case in widths["64"]:
        cells = []
        for width in ("64", "128"):
            counted = [widths[width][case][name] for name in ("forward", "dq", "dk, dv")]
            cells.append(", ".join(str(kernel["registers"]) for kernel in counted))
            cells.append(", ".join(f"{kernel['shared'] / 1024:.0f}" for kernel in counted))
        assert f"| {case} | {' | '.join(cells)} |" in page


# Rows of the page: (program, kernel) of ours, and of what it is compared with.
BUNDLES = [
    ("forward, causal : splash", ("causal", "forward"), ("splash", "forward")),
    ("dq : splash", ("causal, separate", "dq"), ("splash", "dq")),
    ("dk and dv : splash", ("causal, separate", "dk, dv"), ("splash", "dk, dv")),
    ("the whole backward pass in one kernel : splash", ("causal", "backward"), ("splash, fused", "backward")),
    ("forward, ALiBi as a function of yours : no score", ("ALiBi", "forward"), ("causal", "forward")),
    ("forward, T5's buckets : no score", ("T5's buckets", "forward"), ("causal", "forward")),
    ("backward, T5's buckets with their gradient : no score", ("T5's buckets", "backward"), ("causal", "backward")),
]


def test_the_page_on_accelerators_shows_the_recorded_bundles():
    counts = json.loads((ROOT / "benchmarks/results/bundles.json").read_text())
    page = (ROOT / "docs/accelerators.md").read_text()
    text = " ".join(page.split())

    def count(chip, program, kernel, what="whole"):
        return counts[f"{chip}-1"][program]["kernels"][kernel][what]

    def ratio(chip, program, kernel, other, what):
        return f"{count(chip, program, kernel, what) / count(chip, *other, what):.2f}"

    for name, ours, theirs in BUNDLES:
        pairs = [(count(chip, *ours), count(chip, *theirs)) for chip in ("v5e", "v6e")]
        cells = " | ".join(f"{left:,} : {right:,} = {left / right:.2f}" for left, right in pairs)
        assert f"| {name} | {cells} |" in page
    assert f"take more, {count('v5e', 'causal', 'forward', 'partial'):,} forward on a v5e" in text
    calls = [
        ratio(chip, "causal", *each, "call")
        for chip in ("v5e", "v6e")
        for each in (("forward", ("splash", "forward")), ("backward", ("splash, fused", "backward")))
    ]
    said = "forward is {} times splash's there, the whole backward pass {}; on a v6e {} and {}."
    assert said.format(*calls) in text
    vmem = [count("v5e", "causal", kernel, "vmem") / 1e6 for kernel in ("forward", "backward")]
    assert "{:.1f} MB forward, and {:.1f} MB for the whole".format(*vmem) in text
    alibi = [ratio(chip, "ALiBi", "forward", ("causal", "forward"), "call") for chip in ("v5e", "v6e")]
    assert "takes {} times as many bundles on a v5e and {} on a v6e".format(*alibi) in text
    alibi = [
        ratio(chip, "ALiBi", "backward", ("causal", "backward"), what)
        for what in ("whole", "call")
        for chip in ("v5e", "v6e")
    ]
    assert "{} and {} per whole tile, {} and {} per call".format(*alibi) in text
