"""`attn check`: right implementations pass, wrong ones are found, and its results decide what "auto" may choose."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn import checking, cli
from attn.functional import checked, pallas_gpu, pallas_tpu, reference
from attn.functional.contract import Call
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


def test_what_fails_is_reported_and_the_rest_is_checked(few, monkeypatch, capsys):
    def attend(call):
        if call.score is not None:
            raise ValueError("no tile\nof this")
        return reference.attend(call)

    monkeypatch.setitem(IMPLEMENTATIONS, "broken", Implementation(attend))
    monkeypatch.setattr(checking, "implementations", lambda: ["reference", "broken"])
    assert cli.main(["check", "--lengths", "8"]) == 1
    printed = capsys.readouterr().out
    assert printed.count("FAILED: ValueError: no tile\n") == 2 and "wrong: broken" in printed
    assert "broken       NaN and infinity in hidden keys reach nothing: yes" in printed


def test_on_each_processor_kernels_get_several_tiles_with_and_without_padding():
    for platform, blocks in (
        ("tpu", lambda call: pallas_tpu._blocks(call, pallas_tpu.BLOCK_SIZE, 128)),
        ("gpu", lambda call: pallas_gpu._blocks(call, None)),
    ):
        has_padding = set()
        for T, S in checking.SIZES[platform]:
            shapes = ((T, 4, 64), (S, 2, 64), (S, 2, 32))
            call = Call(*(jax.ShapeDtypeStruct(shape, "bfloat16") for shape in shapes), None, None, 1.0, None)
            rows, columns, _ = blocks(call)
            has_padding.add(bool(T % rows or S % columns))
            several = rows < T and columns < S
        assert has_padding == {True, False} and several


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
    assert (
        values["causal, float32, 200 x 333"]["right"]
        and max(values["causal, float32, 200 x 333"]["errors"].values()) < 1e-5
    )
    assert all(each["right"] for each in values.values()) and len(values) == 2 * 2 + 3


def test_a_folder_that_does_not_exist_is_said_before_anything_is_computed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(checking, "run", None)
    assert cli.main(["check", "--output", str(tmp_path / "none" / "x.json")]) == 2
    assert capsys.readouterr().err == (
        f"error: --output={tmp_path / 'none' / 'x.json'}: folder {tmp_path / 'none'} does not exist\n"
    )


def test_a_folder_is_no_file_to_write_and_said_so_before_anything_is_computed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(checking, "run", None)
    assert cli.main(["check", "--output", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"error: --output={tmp_path}: is a folder, must be a file\n"


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
