"""Far past the training length: strings of 1 to 40 symbols are learnt, up to 1,000 and 10,000 are asked.

attn lengths --config=configs/lengths.py
attn lengths --config=configs/lengths.py --only anchored,rotary

Every row is an encoder-decoder of one layer a stack, width 64 and four heads, or a recurrent network of its size,
trained with the same settings. A row of one's own is one line in `rows`. On one core it mostly takes two to four
minutes to train a model and to ask it.
`anchored` is exact at every length that is asked; what becomes of the others is in docs/lengths.md.
"""

import dataclasses

from attn.lengths.table import Row, Table
from attn.nn.encodings import ENCODINGS

_TRANSFORMER = dict(
    name="transformer", width=64, num_heads=4, num_encoder_layers=1, num_decoder_layers=1, feed_forward_width=128
)

_PLAIN = ("none", "sinusoidal", "learned", "rotary", "shaw", "t5", "alibi")
_DRAWN = ("sinusoidal", "learned", "rotary", "alibi")
_IN_ORDER = "order, by reading in order"
_FAR = ("copy", "reverse")


def _with(positions, **settings) -> Row:
    """Positions of one kind in all attention, or at the bottom of both stacks, for all lengths that are asked."""
    return Row(_TRANSFORMER | {"positions": positions, "max_length": 2_050} | settings)


def _pointing(cross: str, own: str = "anchored_once", **settings) -> Row:
    """Some positions in the cross-attention, `own` in the rest: if not said, every head looks at its place."""
    said = ENCODINGS[cross].builds_in + ("; self-attention looks at its own place" if own != "none" else "")
    model = _TRANSFORMER | {"positions": {"encoder": own, "decoder": own, "cross": cross}}
    return Row(model, builds_in=said, **settings)


def _group(group: str, **rows: Row) -> dict[str, Row]:
    """Rows that are drawn together."""
    return {name: dataclasses.replace(row, group=group) for name, row in rows.items()}


def get_table() -> Table:
    """The rows, and how all of them are trained."""
    given = dict(ends=("given",))  # they count from the answer's end, so that its length must be given
    rows = {
        **_group(
            "anchored",
            anchored=_pointing("anchored", seeds=10, symbols=(2, 16), far=_FAR, **given),
            anchored_to_source=_pointing(
                "anchored_to_source", seeds=10, symbols=(2, 16), far=_FAR, tasks=("copy", "reverse")
            ),
            anchored_cross_alone=_pointing("anchored", own="none", **given),
            anchored_once=_pointing("anchored_once"),
            anchored_frozen=_pointing("anchored_frozen", **given),
            anchored_soft=_pointing("anchored_soft", **given),
            anchored_unshifted=_pointing("anchored_unshifted", **given),
        ),
        **_group(
            "weaker priors",
            anchored_t5=_pointing("anchored_t5", **given),
            anchored_t5_longer=_pointing("anchored_t5", budgets=(2_400,), **given),
            line=_pointing("line"),
            anchored_rotary=_pointing("anchored_rotary", own="none", **given),
            randomized_anchored_rotary=_pointing("randomized_anchored_rotary", own="none", **given),
        ),
        **_group("plain", **{name: _with(name) for name in _PLAIN}),
        **_group("randomized", **{f"randomized_{name}": _with(f"randomized_{name}") for name in _DRAWN}),
        **_group(
            "recurrent",
            lstm=Row(dict(name="lstm", width=72, attention="none"), builds_in=_IN_ORDER),
            lstm_attention=Row(dict(name="lstm", width=59, attention="additive"), builds_in=_IN_ORDER),
        ),
    }
    optimizer = dict(learning_rate=3e-3, warmup_fraction=0.1, decay="cosine", beta2=0.95, clip_norm=10.0)
    return Table(rows, config={"optimizer": optimizer, "training": {"batch_size": 32}})
