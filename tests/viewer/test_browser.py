"""The page in a real browser: what is drawn at known cells, hover, keys, touch, slider, comparison, and hostile input.

Of every page the fixture also checks that nothing is loaded and that the console reports nothing.
"""

import colorsys
import pathlib

import numpy as np
import pytest
import viewer_hostile as hostile

import attn
from attn.viewer.arrays import MASKED

ROOT = pathlib.Path(__file__).parent.parent.parent
WORDS = ["The", "quick", "brown", "fox", "jumps", "over"]


def softmax(*shape, seed=0):
    x = np.exp(2 * np.random.default_rng(seed).normal(size=shape))
    return x / x.sum(-1, keepdims=True)


def luminance(color):
    r, g, b = ((c / 255) ** 2.2 for c in color)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def hue(color):
    return colorsys.rgb_to_hsv(*(c / 255 for c in color))[0] * 360


def colors(opened, cells):
    return [opened.color(*opened.cell(*cell)) for cell in cells]


def readout(opened) -> str:
    return opened.page.locator(".head .readout").first.inner_text()


def large_map(opened):
    return opened.page.locator(".map canvas").first


# What is drawn


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_larger_weights_are_drawn_further_from_the_background(opened, scheme):
    x = np.zeros((5, 5))
    x[2] = [0.0, 0.25, 0.5, 0.75, 1.0]
    page = opened(attn.view(x), color_scheme=scheme)
    page.page.mouse.move(0, 0)
    light = [luminance(color) for color in colors(page, [(2, column) for column in range(5)])]
    ordered = sorted(light, reverse=scheme == "light")
    assert light == ordered and len(set(light)) == 5
    assert (luminance(page.color(5, 5)) > 0.5) == (scheme == "light")


@pytest.mark.parametrize("ratio", [1, 1.5, 3])
def test_each_cell_has_its_own_value_at_every_pixel_ratio(opened, ratio):
    x = np.zeros((7, 11))
    marked = [(0, 10), (3, 4), (6, 0), (5, 9)]
    for cell in marked:
        x[cell] = 1
    page = opened(attn.view(x), device_scale_factor=ratio)
    dark = [luminance(color) for color in colors(page, marked)]
    neighbours = [(r, c + (1 if c < 10 else -1)) for r, c in marked]
    light = [luminance(color) for color in colors(page, neighbours)]
    assert max(dark) < 0.2 < 0.7 < min(light)


def test_special_values_have_colors_of_their_own(opened):
    x = np.zeros((4, 6), np.float32)
    x[2] = [0, 1, np.nan, MASKED, np.inf, -np.inf]
    page = opened(attn.view(np.ma.masked_array(x, np.isnan(x) & (np.arange(6) == 3))))
    found = colors(page, [(2, column) for column in range(6)])
    assert len(set(found)) == 6
    assert 280 < hue(found[2]) < 345  # NaN is magenta
    legend = page.page.locator(".legend").inner_text().lower()
    assert "masked" in legend and "nan" in legend


def test_negative_values_are_blue_and_positive_ones_orange(opened):
    page = opened(attn.view(np.array([[-1.0, -0.5, 0.0, 0.5, 1.0]] * 3)))
    found = colors(page, [(1, column) for column in range(5)])
    assert 190 < hue(found[0]) < 260 and 10 < hue(found[4]) < 50
    assert luminance(found[2]) > max(luminance(found[0]), luminance(found[4]))


def test_a_thumbnail_shows_its_head(opened):
    heads = np.zeros((2, 3, 4, 4))
    heads[1, 2] = 1
    page = opened(attn.view(heads))
    rects = {(n, h): page.page.evaluate(f"attnViewer.gridRect({n}, {h}).toJSON()") for n in (0, 1) for h in (0, 2)}
    light = {k: luminance(page.color(r["x"] + r["width"] / 2, r["y"] + r["height"] / 2)) for k, r in rects.items()}
    assert light[1, 2] < 0.2 < 0.7 < min(value for key, value in light.items() if key != (1, 2))


