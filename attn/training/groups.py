"""The settings of a run, in groups: frozen dataclasses. `attn.training.config` validates them."""

import dataclasses

from attn.nn.encodings import Positions
from attn.tasks import pairs
from attn.tasks.sequences import Task


class ConfigError(ValueError):
    """A setting that cannot be used; the message is one line for the user."""


@dataclasses.dataclass(frozen=True)
class Data:
    """Where examples come from: drawn as they are needed, from TFDS, or from a file of pairs.

    See `attn.tasks.builders.load` for `folder` and `attn.tasks.pairs.load` for the rest.
    """

    source: str = "generated"
    folder: str | None = None
    path: str | None = None
    tokens: str = "characters"
    validation: str | None = None
    test: str | None = None
    longest: int = pairs.USUAL_LONGEST


@dataclasses.dataclass(frozen=True)
class Model:
    """Which model, and its settings: see the classes in `attn.nn.models.MODELS`.

    A model reads the settings that it has; the others must be left alone.
    """

    name: str = "transformer"
    width: int = 64
    num_layers: int = 1
    attention: str = "none"
    num_heads: int = 4
    head_width: int | None = None
    num_encoder_layers: int = 1
    num_decoder_layers: int = 1
    feed_forward_width: int = 128
    positions: Positions = dataclasses.field(default_factory=Positions)
    max_length: int = 512
    variant: str = "plain"
    norm: str = "pre"
    dropout: float = 0.0
    tied_embeddings: bool = False
    dtype: str = "float32"


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """Which optimizer, and its settings: see `attn.training.optimizers`.

    Muon has `learning_rate`, `momentum` and `weight_decay` for the matrices between hidden layers, and
    `rest_learning_rate`, `beta1` and `beta2` for the other parameters. With `averaging` = a > 0 the parameters that are
    evaluated and kept are an average over the steps so far, of which the last part, a of them, counts most; 0 keeps
    those of the last step.
    """

    name: str = "adamw"
    learning_rate: float = 3e-3
    rest_learning_rate: float = 2e-2
    momentum: float = 0.95
    warmup_fraction: float = 0.1
    decay: str = "cosine"
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.0
    clip_norm: float = 10.0
    averaging: float = 0.0


@dataclasses.dataclass(frozen=True)
class Training:
    """How long and on how much; the seed decides parameters, batches and dropout.

    `steps` are all steps, or the most: with `stop_when_exact` = n > 0 training stops as soon as an intermediate
    evaluation is exact on its examples and on n more. `replaced_tokens` is the share of the tokens read by the decoder
    that are random ones. With `one_length` all strings of a batch have one length, drawn again at every step.
    """

    seed: int = 0
    steps: int = 2_000
    stop_when_exact: int = 0
    replaced_tokens: float = 0.0
    batch_size: int = 32
    one_length: bool = False
    steps_per_dispatch: int = 100
    evaluate_every: int = 500
    checkpoint_every: int = 1000


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Held-out examples: how many at the end, and how many for the figure on the way; a beam wider than 1 besides."""

    examples: int = 10_000
    examples_on_the_way: int = 500
    batch_size: int = 500
    beam_width: int = 1
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that decides a run."""

    task: Task = dataclasses.field(default_factory=Task)
    data: Data = dataclasses.field(default_factory=Data)
    model: Model = dataclasses.field(default_factory=Model)
    optimizer: Optimizer = dataclasses.field(default_factory=Optimizer)
    training: Training = dataclasses.field(default_factory=Training)
    evaluation: Evaluation = dataclasses.field(default_factory=Evaluation)
