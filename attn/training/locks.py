"""One writer per run: a lock file in the run's folder that names the host and the process.

The file is locked with `flock`, which the system releases when the process ends, even if it is killed, so a stale lock
is recognized. The text of the file names the holder, for people and for file systems without `flock`.
"""

import contextlib
import json
import os
import pathlib
import socket
from collections.abc import Iterator

import psutil

try:
    import fcntl
except ImportError:  # on Windows, where only the text of the file is used
    fcntl = None

NAME = "lock.json"
_SAME_START = 2.0  # seconds by which two readings of a process's start may differ, since clocks are adjusted


class LockError(RuntimeError):
    """A run that another process is training; the message is one line for the user."""


@contextlib.contextmanager
def held(folder: pathlib.Path) -> Iterator[None]:
    """Hold the lock of a run's folder while the block runs; make the folder if it does not exist.

    Raises:
      LockError: another process holds it, or may hold it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / NAME
    file = _open_locked(path)
    with file:
        holder = {"host": socket.gethostname(), "pid": os.getpid(), "started": psutil.Process().create_time()}
        file.seek(0)
        file.truncate()
        file.write(json.dumps(holder) + "\n")
        file.flush()
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # the folder may have been removed in the meantime
                path.unlink()


def check_free(folder: pathlib.Path):
    """Check that the lock of a run's folder is free, without taking it.

    Raises:
      LockError: another process holds it, or may hold it.
    """
    path = folder / NAME
    with contextlib.suppress(FileNotFoundError, PermissionError), path.open("r") as file:
        _check(path, file)


def _open_locked(path: pathlib.Path):
    """Open the lock file and lock it; the returned file is the one at `path`."""
    while True:
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+")
        try:
            _check(path, file)
            # The last holder may have removed the file after it was opened here and before it was locked.
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        except BaseException:
            file.close()
            raise
        file.close()


def _check(path: pathlib.Path, file):
    """Lock an open lock file; raise a LockError that names the holder if another process holds it."""
    locked = True
    if fcntl is not None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            locked = False
        except OSError:  # a file system without flock: only the text of the file is used
            pass
    holder = _holder(file)
    process = "another process" if holder is None else f"process {holder['pid']} on {holder['host']}"
    if not locked or (holder and holder["host"] == socket.gethostname() and _is_alive(holder)):
        raise LockError(f"{path.parent}: {process} is training it; wait for it, or stop it and then resume")
    if holder and holder["host"] != socket.gethostname():
        raise LockError(
            f"{path.parent}: {process} may be training it, which cannot be checked from {socket.gethostname()}; "
            f"if it is not, delete {path}"
        )


def _holder(file) -> dict | None:
    """Read the `host`, `pid` and `started` of the holder from the file; return None if it is empty or damaged."""
    file.seek(0)
    try:
        holder = json.loads(file.read(4096))
        return {"host": str(holder["host"]), "pid": int(holder["pid"]), "started": float(holder["started"])}
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None


def _is_alive(holder: dict) -> bool:
    """Return whether the process is still running, and not another one that got the same number."""
    try:
        return abs(psutil.Process(holder["pid"]).create_time() - holder["started"]) < _SAME_START
    except (psutil.Error, ValueError, OverflowError):  # no process has this number
        return False