# Reading and choosing


def test_hover_reads_the_cell_with_the_names_of_both_axes(opened):
    x = softmax(6, 6)
    page = opened(attn.view(x, rows=WORDS, columns=[word.upper() for word in WORDS]))
    page.page.mouse.move(*page.cell(3, 4))
    page.page.wait_for_timeout(100)
    text = readout(page)
    assert "fox" in text and "JUMPS" in text and f"{x[3, 4]:.3g}"[:4] in text


def test_arrow_keys_move_the_crosshair(opened):
    page = opened(attn.view(softmax(6, 6), rows=WORDS, columns=WORDS))
    large_map(page).focus()
    for key in ("ArrowDown", "ArrowDown", "ArrowRight"):
        page.page.keyboard.press(key)
    state = page.page.evaluate("attnViewer.state()")
    assert (state["row"], state["column"]) == (2, 1)
    page.page.wait_for_timeout(100)
    assert "brown" in readout(page) and "quick" in readout(page)
    page.page.keyboard.press("End")
    assert page.page.evaluate("attnViewer.state().column") == 5


def test_arrow_keys_choose_a_head_in_the_overview(opened):
    page = opened(attn.view(softmax(2, 3, 5, 5)))
    page.page.locator(".overview canvas").focus()
    page.page.keyboard.press("ArrowRight")
    page.page.keyboard.press("ArrowDown")
    state = page.page.evaluate("attnViewer.state()")
    assert (state["layer"], state["head"]) == (1, 1)


def test_a_click_chooses_a_head(opened):
    page = opened(attn.view(softmax(2, 3, 5, 5)))
    rect = page.page.evaluate("attnViewer.gridRect(1, 2).toJSON()")
    page.page.mouse.click(rect["x"] + rect["width"] / 2, rect["y"] + rect["height"] / 2)
    state = page.page.evaluate("attnViewer.state()")
    assert (state["layer"], state["head"]) == (1, 2)


def test_a_tap_reads_a_cell(opened):
    x = softmax(6, 6)
    page = opened(attn.view(x, rows=WORDS, columns=WORDS), width=390, height=844, has_touch=True, is_mobile=True)
    large_map(page).scroll_into_view_if_needed()
    page.page.touchscreen.tap(*page.cell(2, 3))
    page.page.wait_for_timeout(150)
    assert "brown" in readout(page) and "fox" in readout(page)


def test_everything_can_be_reached_by_keyboard(opened):
    view = attn.view({"cross": softmax(2, 3, 6, 6), "encoder": softmax(2, 3, 6, 6)}, rows=WORDS, columns=WORDS)
    page = opened(view)
    reached = set()
    for _ in range(40):
        page.page.keyboard.press("Tab")
        reached.add(
            page.page.evaluate(
                "(e => [e.tagName, e.getAttribute('role') || e.type || '', e.textContent.slice(0, 12)].join(' '))"
                "(document.activeElement)"
            )
        )
    kinds = " | ".join(sorted(reached))
    for wanted in ("CANVAS application", "SELECT", "BUTTON tab", "Tokens", "PNG", "SUMMARY"):
        assert wanted in kinds, kinds


def test_tabs_choose_a_kind(opened):
    page = opened(attn.view({"cross": softmax(2, 3, 4, 6), "encoder": softmax(1, 2, 6, 6)}))
    page.page.get_by_role("tab", name="encoder self-attention").click()
    assert page.page.evaluate("attnViewer.state().kind") == "encoder"


