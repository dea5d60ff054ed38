"""The walkthrough's page, of the recorded measurements: its markup, and in a real browser what a reader gets."""

import base64
import io
import itertools
import json
import pathlib
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib.figure import Figure

from attn.studies.report import Table, panels, styled
from attn.studies.walkthrough import page
from attn.studies.walkthrough.claims import Measurement
from attn.studies.walkthrough.registry import CLAIMS
from attn.studies.web import html_equation, html_figure

ROOT = pathlib.Path(__file__).parents[3]
SOME = ["access", "heads", "blocks"]
AXE = ROOT / "viewer/node_modules/axe-core/axe.min.js"


def recorded(name: str) -> Measurement:
    values = json.loads((ROOT / f"benchmarks/results/walkthrough/{name}.json").read_text())
    return Measurement(*(values[field] for field in Measurement._fields))


# Three claims have all that pages have: failing checks, premises, matrices, wide and folded tables, rows of panels.
@pytest.fixture(scope="module", params=[SOME, pytest.param([*CLAIMS], marks=pytest.mark.nightly)], ids=["some", "all"])
def names(request) -> list[str]:
    return request.param


@pytest.fixture(scope="module")
def text(names) -> str:
    """The page of these claims, made once."""
    return page.write({name: recorded(name) for name in names})


@pytest.fixture(scope="module")
def elements(text) -> list[tuple[str, dict]]:
    """All elements of the page, with their attributes."""
    found = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: found.append((tag, dict(attributes)))
    parser.feed(text)
    return found


# The markup


def test_the_head_names_language_width_and_content(elements, names):
    [root] = [attributes for tag, attributes in elements if tag == "html"]
    metas = {attributes.get("name"): attributes.get("content") for tag, attributes in elements if tag == "meta"}
    assert root["lang"] == "en"
    assert metas["viewport"] == "width=device-width, initial-scale=1"
    assert f"Claims measured: {len(names)}," in metas["description"]


def test_headings_are_in_order_and_landmarks_are_there_once(elements):
    tags = [tag for tag, _ in elements]
    levels = [int(tag[1]) for tag in tags if re.fullmatch("h[1-6]", tag)]
    assert levels.count(1) == 1 and levels[0] == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    assert [tags.count(tag) for tag in ("header", "nav", "main", "footer")] == [1, 1, 1, 1]


def test_every_claim_has_an_anchor_and_links_to_it(elements, names):
    identifiers = [attributes["id"] for _, attributes in elements if "id" in attributes]
    targets = [attributes["href"] for tag, attributes in elements if tag == "a"]
    assert len(identifiers) == len(set(identifiers))
    assert {target[1:] for target in targets if target.startswith("#")} <= set(identifiers)
    for name in names:
        assert targets.count(f"#{name}") == 3  # of the contents, of the table of all claims, and of the claim itself
        assert CLAIMS[name].link in targets


def test_figures_have_captions_and_alternative_texts_and_tables_have_scopes(elements, names):
    tags = [tag for tag, _ in elements]
    assert tags.count("figure") == tags.count("figcaption") == len(names)
    assert all(attributes["alt"].strip() for tag, attributes in elements if tag == "img")
    assert all(attributes.get("scope") in ("row", "col") for tag, attributes in elements if tag == "th")
    assert tags.count("table") == tags.count("caption")


def test_checks_that_fail_are_marked_and_counted(text, names):
    for name in names:
        [section] = re.findall(rf'<section id="{name}".*?</section>', text, re.DOTALL)
        checks = CLAIMS[name].check(recorded(name).numbers)
        failing = sum(not check.holds() for check in checks)
        assert section.count('<tr class="fails"') == failing
        assert section.count("</span> does not hold</span></td>") == failing
        decided = [check.holds() for check in checks if not check.premise]
        assert f"Checks: {sum(decided)} of {len(decided)} hold" in section


def test_a_quick_run_is_marked_and_sizes_are_words():
    claim = CLAIMS["cross"]
    sizes = json.loads(json.dumps(vars(claim.quick)))
    shown = page.write({"cross": recorded("cross")._replace(quick=True, sizes=sizes)})
    assert "A quick run." in shown and '<span class="tag">quick run</span>' in shown
    assert "800 training steps (full: 2,000)" in shown and "attn walkthrough --only cross --quick" in shown
    assert "Not measured yet: The bottleneck (bottleneck)" in shown


def test_a_page_without_measurements_says_so():
    shown = page.write({})
    assert "<table" not in shown and "Not measured yet" in shown


@pytest.mark.parametrize(
    ("value", "words"),
    [([1, 2, 3, 4, 5], "1 to 5"), ([0, 1, 2], "0, 1, 2"), ([4, 1024], "4, 1,024"), (2500, "2,500"), ("both", "both")],
)
def test_sizes_in_words(value, words):
    assert page._listed(value) == words


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("1.329e-07", "1.329 × 10<sup>−7</sup>"),
        ("at most 1e-05", "at most 10<sup>−5</sup>"),
        ("1.513e+07", "1.513 × 10<sup>7</sup>"),
        ("0.95", "0.95"),
        ("nan", "nan"),
        ("see e-07", "see e-07"),
    ],
)
def test_powers_of_ten(text, shown):
    assert page._powers(text) == shown


