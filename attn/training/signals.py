"""SIGINT and SIGTERM during a run: they interrupt it at once, or, while it trains, after saving its state."""

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator

import jax


@contextlib.contextmanager
def stopped_by_sigterm() -> Iterator[None]:
    """Let SIGTERM raise KeyboardInterrupt, as SIGINT does, while there is nothing to save."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextlib.contextmanager
def watch_signals() -> Iterator[threading.Event]:
    """Yield an event that SIGINT and SIGTERM set, so that the loop can save and stop; a second SIGINT stops at once.

    In other threads than the main one, and on several hosts, the signals are left as they are.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread() or jax.process_count() > 1:
        yield stop
        return

    def request_stop(number, frame):
        print("stopping after the current steps; Ctrl-C stops at once, without saving", file=sys.stderr, flush=True)
        stop.set()
        signal.signal(signal.SIGINT, previous[signal.SIGINT])

    previous = {number: signal.signal(number, request_stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
