"""Attention as pure functions of arrays. Imports only jax, jaxtyping and numpy."""

from attn.functional import masks, positions, scores, zigzag
from attn.functional.attention import (
    attention,
    attention_weights,
    multi_head_attention,
    multi_head_attention_weights,
    per_head,
)
from attn.functional.dropout import Dropout
from attn.functional.implementations import Unsupported
from attn.functional.pooled import pooled_attention_weights
from attn.functional.ring import ring_attention

__all__ = [
    "Dropout",
    "Unsupported",
    "attention",
    "attention_weights",
    "masks",
    "multi_head_attention",
    "multi_head_attention_weights",
    "per_head",
    "pooled_attention_weights",
    "positions",
    "ring_attention",
    "scores",
    "zigzag",
]
