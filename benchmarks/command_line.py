"""Pieces of the command lines of benchmarks: errors in one line, and checked values."""

import argparse
import contextlib
import math
import os
import pathlib


class Parser(argparse.ArgumentParser):
    """A parser whose error messages are one line."""

    def error(self, message: str):
        self.exit(2, f"error: {message} (--help lists all options)\n")


def positive(text: str) -> int:
    """Parse a whole number of at least 1."""
    if not (text.isascii() and text.isdigit()) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, must be a whole number of at least 1")
    return int(text)


def positive_number(text: str) -> float:
    """Parse a finite number above 0."""
    with contextlib.suppress(ValueError):
        if 0 < float(text) < math.inf:
            return float(text)
    raise argparse.ArgumentTypeError(f"got {text!r}, must be a number above 0")


def output_file(text: str) -> pathlib.Path:
    """Parse the path of a .json file, and check before the measurements that it can be written."""
    file = pathlib.Path(text)
    if file.suffix != ".json":
        raise argparse.ArgumentTypeError(f"got {text!r}, must end in .json")
    if file.is_dir() or not os.access(file if file.exists() else file.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"cannot write {text!r}")
    return file
