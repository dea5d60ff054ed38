"""SIGINT and SIGTERM while a run trains: what they do depends on whether there is something to save."""

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
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def watch_signals() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set, so that the loop can save and leave; a second SIGINT acts as usual."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread() or jax.process_count() > 1:
        yield stop
        return

    def ask(number, frame):
        print("stopping after the steps under way; Ctrl-C stops at once, without them", file=sys.stderr, flush=True)
        stop.set()
        signal.signal(signal.SIGINT, before[signal.SIGINT])

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
