"""Faults that were found in corners, each with the right value."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from viewer_payloads import payload_of, sheets

import attn
from attn.viewer import Axis, Kind, Picture, static_pictures
from attn.viewer.arrays import MASKED, is_masked
from attn.viewer.measures import computed

ROOT = pathlib.Path(__file__).parent.parent.parent


def test_a_kind_has_one_quantity_in_all_runs_and_frames():
    """One value above 1 makes all of them values, in any order, so that all are pooled in the same way."""
    a = np.full((1, 60, 60), 1 / 60)
    b = a.copy()
    b[0, 0, 0] = 1.5
    for first, second in ((a, b), (b, a)):
        payload = payload_of(attn.view(first, compare=second, budget=2_000).html())
        assert payload["kinds"][0]["quantity"] == "values" and payload["kinds"][0]["layers"][0]["reduce"] == "max"
        largest = [float(np.nanmax(sheet)) for sheet in sheets(payload)]
        np.testing.assert_allclose(sorted(largest), [1 / 60, 1.5], rtol=1e-5)


def test_rounding_below_zero_keeps_weights_weights():
    x = np.full((2, 40, 40), 1 / 40)
    x[0, 3, 3] = -1e-9
    view = attn.view(np.tile(x, (1, 40, 1, 1)))
    payload = payload_of(view.html())
    assert payload["kinds"][0]["quantity"] == "weights" and payload["encoding"] == "levels"
    found = sheets(payload)[0]
    assert found[3, 3] == 0 and found[3, 4] == pytest.approx(1 / 40)


@pytest.mark.parametrize("is_signed, share", [(False, 0.008), (True, 0.016)])
def test_the_note_says_how_far_rounded_values_are_off(is_signed, share):
    x = np.random.default_rng(0).normal(size=(20, 64, 64))
    x = x if is_signed else np.exp(x) / np.exp(x).sum(-1, keepdims=True)
    payload = payload_of(attn.view(x).html())
    assert f"within {100 * share:.1f} %" in payload["note"]
    off = max(abs(found - each).max() / abs(each).max() for found, each in zip(sheets(payload), x))
    assert 0.5 * share < off <= share


def test_pooled_maps_have_the_names_of_whole_positions():
    w = np.full((2, 30, 30), 1 / 30)
    names = [f"token {n}" for n in range(300)]
    view = attn.view(w, pooled_from=(300, 300), rows=names, columns=names)
    assert payload_of(view.html())["kinds"][0]["rows"]["names"] == names
    with pytest.raises(ValueError, match="300 rows, but 30 names"):
        attn.view(w, pooled_from=(300, 300), rows=names[:30])


def test_distance_counts_from_where_the_queries_stand():
    """The last query of four reads itself: a query of a cache at position 3."""
    kind = Kind("decoder", "decoder", [np.eye(4, dtype=np.float32)[None, 3:]], Axis("query"), Axis("key"), offset=3)
    assert computed([kind])["distance"] == [(0.0,)]


def test_keys_that_causality_hides_are_masked_not_zero(copy_run):
    """In the decoder's own map, and nowhere in the cross-attention."""
    kinds = {kind.name: kind for kind in attn.load(copy_run).look("3 1 4").kinds()}
    for layer in kinds["decoder"].layers:
        np.testing.assert_array_equal(is_masked(layer), np.broadcast_to(np.tri(4) == 0, layer.shape))
    assert not any(is_masked(layer).any() for layer in kinds["cross"].layers)


def test_only_a_class_token_is_called_one():
    kinds = attn.view(np.full((20, 16), 1 / 16), picture=np.eye(8)).kinds
    titles = [ax.get_title() for ax in static_pictures.draw(kinds, "").axes]
    assert any("mean over queries" in title for title in titles) and not any("class" in title for title in titles)
    kinds = attn.view(np.full((17, 17), 1 / 17), picture=np.eye(8)).kinds
    assert any("class token" in ax.get_title() for ax in static_pictures.draw(kinds, "").axes)


