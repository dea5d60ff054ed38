"""Measures the viewer: seconds to the first picture in a browser, bytes of pages, and views on one page.

    python benchmarks/viewer.py --output=benchmarks/results/viewer.json

Weights are the softmax of normal numbers, which are harder to compress than those of a model. Bytes are compared with
those of the same weights as a JSON list of lists with four digits, as other viewers paste them into their pages.
"""

import json
import os
import pathlib
import sys
import tempfile
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import browsing
import command_line
import jax
import machine
import numpy as np

import attn

REPEATS = 5


def softmax(*shape: int) -> np.ndarray:
    """Return weights whose rows sum to 1."""
    x = np.exp(np.random.default_rng(0).normal(size=shape, scale=2.0).astype(np.float32))
    return x / x.sum(-1, keepdims=True)


def pooled() -> attn.viewer.View:
    """Return a view of 8 heads of 32,768 x 32,768, pooled in memory that grows with the length alone."""
    query, key = (jax.random.normal(k, (32_768, 8, 64)) for k in jax.random.split(jax.random.key(0)))
    return attn.view(query=query, key=key, mask=attn.masks.causal(), title="32,768 positions")


def first_picture(browser, path: pathlib.Path) -> float:
    """Return the median of seconds from the start of the navigation to the first picture, each in a new context."""
    seconds = []
    for _ in range(REPEATS):
        context = browser.new_context(viewport={"width": 1280, "height": 800})
        page = context.new_page()
        page.goto(path.as_uri())
        page.wait_for_selector(browsing.READY, state="attached")
        seconds.append(page.evaluate("performance.getEntriesByName('attn-first-picture')[0].startTime") / 1000)
        context.close()
    return float(np.median(seconds))


def many(browser, folder: pathlib.Path) -> float:
    """Return the seconds until 50 views on one page all show their picture."""
    frames = "".join(
        attn.view(softmax(2, 4, 12, 12), title=str(n))._repr_html_().replace('loading="lazy"', "") for n in range(50)
    )
    path = folder / "many.html"
    path.write_text(f"<!DOCTYPE html><body>{frames}</body>")
    page = browser.new_page()
    start = time.perf_counter()
    page.goto(path.as_uri())
    for frame in page.frames[1:]:
        frame.wait_for_selector(browsing.READY, state="attached")
    return time.perf_counter() - start


def json_bytes(weights: np.ndarray) -> int:
    """Return the bytes of weights as JSON lists with four digits; of many, extrapolated from the first head."""
    head = weights.reshape(-1, *weights.shape[-2:])[0]
    text = json.dumps([[float(f"{x:.4g}") for x in row] for row in head])
    return len(text) * (weights.size // head.size)


def measure() -> dict:
    """Measure everything."""
    from playwright.sync_api import sync_playwright

    cases = {"6 x 8 of 64 x 64": softmax(6, 8, 64, 64), "12 x 12 of 512 x 512": softmax(12, 12, 512, 512)}
    rows = {}
    with tempfile.TemporaryDirectory() as name, sync_playwright() as driver:
        folder, browser = pathlib.Path(name), browsing.launch(driver)
        for case, weights in cases.items():
            view = attn.view(weights, title=case)
            path = view.save(folder / "page.html")
            rows[case] = {
                "page_bytes": path.stat().st_size,
                "notebook_bytes": len(view._repr_html_().encode()),
                "json_bytes": json_bytes(weights),
                "first_picture_seconds": first_picture(browser, path),
            }
            print(case, rows[case], flush=True)
        exact = attn.view(cases["12 x 12 of 512 x 512"]).save(folder / "exact.html", exact=True)
        rows["12 x 12 of 512 x 512, exact"] = {
            "page_bytes": exact.stat().st_size,
            "first_picture_seconds": first_picture(browser, exact),
        }
        start = time.perf_counter()
        view = pooled()
        path = view.save(folder / "pooled.html")
        rows["8 of 32,768 x 32,768"] = {
            "page_bytes": path.stat().st_size,
            "pooling_seconds": time.perf_counter() - start,
            "first_picture_seconds": first_picture(browser, path),
        }
        rows["50 views on one page"] = {"all_pictures_seconds": many(browser, folder)}
        browser_version = browser.version
    return {"machine": machine.describe(), "browser": browser_version, "rows": rows}


def main():
    """Parse the command line, measure, print and write."""
    parser = command_line.Parser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--output",
        metavar="FILE",
        type=command_line.output_file,
        help="Write the results to this .json file. Default: none is written.",
    )
    arguments = parser.parse_args()
    if reason := browsing.missing():
        sys.exit(f"error: {reason}")
    results = measure()
    print(json.dumps(results, indent=1))
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
