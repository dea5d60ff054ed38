"""Reads the event files of a run's folder as rows, by the format's own definition."""

import pathlib
import struct

import numpy as np
from tensorboardX.proto.event_pb2 import Event


def rows_of_events(folder: pathlib.Path) -> list[dict]:
    """Return every event with numbers, of all event files in their order; its numbers are float32."""
    rows = []
    for path in sorted(folder.glob("events.out.tfevents.*")):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            event = Event.FromString(data[at + 12 : at + 12 + length])
            at += 12 + length + 4
            if event.summary.value:
                rows.append({"step": event.step} | {value.tag: value.simple_value for value in event.summary.value})
    return rows


def in_float32(rows: list[dict]) -> list[dict]:
    """Return rows of `metrics.jsonl` as an event file holds them."""
    return [
        {name: value if name == "step" else float(np.float32(value)) for name, value in row.items()} for row in rows
    ]
