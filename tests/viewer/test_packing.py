"""What a page holds: exact values, values rounded to 7 bits, or pooled maps with the exact largest of each row."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from viewer_payloads import of_levels, payload_of, sheets, tops

import attn
from attn.viewer import packing
from attn.viewer.arrays import MASKED, is_masked


def softmax(*shape, scale=2.0, seed=0):
    x = np.exp(scale * np.random.default_rng(seed).normal(size=shape))
    return (x / x.sum(-1, keepdims=True)).astype(np.float32)


def test_small_maps_are_exact_bit_for_bit():
    w = softmax(2, 3, 5, 7)
    w[1, 2, 3, 4], w[0, 0, 0, 0], w[0, 1, 0, 0] = np.nan, MASKED, np.inf
    payload = payload_of(attn.view(w).html())
    assert payload["encoding"] == "float32" and "exact" in payload["note"]
    np.testing.assert_array_equal(np.stack(sheets(payload)).view("u4"), w.reshape(-1, 5, 7).view("u4"))


def test_the_order_is_run_frame_kind_layer_head():
    maps = {name: softmax(2, 3, 5, 7, seed=seed) for seed, name in enumerate("abcd")}
    frames = {"1": {"x": maps["a"]}, "2": {"x": maps["b"]}}
    others = {"1": {"x": maps["c"]}, "2": {"x": maps["d"]}}
    payload = payload_of(attn.view(frames=frames, compare=others, names=("left", "right")).html())
    assert payload["runs"] == ["left", "right"] and payload["frames"] == ["1", "2"]
    np.testing.assert_array_equal(np.stack(sheets(payload)), np.concatenate([*maps.values()]).reshape(-1, 5, 7))


def test_larger_maps_are_rounded_to_what_the_note_says():
    w = softmax(6, 8, 64, 64)
    payload = payload_of(attn.view(w).html())
    assert payload["encoding"] == "levels" and "within 0.8 %" in payload["note"] and payload["top"] is None
    found, w = np.stack(sheets(payload)), w.reshape(-1, 64, 64)
    assert (abs(found - w) <= 0.008 * w.max(axis=(1, 2), keepdims=True)).all()
    small = w < 0.01 * w.max(axis=(1, 2), keepdims=True)
    assert (abs(found - w)[small] <= 0.001 * w.max()).all()  # closer for small values


def test_maps_beyond_the_budget_are_pooled_with_the_exact_largest_of_each_row():
    w = softmax(2, 2, 300, 500)
    payload = payload_of(attn.view(w, budget=30_000).html())
    [kind] = payload["kinds"]
    (a, b), (t, s) = kind["layers"][0]["block"], kind["layers"][0]["shape"]
    assert (t, s) == (-(-300 // a), -(-500 // b)) and (a, b) != (1, 1) and f"{a} x {b}" in payload["note"]
    assert kind["layers"][0]["reduce"] == "mass"
    w = w.reshape(-1, 300, 500).astype(np.float64)
    for found, head in zip(sheets(payload), w, strict=True):
        expected = [[head[i : i + a, j : j + b].sum(1).mean() for j in range(0, 500, b)] for i in range(0, 300, a)]
        np.testing.assert_allclose(found, expected, atol=0.008 * np.max(expected))
    index, value = tops(payload)
    flat = w.reshape(-1, 500)
    order = np.argsort(-flat, axis=1)[:, : index.shape[1]]
    np.testing.assert_array_equal(index, order)
    np.testing.assert_array_equal(value, np.take_along_axis(flat, order, 1).astype(np.float32))


def test_everything_is_exact_on_request(tmp_path):
    w = softmax(2, 2, 300, 500)
    path = attn.view(w, budget=30_000).save(tmp_path / "all 100%.html", exact=True)
    np.testing.assert_array_equal(np.stack(sheets(payload_of(path.read_text()))), w.reshape(-1, 300, 500))


@pytest.mark.parametrize("shape", [(1, 10_000), (10_000, 1), (8_192, 8_192), (97, 89), (1, 1), (3, 5_000)])
@pytest.mark.parametrize("most", [1, 60, 5_000])
def test_blocks_are_as_small_as_fits(shape, most):
    a, b = packing.block_sizes(*shape, most)
    assert -(-shape[0] // a) * -(-shape[1] // b) <= most
    a, b = max(1, int(0.8 * a) - 1), max(1, int(0.8 * b) - 1)
    assert (a, b) == (1, 1) or -(-shape[0] // a) * -(-shape[1] // b) > most


@given(
    arrays.arrays(
        np.float32,
        st.tuples(st.integers(1, 9), st.integers(1, 9)),
        elements=st.floats(-(2.0**90), 2.0**90, width=32)
        | st.sampled_from([np.nan, np.inf, -np.inf, 0.0, float(MASKED)]),
    )
)
def test_levels_keep_sign_order_of_magnitude_and_special_values(sheet):
    finite = sheet[np.isfinite(sheet)]
    low, high = (finite.min(), finite.max()) if finite.size else (0, 0)
    found = of_levels(packing.levels(sheet, float(low), float(high)), float(low), float(high))
    np.testing.assert_array_equal(np.isnan(found), np.isnan(sheet))
    np.testing.assert_array_equal(np.isinf(found) * np.sign(found), np.isinf(sheet) * np.sign(sheet))
    most = max(abs(low), abs(high))
    # Half a level at the top: 126 levels above 0, or 63 on each side of it.
    step = (1 / 126 if low >= 0 else 1 / 63) * most
    assert (abs(found - sheet)[np.isfinite(sheet)] <= 1.001 * step).all()


def test_pooling_treats_masked_as_absent_and_nan_as_nan():
    x = np.array([[[0.25, MASKED, MASKED, MASKED], [0.75, MASKED, np.nan, MASKED], [1, 0, 0, 0]]], np.float32)
    [cells] = packing.pooled(x, (2, 2), "weights")
    assert cells[0, 0] == 0.5 and np.isnan(cells[0, 1]) and not is_masked(cells)[0, 1]
    assert cells[1].tolist() == [1, 0]  # the last block has one row
    [cells] = packing.pooled(np.full((1, 4, 4), MASKED), (2, 2), "weights")
    assert is_masked(cells).all()
    [cells] = packing.pooled(np.array([[[-3, -1], [-2, -5]]], np.float32), (2, 2), "scores")
    assert cells.tolist() == [[-1]]


def test_the_largest_leave_out_what_is_masked_or_not_a_number():
    x = np.array([[[0.1, 0.7, np.nan], [MASKED, MASKED, MASKED]]], np.float32)
    index, value = packing.largest(x, 3)
    assert index[0].tolist() == [[1, 0, 2**32 - 1], [2**32 - 1] * 3]
    np.testing.assert_array_equal(value[0], np.array([[0.7, 0.1, 0], [0, 0, 0]], np.float32))


def test_a_page_of_heads_that_are_pooled_already_says_so():
    payload = payload_of(attn.view(softmax(8, 16, 16), pooled_from=(1_000, 1_010)).html())
    assert "pooled before, from 1,000 x 1,010" in payload["note"]
    layer = payload["kinds"][0]["layers"][0]
    assert (layer["rows"], layer["columns"], layer["block"], layer["shape"]) == (1_000, 1_010, [63, 64], [16, 16])


def test_six_layers_of_eight_heads_make_a_small_page():
    """Of random weights, which are harder to compress than those of a model."""
    assert len(attn.view(softmax(6, 8, 64, 64, scale=1.0)).html().encode()) < 300_000


def test_a_page_in_a_notebook_stays_under_jupyters_rate():
    assert len(attn.view(softmax(12, 12, 256, 256))._repr_html_().encode()) < 2_000_000