# Parts of a page


def test_a_wide_table_gets_a_box_that_can_have_the_focus():
    wide = Table('a "wide" <table>', ["name", "value"], [["a", 12_345]]).html()
    assert wide.startswith(
        '<div class="scroll" role="region" tabindex="0" aria-label="a &quot;wide&quot; &lt;table&gt;"'
    )
    assert '<th scope="col">name</th>' in wide and '<td class="number">12,345</td>' in wide
    assert "tabindex" not in Table("matrix", [], [[1.0, 0.0], [0.0, 1.0]]).html()
    assert "tabindex" in Table("matrix", [], np.eye(6).tolist()).html()


def images(markup: str) -> list[tuple[str, str]]:
    """Return the alternative text and the SVG of each image."""
    found = re.findall(r'<img alt="([^"]*)"[^>]*src="data:image/svg\+xml;base64,([^"]*)"', markup)
    return [(words, base64.b64decode(data).decode()) for words, data in found]


def test_panels_are_images_in_rows_of_one_height_that_say_what_they_show():
    def draw():
        figure, (line, bars, mapped, spare) = panels(2, 6, 4, rows=2)
        line.plot([1, 2, 4], [0.5, 0.25, 1.0], label="model <a>")
        line.set(title="a curve\nof three", xlabel="step", ylabel="loss")
        bars.bar(["one", "two"], [0.25, 0.75], label="shares")
        figure.colorbar(mapped.imshow(np.eye(3)), ax=mapped)
        mapped.set(title="a map", xlabel="key", ylabel="query")
        spare.remove()
        return figure

    markup = html_figure(styled(draw), "Three <panels>")
    assert markup.count('<div class="panels">') == 2
    assert "<figcaption>Three &lt;panels&gt;</figcaption>" in markup
    (line, left), (bars, right), (mapped, below) = images(markup)
    assert line == "a curve of three. loss against step. model &lt;a&gt;: from 0.5 to 1, at least 0.25"
    assert bars == "shares: 0.25 (one), 0.75 (two)" and mapped == "a map. query against key. map of 3 by 3"
    heights = [float(re.search(r'height="([\d.]+)pt"', svg)[1]) for svg in (left, right)]
    assert heights[0] == heights[1]
    # The map and the bar of its colors, both raster images, are in one panel.
    assert [svg.count("<image") for svg in (left, right, below)] == [0, 0, 2]


def test_a_figure_without_panels_has_its_caption_as_alternative_text():
    [(words, _)] = images(html_figure(Figure(), 'nothing "at all"'))
    assert words == "nothing &quot;at all&quot;"


def test_an_equation_is_one_image_per_part():
    assert [words for words, _ in images(html_equation(r"a=b,\quad c=d"))] == ["a=b,", "c=d"]


# In a browser


def luminances(picture: bytes) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(picture)).convert("L")) / 255


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_reader_can_see_everything_at_every_width(opened, text, scheme):
    shown = opened(text, ready=False, color_scheme=scheme).page
    shown.evaluate("for (const details of document.querySelectorAll('details')) details.open = true")
    for width in (320, 390, 800, 1280):
        shown.set_viewport_size({"width": width, "height": 900})
        assert shown.evaluate("document.documentElement.scrollWidth") == width
        boxes = "[...document.querySelectorAll('table, img, .verdict')].filter(each => !each.closest('.scroll'))"
        assert shown.evaluate(f"{boxes}.every(each => each.getBoundingClientRect().right <= {width})")
    assert shown.evaluate("[...document.images].every(image => image.naturalWidth > 0)")
    # Equations and figures are drawn in black: on a dark page they must be light.
    for part in (".equation img", "figure img"):
        seen = luminances(shown.locator(part).first.screenshot())
        assert (np.median(seen) > 0.9 and seen.min() < 0.2) if scheme == "light" else (np.median(seen) < 0.2)
        assert scheme == "light" or seen.max() > 0.8
    shown.emulate_media(media="print", color_scheme=scheme)
    assert shown.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert shown.evaluate("getComputedStyle(document.querySelector('figure img')).filter") == "none"


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 320)])
def test_axe_finds_no_accessibility_error(opened, text, scheme, width):
    if not AXE.exists():
        pytest.skip("no axe-core: `make viewer` installs it")
    shown = opened(text, ready=False, width=width, color_scheme=scheme).page
    shown.evaluate("for (const details of document.querySelectorAll('details')) details.open = true")
    shown.evaluate(AXE.read_text())
    found = shown.evaluate("axe.run()")
    assert not [(each["id"], [node["html"][:120] for node in each["nodes"]]) for each in found["violations"]]
    assert len(found["passes"]) > 20


def test_wide_tables_scroll_by_keys_in_their_own_box(opened, text):
    shown = opened(text, ready=False, width=320).page
    box = shown.get_by_role("region", name="Exact match of reversal")
    box.focus()
    shown.keyboard.press("ArrowRight")
    shown.wait_for_function("document.activeElement.scrollLeft > 0")
    assert shown.evaluate("document.documentElement.scrollLeft") == 0
