"""Builds and checks a config from nested mappings. An error is one line: key, given value, allowed values."""

import collections
import dataclasses
import os
import pathlib
import typing
from collections.abc import Mapping, Sequence

from attn import tasks
from attn.nn.block import BlockSettings
from attn.nn.model import ModelSettings
from attn.nn.models import MODELS
from attn.settings import PATH, Constraint, description, error_message, nearest, one_of, types_of
from attn.tasks import pairs
from attn.tasks.generated import Generated
from attn.tasks.rules import RULES as TASKS
from attn.tasks.sequences import Task
from attn.training.checks import check_fits
from attn.training.groups import OPTIMIZERS, Config, ConfigError, Data
from attn.training.imports import import_modules

# Constraints on the settings of tasks and data, whose records declare none.
_CONSTRAINTS = {
    "task.name": one_of(TASKS),
    **{f"task.{name}": each for name, each in tasks.CONSTRAINTS.items()},
    "data.source": one_of(collections.ChainMap({"pairs": None}, tasks.SOURCES)),
    "data.folder": PATH,
    **{f"data.{name}": each for name, each in pairs.CONSTRAINTS.items()},
}
# Groups whose `name` decides which record holds their settings: the default name, and what the names stand for.
NAMED = {"model": ("transformer", MODELS), "optimizer": ("adamw", OPTIMIZERS)}
# Sizes of models that the axis `model` of the mesh divides.
_DIVIDED = ("num_heads", "num_decoder_heads", "num_groups", "feed_forward_width", "decoder_feed_forward_width")


def from_mapping(values: Mapping, *, run: pathlib.Path | None = None) -> Config:
    """Build and validate a config from nested mappings; settings that they leave out keep their defaults.

    Raises:
      ConfigError: an unknown key, a value of the wrong type or out of range, or settings that do not go together.
    """
    if isinstance(values, Mapping) and "imports" in values:
        import_modules(values["imports"], run)
    config = _build(_Group("config", Config), values)
    _check_together(config)
    return config


def to_mapping(config: Config) -> dict:
    """Return the config as nested dictionaries of plain values."""
    values = dataclasses.asdict(config)
    imports = {"imports": list(values.pop("imports"))}
    return (imports if imports["imports"] else {}) | values


class _Group:
    """A group of settings: its path, such as "config.model", and the record that holds it."""

    def __init__(self, path: str, record: type, name: str | None = None):
        self.path, self.section, self.name = path, path.removeprefix("config."), name
        if self.section in NAMED:  # the model or optimizer of this name has its own record of settings
            default, known = NAMED[self.section]
            self.name = default if name is None else name
            if message := error_message(str, self.name, one_of(known)):
                raise ConfigError(f"{path}.name: {message}")
            record = _record(self.section, self.name)
        self.record, self.fields = record, {field.name: field for field in dataclasses.fields(record)}
        self.hints = typing.get_type_hints(record)

    def check_has(self, name: str):
        """Check that the group has a setting of this name.

        Raises:
          ConfigError: it has not.
        """
        if name in self.fields:
            return
        known = NAMED.get(self.section, ("", ()))[1]
        others = [other for other in known if name in _setting_names(self.section, other)]
        if others:
            having = " or ".join(map(repr, others))
            raise ConfigError(
                f"{self.path}.{name}: means nothing for {self.path}.name = {self.name!r}; only {having} has it"
            )
        names = ", ".join(self.fields)
        raise ConfigError(f"{self.path}.{name}: unknown setting{nearest(name, self.fields)}; {self.path} has {names}")

    def subgroup(self, name: str, value) -> "_Group | None":
        """Return the group `name` of this group, for the values `value`; None if `name` is a setting."""
        hint = self.hints[name]
        if not dataclasses.is_dataclass(hint):
            return None
        return _Group(f"{self.path}.{name}", hint, value.get("name") if isinstance(value, Mapping) else None)

    def constraint(self, name: str) -> Constraint | None:
        """Return the constraint on a setting, if there is one."""
        key = f"{self.path}.{name}".removeprefix("config.")
        return self.fields[name].metadata.get("constraint") or _CONSTRAINTS.get(key)


def _record(section: str, name: str) -> type:
    """Return the record of the settings of a model or optimizer."""
    record = NAMED[section][1][name]
    return record.settings if section == "model" else record


def _setting_names(section: str, name: str) -> list[str]:
    """Return the names of the settings of a model or optimizer."""
    return [field.name for field in dataclasses.fields(_record(section, name))]


def without_others(section: str, values: Mapping) -> dict:
    """Return the settings without those that the model or optimizer `values["name"]`, which has changed, does not have.

    An unknown name keeps all of them.
    """
    name = values.get("name")
    if name not in NAMED[section][1]:
        return dict(values)
    names = _setting_names(section, name)
    return {key: value for key, value in values.items() if key in names}


def parse(key: str, text: str, values: Mapping):
    """Parse the text of a setting into the setting's type.

    Args:
      key: of the setting, such as "model.width".
      text: its value.
      values: settings as nested mappings; their names of model and optimizer decide which settings exist.

    Raises:
      ConfigError: an unknown setting, or text that is not of its type.
    """
    *sections, name = key.split(".")
    group = _group(sections, values, name)
    group.check_has(name)
    if hasattr(group.hints[name], "named"):  # one text stands for the whole group, such as "rotary + softcap(20)"
        return text
    if (subgroup := group.subgroup(name, {})) is not None:
        names = ", ".join(f"--config.{key}.{each}" for each in subgroup.fields)
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
        subgroup = group.subgroup(section, values)
        if subgroup is None:
            raise ConfigError(f"{group.path}.{section} is a setting, not a group: it has no {name!r}")
        group = subgroup
    return group


