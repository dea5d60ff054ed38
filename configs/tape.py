"""The published encoders: the source on a tape with an empty cell for each symbol of the answer, one pass, no decoder.

python train.py --config=configs/tape.py --config.task.name=duplicate --config.model.positions=randomized_rotary
attn lengths --config=configs/tape.py --only relative

Sizes, batches and optimizer are those of Deletang et al. 2023 and Ruoss et al. 2023: 5 layers, width 64, 8 heads,
post-norm, dropout 0.1, 128 strings a step of one length from 1 to 40, Adam, gradients clipped at 1; here at one
learning rate. On one core a model takes a quarter of an hour to an hour to train, and up to half an hour to ask. What
came of them: docs/tape.md.
"""

from ml_collections import ConfigDict

from attn.lengths.table import Asked, Row, Table
from attn.nn.encodings import ENCODINGS
from attn.training.config import from_mapping, to_mapping

_MODEL = dict(
    name="tape",
    width=64,
    num_heads=8,
    num_layers=5,
    feed_forward_width=256,
    positions="randomized_transformer_xl",
    max_length=2_048,
    norm="post",
    dropout=0.1,
)
PUBLISHED = {
    "none": "none",
    "sinusoidal": "sinusoidal",
    "relative": "transformer_xl",
    "alibi": "alibi",
    "rotary": "rotary",
    "randomized_sinusoidal": "randomized_sinusoidal",
    "randomized_relative": "randomized_transformer_xl",
    "randomized_alibi": "randomized_alibi",
    "randomized_rotary": "randomized_rotary",
}
_OPTIMIZER = dict(learning_rate=1e-3, warmup_fraction=0.0, decay="none", beta2=0.999, clip_norm=1.0)
_TRAINING = dict(steps=2_000, batch_size=128, one_length=True)


def get_config() -> ConfigDict:
    """One of them, on reverse."""
    task = dict(name="reverse", symbols=2, min_length=1, max_length=40)
    return ConfigDict(to_mapping(from_mapping(dict(task=task, model=_MODEL, optimizer=_OPTIMIZER, training=_TRAINING))))


def get_table() -> Table:
    """The published ones by what tells positions, and two that count source and cells each from both of its ends."""
    rows = {name: row(positions, group="published") for name, positions in PUBLISHED.items()}
    for name in ("anchored_t5", "anchored_rotary"):
        said = f"{ENCODINGS[name].builds_in}; where the answer begins"
        rows[name] = row(name, group="counted from both ends", builds_in=said)
    return table(rows)


def row(positions: str, **settings) -> Row:
    """A published encoder with some positions; those that are drawn are drawn at test as well, as in print."""
    named = dict.fromkeys(("encoder", "decoder", "cross"), positions) | {"at_test": "random"}
    model = _MODEL | {"positions": named if ENCODINGS[positions].randomized else positions}
    return Row(model, **(dict(ends=("given",), seeds=1) | settings))


def table(rows: dict[str, Row], steps: int = _TRAINING["steps"], **asked) -> Table:
    """Rows that are trained for so many steps, asked on a grid of a dozen lengths unless `asked` says more."""
    grid = dict(beyond=tuple(range(41, 501, 41)), each=128, exact=(500,), strings=128, structured=500)
    return Table(
        rows,
        config={"optimizer": _OPTIMIZER, "training": {"batch_size": 128, "one_length": True}},
        budgets=(steps,),
        tasks=("reverse", "duplicate"),
        asked=Asked(**(grid | asked)),
    )
