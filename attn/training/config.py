"""From nested mappings to the settings of a run: the table of rules that they must meet, and the checks.

Whatever is wrong is said in one line that names the key, what was given and what is allowed.
"""

import dataclasses
import os
import typing
from collections.abc import Callable, Mapping

from attn import tasks
from attn.nn.encodings import ENCODINGS
from attn.nn.models import MODELS, settings_of
from attn.nn.recurrent import DECODERS
from attn.nn.variants import VARIANTS
from attn.tasks import pairs
from attn.tasks.generated import Generated
from attn.tasks.sequences import KINDS, Task
from attn.tasks.settings import PATH, SEED, between, described, fault, kinds_of, nearest, one_of
from attn.tasks.stored import Stored
from attn.training.groups import Config, ConfigError, Data, Model, Optimizer

_OF_MUON = ("rest_learning_rate", "momentum")
_OF_ALL = [field.name for field in dataclasses.fields(Optimizer) if field.name not in ("name", *_OF_MUON)]
OPTIMIZERS = {"adamw": _OF_ALL, "muon": [*_OF_ALL, *_OF_MUON]}  # and their settings
_COUNT = between(1, 1_000_000_000)
BEAM_WIDTH = between(1, 1_000)
_SIZE = between(1, 65_536)
RULES = {
    "task.name": one_of(KINDS),
    **{f"task.{name}": rule for name, rule in tasks.RULES.items()},
    "data.source": one_of((*tasks.SOURCES, "pairs")),
    "data.folder": PATH,
    **{f"data.{name}": rule for name, rule in pairs.RULES.items()},
    "model.name": one_of(MODELS),
    "model.width": _SIZE,
    "model.num_layers": between(1, 1_000),
    "model.attention": one_of(DECODERS),
    "model.num_heads": _SIZE,
    "model.head_width": _SIZE,
    "model.num_encoder_layers": between(1, 1_000),
    "model.num_decoder_layers": between(1, 1_000),
    "model.feed_forward_width": _SIZE,
    **{f"model.positions.{kind}": one_of(ENCODINGS) for kind in ("encoder", "decoder", "cross")},
    "model.positions.range": between(2, 40_000),
    "model.positions.at_test": one_of(("spaced", "random")),
    "model.max_length": between(2, 1_000_000),
    "model.variant": one_of(VARIANTS),
    "model.norm": one_of(("pre", "post")),
    "model.dropout": between(0, 1, open_high=True),
    "model.dtype": one_of(("float32", "bfloat16")),
    "optimizer.name": one_of(OPTIMIZERS),
    **dict.fromkeys(("optimizer.learning_rate", "optimizer.rest_learning_rate"), between(0, 1e3, open_low=True)),
    "optimizer.momentum": between(0, 1, open_high=True),
    "optimizer.warmup_fraction": between(0, 1, open_high=True),
    "optimizer.decay": one_of(("cosine", "linear", "inverse", "none")),
    "optimizer.beta1": between(0, 1, open_high=True),
    "optimizer.beta2": between(0, 1, open_high=True),
    "optimizer.weight_decay": between(0),
    "optimizer.clip_norm": between(0, open_low=True),
    "optimizer.averaging": between(0, 1, open_high=True),
    "training.seed": SEED,
    "training.steps": _COUNT,
    "training.stop_when_exact": between(0, 1_000_000_000),
    "training.replaced_tokens": between(0, 1),
    "training.batch_size": _COUNT,
    "training.steps_per_dispatch": _COUNT,
    "training.evaluate_every": _COUNT,
    "training.checkpoint_every": _COUNT,
    "evaluation.examples": _COUNT,
    "evaluation.examples_on_the_way": _COUNT,
    "evaluation.batch_size": _COUNT,
    "evaluation.beam_width": BEAM_WIDTH,
    "evaluation.seed": SEED,
}


def from_mapping(values: Mapping) -> Config:
    """Build and validate a config from nested mappings; what they leave out keeps its default.

    Raises:
      ConfigError: an unknown key, a value of the wrong type or out of range, or settings that do not go together.
    """
    config = _build(Config, values, "config")
    _check_together(config)
    return config


def to_mapping(config: Config) -> dict:
    """The config as nested dictionaries of plain values; of model and optimizer the settings that they have."""
    values = dataclasses.asdict(config)
    for group in ("model", "optimizer"):
        for name in _unread(getattr(config, group)):
            del values[group][name]
    return values


def model_settings(model: Model) -> dict:
    """What the model that is named is built with."""
    return {name: getattr(model, name) for name in settings_of(model.name)}


