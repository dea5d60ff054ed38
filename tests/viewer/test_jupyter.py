"""Views in a real JupyterLab, trusted or not, run again, and after nbconvert."""

import os
import pathlib
import socket
import subprocess
import sys
import time
import urllib.request

import nbformat
import numpy as np
import pytest

import attn

CELLS = [
    "import numpy as np, attn",
    "attn.view(np.eye(6).reshape(1, 6, 6), rows=list('abcdef'), title='first')",
    "attn.view(np.full((2, 3, 4, 4), 0.25), title='second')",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A notebook that has not run, and one with the outputs of another machine, which is therefore not trusted."""
    folder = tmp_path_factory.mktemp("notebooks")
    fresh = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in CELLS])
    fresh.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(fresh, folder / "fresh.ipynb")
    for cell, view in zip(fresh.cells[1:], (attn.view(np.eye(6), title="first"), attn.view(np.eye(4), title="second"))):
        data = {"text/html": view._repr_html_(), "text/plain": repr(view)}
        cell.outputs = [nbformat.v4.new_output("execute_result", data=data, execution_count=1)]
    nbformat.write(fresh, folder / "foreign.ipynb")
    return folder


@pytest.fixture(scope="module")
def lab(folder, tmp_path_factory):
    """The address of a JupyterLab that serves the folder, at the loopback address alone."""
    pytest.importorskip("jupyterlab", reason="no JupyterLab: `make test` installs it")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    home = str(tmp_path_factory.mktemp("home"))
    root = str(pathlib.Path(__file__).parent.parent.parent)
    environment = os.environ | {
        "HOME": home,
        "JUPYTER_CONFIG_DIR": home,
        "JUPYTER_DATA_DIR": home,
        "JUPYTER_RUNTIME_DIR": home,
        "PYTHONPATH": root,
    }
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1", f"--port={port}", "--allow-root"]
    command += [f"--ServerApp.root_dir={folder}", "--IdentityProvider.token=", "--ServerApp.password="]
    command += ["--LabApp.news_url=", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    server = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    for _ in range(300):
        try:
            urllib.request.urlopen(f"{address}/api", timeout=1)
            break
        except OSError:
            assert server.poll() is None
            time.sleep(0.2)
    yield address
    server.terminate()
    server.wait(20)


@pytest.fixture
def page(browser):
    context = browser.new_context(viewport={"width": 1300, "height": 1600})
    context.set_default_timeout(60_000)
    yield context.new_page()
    context.close()


def titles(page, count):
    """Return the titles of the views in the outputs of a notebook, once all show a picture."""
    found = []
    frames = page.locator(".jp-OutputArea iframe, .output_html iframe, iframe[srcdoc]")
    for n in range(count):
        frame = frames.nth(n)
        frame.scroll_into_view_if_needed()
        inside = frame.content_frame
        inside.locator("html[data-ready=true]").wait_for(state="attached")
        assert inside.locator(".map canvas").first.bounding_box()["width"] > 100
        found.append(inside.locator("h1").inner_text())
    return found


def run_all(page):
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_text("Run All Cells", exact=True).click()


def test_views_show_themselves_in_jupyterlab_and_again_after_another_run(lab, page):
    page.goto(f"{lab}/lab/tree/fresh.ipynb")
    page.locator(".jp-Notebook .jp-CodeCell").first.wait_for()
    run_all(page)
    page.locator(".jp-OutputArea iframe").nth(1).wait_for(state="attached", timeout=120_000)
    assert titles(page, 2) == ["first", "second"]
    run_all(page)
    page.wait_for_timeout(2_000)
    assert titles(page, 2) == ["first", "second"]
    assert page.locator(".jp-OutputArea iframe").count() == 2


def test_a_notebook_that_is_not_trusted_says_so(lab, page):
    page.goto(f"{lab}/lab/tree/foreign.ipynb")
    page.locator(".jp-Notebook .jp-CodeCell").first.wait_for()
    line = page.get_by_text("trust this notebook").first
    line.wait_for()
    assert line.is_visible() and page.locator(".jp-OutputArea iframe").count() == 0


def test_views_survive_nbconvert(folder, page):
    pytest.importorskip("nbconvert", reason="no nbconvert: `make test` installs it")
    command = [sys.executable, "-m", "nbconvert", "--to", "html", "--log-level=ERROR", str(folder / "foreign.ipynb")]
    subprocess.run(command, check=True, timeout=120)
    path = folder / "foreign.html"
    # The page of nbconvert itself loads scripts from elsewhere; the views need none of them.
    page.route("**/*", lambda route: route.abort() if not route.request.url.startswith("file:") else route.continue_())
    page.goto(path.as_uri())
    assert titles(page, 2) == ["first", "second"]
