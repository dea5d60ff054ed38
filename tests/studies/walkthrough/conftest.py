"""The browser for the tests of the walkthrough's page."""

from opened_pages import browser, opened  # noqa: F401