def test_the_slider_goes_through_the_frames(opened):
    frames = {f"step {n}": np.full((3, 3), value) for n, value in ((1, 0.0), (10, 0.5), (100, 1.0))}
    page = opened(attn.view(frames=frames))
    slider = page.page.get_by_role("slider").first
    seen = {}
    for key in (None, "ArrowLeft", "ArrowLeft"):
        slider.focus()
        if key:
            page.page.keyboard.press(key)
        page.page.wait_for_timeout(100)
        seen[slider.get_attribute("aria-valuetext")] = luminance(colors(page, [(2, 1)])[0])
    assert [*seen] == ["step 100", "step 10", "step 1"]  # it begins at the last
    assert seen["step 100"] < seen["step 10"] < seen["step 1"]


def test_the_difference_of_two_runs(opened):
    first, second = np.full((3, 3), 0.5), np.full((3, 3), 0.5)
    first[1, 1], second[2, 2] = 1.0, 1.0
    page = opened(attn.view(first, compare=second, names=("adam", "sgd")))
    page.page.locator("select").filter(has_text="difference").select_option("difference")
    page.page.wait_for_timeout(100)
    less, more, equal = colors(page, [(1, 1), (2, 2), (2, 1)])
    assert 190 < hue(less) < 260 and 10 < hue(more) < 50 and luminance(equal) > 0.7


def test_hidden_columns_show_their_mass_and_the_rest_is_renormalised(opened):
    x = np.array([[0.8, 0.1, 0.1], [0.6, 0.4, 0.0], [0.5, 0.25, 0.25]])
    page = opened(attn.view(x))
    page.page.locator("details.hide summary").click()
    page.page.get_by_role("button", name="First column").click()
    page.page.mouse.move(*page.cell(1, 1))
    page.page.wait_for_timeout(150)
    text = page.page.locator(".head").inner_text()
    assert ": 1" in readout(page)  # 0.4 of the remaining 0.4
    assert "0.6" in text and "0.63" in text  # of this row, and the mean over rows


def test_heads_are_sorted_by_a_measure(opened):
    effect = {"effect": {"attention": [[0.1, 0.9, 0.5], [0.2, 0.8, 0.3]]}}
    page = opened(attn.view(softmax(2, 3, 5, 5), measures=effect))
    select = page.page.locator(".overview select")
    [label] = [each for each in select.locator("option").all_inner_texts() if "effect" in each and "high" in each]
    select.select_option(label=label)
    page.page.wait_for_timeout(100)
    xs = {(n, h): page.page.evaluate(f"attnViewer.gridRect({n}, {h}).toJSON()") for n in range(2) for h in range(3)}
    order = sorted(xs, key=lambda place: (round(xs[place]["y"]), xs[place]["x"]))
    assert order == [(0, 1), (1, 1), (0, 2), (1, 2), (1, 0), (0, 0)]


