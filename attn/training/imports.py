"""The modules of a user that a run names: they register mechanisms, models, tasks or implementations."""

import importlib
import importlib.machinery
import importlib.util
import pathlib
import sys
import traceback
from collections.abc import Iterable

from attn.training.groups import ConfigError


def import_modules(names, run: pathlib.Path | None = None):
    """Import the modules that register what a config names, from Python's path or the current folder.

    A module in the folder of a run is never executed, since the run may come from another person; nor is one that the
    named modules import in turn, so the current folder is left out if it is that of a run.

    Raises:
      ConfigError: a module that cannot be imported, or that lies in the folder of a run.
    """
    is_list = isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names)
    parts = [part for name in names for part in name.split(".")] if is_list else []
    if not is_list or not all(part.isidentifier() for part in parts) or any(name.endswith(".py") for name in names):
        raise ConfigError(f"config.imports: got {names!r}, must be names of modules without .py, as ['my_mechanism']")
    current = pathlib.Path.cwd()
    if names and str(current) not in sys.path and not _are_in_a_run([current], run):
        sys.path.append(str(current))
    for name in names:
        try:
            spec = importlib.util.find_spec(name.partition(".")[0])
            if spec is not None and _are_in_a_run(_paths(spec), run):
                raise ConfigError(
                    f"config.imports: {name!r} is found in the folder of a run ({spec.origin}), from which no code is "
                    "executed: run the command from another folder"
                )
            if spec is not None and (beside := current / f"{name}.py").exists() and str(beside) != str(spec.origin):
                raise ConfigError(
                    f"config.imports: {name!r} is another module, {spec.origin}, not {beside}: rename that file"
                )
            importlib.import_module(name)
        except ConfigError:
            raise
        except (Exception, SystemExit) as error:  # the user's module may raise anything
            message = " ".join(f"{type(error).__name__}: {error}".split())
            is_missing = isinstance(error, ModuleNotFoundError) and error.name in (name, name.partition(".")[0])
            advice = "; its folder must be in PYTHONPATH" if is_missing else line_of(error, name)
            raise ConfigError(f"config.imports: {name!r} cannot be imported ({message}){advice}") from None


def line_of(error: BaseException, name: str) -> str:
    """Return ", line N of FILE" for the place in a user's module at which an error was raised, if there is one."""

    def is_of_module(path: pathlib.Path) -> bool:
        return name.split(".")[-1] in (path.stem, path.parent.name)

    places = [each for each in traceback.extract_tb(error.__traceback__) if is_of_module(pathlib.Path(each.filename))]
    return f", line {places[-1].lineno} of {places[-1].filename}" if places else ""


def _paths(spec: importlib.machinery.ModuleSpec) -> list[pathlib.Path]:
    """Return the file of a module, or the file and the folders of a package."""
    return [pathlib.Path(path) for path in (spec.origin, *(spec.submodule_search_locations or ())) if path]


def _are_in_a_run(paths: Iterable[pathlib.Path], run: pathlib.Path | None) -> bool:
    """Return whether any of these paths is, or lies in, the folder of a run."""
    folders = {folder for path in paths for folder in (path.resolve(), *path.resolve().parents)}
    return (run is not None and run.resolve() in folders) or any((each / "checkpoints").is_dir() for each in folders)
