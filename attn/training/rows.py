"""The rows of a run's metrics: `metrics.jsonl`, and an event file for TensorBoard that is derived from it."""

import json
import pathlib
import socket
import struct
import time
from typing import IO

from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import masked_crc32c
from tensorboardX.summary import scalar

from attn.training.folders import Folder, RunError, write_whole

_LARGEST = 3.4e38  # event files have float32; infinity and NaN do not compare as less either
_EVENTS = "events.out.tfevents.*"


class RowFiles:
    """The metrics of a run, open for more rows. Both files have the same rows, each once, even after a kill.

    Rows after step `last` are dropped, and the event file is written again from the rows that are kept, since a killed
    process may have left it with more or fewer rows.

    Args:
      folder: of the run.
      last: the step at which the run resumes; 0 for a new run.

    Raises:
      RunError: `metrics.jsonl` is damaged.
    """

    def __init__(self, folder: Folder, last: int):
        kept = [row for row in read(folder.metrics) if row["step"] <= last]
        if folder.metrics.exists():
            write_whole(folder.metrics, "".join(json.dumps(row) + "\n" for row in kept))
        self._events = _event_file(folder.path, kept)
        self._metrics = folder.metrics.open("a")

    def write(self, row: dict):
        """Append a row and flush it, so that readers see it at once."""
        self._metrics.write(json.dumps(row) + "\n")
        self._metrics.flush()
        _append(self._events, _event(row))
        self._events.flush()

    def close(self):
        """Close both files."""
        with self._metrics, self._events:
            pass


def read(path: pathlib.Path) -> list[dict]:
    """Read the rows of `metrics.jsonl`, without an unfinished last row that a killed run may have left.

    Raises:
      RunError: a row is damaged.
    """
    if not path.exists():
        return []
    rows = []
    try:
        lines = path.read_text().rpartition("\n")[0].splitlines()
    except UnicodeDecodeError:
        raise RunError(f"{path}: damaged (not a text file); remove it to resume without its rows") from None
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not _is_row(row) or (rows and rows[-1]["step"] >= row["step"]):
            raise RunError(f"{path}: line {number} is damaged; remove the file to resume without its rows")
        rows.append(row)
    return rows


def _is_row(row: object) -> bool:
    """Return whether a JSON value is a row: a step, a loss, and possibly other numbers, by name."""
    if not isinstance(row, dict) or type(row.get("step")) is not int or not 0 < row["step"] < 2**31:
        return False
    numbers = [value for name, value in row.items() if name != "step"]
    return "loss" in row and all(type(value) in (int, float) and abs(value) < _LARGEST for value in numbers)


def _event_file(folder: pathlib.Path, rows: list[dict]) -> IO:
    """Write rows into a new event file that replaces the old ones, and return it open for more."""
    partial = folder / ".events.partial"
    name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}"
    events = partial.open("wb")
    _append(events, Event(file_version="brain.Event:2"))
    # This record makes a running TensorBoard discard the rows that it has read before.
    _append(events, Event(step=0, session_log=SessionLog(status=SessionLog.START)))
    for row in rows:
        _append(events, _event(row))
    events.flush()
    old = [path for path in folder.glob(_EVENTS) if path.name != name]
    partial.replace(folder / name)
    for path in old:
        path.unlink()
    return events


def _event(row: dict) -> Event:
    """Return a row as one event: after a kill the file has all of its numbers or none."""
    numbers = [scalar(name, value).value[0] for name, value in sorted(row.items()) if name != "step"]
    return Event(step=row["step"], summary=Summary(value=numbers))


def _append(events: IO, event: Event):
    """Append a record: length, its checksum, data, their checksum."""
    event.wall_time = time.time()
    data = event.SerializeToString()
    length = struct.pack("<Q", len(data))
    events.write(length + _checksum(length) + data + _checksum(data))


def _checksum(data: bytes) -> bytes:
    return struct.pack("<I", masked_crc32c(data))
