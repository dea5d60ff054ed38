"""Takes a picture of a page of the viewer in a browser, as the README shows one.

attn inspect RUN "3 1 4 1 5" --output page.html
python benchmarks/page_picture.py page.html --output=docs/viewer.png
"""

import argparse
import pathlib
import sys

import browsing
import command_line


def png_file(text: str) -> pathlib.Path:
    """Parse the path of a .png file."""
    path = pathlib.Path(text)
    if path.suffix != ".png":
        raise argparse.ArgumentTypeError(f"got {text!r}, must end in .png")
    return path


def take(page_file: pathlib.Path, output: pathlib.Path, width: int, height: int, choices: str):
    """Open a page in a window of this size, with the choices of its address, and write what it shows."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = browsing.launch(driver)
        page = browser.new_page(viewport={"width": width, "height": height}, device_scale_factor=1.5)
        page.goto(f"{page_file.resolve().as_uri()}{'#' if choices else ''}{choices}")
        page.wait_for_selector(browsing.READY, state="attached")
        page.wait_for_timeout(500)  # thumbnails follow the first picture
        page.screenshot(path=output)
        browser.close()


def main():
    """Parse the command line and take the picture."""
    parser = command_line.Parser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "page", metavar="PAGE", type=pathlib.Path, help="Page that `View.save` or `attn inspect` wrote."
    )
    parser.add_argument(
        "--output", metavar="FILE", type=png_file, default="page.png", help="Picture to write. Default: page.png."
    )
    parser.add_argument("--width", type=command_line.positive, default=1100, help="Of the window. Default: 1100.")
    parser.add_argument("--height", type=command_line.positive, default=700, help="Of the window. Default: 700.")
    parser.add_argument("--choices", default="", help='What follows "#" in the address of the page. Default: nothing.')
    arguments = parser.parse_args()
    if not arguments.page.is_file():
        parser.error(f"{arguments.page}: is not a file")
    if reason := browsing.missing():
        sys.exit(f"error: {reason}")
    take(arguments.page, arguments.output, arguments.width, arguments.height, arguments.choices)
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
