"""From nested mappings to the settings of a run; a wrong one is one line: key, what was given, what is allowed."""

import collections
import dataclasses
import importlib
import importlib.machinery
import importlib.util
import os
import pathlib
import sys
import typing
from collections.abc import Callable, Mapping, Sequence

import jax.numpy as jnp
from flax import nnx

from attn import tasks
from attn.mechanisms.rows import LengthUnknown
from attn.nn.model import ModelSettings
from attn.nn.models import MODELS
from attn.settings import PATH, Constraint, description, error_message, nearest, one_of, types_of
from attn.tasks import pairs
from attn.tasks.generated import Generated
from attn.tasks.rules import RULES as TASKS
from attn.tasks.sequences import Task
from attn.tasks.stored import Stored
from attn.training.groups import OPTIMIZERS, Config, ConfigError, Data

# Settings of tasks and data, whose records know no constraints.
_CONSTRAINTS = {
    "task.name": one_of(TASKS),
    **{f"task.{name}": each for name, each in tasks.CONSTRAINTS.items()},
    "data.source": one_of(collections.ChainMap({"pairs": None}, tasks.SOURCES)),
    "data.folder": PATH,
    **{f"data.{name}": each for name, each in pairs.CONSTRAINTS.items()},
}
NAMED = {"model": ("transformer", MODELS), "optimizer": ("adamw", OPTIMIZERS)}  # groups whose record a name decides


def from_mapping(values: Mapping) -> Config:
    """Build and validate a config from nested mappings; what they leave out keeps its default.

    Raises:
      ConfigError: an unknown key, a value of the wrong type or out of range, or settings that do not go together.
    """
    if isinstance(values, Mapping) and "imports" in values:
        import_modules(values["imports"])
    config = _build(_Group("config", Config), values)
    _check_together(config)
    return config


def import_modules(names):
    """Import the modules that register what a config names, from the path or the current folder.

    Nothing in the folder of a run is ever executed, since a run may come from somebody else.

    Raises:
      ConfigError: one that cannot be imported, or that lies in the folder of a run.
    """
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"config.imports: got {names!r}, must be names of modules")
    if names and str(pathlib.Path.cwd()) not in sys.path:
        sys.path.append(str(pathlib.Path.cwd()))
    for name in names:
        try:
            spec = importlib.util.find_spec(name.partition(".")[0])
            if spec is not None and _is_in_a_run(spec):
                raise ImportError(f"{spec.origin} lies in the folder of a run, where nothing is executed")
            importlib.import_module(name)
        except (Exception, SystemExit) as error:  # whatever the user's module raises
            words = " ".join(f"{type(error).__name__}: {error}".split())
            raise ConfigError(
                f"config.imports: {name!r} cannot be imported ({words}); its folder must be in PYTHONPATH"
            ) from None


def _is_in_a_run(spec: importlib.machinery.ModuleSpec) -> bool:
    """Whether a module lies in the folder of a run, itself or as a package."""
    places = [pathlib.Path(place) for place in (spec.origin, *(spec.submodule_search_locations or ())) if place]
    return any((folder / "checkpoints").is_dir() for place in places for folder in place.parents)


def to_mapping(config: Config) -> dict:
    """Return the config as nested dictionaries of plain values."""
    values = dataclasses.asdict(config)
    imports = {"imports": list(values.pop("imports"))}
    return (imports if imports["imports"] else {}) | values


class _Group:
    """A group of settings: its path, such as "config.model", and the record that holds it."""

    def __init__(self, path: str, record: type, name: str | None = None):
        self.path, self.section, self.name = path, path.removeprefix("config."), name
        if self.section in NAMED:  # the record is that of the model or optimizer that is named
            default, known = NAMED[self.section]
            self.name = default if name is None else name
            if said := error_message(str, self.name, one_of(known)):
                raise ConfigError(f"{path}.name: {said}")
            record = _record(self.section, self.name)
        self.record, self.fields = record, {field.name: field for field in dataclasses.fields(record)}
        self.hints = typing.get_type_hints(record)

    def check_has(self, name: str):
        """Check that there is a setting of a name.

        Raises:
          ConfigError: there is none.
        """
        if name in self.fields:
            return
        others = [other for other in NAMED.get(self.section, ("", ()))[1] if name in _names(self.section, other)]
        if others:
            having = " or ".join(map(repr, others))
            raise ConfigError(
                f"{self.path}.{name}: means nothing for {self.path}.name = {self.name!r}; only {having} has it"
            )
        known = ", ".join(self.fields)
        raise ConfigError(f"{self.path}.{name}: unknown setting{nearest(name, self.fields)}; {self.path} has {known}")

    def inside(self, name: str, value) -> "_Group | None":
        """The group of a name inside of this one, for these values; None for a setting."""
        hint = self.hints[name]
        if not dataclasses.is_dataclass(hint):
            return None
        return _Group(f"{self.path}.{name}", hint, value.get("name") if isinstance(value, Mapping) else None)

    def constraint(self, name: str) -> Constraint | None:
        """The constraint on a setting."""
        key = f"{self.path}.{name}".removeprefix("config.")
        return self.fields[name].metadata.get("constraint") or _CONSTRAINTS.get(key)


