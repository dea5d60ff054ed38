"""`attn check`: right implementations pass, wrong ones are found, and its results decide what "auto" may choose."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from attn import checking, cli
from attn.functional import checked, reference
from attn.functional.implementations import IMPLEMENTATIONS, Implementation


@pytest.fixture
def few(monkeypatch):
    """Two cases, short sequences to time, and one implementation."""
    cases = {name: checking.CASES[name] for name in ("causal", "ALiBi")}
    monkeypatch.setattr(checking, "CASES", cases)
    monkeypatch.setattr(checking, "implementations", lambda: ["reference"])
    monkeypatch.setattr(checking, "times", lambda names, length: {n: {"forward": 1.0, "backward": 2.0} for n in names})


@pytest.mark.some(3)
@pytest.mark.parametrize("name", checking.CASES)
def test_every_case_is_right_in_float32(name):
    found = checking.errors("blockwise", checking.CASES[name], "float32")
    assert {"out", "logsumexp", "dquery", "dkey", "dvalue"} <= found.keys()
    assert max(found.values()) < checking.TOLERANCES["float32"]


def test_gradients_of_what_a_score_captures_are_checked():
    assert "dslopes" in checking.errors("reference", checking.CASES["ALiBi"], "float32")


def test_a_wrong_implementation_is_found(few, monkeypatch, capsys):
    def wrong(call):
        out, normalizer = reference.attend(call)
        return out * (1 + 1e-3 * (jnp.arange(out.shape[0]) == 7))[:, None], normalizer  # in one row

    monkeypatch.setitem(IMPLEMENTATIONS, "reference", dataclasses.replace(IMPLEMENTATIONS["reference"], attend=wrong))
    monkeypatch.setitem(IMPLEMENTATIONS, "exact", Implementation(reference.attend))
    errors = checking.errors
    monkeypatch.setattr(checking, "_results", _with_exact_reference(checking._results))
    assert errors("reference", checking.CASES["causal"], "float32")["out"] > checking.TOLERANCES["float32"]
    assert cli.main(["check", "--lengths", "8"]) == 1
    printed = capsys.readouterr().out
    assert "WRONG" in printed and "wrong: reference" in printed


def test_a_nan_is_an_error_whatever_the_other_results_are(few, monkeypatch):
    def with_nan(*arguments):
        results = exact(*arguments)
        if arguments[2] != "float64":
            results["dkey"][3] = np.nan
        return results

    exact = checking._results
    monkeypatch.setattr(checking, "_results", with_nan)
    found = checking.outcome("reference", "causal", "float32")
    assert not found["right"] and found["errors"]["dkey"] == np.inf and found["errors"]["out"] < 1e-5
    assert checking.describe(found) == "WRONG, dkey inf"


def _with_exact_reference(results):
    return lambda name, case, dtype, *rest: results("exact" if dtype == "float64" else name, case, dtype, *rest)


def test_the_report_is_printed_and_written(few, tmp_path, capsys):
    path = tmp_path / "cpu.json"
    assert cli.main(["check", "--lengths", "8", "--output", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "every result is right" in printed and "8 positions" in printed
    results = json.loads(path.read_text())
    assert results["preferred"] == [] and results["seconds"] == {"8": {"reference": {"forward": 1.0, "backward": 2.0}}}
    values = results["values"]["reference"]
    assert values["causal, float32"]["right"] and max(values["causal, float32"]["errors"].values()) < 1e-5
    assert all(each["right"] for each in values.values()) and len(values) == 2 * 2 + 3


def test_a_folder_that_does_not_exist_is_said_before_anything_is_computed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(checking, "run", None)
    assert cli.main(["check", "--output", str(tmp_path / "none" / "x.json")]) == 2
    assert capsys.readouterr().err == f"error: --output: the folder {tmp_path / 'none'} does not exist\n"


def test_a_kernel_is_preferred_where_it_is_right_and_faster_everywhere():
    seconds = {
        1024: {"blockwise": {"forward": 2.0, "backward": 5.0}, "pallas_tpu": {"forward": 1.0, "backward": 4.0}},
        4096: {"blockwise": {"forward": 8.0, "backward": 9.0}, "pallas_tpu": {"forward": 4.0, "backward": 8.0}},
    }
    assert checking._is_faster("pallas_tpu", seconds)
    seconds[4096]["pallas_tpu"]["backward"] = 9.5
    assert not checking._is_faster("pallas_tpu", seconds)
    assert not checking._is_faster("cudnn", seconds) and not checking._is_faster("cudnn", {})


def test_committed_results_say_what_is_preferred(tmp_path, monkeypatch):
    (tmp_path / "v9.json").write_text(json.dumps({"device_kind": "TPU v9", "preferred": ["pallas_tpu"]}))
    monkeypatch.setattr(checked, "FOLDER", tmp_path)
    checked.preferred.cache_clear()
    try:
        assert checked.preferred("TPU v9") == {"pallas_tpu"} and checked.preferred("TPU v8") == frozenset()
    finally:
        checked.preferred.cache_clear()


def test_times_are_of_every_implementation_that_serves():
    found = checking.times(["reference", "blockwise", "cudnn"], 64, width=8, heads=2, rounds=1)
    assert found.keys() == {"reference", "blockwise"}
    assert all(np.isfinite(each[d]) and each[d] > 0 for each in found.values() for d in ("forward", "backward"))


@pytest.mark.parametrize("arguments", [["--lengths", "0"], ["--lengths", "x"], ["--nope"]])
def test_bad_arguments_are_one_line(arguments, capsys):
    with pytest.raises(SystemExit):
        cli.main(["check", *arguments])
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
