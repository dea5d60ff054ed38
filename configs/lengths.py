"""A study of lengths: models are trained on strings of 1 to 40 symbols and evaluated on up to 1,000 and 10,000.

attn lengths --config=configs/lengths.py
attn lengths --config=configs/lengths.py --only anchored,rotary

Every row is an encoder-decoder with one layer per stack, width 64 and four heads, or a recurrent network of about as
many parameters, trained with the same settings. To add a row, add one line to `rows`. Most models take two to four
minutes on one core to train and evaluate.
`anchored` is exact at every evaluated length; the results of all rows are in docs/lengths.md.
"""

import dataclasses

from attn.studies.lengths.priors import prior
from attn.studies.lengths.study import Row, Study

_TRANSFORMER = dict(
    name="transformer", width=64, num_heads=4, num_encoder_layers=1, num_decoder_layers=1, feed_forward_width=128
)

_PLAIN = {
    "none": "none",
    "sinusoidal": "sinusoidal",
    "learned": "learned(2050)",  # for all lengths that are evaluated
    "rotary": "rotary",
    "shaw": "shaw",
    "t5": "t5",
    "alibi": "alibi",
}
_DRAWN = {name: f"randomized({_PLAIN[name]})" for name in ("sinusoidal", "learned", "rotary", "alibi")}
_ONCE = "anchored(keys=False, queries=False)"
_IN_ORDER = "order, by reading in order"
_FAR = ("copy", "reverse")


def _with(mechanism: str) -> Row:
    """Return a row with one mechanism for all attention."""
    return Row(_TRANSFORMER | {"mechanism": mechanism})


def _pointing(cross: str, self_attention: str = _ONCE, **settings) -> Row:
    """Return a row with one mechanism in the cross-attention and another in self-attention."""
    self_prior = "; self-attention attends to its own position" if self_attention != "none" else ""
    model = _TRANSFORMER | {"mechanism": {"encoder": self_attention, "decoder": self_attention, "cross": cross}}
    return Row(model, prior=prior(cross) + self_prior, **settings)


def _group(group: str, **rows: Row) -> dict[str, Row]:
    """Return rows as one group, which share a plot."""
    return {name: dataclasses.replace(row, group=group) for name, row in rows.items()}


def get_study() -> Study:
    """Return the rows and the settings of their training."""
    given = dict(ends=("given",))  # for mechanisms that count from the answer's end: its length must be given
    rows = {
        **_group(
            "anchored",
            anchored=_pointing("anchored", seeds=10, symbols=(2, 16), far=_FAR, **given),
            anchored_to_source=_pointing(
                "anchored(queries=False)", seeds=10, symbols=(2, 16), far=_FAR, tasks=("copy", "reverse")
            ),
            anchored_cross_alone=_pointing("anchored", self_attention="none", **given),
            anchored_once=_pointing(_ONCE),
            anchored_frozen=_pointing("anchored(frozen=True)", **given),
            anchored_soft=_pointing("anchored(soft=True)", **given),
            anchored_unshifted=_pointing("anchored(shift=False)", **given),
        ),
        **_group(
            "weaker priors",
            anchored_t5=_pointing("anchored_t5 + log_length", **given),
            anchored_t5_longer=_pointing("anchored_t5 + log_length", budgets=(2_400,), **given),
            line=_pointing("line"),
            anchored_rotary=_pointing("anchored_rotary + log_length", self_attention="none", **given),
            randomized_anchored_rotary=_pointing(
                "randomized(anchored_rotary) + log_length", self_attention="none", **given
            ),
        ),
        **_group("plain", **{name: _with(mechanism) for name, mechanism in _PLAIN.items()}),
        **_group("randomized", **{f"randomized_{name}": _with(mechanism) for name, mechanism in _DRAWN.items()}),
        **_group(
            "recurrent",
            lstm=Row(dict(name="lstm", width=72, attention="none"), prior=_IN_ORDER),
            lstm_attention=Row(dict(name="lstm", width=59, attention="additive"), prior=_IN_ORDER),
        ),
    }
    optimizer = dict(learning_rate=3e-3, warmup_fraction=0.1, decay="cosine", beta2=0.95, clip_norm=10.0)
    return Study(rows, config={"optimizer": optimizer, "training": {"batch_size": 32}})
