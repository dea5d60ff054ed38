"""The folder of a run: what lies where, written so that a reader never sees half a file.

config.json      the resolved config
data.json        what was learnt from, with a digest of all that was read
vocabulary.json  the tokens of a file of pairs
metrics.jsonl    one row per dispatch; TensorBoard's event file beside it holds the same
checkpoints/     one folder per step
lock.json        which process trains the run now
summary.json     what came out, once the run is finished
attention.png    what the model looks at, once the run is finished
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import time
import types
from collections.abc import Iterator

from attn.tasks.generated import Generated
from attn.tasks.stored import Stored
from attn.tasks.vocabulary import Pieces, Vocabulary
from attn.training import checkpoints, locks
from attn.training.config import Config, ConfigError, from_mapping, to_mapping

RUNS = pathlib.Path("runs")  # where runs go unless told otherwise


class RunError(RuntimeError):
    """A folder that is not what it should be; the message is one line for the user."""


class Folder:
    """A run's folder, which may not exist yet.

    Args:
      path: of the folder.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = pathlib.Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.metrics = self.path / "metrics.jsonl"
        self.picture = self.path / "attention.png"
        self._summary = self.path / "summary.json"

    def is_run(self) -> bool:
        """Return whether a run was started here."""
        return (self.path / "config.json").is_file()

    def check_new(self):
        """Check that a new run may be put here.

        Raises:
          RunError: the path is a file or leads through one, or holds a run already.
        """
        if not self.path.name:
            raise RunError(f"--workdir={self.path}: must name the run's folder")
        if file := file_in_the_way(self.path):
            raise RunError(f"--workdir={self.path}: {file} is a file, must be a folder")
        if self.is_run():
            raise RunError(f"--workdir={self.path}: holds a run already; go on with --resume or choose another folder")
        for path in (self.checkpoints, self.metrics, self._summary):
            if path.exists():
                raise RunError(
                    f"--workdir={self.path}: holds the {path.name} of a run, but no config.json; put that back and "
                    "give --resume, or choose another folder"
                )

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Be the only process that writes into the folder, after removing what a killed one left half-written.

        Raises:
          attn.training.locks.LockError: another process holds it, or may hold it.
        """
        with locks.held(self.path):
            checkpoints.sweep(self.checkpoints)
            for left in self.path.glob(".*.partial"):
                left.unlink()
            yield

    def create(self, config: Config, data: Generated | Stored):
        """Make the folder for a new run.

        Raises:
          RunError: as `check_new`, or it cannot be written.
        """
        self.check_new()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._write("data.json", {"name": data.name, "origins": _origins(data), "about": data.describe()})
            if isinstance(data.vocabulary, Pieces):
                self._write("vocabulary.json", dataclasses.asdict(data.vocabulary))
            self._write("config.json", to_mapping(config))  # last: it makes the folder a run's
        except OSError as error:
            raise RunError(f"--workdir={self.path}: cannot be written ({error.strerror})") from None

    def settings(self) -> dict:
        """Return the content of config.json.

        Raises:
          RunError: no run's folder, or the file is damaged.
        """
        if not self.path.is_dir():
            raise RunError(
                f"{self.path}: {'a file' if self.path.exists() else 'no such folder'}, must be a run's folder"
            )
        if not self.is_run():
            raise RunError(f"{self.path}: not a run's folder (it has no config.json)")
        return self._read("config.json")

    def config(self) -> Config:
        """The run's config.

        Raises:
          RunError: as `settings`, or a config of some other version.
        """
        try:
            return from_mapping(self.settings())
        except ConfigError as error:
            raise RunError(f"{self.path / 'config.json'}: {error}") from None

    def data(self) -> dict:
        """Return the content of data.json: `name`, `origins` of the parts with their digests, and lines `about` them.

        Raises:
          RunError: the file is missing or damaged.
        """
        values = self._read("data.json", name=str, origins=dict, about=list)
        of_parts = values["origins"].values()
        if not all(isinstance(part, dict) and {"path", "digest"} <= part.keys() for part in of_parts):
            raise RunError(f"{self.path / 'data.json'}: cannot be read (no usable 'origins' in it)")
        return values

    def vocabulary(self, config: Config) -> Vocabulary:
        """Between text and the tokens of the run.

        Raises:
          RunError: vocabulary.json is needed, and missing or damaged.
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

        Where they lie does not matter: they may have been moved.

        Raises:
          RunError: a part is another one, so that the run would go on with other examples.
        """
        before, now = self.data()["origins"], _origins(data)
        for part in sorted(before | now):
            if part not in now:
                raise RunError(f"{self.path}: began with a {part} part of its own, {before[part]['path']}")
            if before.get(part, {}).get("digest") != now[part]["digest"]:
                path = now[part]["path"]
                began = f"what {self.path} began with as {part} part"
                raise RunError(f"{path}: differs from {began} (by its SHA-256); start another run for it")

    def update_config(self, config: Config):
        """Write the config of a run that resumes with other settings."""
        self._write("config.json", to_mapping(config))

    def newest_step(self) -> int | None:
        """The step of the newest checkpoint, not verified; None if there is none."""
        return checkpoints.newest_step(self.checkpoints)

    def summary(self) -> dict | None:
        """Return the summary, if the run is finished.

        Raises:
          RunError: the file is damaged.
        """
        if not self._summary.exists():
            return None
        shown = {"steps": int, "examples_evaluated": int, "lengths_evaluated": list, "seconds": dict, "samples": list}
        metrics = dict.fromkeys(("exact_match", "token_accuracy", "error_rate"), float)
        summary = self._read("summary.json", **shown, **metrics, beam=dict | None)
        inside = {
            "lengths_evaluated": _are(summary["lengths_evaluated"], int),
            "seconds": _has(summary["seconds"], float, "import", "compile", "train", "evaluate", "total"),
            "samples": _are(summary["samples"], dict) and all(map(_is_sample, summary["samples"])),
            "beam": summary["beam"] is None or _has(summary["beam"], float, "width", *metrics),
        }
        for name, usable in inside.items():
            if not usable:
                raise RunError(f"{self._summary}: cannot be read (no usable {name!r} in it)")
        return summary

    def write_summary(self, summary: dict):
        """Write summary.json: with it the run is finished."""
        self._write("summary.json", summary)

    def _read(self, name: str, /, **kinds: type | types.UnionType) -> dict:
        """The content of a file, which has such values at least."""
        try:
            values = json.loads((self.path / name).read_text())
        except (ValueError, OSError, RecursionError) as error:
            raise RunError(f"{self.path / name}: cannot be read ({error})") from None
        for key, kind in kinds.items():
            if not isinstance(values, dict) or not isinstance(values.get(key), kind):
                raise RunError(f"{self.path / name}: cannot be read (no usable {key!r} in it)")
        return values

    def _write(self, name: str, values: dict):
        write_whole(self.path / name, json.dumps(values, indent=2) + "\n")


def _are(values: list, kind: type) -> bool:
    """Return whether there are values, all of a kind."""
    return len(values) > 0 and all(isinstance(value, kind) for value in values)


def _has(values: dict, kind: type, *names: str) -> bool:
    """Return whether the values of these names are of a kind; whole numbers count as numbers."""
    allowed = (int, float) if kind is float else kind
    return all(isinstance(values.get(name), allowed) for name in names)


def _is_sample(sample: dict) -> bool:
    texts = sample.get("accepted")
    return _has(sample, str, "input", "answer") and isinstance(texts, list) and _are(texts, str) and "right" in sample


def write_whole(path: pathlib.Path, text: str):
    """Write a file so that a reader never sees half of it."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    partial.replace(path)


def file_in_the_way(path: pathlib.Path) -> pathlib.Path | None:
    """Return the file that keeps a path from being a folder, at the path or above it."""
    return next((part for part in (path, *path.parents) if part.exists() and not part.is_dir()), None)


def _origins(data: Generated | Stored) -> dict[str, dict[str, str]]:
    return {part: origin._asdict() for part, origin in data.origins.items()} if isinstance(data, Stored) else {}


def new_folder(name: str) -> Folder:
    """A folder under `RUNS` that does not exist yet, named after the config and the time."""
    stem = RUNS / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    count = 1
    path = stem
    while path.exists():
        count += 1
        path = stem.with_name(f"{stem.name}-{count}")
    return Folder(path)


def newest_folder() -> Folder:
    """The run under `RUNS` that was started or resumed last.

    Raises:
      RunError: there is none.
    """
    runs = [Folder(path) for path in RUNS.glob("*") if Folder(path).is_run()]
    if not runs:
        raise RunError(f"--resume: no run under {RUNS}/ to go on with; name its folder with --workdir")
    return max(runs, key=lambda folder: (folder.path / "config.json").stat().st_mtime)
