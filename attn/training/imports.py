"""The modules of a user that a run names: they register mechanisms, models, tasks or implementations."""

import importlib
import importlib.machinery
import importlib.util
import pathlib
import sys
import traceback

from attn.training.groups import ConfigError


def import_modules(names, run: pathlib.Path | None = None):
    """Import the modules that register what a config names, from Python's path or the current folder.

    A module in the folder of a run is never executed, since the run may come from another person.

    Raises:
      ConfigError: a module that cannot be imported, or that lies in the folder of a run.
    """
    is_list = isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names)
    if not is_list or not all(part.isidentifier() for name in names for part in name.split(".")):
        raise ConfigError(f"config.imports: got {names!r}, must be names of modules, such as ['my_mechanism']")
    if names and str(pathlib.Path.cwd()) not in sys.path:
        sys.path.append(str(pathlib.Path.cwd()))
    for name in names:
        try:
            spec = importlib.util.find_spec(name.partition(".")[0])
            if spec is not None and _is_in_a_run(spec, run):
                raise ConfigError(
                    f"config.imports: {name!r} is found in the folder of a run ({spec.origin}), from which no code is "
                    "executed: run the command from another folder"
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


def _is_in_a_run(spec: importlib.machinery.ModuleSpec, run: pathlib.Path | None) -> bool:
    """Return whether the file or the package of a module lies in the folder of a run."""
    paths = [pathlib.Path(path).resolve() for path in (spec.origin, *(spec.submodule_search_locations or ())) if path]
    folders = {folder for path in paths for folder in path.parents}
    return (run is not None and run.resolve() in folders) or any((each / "checkpoints").is_dir() for each in folders)
