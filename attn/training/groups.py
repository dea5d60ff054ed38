"""The settings of a run, in groups: frozen records with constraints, which `attn.training.config` checks."""

import dataclasses

from attn.nn.model import ModelSettings
from attn.nn.transformer import TransformerSettings
from attn.settings import PATH, SEED, between, one_of, setting
from attn.tasks import pairs
from attn.tasks.sequences import Task

_COUNT = between(1, 1_000_000_000)
_FRACTION = between(0, 1, open_high=True)
_RATE = between(0, 1e3, open_low=True)
BEAM_WIDTH = between(1, 1_000)


class ConfigError(ValueError):
    """A setting that cannot be used; the message is one line for the user."""


@dataclasses.dataclass(frozen=True)
class Data:
    """The source of examples: generated as they are needed, from TFDS, or from a file of pairs.

    See `attn.tasks.builders.load_dataset` for `folder` and `attn.tasks.pairs.load_pairs` for the rest.
    """

    source: str = "generated"
    folder: str | None = setting(None, PATH)
    path: str | None = None
    tokens: str = "characters"
    validation: str | None = None
    test: str | None = None
    longest: int = pairs.USUAL_LONGEST


@dataclasses.dataclass(frozen=True)
class AdamW:
    """Settings of AdamW and of the learning rate: see `attn.training.optimizers`.

    With `averaging` = a > 0 the parameters that are evaluated and kept are an average over the steps so far, in which
    the last fraction a of the steps counts most; 0 keeps the parameters of the last step.
    """

    name: str = "adamw"
    learning_rate: float = setting(3e-3, _RATE)
    warmup_fraction: float = setting(0.1, _FRACTION)
    decay: str = setting("cosine", one_of(("cosine", "linear", "inverse", "none")))
    beta1: float = setting(0.9, _FRACTION)
    beta2: float = setting(0.95, _FRACTION)
    weight_decay: float = setting(0.0, between(0))
    clip_norm: float = setting(10.0, between(0, open_low=True))
    averaging: float = setting(0.0, _FRACTION)


@dataclasses.dataclass(frozen=True)
class Muon(AdamW):
    """Settings of Muon: `learning_rate`, `momentum` and `weight_decay` are for the matrices between hidden layers.

    `rest_learning_rate`, `beta1` and `beta2` are AdamW's for the other parameters.
    """

    name: str = "muon"
    rest_learning_rate: float = setting(2e-2, _RATE)
    momentum: float = setting(0.95, _FRACTION)


OPTIMIZERS = {"adamw": AdamW, "muon": Muon}


@dataclasses.dataclass(frozen=True)
class Training:
    """The length of training and the batches; the seed decides parameters, batches and dropout.

    `steps` is the number of steps, or the largest number: with `stop_when_exact` = n > 0 training stops as soon as an
    intermediate evaluation is exact on its examples and on n more. `replaced_tokens` is the fraction of the decoder's
    input tokens that are replaced by random ones. One call of the compiled programs takes `steps_per_call` steps.
    `snapshots` is the number of steps at which the parameters are kept, to look back at training; 0 keeps none. See
    `attn.training.snapshots`.
    """

    seed: int = setting(0, SEED)
    steps: int = setting(2_000, _COUNT)
    stop_when_exact: int = setting(0, between(0, 1_000_000_000))
    replaced_tokens: float = setting(0.0, between(0, 1))
    batch_size: int = setting(32, _COUNT)
    steps_per_call: int = setting(100, _COUNT)
    evaluate_every: int = setting(500, _COUNT)
    checkpoint_every: int = setting(1000, _COUNT)
    snapshots: int = setting(16, between(0, 1_000))


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Numbers of held-out examples of the final and the intermediate evaluations; width of an additional beam."""

    examples: int = setting(10_000, _COUNT)
    intermediate_examples: int = setting(500, _COUNT)
    batch_size: int = setting(500, _COUNT)
    beam_width: int = setting(1, BEAM_WIDTH)
    seed: int = setting(0, SEED)


@dataclasses.dataclass(frozen=True)
class MeshShape:
    """The numbers of devices along the axes of the mesh that divide the model; the data axis has the other devices.

    Along `model` each device has some of the heads and of the hidden units of feed-forward layers, along `sequence`
    some of the tokens of each text. See `attn.nn.sharding`.
    """

    model: int = setting(1, _COUNT)
    sequence: int = setting(1, _COUNT)

    @property
    def size(self) -> int:
        """The number of devices that share a model."""
        return self.model * self.sequence


@dataclasses.dataclass(frozen=True)
class Config:
    """All settings of a run.

    Attributes:
      imports: modules that are imported before anything else, since they register what the other settings name.
      model: the settings of the model that `model.name` names.
      optimizer: the settings of the optimizer that `optimizer.name` names.
    """

    imports: tuple[str, ...] = ()
    task: Task = dataclasses.field(default_factory=Task)
    data: Data = dataclasses.field(default_factory=Data)
    model: ModelSettings = dataclasses.field(default_factory=lambda: TransformerSettings("transformer"))
    optimizer: AdamW = dataclasses.field(default_factory=AdamW)
    training: Training = dataclasses.field(default_factory=Training)
    evaluation: Evaluation = dataclasses.field(default_factory=Evaluation)
    mesh: MeshShape = dataclasses.field(default_factory=MeshShape)