def parse(key: str, text: str):
    """The value of setting `key` (such as "model.width") written as text, in the type of the setting.

    Raises:
      ConfigError: no such setting, or the text is not of its type.
    """
    cls = Config
    *sections, name = key.split(".")
    for depth, section in enumerate(sections):
        hint = _hint(cls, section, ".".join(["config", *sections[:depth]]))
        if not dataclasses.is_dataclass(hint):
            raise ConfigError(f"config.{'.'.join(sections[: depth + 1])} is a setting: it has no {name!r} inside")
        cls = hint
    hint = _hint(cls, name, ".".join(["config", *sections]))
    if hasattr(hint, "named"):  # a name alone stands for all of the group
        return text
    if dataclasses.is_dataclass(hint):
        names = ", ".join(f"--config.{key}.{field.name}" for field in dataclasses.fields(hint))
        raise ConfigError(f"config.{key} is a group of settings: give one of {names}")
    return _from_text(f"config.{key}", hint, text)


def _build(cls, values, path: str):
    if isinstance(values, str) and hasattr(cls, "named"):
        if said := fault(str, values, one_of(ENCODINGS)):
            raise ConfigError(f"{path}: {said}")
        return cls.named(values)
    if not isinstance(values, Mapping):
        raise ConfigError(f"{path}: got {values!r}, must be a group of settings")
    settings = {}
    for name, value in values.items():
        hint = _hint(cls, str(name), path)
        inner = f"{path}.{name}"
        settings[name] = _build(hint, value, inner) if dataclasses.is_dataclass(hint) else _check(inner, hint, value)
    return cls(**settings)


def _hint(cls, name: str, path: str):
    hints = typing.get_type_hints(cls)
    if name not in hints:
        raise ConfigError(f"{path}.{name}: unknown setting{nearest(name, hints)}; {path} has {', '.join(hints)}")
    return hints[name]


def _check(path: str, hint, value):
    value = os.fspath(value) if isinstance(value, os.PathLike) else value
    if said := fault(hint, value, RULES.get(path.removeprefix("config."))):
        raise ConfigError(f"{path}: {said}")
    (kind, *_), _ = kinds_of(hint)
    return value if value is None else kind(value)


def _from_text(path: str, hint, text: str):
    (kind, *_), optional = kinds_of(hint)
    if optional and text.lower() == "none":
        return None
    try:
        if kind is bool:
            return {"true": True, "false": False, "1": True, "0": False}[text.lower()]
        return kind(text.replace("_", "")) if kind in (int, float) else text
    except (ValueError, KeyError):
        allowed = described(hint, RULES.get(path.removeprefix("config.")))
        raise ConfigError(f"{path}: got {text!r}, must be {allowed}") from None


def _check_together(config: Config):
    task = config.task
    if task.min_length > task.max_length:
        raise ConfigError(
            f"config.task.min_length: got {task.min_length}, must be at most config.task.max_length = {task.max_length}"
        )
    _check_unread("model", config.model)
    _check_unread("optimizer", config.optimizer)
    _check_model(config.model)
    _check_data(config)
    if config.data.source != "pairs":
        check_fits(config, Generated(task))


def _unread(settings: Model | Optimizer) -> dict[str, list[str]]:
    """The settings that the model or optimizer of that name does not have, and the names of those that have each."""
    having = {name: settings_of(name) for name in MODELS} if isinstance(settings, Model) else OPTIMIZERS
    others = [
        field.name for field in dataclasses.fields(settings) if field.name not in ("name", *having[settings.name])
    ]
    return {other: [name for name in having if other in having[name]] for other in others}


def _check_unread(group: str, settings: Model | Optimizer):
    """Settings that what is named does not have must be left alone."""
    for name, having in _unread(settings).items():
        given = getattr(settings, name)
        if given != getattr(type(settings)(), name):
            raise ConfigError(
                f"config.{group}.{name}: got {given!r}, means nothing for config.{group}.name = {settings.name!r}; "
                f"only {' or '.join(map(repr, having))} has it"
            )


