"""The folder of a run. Its JSON files are written so that a reader never sees half of one.

config.json      the resolved config
data.json        the data of the run, with a digest of every part that was read
vocabulary.json  the tokens of a file of pairs
metrics.jsonl    one row per call of the training program; TensorBoard's event file has the same rows
checkpoints/     one folder per step
snapshots/       the parameters at some steps, one file per step
lock.json        the process that trains the run now
summary.json     the results, once the run is finished
attention.png    attention maps, once the run is finished
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import time
from collections.abc import Iterator
from types import UnionType

from attn.tasks.generated import Generated
from attn.tasks.stored import Stored
from attn.tasks.vocabulary import Pieces, Vocabulary
from attn.training import checkpoints, locks
from attn.training.config import Config, ConfigError, from_mapping, to_mapping

RUNS = pathlib.Path("runs")  # default parent of the folders of runs


class RunError(RuntimeError):
    """A folder of a run that cannot be used; the message is one line for the user."""


class Folder:
    """A run's folder, which may not exist yet.

    Args:
      path: of the folder.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = pathlib.Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.snapshots = self.path / "snapshots"
        self.metrics = self.path / "metrics.jsonl"
        self.picture = self.path / "attention.png"
        self._summary = self.path / "summary.json"

    def is_run(self) -> bool:
        """Return whether a run was started here."""
        return (self.path / "config.json").is_file()

    def check_new(self):
        """Check that a new run may be written here.

        Raises:
          RunError: the path is a file or leads through one, or holds a run already.
        """
        if not self.path.name:
            raise RunError(f"--workdir={self.path}: must name the run's folder")
        if file := file_in_the_way(self.path):
            raise RunError(f"--workdir={self.path}: {file} is a file, must be a folder")
        if self.is_run():
            raise RunError(f"--workdir={self.path}: holds a run already; give --resume or choose another folder")
        for path in (self.checkpoints, self.snapshots, self.metrics, self._summary):
            if path.exists():
                raise RunError(
                    f"--workdir={self.path}: holds the {path.name} of a run, but no config.json; restore config.json "
                    "and give --resume, or choose another folder"
                )

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Hold the run's lock while the block runs, after removing files that a killed process left half-written.

        Raises:
          attn.training.locks.LockError: another process holds it, or may hold it.
        """
        with locks.held(self.path):
            checkpoints.sweep(self.checkpoints)
            for folder in (self.path, self.snapshots):
                for partial in folder.glob(".*.partial"):
                    partial.unlink()
            yield

    def create(self, config: Config, data: Generated | Stored):
        """Make the folder for a new run.

        Raises:
          RunError: as in `check_new`, or the folder cannot be written.
        """
        self.check_new()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._write("data.json", {"name": data.name, "origins": _origins(data), "about": data.describe()})
            if isinstance(data.vocabulary, Pieces):
                self._write("vocabulary.json", dataclasses.asdict(data.vocabulary))
            self._write("config.json", to_mapping(config))  # last, since a folder with it counts as a run
        except OSError as error:
            raise RunError(f"--workdir={self.path}: cannot be written ({error.strerror})") from None

    def settings(self) -> dict:
        """Return the content of config.json.

        Raises:
          RunError: the folder does not exist or is not a run's, or the file is damaged.
        """
        if not self.path.is_dir():
            problem = "is a file" if self.path.exists() else "does not exist"
            raise RunError(f"{self.path}: {problem}, must be the folder of a run")
        if not self.is_run():
            raise RunError(f"{self.path}: not a run's folder (it has no config.json)")
        return self._read("config.json")

    def config(self) -> Config:
        """Return the run's config.

        Raises:
          RunError: as in `settings`, or the config is not valid, such as that of another version.
        """
        try:
            return from_mapping(self.settings(), run=self.path)
        except ConfigError as error:
            raise RunError(f"{self.path / 'config.json'}: {error}") from None

    def data(self) -> dict:
        """Return the content of data.json: `name`; `origins`, paths and digests by part; `about`, lines of description.

        Raises:
          RunError: the file is missing or damaged.
        """
        values = self._read("data.json", name=str, origins=dict, about=list)
        parts = values["origins"].values()
        if not all(isinstance(part, dict) and {"path", "digest"} <= part.keys() for part in parts):
            raise RunError(f"{self.path / 'data.json'}: cannot be read ('origins' is missing or invalid)")
        return values

    def vocabulary(self, config: Config) -> Vocabulary:
        """Return the vocabulary of the run, which converts between text and tokens.

        Raises:
          RunError: vocabulary.json is needed, but missing or damaged.
        """
        if config.data.source != "pairs":
            return config.task.vocabulary
        values = self._read("vocabulary.json")
        try:
            lengths = tuple((int(source), int(target)) for source, target in values["longest_targets"])
            return Pieces(**(values | {"pieces": tuple(values["pieces"]), "longest_targets": lengths}))
        except (TypeError, KeyError, ValueError) as error:
            raise RunError(f"{self.path / 'vocabulary.json'}: not a vocabulary ({error})") from None

    def check_data(self, data: Generated | Stored):
        """Check that the data are those that the run began with.

        They may have been moved: digests are compared, not paths.

        Raises:
          RunError: a part has changed, so that the run would continue with other examples.
        """
        before, now = self.data()["origins"], _origins(data)
        for part in sorted(before | now):
            if part not in now:
                raise RunError(f"{self.path}: began with a separate {part} part, {before[part]['path']}; give it again")
            if before.get(part, {}).get("digest") != now[part]["digest"]:
                path = now[part]["path"]
                began = f"what {self.path} began with as {part} part"
                raise RunError(f"{path}: differs from {began} (by its SHA-256); start another run for it")

    def update_config(self, config: Config):
        """Write the config of a run that resumes with other settings."""
        self._write("config.json", to_mapping(config))

    def newest_step(self) -> int | None:
        """Return the step of the newest checkpoint, without verifying it; None if there is none."""
        return checkpoints.newest_step(self.checkpoints)

    def summary(self) -> dict | None:
        """Return the summary, if the run is finished.

        Raises:
          RunError: the file is damaged.
        """
        if not self._summary.exists():
            return None
        types = {"steps": int, "examples_evaluated": int, "lengths_evaluated": list, "seconds": dict, "samples": list}
        metrics = dict.fromkeys(("exact_match", "token_accuracy", "error_rate"), float)
        summary = self._read("summary.json", **types, **metrics, beam=dict | None)
        valid = {
            "lengths_evaluated": _are(summary["lengths_evaluated"], int),
            "seconds": _has(summary["seconds"], float, "import", "compile", "train", "evaluate", "total"),
            "samples": _are(summary["samples"], dict) and all(map(_is_sample, summary["samples"])),
            "beam": summary["beam"] is None or _has(summary["beam"], float, "width", *metrics),
        }
        for name, is_valid in valid.items():
            if not is_valid:
                raise RunError(f"{self._summary}: cannot be read ({name!r} is missing or invalid)")
        return summary

    def write_summary(self, summary: dict):
        """Write summary.json, which marks the run as finished."""
        self._write("summary.json", summary)

    def _read(self, name: str, /, **required: type | UnionType) -> dict:
        """Return the content of a JSON file, which must have at least values of these names and types."""
        try:
            values = json.loads((self.path / name).read_text())
        except (ValueError, OSError, RecursionError) as error:
            raise RunError(f"{self.path / name}: cannot be read ({error})") from None
        for key, type_ in required.items():
            if not isinstance(values, dict) or not isinstance(values.get(key), type_):
                raise RunError(f"{self.path / name}: cannot be read ({key!r} is missing or invalid)")
        return values

    def _write(self, name: str, values: dict):
        write_whole(self.path / name, json.dumps(values, indent=2) + "\n")


def _are(values: list, type_: type) -> bool:
    """Return whether the list is not empty and all its values are of a type."""
    return len(values) > 0 and all(isinstance(value, type_) for value in values)


def _has(values: dict, type_: type, *names: str) -> bool:
    """Return whether there are values of these names, all of a type; for float, ints are allowed too."""
    allowed = (int, float) if type_ is float else type_
    return all(isinstance(values.get(name), allowed) for name in names)


def _is_sample(sample: dict) -> bool:
    """Return whether the entry is a sample of a summary, as `attn.experiment` writes it."""
    texts = sample.get("accepted")
    return _has(sample, str, "input", "answer") and isinstance(texts, list) and _are(texts, str) and "right" in sample


def write_whole(path: pathlib.Path, content: str | bytes):
    """Write a file so that a reader never sees half of it."""
    partial = path.with_name(f".{path.name}.partial")
    if isinstance(content, bytes):
        partial.write_bytes(content)
    else:
        partial.write_text(content)
    partial.replace(path)


def file_in_the_way(path: pathlib.Path) -> pathlib.Path | None:
    """Return the file, at the path or above it, that keeps the path from being a folder; None if there is none."""
    return next((part for part in (path, *path.parents) if part.exists() and not part.is_dir()), None)


def _origins(data: Generated | Stored) -> dict[str, dict[str, str]]:
    return {part: origin._asdict() for part, origin in data.origins.items()} if isinstance(data, Stored) else {}


def new_folder(name: str) -> Folder:
    """Return a folder under `RUNS` that does not exist yet, named after the config and the time."""
    stem = RUNS / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    count = 1
    path = stem
    while path.exists():
        count += 1
        path = stem.with_name(f"{stem.name}-{count}")
    return Folder(path)


def newest_folder() -> Folder:
    """Return the folder of the run under `RUNS` that was started or resumed last.

    Raises:
      RunError: there is no run.
    """
    runs = [Folder(path) for path in RUNS.glob("*") if Folder(path).is_run()]
    if not runs:
        raise RunError(f"--resume: there is no run under {RUNS}/; give the folder of a run with --workdir")
    return max(runs, key=lambda folder: (folder.path / "config.json").stat().st_mtime)
