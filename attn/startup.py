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

STUCK = "waits inside of C++"  # name of a thread that cannot be stopped
NOTHING_WRITTEN = "stopped before the run began"


def begin():
    """Set up the process of a command; call before JAX and matplotlib are imported."""
    # XLA's alarm "Very slow compile?" is logged as an error. JAX's own errors are Python exceptions.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    # Where its folder cannot be written, matplotlib makes a temporary one and says so in two lines.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    sys.stdout, sys.stderr = (_forgiving(stream) for stream in (sys.stdout, sys.stderr))


def run(command: Callable[[], int]):
    """Run a command as the whole of this process, and leave with the exit status that it returns."""
    begin()
    try:
        status = command()
    except KeyboardInterrupt:  # between one handler of ^C and the next
        print("stopped", file=sys.stderr)
        status = 130
    leave(status)


@contextlib.contextmanager
def leaving_at_once(words: str) -> Iterator[None]:
    """While the block runs, let ^C end the process with these words and status 130, even inside of a compilation.

    A Python signal handler would have to wait until the main thread is back from C++; the wake-up pipe does not.
    """
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN  # as under nohup, and in the background of a script
    if ignored or threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = signal.signal(signal.SIGINT, lambda number, frame: None)
    wakeup = signal.set_wakeup_fd(writer)
    threading.Thread(target=_leave_on_interrupt, args=(reader, words), daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup)
        signal.signal(signal.SIGINT, before)
        os.close(writer)  # ends the thread


def leave(status: int):
    """End the process with an exit status.

    When it was interrupted, or a thread is stuck, at once: what threads still do, such as a compilation, would crash
    the interpreter's own ending, or keep it waiting.
    """
    if status == 130 or any(thread.name == STUCK for thread in threading.enumerate()):
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, AttributeError):  # its reader was interrupted as well, or it is closed
                stream.flush()
        os._exit(status)
    sys.exit(status)


def _leave_on_interrupt(reader: int, words: str):
    """Wait for the number of a signal; leave if it is SIGINT's."""
    while number := os.read(reader, 1):
        if number[0] == signal.SIGINT:
            shown = "\x1b[?25h" if os.isatty(2) else ""  # a progress bar may have hidden the cursor
            with contextlib.suppress(OSError):  # nobody reads
                os.write(2, f"{shown}{words}\n".encode())
            os._exit(130)
    os.close(reader)


class _Forgiving(io.RawIOBase):
    """A stream whose reader may leave early, as `head` does: what is written after that is dropped."""

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


def _forgiving(stream):
    """Return the text stream over one whose reader may leave."""
    if not isinstance(stream, io.TextIOWrapper):  # None where it is closed
        return stream
    raw = getattr(stream.buffer, "raw", None)  # None where Python was told not to buffer
    return io.TextIOWrapper(
        io.BufferedWriter(_Forgiving(raw)) if raw else _Forgiving(stream.buffer),
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