def _check_model(model: Model):
    """The model's settings must go together."""
    if "num_heads" not in settings_of(model.name):
        return
    if model.head_width is None and model.width % model.num_heads:
        divisors = [str(n) for n in range(1, model.width + 1) if model.width % n == 0]
        raise ConfigError(
            f"config.model.num_heads: got {model.num_heads}, must divide config.model.width = {model.width} "
            f"({', '.join(divisors)}) unless config.model.head_width is given"
        )
    head_width = model.head_width or model.width // model.num_heads
    for kind, name in model.positions.by_kind().items():
        if "rotary" in name and head_width < 2:
            raise ConfigError(
                f"config.model.positions.{kind}: got {name!r}, must have heads of width 2 or more, not {head_width}"
            )
    encodings = [ENCODINGS[name] for name in model.positions.by_kind().values()]
    if any(each.learned and each.randomized for each in encodings) and model.max_length < model.positions.range:
        raise ConfigError(
            f"config.model.max_length: got {model.max_length}, must be at least config.model.positions.range = "
            f"{model.positions.range}, from which places in the table are drawn"
        )


def most_places(model: Model) -> int | None:
    """How many places the model can tell apart, so how many tokens source and answer may have; None for any number."""
    if "positions" not in settings_of(model.name):
        return None
    encodings = [ENCODINGS[name] for name in model.positions.by_kind().values()]
    bounds = [model.max_length] * any(each.learned for each in encodings)
    bounds += [model.positions.range] * any(each.randomized for each in encodings)
    return min(bounds, default=None)


def longest_input(model: Model, room: Callable[[int], int]) -> int | None:
    """How many tokens of a source the positions can encode, answer included; None for any number.

    Args:
      model: its settings.
      room: how many tokens the answer to so many may have.
    """
    most, places = most_places(model), MODELS[model.name].places
    return most and max(n for n in range(most) if places(n + 1, room(n)) <= most)


def _check_data(config: Config):
    """Settings that mean nothing for the source of the data, or for the model, must be left alone."""
    if config.training.one_length and config.data.source != "generated":
        raise ConfigError(
            f"config.training.one_length: got True, but config.data.source is {config.data.source!r}; only 'generated' "
            "draws lengths"
        )
    if config.training.replaced_tokens and not MODELS[config.model.name].reads_target:
        raise ConfigError(
            f"config.training.replaced_tokens: got {config.training.replaced_tokens}, means nothing for "
            f"config.model.name = {config.model.name!r}, which reads no target"
        )
    data, default = config.data, Data()
    readers = {name: "pairs" for name in ("path", "tokens", "validation", "test", "longest")} | {"folder": "tfds"}
    for name, reader in readers.items():
        given = getattr(data, name)
        if given != getattr(default, name) and data.source != reader:
            hint = " (or --config=configs/pairs.py)" if reader == "pairs" else ""
            raise ConfigError(
                f"config.data.{name}: got {given!r}, but config.data.source is {data.source!r}; "
                f"only {reader!r} reads it: --config.data.source={reader}{hint}"
            )
    if data.source == "pairs" and MODELS[config.model.name].needs_length:
        raise ConfigError(
            f"config.model.name: got {config.model.name!r}, which must be told the length of the answer: of pairs it "
            "is not known before it is written"
        )
    needing = config.model.positions.needing_length()
    for kind, name in config.model.positions.by_kind().items():
        if data.source == "pairs" and (kind in needing or ENCODINGS[name].randomized):
            what = "counts from the end of" if kind in needing else "draws a position for each place of source and"
            raise ConfigError(
                f"config.model.positions.{kind}: got {name!r}, which {what} the answer: of pairs its length is not "
                "known before it is written"
            )
    for field in dataclasses.fields(Task):
        given = getattr(config.task, field.name)
        if data.source == "pairs" and given != field.default:
            raise ConfigError(
                f"config.task.{field.name}: got {given!r}, means nothing for config.data.source = 'pairs'"
            )


def check_fits(config: Config, data: Generated | Stored):
    """Check that the model can encode the longest source and its answer, and that there is what training needs.

    Raises:
      ConfigError: it cannot, or there is not.
    """
    longest, most = data.longest_source, most_places(config.model)
    needed = MODELS[config.model.name].places(longest, data.vocabulary.room(longest - 1))
    if most is not None and most < needed:
        bound = "max_length" if most == config.model.max_length else "positions.range"
        raise ConfigError(
            f"config.model.{bound}: got {most}, must be at least {needed} for {data.name} with sources of "
            f"{longest - 1} tokens"
        )
    many = config.training.stop_when_exact
    if many and isinstance(data, Generated):
        longest = data.task.max_length
        if not len(data.questions_of_each_length("validation", [longest], 1, 0).lengths):
            raise ConfigError(
                f"config.training.stop_when_exact: got {many}, must be 0 for {data.name} with strings of up to "
                f"{longest} symbols: too few of them are held out for a validation part"
            )
