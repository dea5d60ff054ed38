"""The published encoders: a tape holds the source and one empty cell per symbol of the answer; one pass, no decoder.

python train.py --config=configs/tape.py --config.task.name=duplicate --config.model.mechanism="randomized(rotary)"
attn lengths --config=configs/tape.py --only relative

Sizes, batches and optimizer are those of Deletang et al. 2023 and Ruoss et al. 2023: 5 layers, width 64, 8 heads,
post-norm, dropout 0.1, 128 strings per step of one length from 1 to 40, Adam, gradients clipped at 1; here with
one learning rate. On one core a model takes 15 to 60 minutes to train, and up to 30 minutes to evaluate. Results:
docs/tape.md.
"""

from ml_collections import ConfigDict

from attn.studies.lengths.priors import prior
from attn.studies.lengths.study import Grid, Row, Study
from attn.training.config import from_mapping, to_mapping

_MODEL = dict(
    name="tape",
    width=64,
    num_heads=8,
    num_layers=5,
    feed_forward_width=256,
    mechanism="randomized(transformer_xl, at_test='random')",
    norm="post",
    dropout=0.1,
)
PUBLISHED = {
    "none": "none",
    "sinusoidal": "sinusoidal",
    "relative": "transformer_xl",
    "alibi": "alibi",
    "rotary": "rotary",
    # As published, positions are drawn at random at test as well.
    "randomized_sinusoidal": "randomized(sinusoidal, at_test='random')",
    "randomized_relative": "randomized(transformer_xl, at_test='random')",
    "randomized_alibi": "randomized(alibi, at_test='random')",
    "randomized_rotary": "randomized(rotary, at_test='random')",
}
_IMPORTS = ("attn.studies.tape",)
_OPTIMIZER = dict(learning_rate=1e-3, warmup_fraction=0.0, decay="none", beta2=0.999, clip_norm=1.0)
_TRAINING = dict(steps=2_000, batch_size=128)
_DATA = dict(source="one_length")


def get_config() -> ConfigDict:
    """Return the config of one of these encoders, trained on reverse."""
    task = dict(name="reverse", symbols=2, min_length=1, max_length=40)
    groups = dict(task=task, model=_MODEL, data=_DATA, optimizer=_OPTIMIZER, training=_TRAINING)
    return ConfigDict(to_mapping(from_mapping(dict(imports=_IMPORTS, **groups))))


def get_study() -> Study:
    """Return the published mechanisms, and two that count the source and the cells from both of their ends."""
    rows = {name: row(mechanism, group="published") for name, mechanism in PUBLISHED.items()}
    for name in ("anchored_t5", "anchored_rotary"):
        mechanism = f"{name} + log_length"
        built_in = f"{prior(mechanism)}; where the answer begins"
        rows[name] = row(mechanism, group="counted from both ends", prior=built_in)
    return study(rows)


def row(mechanism: str, **settings) -> Row:
    """Return a published encoder with one mechanism."""
    return Row(_MODEL | {"mechanism": mechanism}, **(dict(ends=("given",), seeds=1) | settings))


def study(rows: dict[str, Row], steps: int = _TRAINING["steps"], **grid) -> Study:
    """Return a study of rows trained for `steps`, evaluated at a dozen lengths unless `grid` changes that."""
    default = dict(beyond=tuple(range(41, 501, 41)), each=128, exact=(500,), strings=128, structured=500)
    return Study(
        rows,
        config={"data": _DATA, "optimizer": _OPTIMIZER, "training": {"batch_size": 128}},
        budgets=(steps,),
        tasks=("reverse", "duplicate"),
        grid=Grid(**(default | grid)),
        imports=_IMPORTS,
    )