def test_a_picture_shows_both_runs():
    view = attn.view(np.eye(3), compare=np.eye(3)[::-1], names=("adam", "sgd"))
    drawn = static_pictures.draw(view._pictured(), "").axes
    assert ["adam" in ax.get_title() for ax in drawn] == [True, False]
    np.testing.assert_array_equal(drawn[1].get_images()[0].get_array(), np.eye(3)[::-1])


def test_a_mosaic_keeps_signs_masks_and_nan():
    heads = np.zeros((5, 20, 6, 6), np.float32)
    heads[0, 0], heads[0, 1], heads[0, 2], heads[0, 3] = np.nan, -1, 1, MASKED
    kinds = attn.view(heads).kinds
    [ax] = static_pictures.draw(kinds, "").axes
    image = ax.get_images()[0].get_array()
    nan, negative, positive, masked, zero = (image[10, 25 * n + 10, :3] for n in range(5))
    assert nan[0] > nan[1] < nan[2] and negative[2] > negative[0] and positive[0] > positive[2]
    assert np.ptp(masked) == 0 and masked[0] < 0.9 < zero.min()


@pytest.mark.parametrize("ending", ["html", "png", "svg", "pdf"])
def test_a_file_that_cannot_be_written_keeps_what_it_was(tmp_path, ending):
    path = tmp_path / f"page.{ending}"
    path.write_text("precious")
    code = (
        "import resource, sys, numpy as np, attn\n"
        "view = attn.view(np.random.default_rng(0).random((3, 4, 40, 40)))\n"
        "view.html()\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        f"try: view.save({str(path)!r})\n"
        "except OSError as error: sys.exit(0 if error.filename else 1)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert path.read_text() == "precious" and [each.name for each in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(
    "options, match",
    [
        (dict(weights=np.eye(3), compare=np.eye(3), names=("a", "a")), "names: got"),
        (dict(weights=np.eye(3), compare=np.eye(3), names=("a",)), "names: got"),
        (dict(frames={1: np.eye(3), "1": np.eye(3)}), "same text"),
        (dict(weights={1: np.eye(3), "1": np.eye(3)}), "same text"),
        (dict(weights={"logits": np.ones((1, 6, 50))}), "without attentions"),
        (dict(weights=np.eye(3), shape=(3, 3)), "scale and shape"),
        (dict(mask=attn.masks.causal(), shape=3, batch=0), "batch: goes with"),
        (dict(mask=attn.masks.causal(), rows={"mask": ["a"]}, columns={"mask": ["a"]}), "got a dictionary"),
        (dict(mask=attn.masks.causal(), shape=True), "shape: got True"),
        (dict(mask=attn.masks.causal(), shape=10**12), "view a part"),
        (dict(query="a", key="a"), "query: got"),
        (dict(weights=np.ones((2, 3, 4, 4)), measures={"x": np.ones((3, 2))}), r"got \[3, 2\], must be"),
        (dict(weights=np.eye(3), measures={"x": 3}), "must be"),
        (dict(weights=np.eye(3), measures={"x": "abc"}), "must be"),
        (dict(weights=np.eye(5), picture=Picture(np.eye(6), (3, 3))), "has 5 columns"),
        (dict(weights=np.eye(5), picture=Picture(np.eye(6), (0, 3))), r"grid \(0, 3\)"),
        (dict(weights=[[], []]), "no layers"),
        (dict(weights=np.eye(3), pooled_from=5), "pooled_from"),
    ],
)
def test_more_wrong_calls_are_named(untyped, options, match):
    with pytest.raises((TypeError, ValueError), match=match):
        attn.view(**options)


def test_runs_with_other_names_are_not_compared():
    first, second = (
        Kind("x", "x", [np.eye(2, dtype=np.float32)[None]], Axis("q", tuple(names)), Axis("k"))
        for names in ("ab", "ac")
    )
    holders = [type("Maps", (), {"kinds": lambda self, kind=kind: [kind]})() for kind in (first, second)]
    with pytest.raises(ValueError, match="other names of rows"):
        attn.view(holders[0], compare=holders[1])
