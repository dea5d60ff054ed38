"""Files that are written whole."""

import contextlib
import pathlib


def write_whole(path: pathlib.Path, data: bytes):
    """Write a file so that a reader never sees half of it, and a failure leaves the one before it as it was.

    Raises:
      OSError: the file cannot be written; nothing is left of it.
    """
    path = path.resolve()  # a link stays a link
    if path.exists() and not path.is_file():  # a device or a pipe; a folder raises
        path.write_bytes(data)
        return
    partial = path.with_name(f".{path.stem[:100]}.partial")
    try:
        partial.write_bytes(data)
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        error.filename, error.filename2 = str(path), None
        raise