def _record(section: str, name: str) -> type:
    """The record of the settings of a model or optimizer."""
    record = NAMED[section][1][name]
    return record.settings if section == "model" else record


def _names(section: str, name: str) -> list[str]:
    """The names of the settings of a model or optimizer."""
    return [field.name for field in dataclasses.fields(_record(section, name))]


def without_others(section: str, values: Mapping) -> dict:
    """Return those of the settings that the model or optimizer named among them has: for another one than before."""
    name = values.get("name")
    known = NAMED[section][1]
    return dict(values) if name not in known else {key: values[key] for key in values if key in _names(section, name)}


def parse(key: str, text: str, values: Mapping):
    """Return the value of setting `key` (such as "model.width") written as text, in the type of the setting.

    Args:
      key: of the setting.
      text: its value.
      values: settings as nested mappings, whose names of model and optimizer decide what settings there are.

    Raises:
      ConfigError: an unknown setting, or text that is not of its type.
    """
    *sections, name = key.split(".")
    group = _group(sections, values, name)
    group.check_has(name)
    if hasattr(group.hints[name], "named"):  # one text alone stands for all of the group
        return text
    if (inside := group.inside(name, {})) is not None:
        names = ", ".join(f"--config.{key}.{each}" for each in inside.fields)
        raise ConfigError(f"config.{key} is a group of settings: give one of {names}")
    return _from_text(group, name, text)


def record(sections: Sequence[str], values: Mapping) -> type:
    """Return the record of a group of settings, such as that of ["model", "mechanism"], for these values."""
    return _group(sections, values).record


def _group(sections: Sequence[str], values: Mapping, name: str = "") -> _Group:
    group = _Group("config", Config)
    for section in sections:
        group.check_has(section)
        values = values.get(section, {}) if isinstance(values, Mapping) else {}
        inside = group.inside(section, values)
        if inside is None:
            raise ConfigError(f"{group.path}.{section} is a setting: it has no {name!r} inside")
        group = inside
    return group


def _from_text(group: _Group, name: str, text: str):
    hint = group.hints[name]
    (kind, *_), optional = types_of(hint)
    if optional and text.lower() == "none":
        return None
    try:
        if kind is bool:
            return {"true": True, "false": False, "1": True, "0": False}[text.lower()]
        return kind(text.replace("_", "")) if kind in (int, float) else text
    except (ValueError, KeyError):
        allowed = description(hint, group.constraint(name))
        raise ConfigError(f"{group.path}.{name}: got {text!r}, must be {allowed}") from None


def _build(group: _Group, values):
    """The record of a group, with these values."""
    if isinstance(values, str) and hasattr(group.record, "named"):
        if said := error_message(str, values, group.constraint(next(iter(group.fields)))):
            raise ConfigError(f"{group.path}: {said}")
        return group.record.named(values)
    if not isinstance(values, Mapping):
        raise ConfigError(f"{group.path}: got {values!r}, must be a group of settings")
    settings = {} if group.name is None else {"name": group.name}
    for name, value in values.items():
        group.check_has(str(name))
        inside = group.inside(name, value)
        settings[name] = _checked(group, name, value) if inside is None else _build(inside, value)
    return group.record(**settings)


def _checked(group: _Group, name: str, value):
    if name == "imports":
        return tuple(value)  # checked before anything else
    value, hint = os.fspath(value) if isinstance(value, os.PathLike) else value, group.hints[name]
    if said := error_message(hint, value, group.constraint(name)):
        raise ConfigError(f"{group.path}.{name}: {said}")
    (kind, *_), _ = types_of(hint)
    return value if value is None else kind(value)


def _check_together(config: Config):
    task = config.task
    if task.min_length > task.max_length:
        raise ConfigError(
            f"config.task.min_length: got {task.min_length}, must be at most config.task.max_length = {task.max_length}"
        )
    _check_heads(config.model)
    _check_data(config)
    if config.data.source != "pairs":
        check_fits(config, Generated(task))