def test_a_picture_lies_under_its_patches(opened):
    """Patch 6 of 4 x 4, after a class token, is the third of the second row; the other patches have no colour."""
    x = np.zeros((17, 17))
    x[:, 1 + 6] = 1
    page = opened(attn.view(x, picture=np.random.default_rng(0).random((8, 8))))
    page.page.get_by_role("button", name="Picture", exact=True).click()
    page.page.wait_for_timeout(150)
    box = page.page.locator(".picture-box canvas").bounding_box()
    side = box["width"] / 4
    dark = [luminance(page.color(box["x"] + (n % 4 + 0.4) * side, box["y"] + (n // 4 + 0.4) * side)) for n in range(16)]
    assert int(np.argmin(dark)) == 6 and dark[6] < 0.5 * min(dark[:6] + dark[7:])
    page.page.mouse.move(box["x"] + 2.5 * side, box["y"] + 1.5 * side)
    page.page.wait_for_timeout(100)
    assert "column 7: 1" in readout(page)


def test_the_choices_are_kept_in_the_address(opened):
    page = opened(attn.view(softmax(2, 3, 5, 5)))
    page.page.locator(".overview canvas").focus()
    page.page.keyboard.press("ArrowRight")
    page.page.wait_for_timeout(600)
    fragment = page.page.evaluate("location.hash")
    assert fragment
    again = opened(attn.view(softmax(2, 3, 5, 5)), fragment=fragment)
    assert again.page.evaluate("attnViewer.state().head") == 1
    wrong = opened(attn.view(softmax(2, 3, 5, 5)), fragment="#head=99&layer=-1&kind=<img>&frame=x&hide=%00")
    assert wrong.page.evaluate("attnViewer.state().head") <= 2


@pytest.mark.parametrize("name", ["PNG", "SVG"])
def test_a_head_is_saved(opened, name):
    page = opened(attn.view(softmax(6, 6), rows=["<script>", *WORDS[1:]], title="../a <b> %"))
    with page.page.expect_download() as download:
        page.page.get_by_role("button", name=f"Save the map as {name}").click()
    data = pathlib.Path(download.value.path()).read_bytes()
    assert "/" not in download.value.suggested_filename and download.value.suggested_filename.endswith(name.lower())
    if name == "PNG":
        assert data.startswith(b"\x89PNG")
    else:
        import xml.etree.ElementTree as ET

        texts = [element.text for element in ET.fromstring(data).iter() if element.text]
        assert "<script>" in texts


# Hostile input


@pytest.mark.parametrize("name", hostile.TOKENS)
def test_hostile_texts_run_nothing_and_are_shown_as_text(opened, name):
    token = hostile.TOKENS[name]
    page = opened(attn.view(np.eye(3), rows=[token] * 3, columns=["a", token, "b"], title=token))
    page.page.get_by_role("button", name="Tokens", exact=True).click()
    page.page.locator(".chips.rows .chip").nth(2).wait_for()
    assert page.page.evaluate("typeof attacked") == "undefined"
    assert page.page.locator("script").count() == 2 and page.page.locator("main img, main s, main style").count() == 0
    chips = page.page.locator(".chips.rows .chip").all_inner_texts()
    assert len(chips) == 3 and all(text.strip() for text in chips)  # also where the token is empty
    plain = token[:20]
    if plain.isprintable() and plain.isascii() and plain.strip() == plain and plain:
        assert plain in chips[0]
    for hidden in ("\u202e", "\x00", "\u2028"):
        assert hidden not in chips[0]


@pytest.mark.parametrize("name", hostile.ARRAYS)
def test_hostile_arrays_are_drawn(opened, name):
    page = opened(attn.view(hostile.ARRAYS[name]))
    assert page.page.locator(".error").count() == 0
    large_map(page).focus()
    for key in ("ArrowRight", "ArrowDown", "End", "Home"):
        page.page.keyboard.press(key)
    for tab in ("Tokens", "Map"):
        page.page.get_by_role("button", name=tab, exact=True).click()
    page.page.wait_for_timeout(50)
    assert readout(page)


# Places


@pytest.mark.parametrize("width", [320, 390, 768, 1280, 5000])
def test_the_page_never_scrolls_sideways(opened, width):
    maps = {"cross": softmax(4, 8, 40, 60), "encoder": softmax(4, 8, 60, 60)}
    long = ["a name that is longer than sixty characters, as those of a file's path may be"] * 60
    names = ("/a/long/path/without/a/space/to/a/run/of/mine/reverse-20261130", "the other")
    view = attn.view(maps, compare=maps, names=names, columns=long, title="A title " * 9)
    page = opened(view, width=width)
    assert page.page.evaluate("document.documentElement.scrollWidth") <= width
    for tab in ("Tokens", "Map"):
        page.page.get_by_role("button", name=tab, exact=True).click()
        page.page.wait_for_timeout(50)
        assert page.page.evaluate("document.documentElement.scrollWidth") <= width


def test_without_javascript_a_picture_and_a_sentence_remain(opened):
    page = opened(attn.view(softmax(2, 3, 5, 5)), ready=False, java_script_enabled=False)
    assert page.page.locator("noscript p").is_visible()
    assert page.page.locator("noscript img").bounding_box()["width"] > 300


def test_fifty_views_on_one_page(opened):
    frames = "".join(
        attn.view(softmax(2, 4, 12, 12, seed=n), title=f"View {n}")._repr_html_().replace('loading="lazy"', "")
        for n in range(50)
    )
    page = opened(f"<!DOCTYPE html><html><body>{frames}</body></html>", ready=False)
    for n, frame in enumerate(page.page.frames[1:]):
        frame.wait_for_selector("html[data-ready=true]", state="attached", timeout=60_000)
        assert frame.locator("h1").inner_text() == f"View {n}"
    assert len(page.page.frames) == 51


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 1280])
def test_axe_finds_no_accessibility_error(opened, width, scheme):
    axe = ROOT / "viewer/node_modules/axe-core/axe.min.js"
    if not axe.exists():
        pytest.skip("no axe-core: `make viewer` installs it")
    frames = {n: {"cross": softmax(2, 3, 6, 6), "encoder": softmax(2, 3, 6, 6)} for n in range(3)}
    picture = attn.viewer.Picture(np.eye(6), (2, 3))
    view = attn.view(frames=frames, compare=frames, rows=WORDS, columns=WORDS, title="A model", picture=picture)
    page = opened(view, width=width, color_scheme=scheme)
    page.page.evaluate("for (const details of document.querySelectorAll('details')) details.open = true")
    page.page.evaluate(axe.read_text())
    for tab in ("Map", "Tokens", "Picture"):
        page.page.get_by_role("button", name=tab, exact=True).click()
        page.page.wait_for_timeout(50)
        found = page.page.evaluate("axe.run()")
        faults = [(each["id"], [node["html"][:120] for node in each["nodes"]]) for each in found["violations"]]
        assert not faults
        assert len(found["passes"]) > 10


def test_one_token_five_hundred_times(opened):
    """Rows and columns are told apart by number; the tokens are shown around the chosen one."""
    x = softmax(500, 500)
    page = opened(attn.view(x, rows=["the"] * 500, columns=["the"] * 500))
    large_map(page).focus()
    page.page.keyboard.press("End")
    page.page.get_by_role("button", name="Tokens", exact=True).click()
    page.page.locator(".chips.rows .chip").first.wait_for()
    chips = page.page.locator(".chips .chip")
    assert 2 <= chips.count() <= 800 and set(chips.all_inner_texts()) == {"the"}
    assert "499" in readout(page)


def test_a_long_sequence_does_not_hang(opened):
    """8,192 positions: pooled, with the exact largest weight of the row under the crosshair."""
    x = np.zeros((8_192, 8_192), np.float32)
    columns = (np.arange(8_192) * 7) % 8_192
    x[np.arange(8_192), columns] = 1
    page = opened(attn.view(x))
    large_map(page).focus()
    for _ in range(3):
        page.page.keyboard.press("ArrowDown")
    page.page.wait_for_timeout(200)
    text = page.page.locator(".head").inner_text()
    row = page.page.evaluate("attnViewer.state().row")
    assert row == 3 and "Pooled by mass" in page.page.locator("body").inner_text()
    [exact] = [line for line in text.splitlines() if line.startswith("Exact largest")]
    number, column = (int(each.replace(",", "")) for each in exact.split(":")[1].replace("row", "").split("→ column"))
    assert column == columns[number]


def test_the_same_view_twice_and_on_paper(opened):
    frame = attn.view(softmax(2, 3, 5, 5), title="twice")._repr_html_()
    page = opened(f"<!DOCTYPE html><body>{frame}{frame}</body>", ready=False)
    for inside in page.page.frames[1:]:
        inside.wait_for_selector("html[data-ready=true]", state="attached")
    alone = opened(attn.view(softmax(2, 3, 5, 5)))
    alone.page.emulate_media(media="print")
    assert large_map(alone).is_visible() and not alone.page.get_by_role("button", name="PNG").is_visible()
