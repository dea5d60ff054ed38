"""Reads the payload of a page in Python, written from its description alone, so that pages can be held to arrays."""

import base64
import gzip
import json
import re

import numpy as np


def payload_of(page: str) -> dict:
    """Return the payload of a page."""
    [text] = re.findall(r'<script type="application/json" id="attn-data">(.*?)</script>', page, re.DOTALL)
    return json.loads(text)


def unpacked(text: str, dtype: str) -> np.ndarray:
    """Return the numbers of a part of the payload."""
    return np.frombuffer(gzip.decompress(base64.b64decode(text)), dtype)


def sheets(payload: dict) -> list[np.ndarray]:
    """Return all maps `[t s]` in their order: run, frame, kind, layer, head; 7-bit levels as values."""
    is_exact = payload["encoding"] == "float32"
    values = unpacked(payload["values"], "<f4" if is_exact else "u1")
    ranges, found, start = unpacked(payload["ranges"], "<f4").reshape(-1, 2), [], 0
    for _ in range(len(payload["runs"]) * len(payload["frames"])):
        for layer in (layer for kind in payload["kinds"] for layer in kind["layers"]):
            t, s = layer["shape"]
            for _ in range(layer["heads"]):
                part = values[start : start + t * s].reshape(t, s)
                found.append(part if is_exact else of_levels(part, *ranges[len(found)]))
                start += t * s
    assert start == len(values) and len(found) == len(ranges)
    return found


def of_levels(codes: np.ndarray, low: float, high: float) -> np.ndarray:
    """Return the values of 7-bit levels; masked is NaN."""
    c = codes.astype(float)
    most = max(abs(low), abs(high))
    x = high * (c / 126) ** 2 if low >= 0 else most * np.sign(c - 63) * ((c - 63) / 63) ** 2
    for code, value in ((252, -np.inf), (253, np.inf), (254, np.nan), (255, np.nan)):
        x = np.where(codes == code, value, x)
    return x


def tops(payload: dict) -> tuple[np.ndarray, np.ndarray]:
    """Return the columns and values `[all rows, k]` of the exact largest values."""
    top = payload["top"]
    return unpacked(top["index"], "<u4").reshape(-1, top["k"]), unpacked(top["value"], "<f4").reshape(-1, top["k"])