def _check_heads(model: ModelSettings):
    """The heads must divide the width, unless they have one of their own."""
    num_heads = getattr(model, "num_heads", None)
    if num_heads and model.head_width is None and model.width % num_heads:
        divisors = [str(n) for n in range(1, model.width + 1) if model.width % n == 0]
        raise ConfigError(
            f"config.model.num_heads: got {num_heads}, must divide config.model.width = {model.width} "
            f"({', '.join(divisors)}) unless config.model.head_width is given"
        )


def _check_data(config: Config):
    """Settings that mean nothing for the source of the data, or for the model, must be left alone."""
    if config.training.replaced_tokens and not MODELS[config.model.name].reads_answer:
        raise ConfigError(
            f"config.training.replaced_tokens: got {config.training.replaced_tokens}, means nothing for "
            f"config.model.name = {config.model.name!r}, which does not read the answer"
        )
    if config.data.source != "pairs" and config.task.rule.continues:
        _check_text(config)
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
    for field in dataclasses.fields(Task):
        given = getattr(config.task, field.name)
        if data.source == "pairs" and given != field.default:
            raise ConfigError(
                f"config.task.{field.name}: got {given!r}, means nothing for config.data.source = 'pairs'"
            )


def _check_text(config: Config):
    """A text without a source is for a model that reads source and answer as one, each token after those before it."""
    without, model = f"the strings of {config.task.name!r} have no source", config.model
    if not MODELS[model.name].one_text:
        having = " or ".join(repr(name) for name, each in MODELS.items() if each.one_text)
        raise ConfigError(f"config.model.name: got {model.name!r}, but {without}; only {having} learns them")
    if getattr(model, "prefix", "causal") != "causal":
        raise ConfigError(
            f"config.model.prefix: got {model.prefix!r}, but {without}, which would be the prefix; must be 'causal'"
        )


def longest_input(model: ModelSettings, capacity: Callable[[int], int]) -> int | None:
    """Return how many tokens of a source the model can tell apart, answer included; None for any number.

    Args:
      model: its settings.
      capacity: how many tokens the answer to so many may have.
    """
    kind = MODELS[model.name]
    most = kind.max_positions(model)
    return most and max(n for n in range(most) if kind.num_positions(n + 1, capacity(n)) <= most)


def check_fits(config: Config, data: Generated | Stored):
    """Check that the model can encode the longest source and its answer, and that training has its data.

    Raises:
      ConfigError: it cannot, or has not.
    """
    kind, longest = MODELS[config.model.name], data.longest_source
    most, capacity = kind.max_positions(config.model), data.vocabulary.capacity(longest - 1)
    needed = kind.num_positions(longest, capacity)
    if most is not None and most < needed:
        raise ConfigError(
            f"config.model.mechanism: tells {most} positions apart, must tell {needed} apart for {data.name} with "
            f"sources of {longest - 1} tokens"
        )
    many = config.training.stop_when_exact
    if many and isinstance(data, Generated):
        longest = data.task.max_length
        if not data.has_validation(longest):
            raise ConfigError(
                f"config.training.stop_when_exact: got {many}, must be 0 for {data.name} with strings of up to "
                f"{longest} symbols: too few of them are held out for a validation part"
            )


def check_runs(config: Config, data: Generated | Stored):
    """Check that the model runs on the longest source and its answer.

    Raises:
      ConfigError: a mechanism refuses its settings, or reads the length of the answer where that is not known.
    """
    try:
        run_shapes(config, data, data.vocabulary.answer_length(data.longest_source - 1))
    except (LengthUnknown, ValueError, TypeError, NotImplementedError) as error:
        where = f" for {data.name}" if isinstance(error, LengthUnknown) else ""
        raise ConfigError(f"config.model: {' '.join(str(error).split())}{where}") from None


def run_shapes(config: Config, data: Generated | Stored, answer_length: int | None):
    """Run the model on the longest source and its answer, for shapes alone; the length of the answer may be unknown.

    This starts JAX's backend, so several hosts must have been joined before.
    """
    source, vocabulary = data.longest_source, data.vocabulary

    def run():
        model = MODELS[config.model.name](vocabulary.size, config.model, nnx.Rngs(0))
        tokens = (jnp.ones(length, int) for length in (source, vocabulary.capacity(source - 1)))
        return model(*tokens, answer_length=answer_length)

    nnx.eval_shape(run)
