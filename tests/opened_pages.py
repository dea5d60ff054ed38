"""Fixtures with a real browser for the tests of pages: a page may load nothing, and must report no error."""

import pathlib

import browsing
import pytest


@pytest.fixture(scope="session")
def browser():
    """The browser, for all tests of a worker."""
    if reason := browsing.missing():
        pytest.skip(reason)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = browsing.launch(driver)
        yield browser
        browser.close()


class Opened:
    """A page in the browser.

    Attributes:
      page: of playwright.
      requests: addresses of everything that was asked for but the page itself.
      errors: what the console reported, and dialogs.
    """

    def __init__(self, context, url: str):
        self.page, self.requests, self.errors = context.new_page(), [], []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda message: self._note(message.type, message.text))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.errors.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        self.page.goto(url)
        # Images inside of the page are no requests of the network.
        self.requests = [each for each in self.requests if each != self.page.url.partition("#")[0]]

    def _note(self, kind: str, text: str):
        if kind in ("error", "warning"):
            self.errors.append(f"{kind}: {text}")

    def is_quiet(self) -> bool:
        """Return whether nothing was asked for and nothing was reported."""
        return not [url for url in self.requests if not url.startswith(("data:", "blob:"))] and not self.errors

    def cell(self, row: int, column: int) -> tuple[float, float]:
        """Return the middle of a cell of the large map, in the window, after scrolling to it."""
        rect = self.page.evaluate(f"attnViewer.cellRect({row}, {column}).toJSON()")
        return rect["x"] + rect["width"] / 2, rect["y"] + rect["height"] / 2

    def color(self, x: float, y: float) -> tuple[int, int, int]:
        """Return the colour of a point of the window, from a screenshot."""
        from io import BytesIO

        from PIL import Image

        clip = {"x": int(x), "y": int(y), "width": 1, "height": 1}
        return Image.open(BytesIO(self.page.screenshot(clip=clip))).convert("RGB").getpixel((0, 0))


@pytest.fixture
def opened(browser, tmp_path):
    """`opened(view or page, ...)`: open it as a file, wait for its first picture; it must stay quiet."""
    pages, contexts = [], []

    def open_page(shown, *, width=1280, height=900, ready=True, fragment="", **options) -> Opened:
        text = shown if isinstance(shown, str) else shown.html()
        path = pathlib.Path(tmp_path / f"page {len(pages)} 100%.html")
        path.write_text(text, encoding="utf-8")
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        context.set_default_timeout(10_000)
        contexts.append(context)
        pages.append(Opened(context, path.as_uri() + fragment))
        if ready:
            pages[-1].page.wait_for_selector(browsing.READY, state="attached")
        return pages[-1]

    yield open_page
    for page in pages:
        assert page.is_quiet(), (page.requests, page.errors)
    for context in contexts:
        context.close()
