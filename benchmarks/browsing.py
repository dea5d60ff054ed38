"""A browser for pages: found, quiet and offline. Benchmarks, tests and the README's picture use it."""

import shutil

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
READY = "html[data-ready=true]"  # once the viewer's first picture is drawn
# The browser itself asks for nothing either.
_FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


def missing() -> str | None:
    """Return what is missing to open a browser, and what to do; None if nothing is."""
    try:
        import playwright  # noqa: F401
    except ImportError:
        return "no package playwright: `make test` installs it"
    if not any(map(shutil.which, BROWSERS)):
        return f"no browser: install one of {', '.join(BROWSERS)}"
    return None


def launch(driver):
    """Start the browser that is installed, by playwright's driver."""
    return driver.chromium.launch(executable_path=next(filter(None, map(shutil.which, BROWSERS))), args=list(_FLAGS))
