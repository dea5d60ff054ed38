"""The start of a command's process: environment, streams and Ctrl-C, before anything heavy is imported.

Only `train.py` and the `attn` script call this; `import attn` changes nothing.
"""

import contextlib
import io
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator

STUCK = "waits in C++"  # name of a thread that cannot be stopped
NOTHING_WRITTEN = "stopped before the run began"


def begin():
    """Set up the process of a command; call before JAX and matplotlib are imported."""
    # XLA logs its alarm "Very slow compile?" as an error. Real errors are Python exceptions.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    # If matplotlib cannot write its folder, it makes a temporary one and logs two lines.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    sys.stdout, sys.stderr = (_tolerate_closed_pipe(stream) for stream in (sys.stdout, sys.stderr))


def run(command: Callable[[], int]):
    """Run a command as the whole of this process, and leave with the exit status that it returns."""
    begin()
    try:
        status = command()
    except KeyboardInterrupt:  # ^C while the command handled none
        print("stopped", file=sys.stderr)
        status = 130
    leave(status)


@contextlib.contextmanager
def leaving_at_once(words: str) -> Iterator[None]:
    """Let ^C end the process with these words and status 130 while the block runs, even during a compilation.

    A Python signal handler would wait until the main thread returns from C++; a thread that reads the signal's wake-up
    pipe does not.
    """
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN  # as under nohup, or in the background of a script
    if ignored or threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    previous = signal.signal(signal.SIGINT, lambda number, frame: None)
    wakeup = signal.set_wakeup_fd(writer)
    threading.Thread(target=_leave_on_interrupt, args=(reader, words), daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup)
        signal.signal(signal.SIGINT, previous)
        os.close(writer)  # ends the thread


def leave(status: int):
    """End the process with an exit status.

    After an interruption, or with a stuck thread, this skips the interpreter's shutdown: threads that still run, such
    as a compilation, would crash it or keep it waiting.
    """
    if status == 130 or any(thread.name == STUCK for thread in threading.enumerate()):
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, AttributeError):  # its reader was interrupted too, or it is closed
                stream.flush()
        os._exit(status)
    sys.exit(status)


def _leave_on_interrupt(reader: int, words: str):
    """Read the numbers of signals from the pipe; end the process at the first SIGINT."""
    while number := os.read(reader, 1):
        if number[0] == signal.SIGINT:
            shown = "\x1b[?25h" if os.isatty(2) else ""  # a progress bar may have hidden the cursor
            with contextlib.suppress(OSError):  # stderr may be closed
                os.write(2, f"{shown}{words}\n".encode())
            os._exit(130)
    os.close(reader)


class _PipeTolerant(io.RawIOBase):
    """A stream whose reader may exit early, as `head` does: data that is written after that is dropped."""

    def __init__(self, raw: io.RawIOBase):
        self._raw = raw

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._raw.fileno()

    def isatty(self) -> bool:
        return self._raw.isatty()

    def write(self, data) -> int:
        try:
            return self._raw.write(data)
        except BrokenPipeError:
            return len(data)


def _tolerate_closed_pipe(stream):
    """Return a text stream that drops data once its reader has exited."""
    if not isinstance(stream, io.TextIOWrapper):  # None if it is closed
        return stream
    raw = getattr(stream.buffer, "raw", None)  # None if Python runs unbuffered
    return io.TextIOWrapper(
        io.BufferedWriter(_PipeTolerant(raw)) if raw else _PipeTolerant(stream.buffer),
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
