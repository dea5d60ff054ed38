"""The page as text: it loads nothing, runs nothing but the viewer, and holds every text unchanged."""

import base64
import hashlib
import html
import html.parser
import pathlib
import re

import jax.numpy as jnp
import numpy as np
import pytest
import viewer_hostile as hostile
from viewer_payloads import payload_of, sheets, tops

import attn
from attn.viewer import before, page

ROOT = pathlib.Path(__file__).parent.parent.parent
STATIC = ROOT / "attn/viewer/static"


class Parser(html.parser.HTMLParser):
    """Collects the elements of a page, and the text of its scripts and styles."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.texts = [], {}
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.elements and self.elements[-1][0] in ("script", "style"):
            self.texts.setdefault(self.elements[-1][0], []).append(data)
            self.elements.append(("", {}))


@pytest.fixture(scope="module")
def small():
    return attn.view(np.eye(3), rows=list("abc"), title="A title").html()


def hash_of(text):
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def test_the_policy_allows_the_viewers_script_and_style_alone(small):
    parser = Parser(small)
    [policy] = [a["content"] for tag, a in parser.elements if a.get("http-equiv") == "Content-Security-Policy"]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    data, script = parser.texts["script"]
    [style] = parser.texts["style"]
    assert rules == {
        "default-src": "'none'",
        "script-src": hash_of(script),
        "style-src": hash_of(style),
        "img-src": "data: blob:",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    assert data.startswith("{")
    assert script == (STATIC / "viewer.js").read_text() and style == (STATIC / "viewer.css").read_text()


def test_nothing_is_loaded(small):
    addresses = [a.get(name) for _, a in Parser(small).elements for name in ("src", "href", "action") if a.get(name)]
    assert all(address.startswith("data:image/png;base64,") for address in addresses)
    assert not re.search(r"https?://(?!www\.w3\.org/)", small)


def test_the_committed_bundle_is_that_of_the_source():
    """As `make viewer` writes it; the hash is computed here again."""
    digest = hashlib.sha256()
    source = ROOT / "viewer/src"
    for path in sorted(source.rglob("*"), key=lambda path: path.relative_to(source).as_posix()):
        if path.is_file():
            digest.update(path.relative_to(source).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    for name in ("viewer.js", "viewer.css"):
        first = (STATIC / name).read_text().splitlines()[0]
        assert first == f"/* attn viewer, sha256 of viewer/src: {digest.hexdigest()} */", "run `make viewer`"


def test_the_bundle_sets_no_markup():
    """Texts are only ever set as text, and nothing is evaluated."""
    source = "".join(path.read_text() for path in (ROOT / "viewer/src").rglob("*.ts"))
    for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function", "fetch("):
        assert word not in source and word not in (STATIC / "viewer.js").read_text()


@pytest.mark.parametrize("name", hostile.TOKENS)
def test_hostile_texts_are_in_the_payload_as_they_are(name):
    token = hostile.TOKENS[name]
    text = attn.view(np.eye(3), rows=[token] * 3, columns=["a", token, "b"], title=token).html()
    payload = payload_of(text)
    assert payload["kinds"][0]["rows"]["names"] == [token] * 3 and payload["title"] == token
    tags = [tag for tag, _ in Parser(text).elements if tag]
    assert (tags.count("script"), tags.count("img"), tags.count("style"), tags.count("s")) == (2, 1, 1, 0)
    text.encode("utf-8")  # can be written


@pytest.mark.parametrize("name", hostile.ARRAYS)
def test_hostile_arrays_are_shown_as_they_are(name):
    x = hostile.ARRAYS[name]
    payload = payload_of(attn.view(x).html(exact=True))
    layers = x if isinstance(x, list) else [x]
    with np.errstate(over="ignore"):
        expected = [
            head
            for layer in layers
            for head in np.ma.filled(np.ma.masked_array(layer).astype(np.float32), np.nan).reshape(
                -1, *np.shape(layer)[-2:]
            )
        ]
    for found, head in zip(sheets(payload), expected, strict=True):
        np.testing.assert_array_equal(found, head)


def test_the_frame_of_a_notebook_holds_the_same_document(small):
    view = attn.view(np.eye(3), rows=list("abc"), title="A title")
    elements = Parser(view._repr_html_()).elements
    [frame] = [attributes for tag, attributes in elements if tag == "iframe"]
    assert frame["srcdoc"] == small
    assert frame["sandbox"] == "allow-scripts allow-downloads"
    assert "trust this notebook" in view._repr_html_()


def test_without_javascript_a_picture_and_a_sentence_remain(small):
    inside = re.search(r"<noscript>(.*?)</noscript>", small, re.DOTALL)[1]
    assert "Without JavaScript" in inside and "data:image/png;base64," in inside


def test_a_page_never_holds_an_end_of_its_script():
    assert page.as_json({"a": "</script>&\u2028"}) == '{"a":"\\u003c/script\\u003e\\u0026\\u2028"}'


@pytest.mark.parametrize("ending", ["html", "svg", "png", "pdf"])
def test_files_are_written_whole(tmp_path, ending):
    path = tmp_path / f"a b 100%.{ending}"
    assert attn.view(np.eye(3), rows=["<s>", "$x^", "\udc80"], title="$t").save(path) == path
    starts = {"html": b"<!DOCTYPE html>", "svg": b"<?xml", "png": b"\x89PNG", "pdf": b"%PDF"}
    assert path.read_bytes().startswith(starts[ending])
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def test_another_ending_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"page\.jpg.*\.html, \.svg, \.png"):
        attn.view(np.eye(3)).save(tmp_path / "page.jpg")


def test_a_view_shows_itself_as_text():
    text = repr(attn.view({"cross": np.ones((2, 3, 5, 7))}, title="reverse"))
    assert text.splitlines()[:2] == ["reverse", "  cross-attention: 2 x 3 heads of 5 x 7"]


# Masks and scores, before anything has run


def test_a_mask_is_shown_as_it_is():
    mask = attn.masks.causal() & attn.masks.sliding_window(2, 0)
    payload = payload_of(attn.view(mask=mask, shape=(6, 6)).html())
    [kind] = payload["kinds"]
    i, j = np.arange(6)[:, None], np.arange(6)
    expected = np.where((j <= i) & (j >= i - 2), 1, np.nan)
    assert kind["quantity"] == "mask"
    np.testing.assert_array_equal(sheets(payload)[0], expected)


def test_a_mask_and_a_score_are_composed_as_the_function_composes_them():
    """Per head, with an offset; what the softmax of the shown scores gives are the weights of the function."""
    rng = np.random.default_rng(0)
    T, S, N, H = 5, 7, 3, 4
    query, key = (jnp.asarray(rng.normal(size=(n, N, H)), jnp.float32) for n in (T, S))
    mask = attn.masks.causal(offset=2) & (lambda i, j: (i + j) % 3 > 0)
    score = attn.per_head(attn.scores.alibi(jnp.array([0.5, 0.25, 0.125]), offset=2)) >> attn.scores.softcap(3.0)
    view = attn.view(query=query, key=key, mask=mask, score=score)
    weights, scores, visible = ({kind.name: kind for kind in view.kinds}[n] for n in ("attention", "scores", "mask"))
    assert (weights.quantity, scores.quantity, visible.quantity) == ("weights", "scores", "mask")
    i, j = np.arange(T)[:, None], np.arange(S)
    allowed = (j <= i + 2) & ((i + j) % 3 > 0)
    slopes = np.array([0.5, 0.25, 0.125])[:, None, None]
    products = np.einsum("tnh,snh->nts", np.asarray(query, float), np.asarray(key, float)) / 2
    s = 3 * np.tanh((products - slopes * abs(i + 2 - j)) / 3)
    np.testing.assert_allclose(scores.layers[0], np.where(allowed, s, np.nan), rtol=1e-5, atol=1e-6)
    e = np.where(allowed, np.exp(s), 0)
    p = e / np.maximum(e.sum(-1, keepdims=True), 1e-300)
    np.testing.assert_allclose(weights.layers[0], np.where(allowed, p, np.nan), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(visible.layers[0], np.where(allowed, 1, np.nan)[None].repeat(N, 0))


def test_a_score_without_queries_changes_products_of_zero():
    slopes = jnp.array([1.0, 0.5])
    view = attn.view(score=attn.per_head(attn.scores.alibi(slopes)), rows=list("abcd"), columns=list("abcd"))
    [kind] = view.kinds
    distances = abs(np.arange(4)[:, None] - np.arange(4))
    np.testing.assert_allclose(kind.layers[0], -np.array([1, 0.5])[:, None, None] * distances)
    assert kind.rows.names == tuple("abcd")


@pytest.mark.parametrize(
    "options, match",
    [
        (dict(mask=attn.masks.causal()), "shape: give"),
        (dict(mask=attn.masks.causal(), shape=(0, 3)), "shape: got"),
        (dict(mask=attn.masks.causal(), shape=(3, 5)), "offset"),
        (dict(mask=attn.masks.causal(), shape=(3, 3), rows=["a"]), "3 rows, but 1 names"),
        (dict(mask=attn.masks.causal(), shape=(60_000, 60_000)), "view a part"),
        (dict(query=np.ones((3, 4))), "query and key"),
        (dict(weights=np.eye(3), mask=attn.masks.causal()), "give one of"),
        (dict(mask=attn.masks.causal(), shape=3, compare=np.eye(3)), "compare"),
        (dict(weights=np.eye(3), groups=2), "groups"),
        (dict(weights=np.eye(3), pooled_from=(4, 4)), "pooled_from"),
        (dict(weights=np.eye(3), budget=0), "budget"),
        (dict(weights=np.eye(3), compare=np.eye(4)), "same sizes"),
        (dict(frames={1: np.eye(3), 2: np.eye(4)}), "same sizes"),
        (dict(frames={}), "with an entry"),
        (dict(weights=np.eye(3), measures={"x": {"other": [1]}}), "must be for attention"),
        (dict(weights=np.eye(3), measures={"x": [1, 2]}), "one number for each of 1 heads"),
    ],
)
def test_wrong_calls_are_named(untyped, options, match):
    with pytest.raises((TypeError, ValueError), match=match):
        attn.view(**options)


def test_measures_by_which_heads_are_sorted():
    """Of a uniform, a diagonal, a reversing and a previous-token head, against numbers by hand."""
    n = 8
    eye = np.eye(n)
    heads = np.stack([np.full((n, n), 1 / n), eye, eye[::-1], np.eye(n, k=-1)])
    given = {"effect": {"attention": [[1, 2, 3, 4]]}}
    payload = payload_of(attn.view(heads, measures=given).html())
    values = {measure["name"]: measure["values"][0][0][0] for measure in payload["measures"]}
    np.testing.assert_allclose(values["entropy"], [np.log(n), 0, 0, 0], atol=1e-6)
    distances = abs(np.arange(n)[:, None] - np.arange(n))
    expected = [distances.mean(), 0, (heads[2] * distances).sum() / n, 1]
    np.testing.assert_allclose(values["distance"], expected, atol=1e-6)
    np.testing.assert_allclose(values["diagonal"], [1 / n, 1, 1 / n, 1], atol=1e-6)
    np.testing.assert_allclose(values["anti-diagonal"], [1 / n, 1 / n, 1, 1 / (n - 1)], atol=1e-6)
    assert values["effect"] == [1, 2, 3, 4]


def test_the_example_of_the_page_about_the_viewer_runs(tmp_path, monkeypatch):
    text = (ROOT / "docs/viewer.md").read_text()
    [code] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "viewer.md", "exec"), {})
    assert (tmp_path / "page.html").stat().st_size > 60_000


def test_queries_and_keys_too_many_for_a_map_are_pooled_with_the_exact_largest_of_each_row(monkeypatch):
    monkeypatch.setattr(before, "_MOST_CELLS", 1_000)
    monkeypatch.setattr(before, "_CELLS_AT_ONCE", 10_000)  # 7 rows at a time
    rng = np.random.default_rng(0)
    T, N, H = 701, 2, 4
    query, key = (jnp.asarray(2 * rng.normal(size=(T, N, H)), jnp.float32) for _ in range(2))
    payload = payload_of(attn.view(query=query, key=key, mask=attn.masks.causal() & (lambda i, j: j != i)).html())
    s = np.einsum("tnh,snh->nts", np.asarray(query, float), np.asarray(key, float)) / 2
    allowed = np.tri(T, k=-1, dtype=bool)
    e = np.where(allowed, np.exp(s), 0)
    p = e / np.maximum(e.sum(-1, keepdims=True), 1e-300)
    layer = payload["kinds"][0]["layers"][0]
    assert (layer["rows"], layer["columns"], layer["block"], layer["shape"]) == (T, T, [3, 3], [234, 234])
    cells = [[p[0, i : i + 3, j : j + 3].sum(1).mean() for j in range(0, T, 3)] for i in range(0, T, 3)]
    np.testing.assert_allclose(sheets(payload)[0], cells, atol=0.008 * np.max(cells))
    index, value = tops(payload)
    assert index[0, 0] == 2**32 - 1 and value[0, 0] == 0  # the first query sees no key
    np.testing.assert_array_equal(index[1:T, 0], p[0, 1:].argmax(axis=-1))
    np.testing.assert_allclose(value[:, 0], p.max(axis=-1).ravel(), rtol=2e-5)
    assert "the largest weight of each row is exact" in payload["note"]
