"""benchmarks/gpu.sh without a GPU: its plan, its truth, and that a wrong, broken or late contestant loses nothing."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import time

import gpu
import gpu_cases
import gpu_peers
import gpu_report
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_job import draw
from gpu_peers import Order

import attn
from attn.functional import reference
from attn.functional.implementations import IMPLEMENTATIONS

ROOT = pathlib.Path(__file__).parent.parent
OURS = "attn-pallas_gpu"


@pytest.fixture
def here(monkeypatch):
    """Do the work of child processes in this one, with short sequences, and leave the registry as it was."""
    before = dict(IMPLEMENTATIONS)

    def follow(order, until, on_row):
        gpu_peers.set_up(order.interpreted)
        gpu_peers.SECTIONS[order.section](order, lambda row: None if "at" in row else on_row(row))
        return None, {"at": "the end", "contestant": None}

    monkeypatch.setattr(gpu, "follow", follow)
    monkeypatch.setattr(gpu, "checks", lambda args: [])
    monkeypatch.setattr(gpu, "TILES", ())
    yield
    IMPLEMENTATIONS.clear()
    IMPLEMENTATIONS.update(before)


def main(monkeypatch, *words) -> int:
    monkeypatch.setattr(sys, "argv", ["gpu.py", *words])
    return gpu.main()


def test_the_shell_script_helps():
    environment = os.environ | {"PYTHON": sys.executable, "JAX_PLATFORMS": "cpu"}
    words = ["benchmarks/gpu.sh", "--help"]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for word in ("--install", "--small", "--output FILE", "--minutes", "eight minutes"):
        assert word in done.stdout


def test_the_shell_script_names_what_a_python_lacks(tmp_path):
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S -E "$@"\n')  # without the installed packages
    bare.chmod(0o755)
    done = subprocess.run(
        [ROOT / "benchmarks/gpu.sh"], env=os.environ | {"PYTHON": str(bare)}, capture_output=True, text=True
    )
    assert done.returncode == 2 and "lacks: jax jaxlib numpy flax" in done.stderr
    assert ".[cuda13,bench]" in done.stderr


def test_without_a_gpu_it_says_how_to_run_small(monkeypatch, capsys):
    monkeypatch.setattr(gpu, "follow", lambda order, until, on_row: (on_row({"platform": "cpu", "device": "cpu"}), {}))
    assert main(monkeypatch) == 2
    assert "JAX finds no GPU, its backend is 'cpu'" in (line := capsys.readouterr().err) and "--small" in line


# The plan


def test_every_cell_is_planned_the_most_important_first():
    jobs = gpu.jobs(gpu.arguments([]))
    cells = [gpu._cell(job)[:3] for job in jobs if OURS + "-32" not in job.contestants]
    assert len(cells) == len(set(cells)) == 6 * 6 * 2
    assert set(cells[:4]) == {(case, 4096, width) for case in ("causal", "full") for width in (64, 128)}
    assert {T for _, T, _ in cells[:24]} == {4096, 8192} and {case for case, *_ in cells[:24]} == set(gpu.CASES)
    for job in jobs:
        assert job.batch * job.lengths[0] == max(16384, job.lengths[0])
        assert ("attn-blockwise" in job.contestants) == (job.lengths[0] <= 4096 and "torch-flex" in job.contestants)


def test_a_length_beyond_the_checked_one_needs_a_shorter_one(capsys):
    with pytest.raises(SystemExit):
        gpu.arguments(["--lengths", "8192"])
    assert "values are checked up to T = 4,096" in capsys.readouterr().err


# The truth


@pytest.mark.parametrize("case", gpu_cases.CASES)
def test_the_formula_in_numpy_is_what_attn_computes(case):
    T, heads = 24, 3
    job = gpu_peers.Job("cells", batch=2, heads=heads, width=8, dtype="bfloat16")
    arrays = draw(job, T)
    expected = gpu_cases.expected(case, arrays, gpu_cases.slopes(heads))
    attend, operands = gpu_cases.of_attn("reference", case, T, heads)
    with jax.enable_x64(True):
        query, key, value, cotangent = (jnp.asarray(x, jnp.float64) for x in arrays)
        out, pull_back = jax.vjp(jax.jit(lambda *arrays: attend(*arrays, *operands)), query, key, value)
        for found, exact in zip((out, *pull_back(cotangent)), expected, strict=True):
            np.testing.assert_allclose(found, exact, rtol=1e-6, atol=1e-9)  # slopes are float32


def test_pairs_are_those_that_the_masks_show():
    i, j = np.arange(40)[:, None], np.arange(40)
    ids = gpu_cases.documents(40)
    masks = {
        "full": np.ones((40, 40), bool),
        "window": attn.masks.sliding_window(9, 0)(i, j),
        "documents": (ids[i] == ids[j]) & (j <= i),
    }
    for case in gpu_cases.CASES:
        assert gpu_cases.pairs(case, 40) == np.sum(masks.get(case, j <= i)), case
    assert len(set(ids)) == 8


# A run


def test_a_small_run_checks_times_and_saves(here, monkeypatch, tmp_path, capsys):
    path = tmp_path / "small.json"
    words = ["--cases", "causal", "--lengths", "16", "--widths", "8"]
    assert main(monkeypatch, "--small", *words, "--output", str(path)) == 0
    results = json.loads(path.read_text())
    assert results["small"] and results["not_reached"] == [] and results["failures"] == []
    cell, with_tiles = results["cells"]
    assert (cell["case"], cell["T"], cell["width"], cell["pairs"]) == ("causal", 16, 8, 136)
    ours = cell["contestants"][OURS]
    assert ours["right"] and set(ours["errors"]) == {"out", "dquery", "dkey", "dvalue"}
    assert all(ours[mode]["median_ms"] > 0 and ours[mode]["tflops"] >= 0 for mode in gpu_peers.MODES)
    assert set(cell["contestants"]) == set(gpu_peers.CONTESTANTS)
    assert "cuDNN" in cell["contestants"]["jax.nn-cudnn"]["forward"]["left_out"]
    assert set(with_tiles["contestants"]) == {OURS} and len(results["tiles"]) == 2
    printed = capsys.readouterr().out
    assert "every value that was checked is right" in printed and "say nothing about a GPU" in printed


def test_what_the_time_does_not_suffice_for_is_listed(here, monkeypatch, tmp_path):
    path = tmp_path / "late.json"
    assert main(monkeypatch, "--small", "--minutes", "0.001", "--output", str(path)) == 0
    results = json.loads(path.read_text())
    assert results["cells"] == [] and {row["case"] for row in results["not_reached"]} == set(gpu_cases.CASES)


def test_a_wrong_contestant_is_named_and_not_timed(here, monkeypatch, tmp_path, capsys):
    def wrong(call):
        out, normalizer = reference.attend(call)
        return out.at[:, 3].multiply(1.1), normalizer

    monkeypatch.setattr(gpu, "CONTESTANTS", ("attn-reference", "attn-wrong"))
    monkeypatch.setattr(gpu, "jobs", lambda args: [_job("causal", ("attn-reference", "attn-wrong"), checked_length=16)])
    IMPLEMENTATIONS["wrong"] = dataclasses.replace(IMPLEMENTATIONS["reference"], attend=wrong)
    path = tmp_path / "wrong.json"
    assert main(monkeypatch, "--small", "--output", str(path)) == 1
    found = json.loads(path.read_text())["cells"][0]["contestants"]
    assert found["attn-reference"]["right"] and "median_ms" in found["attn-reference"]["forward"]
    assert not found["attn-wrong"]["right"] and found["attn-wrong"]["errors"]["out"] > 0.02
    assert "median_ms" not in found["attn-wrong"]["forward"]
    assert "WRONG: attn-wrong, causal, T 16, width 8" in capsys.readouterr().out


def test_a_long_sequence_is_timed_for_those_that_were_right_at_a_shorter_one(here):
    rows, job = [], _job("causal", ("attn-reference", "attn-blockwise"), checked_length=8)
    order = Order("cells", True, time.time() + 60, jobs=(job,), right=(("causal", 8, "attn-reference"),))
    gpu_peers.cells(order, rows.append)
    found = rows[-1]["contestants"]
    assert "median_ms" in found["attn-reference"]["forward"]
    assert found["attn-blockwise"] == {"left_out": "was not found right at a shorter length"}


def _job(case: str, contestants: tuple[str, ...], **more) -> gpu_peers.Job:
    settings = gpu.SMALL | {"lengths": (16,), "masks": (case,), "width": 8} | more
    return gpu_peers.Job("cells", "one_process", contestants, **settings)


# Processes that end early


def test_a_contestant_that_ends_its_process_is_left_out_of_its_case_alone(here, monkeypatch, tmp_path):
    names, orders = ("attn-reference", "attn-broken"), []
    jobs = [_job("causal", names), _job("full", names), _job("causal", names, lengths=(32,))]
    monkeypatch.setattr(gpu, "jobs", lambda args: list(jobs))

    def follow(order, until, on_row):
        orders.append(order)
        for job in map(gpu._cell, order.jobs):
            if job[0] == "causal" and "attn-broken" in job[3]:
                return "the process ended with status 3", {"at": "times of attn-broken", "contestant": "attn-broken"}
            on_row({"case": job[0], "T": job[1], "width": 8, "contestants": {name: {"right": True} for name in job[3]}})
        return None, {}

    args = gpu.arguments(["--small", "--output", str(tmp_path / "broken.json")])
    run = gpu.Run(args, {"platform": "cpu", "device": "cpu"}, time.time())
    monkeypatch.setattr(gpu, "follow", follow)
    run.measure()
    assert [set(cell["contestants"]) for cell in run.results["cells"]] == [{names[0]}, set(names), {names[0]}]
    assert len(orders) == 2 and run.results["failures"][0]["at"] == "times of attn-broken"
    assert json.loads((tmp_path / "broken.json").read_text())["not_reached"] == []


@pytest.mark.parametrize("then, failure", [("sys.exit(3)", "status 3"), ("time.sleep(60)", "the time was up")])
def test_rows_of_a_process_that_fails_are_kept(monkeypatch, tmp_path, then, failure):
    child = tmp_path / "child.py"
    lines = [json.dumps({"case": "causal"}), json.dumps({"at": "times of x", "contestant": "x"})]
    child.write_text(f"import sys, time\nopen(sys.argv[2], 'a').write({chr(10).join([*lines, ''])!r})\n{then}\n")
    monkeypatch.setattr(gpu, "CHILD", child)
    rows = []
    failed, at = gpu.follow(Order("cells", True), time.time() + 3, rows.append)
    assert failure in failed and rows == [{"case": "causal"}] and at["contestant"] == "x"


def test_an_error_after_which_a_gpu_serves_no_more_is_told_from_others():
    def fail(text):
        raise RuntimeError(text)

    assert gpu_peers._tried("x", lambda: fail("no memory")) == (None, "RuntimeError: no memory")
    with pytest.raises(gpu_peers.Broken):
        gpu_peers._tried("x", lambda: fail("CUDA_ERROR_ILLEGAL_ADDRESS: an illegal memory access was encountered"))


# The report


def test_aims_are_of_cudnn_without_a_score_and_of_flex_attention_with_one():
    def cell(case):
        names = {OURS: 2.0, "jax.nn-cudnn": 1.8, "torch-flex": 3.0}
        contestants = {name: {"forward": {"median_ms": ms}} for name, ms in names.items()}
        return {"case": case, "T": 4096, "width": 64, "contestants": contestants}

    rows = gpu_report.ratios([cell("causal"), cell("softcap")])
    aims = {(row["case"], row["peer"]): (row["times_as_fast"], row.get("aim")) for row in rows}
    assert aims["causal", "jax.nn-cudnn"] == (0.9, 0.8) and aims["softcap", "torch-flex"] == (1.5, 1.0)
    assert aims["causal", "torch-flex"][1] is None and aims["softcap", "jax.nn-cudnn"][1] is None
    assert [(row["median"], row["aim"]) for row in gpu_report.figures(rows)] == [(0.9, 0.8), (1.5, 1.0)]
