"""Attention as pure functions of arrays. Imports only jax, jaxtyping and numpy."""

from attn.functional import masks, positions, scores
from attn.functional.attention import (
    attention,
    attention_weights,
    multi_head_attention,
    multi_head_attention_weights,
    per_head,
)
from attn.functional.dropout import Dropout
from attn.functional.implementations import Unsupported

__all__ = [
    "Dropout",
    "Unsupported",
    "attention",
    "attention_weights",
    "masks",
    "multi_head_attention",
    "multi_head_attention_weights",
    "per_head",
    "positions",
    "scores",
]
