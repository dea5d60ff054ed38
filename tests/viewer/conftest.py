"""The browser for the tests of the viewer."""

from opened_pages import browser, opened  # noqa: F401