def _from_text(group: _Group, name: str, text: str):
    hint = group.hints[name]
    (type_, *_), optional = types_of(hint)
    if optional and text.lower() == "none":
        return None
    try:
        if type_ is bool:
            return {"true": True, "false": False, "1": True, "0": False}[text.lower()]
        return type_(text.replace("_", "")) if type_ in (int, float) else text
    except (ValueError, KeyError):
        allowed = description(hint, group.constraint(name))
        raise ConfigError(f"{group.path}.{name}: got {text!r}, must be {allowed}") from None


def _build(group: _Group, values):
    """Return the record of a group, with these values."""
    if isinstance(values, str) and hasattr(group.record, "named"):  # one text stands for the whole group
        if message := error_message(str, values, group.constraint(next(iter(group.fields)))):
            raise ConfigError(f"{group.path}: {message}")
        return group.record.named(values)
    if not isinstance(values, Mapping):
        raise ConfigError(f"{group.path}: got {values!r}, must be a group of settings")
    settings = {} if group.name is None else {"name": group.name}
    for name, value in values.items():
        group.check_has(str(name))
        subgroup = group.subgroup(name, value)
        settings[name] = _checked(group, name, value) if subgroup is None else _build(subgroup, value)
    return group.record(**settings)


def _checked(group: _Group, name: str, value):
    if name == "imports":
        return tuple(value)  # `from_mapping` has checked it already
    value, hint = os.fspath(value) if isinstance(value, os.PathLike) else value, group.hints[name]
    if message := error_message(hint, value, group.constraint(name)):
        raise ConfigError(f"{group.path}.{name}: {message}")
    (type_, *_), _ = types_of(hint)
    return value if value is None else type_(value)


def _check_together(config: Config):
    """Check settings that depend on each other."""
    task = config.task
    if task.min_length > task.max_length:
        raise ConfigError(
            f"config.task.min_length: got {task.min_length}, must be at most config.task.max_length = {task.max_length}"
        )
    _check_divisors(config.model)
    _check_mesh(config)
    _check_data(config)
    if config.data.source != "pairs":
        check_fits(config, Generated(task))


def _check_divisors(model: ModelSettings):
    """Check that heads divide the width unless `head_width` is given, groups the heads, distinct layers the layers."""
    pairs = [
        ("num_groups", "num_heads", ""),
        ("num_groups", "num_decoder_heads", ""),
        ("distinct_layers", "num_layers", ""),
    ]
    if isinstance(model, BlockSettings) and model.head_width is None:
        unless = " unless config.model.head_width is given"
        pairs += [("num_heads", "width", unless), ("num_decoder_heads", "width", unless)]
    for name, of, unless in pairs:
        given, whole = getattr(model, name, None), getattr(model, of, None)
        if given is not None and whole is not None and whole % given:
            raise ConfigError(
                f"config.model.{name}: got {given}, must divide config.model.{of} = {whole} "
                f"({_divisors(whole)}){unless}"
            )


def _check_mesh(config: Config):
    """Check that the mesh divides the heads and the feed-forward layers evenly, in a model that has them."""
    for name, given in dataclasses.asdict(config.mesh).items():
        if given > 1 and not isinstance(config.model, BlockSettings):
            raise ConfigError(
                f"config.mesh.{name}: got {given}, must be 1 for config.model.name = {config.model.name!r}, "
                "which is not made of blocks of attention"
            )
    for name in _DIVIDED:
        whole = getattr(config.model, name, None)
        if whole is not None and whole % config.mesh.model:
            raise ConfigError(
                f"config.mesh.model: got {config.mesh.model}, must divide config.model.{name} = {whole} "
                f"({_divisors(whole)})"
            )


def _divisors(whole: int) -> str:
    return ", ".join(str(n) for n in range(1, whole + 1) if whole % n == 0)


def _check_data(config: Config):
    """Check that settings without meaning for the source of the data, or for the model, are at their defaults."""
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
        value = getattr(data, name)
        if value != getattr(default, name) and data.source != reader:
            hint = " (or --config=configs/pairs.py)" if reader == "pairs" else ""
            raise ConfigError(
                f"config.data.{name}: got {value!r}, but config.data.source is {data.source!r}; "
                f"only {reader!r} reads it: --config.data.source={reader}{hint}"
            )
    for field in dataclasses.fields(Task):
        value = getattr(config.task, field.name)
        if data.source == "pairs" and value != field.default:
            raise ConfigError(
                f"config.task.{field.name}: got {value!r}, means nothing for config.data.source = 'pairs'"
            )


def _check_text(config: Config):
    """Check that the model learns strings without a source."""
    name = config.model.name
    if (reason := MODELS[name].text_refusal(config.model)) is not None:
        suited = [repr(other) for other, each in MODELS.items() if each.text_refusal(each.settings(other)) is None]
        raise ConfigError(
            f"config.model.name: got {name!r}, but the strings of {config.task.name!r} have no source: {reason}; "
            f"{' or '.join(suited)} with default settings learns them"
        )
