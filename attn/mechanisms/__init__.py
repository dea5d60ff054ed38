"""Mechanisms, the departures of an attention layer from softmax(Q K^T / sqrt(H)) V; see `Mechanism`.

from attn import masks, mechanisms

mechanisms.parse("rotary + softcap(20)")
mechanisms.rotary() + mechanisms.of(mask=masks.sliding_window(4, 0))
"""

from attn.mechanisms.added import learned, learned_grid, sinusoidal
from attn.mechanisms.changes import none, of, qk_norm, scaled, softcap, unscaled, window
from attn.mechanisms.mechanism import HeadParam, Layer, Mechanism
from attn.mechanisms.registry import MECHANISMS, parse, register
from attn.mechanisms.relative import alibi, rotary, shaw, t5, transformer_xl
from attn.mechanisms.rows import Example, LengthUnknown, Rows

__all__ = [
    "MECHANISMS",
    "Example",
    "HeadParam",
    "Layer",
    "LengthUnknown",
    "Mechanism",
    "Rows",
    "alibi",
    "learned",
    "learned_grid",
    "none",
    "of",
    "parse",
    "qk_norm",
    "register",
    "rotary",
    "scaled",
    "shaw",
    "sinusoidal",
    "softcap",
    "t5",
    "transformer_xl",
    "unscaled",
    "window",
]
