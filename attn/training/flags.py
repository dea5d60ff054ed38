"""Makes a config from the command line: a file that defines `get_config`, and `--config.section.name=value`."""

import dataclasses
import pathlib
import sys

from ml_collections import ConfigDict

from attn.settings import nearest
from attn.training.config import NAMED, Config, ConfigError, from_mapping, parse, record, without_others


def split_overrides(argv: list[str]) -> tuple[list[str], dict[str, str]]:
    """Separate the overrides `--config.key=value` (or `--config.key value`) from the rest of a command line.

    Returns:
      (the rest, the overrides as {key: text}).

    Raises:
      ConfigError: an override without a value.
    """
    rest, overrides = [], {}
    arguments = iter(argv)
    for argument in arguments:
        if not argument.startswith(("--config.", "-config.")):
            rest.append(argument)
            continue
        key, equals, text = argument.lstrip("-").removeprefix("config.").partition("=")
        if not equals:
            text = next(arguments, None)
            if text is None or text.startswith("--"):
                raise ConfigError(f"--config.{key} needs a value: --config.{key}=VALUE")
        overrides[key] = text
    return rest, overrides


def load_config(path: str, overrides: dict[str, str] | None = None) -> Config:
    """Run a config file and apply overrides.

    Raises:
      ConfigError: the file is missing or a folder, cannot be read or run, or has no `get_config`; or its config with
        the overrides is not valid.
    """
    settings = run_file(pathlib.Path(path), "get_config")
    if not isinstance(settings, (ConfigDict, dict)):
        raise ConfigError(f"--config={path}: get_config() returned {settings!r}, must be a ml_collections.ConfigDict")
    return override(ConfigDict(settings).to_dict(), overrides or {})


def override(settings: dict, overrides: dict[str, str]) -> Config:
    """Return the config of these settings after parsing and applying overrides, `{key: text}`.

    If they choose another model or optimizer, it keeps the settings that both have.

    Raises:
      ConfigError: as in `load_config`.
    """
    overrides = dict(overrides)
    if "imports" in overrides:
        imports = [name.strip() for name in overrides.pop("imports").split(",")]
        settings["imports"] = list(dict.fromkeys([*settings.get("imports", ()), *imports]))
    from_mapping(settings)  # reports an error of the file before one of the overrides
    # Names first, since they decide which settings exist; then a group before the settings in it.
    order = sorted(overrides.items(), key=lambda pair: (not pair[0].endswith(".name"), pair[0].count(".")))
    for key, text in order:
        value = parse(key, text, settings)
        *sections, name = key.split(".")
        group = settings
        for depth, section in enumerate(sections):
            if isinstance(group.get(section), str):  # one text stands for the whole group
                group[section] = dataclasses.asdict(record(sections[: depth + 1], settings).named(group[section]))
            group = group.setdefault(section, {})
        group[name] = value
        if name == "name" and sections[0] in NAMED:
            settings[sections[0]] = without_others(sections[0], group)
    return from_mapping(settings)


def run_file(path: pathlib.Path, name: str):
    """Run a config file and call its function of this name.

    Raises:
      ConfigError: the file is missing or a folder, cannot be read or run, or does not define the function.
    """
    if path.is_dir():
        raise ConfigError(f"--config={path}: is a folder, must be a Python file with {name}()")
    if not path.exists():
        others = path.parent.glob("*.py") if path.parent.is_dir() else ()
        raise ConfigError(f"--config={path}: does not exist{nearest(str(path), map(str, others))}")
    namespace = {"__name__": path.stem, "__file__": str(path)}
    sys.path.insert(0, str(path.resolve().parent.parent))  # a config may import a sibling: `from configs import ...`
    try:
        exec(compile(path.read_bytes(), str(path), "exec"), namespace)
        if not callable(namespace.get(name)):
            raise ConfigError(f"--config={path}: has no function {name}()")
        return namespace[name]()
    except ConfigError:
        raise
    except SyntaxError as error:
        raise ConfigError(f"--config={path}: line {error.lineno}: {error.msg}") from None
    except (Exception, SystemExit) as error:  # the user's file may raise anything
        message = " ".join(str(error).split())
        raise ConfigError(f"--config={path}: {type(error).__name__}: {message}") from None
    finally:
        sys.path.pop(0)
