"""Snapshots: the parameters of a run at some steps of its training, one small file per step, to look back at it.

The steps are spaced evenly in their logarithm, since most is learned early: 0, 1, ... and the last. A checkpoint, from
which training resumes, has the whole state, and only the newest are kept; a snapshot has the parameters alone.

A file, `snapshots/00000123.safetensors`, holds the arrays by their path, and as metadata, in one line of JSON, the
step, the digest of the config and a SHA-256 of all of these. It gets its name only when it is complete.
"""

import hashlib
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
import safetensors.numpy

from attn.training.checkpoints import reason
from attn.training.folders import write_whole
from attn.training.leaves import array_digest, describe, leaves_by_name
from attn.training.meshes import fetch

LIMIT = 1 << 28  # bytes of all snapshots of a run, 256 MiB
_HEADER = 512  # most bytes of a file per array beside its values, and of the metadata
_SUFFIX, _ABOUT = ".safetensors", "snapshot"  # of the files, and the name of their metadata


class SnapshotError(RuntimeError):
    """A snapshot that cannot be used; the message is one line for the user."""


class Plan(NamedTuple):
    """The steps of a run's snapshots, in ascending order; and a line about those that do not fit, or None."""

    steps: tuple[int, ...]
    note: str | None


def plan(count: int, last: int, params) -> Plan:
    """Choose the steps of up to `count` snapshots from 0 to `last`, fewer if their files would exceed `LIMIT`.

    Every host plans the same, since all of them take part in fetching parameters.

    Args:
      count: the setting `training.snapshots`.
      last: the last step of training.
      params: parameters, or their shapes.
    """
    size = sum(leaf.size * np.dtype(leaf.dtype).itemsize + _HEADER for leaf in jax.tree.leaves(params)) + _HEADER
    fitting = min(count, LIMIT // size)
    if fitting == count:
        return Plan(schedule(count, last), None)
    limit = f"snapshots take at most {LIMIT >> 20} MiB, and one has {size / 2**20:,.0f}"
    return Plan(schedule(fitting, last), f"{limit}: {fitting or 'none'} of {count} are recorded")


def schedule(count: int, last: int) -> tuple[int, ...]:
    """Return `count` different steps, or all if there are fewer: 0, 1, and on in equal ratios to `last`.

    Early on, where equal ratios would repeat a step, the steps follow one another.
    """
    steps = [0, 1][: max(0, count - 1)]
    for left in range(count - len(steps), 0, -1):
        newest = steps[-1] if steps else 0
        if newest >= last:
            break
        start = max(1, newest)
        steps.append(max(newest + 1, round(start * (last / start) ** (1 / left))))
    return tuple(steps)


class Recorder:
    """Writes the parameters at the planned steps. If a file cannot be written, training goes on without snapshots.

    Args:
      folder: of the snapshots; None on hosts that do not write.
      steps: at which to record; the same on every host.
      config: digest of the settings, from `identity.digest_of`.
      say: called with one line if snapshots cannot be written.
    """

    def __init__(self, folder: pathlib.Path | None, steps: Sequence[int], config: str, say: Callable[[str], None]):
        self.steps = tuple(steps)
        self._folder, self._config, self._say = folder, config, say

    def record(self, step: int, params):
        """Write the parameters if a snapshot of this step is planned. Every host must call it."""
        if step not in self.steps:
            return
        whole = fetch(params)
        if self._folder is None:
            return
        try:
            data = _to_bytes(step, whole, self._config)
            if sum(path.stat().st_size for path in _paths(self._folder).values()) + len(data) > LIMIT:
                raise OSError(f"all of them take more than {LIMIT >> 20} MiB")
            self._folder.mkdir(exist_ok=True)
            write_whole(_path(self._folder, step), data)
        except OSError as error:
            self._say(f"the snapshot of step {step:,} cannot be written ({error.strerror or error}); no more follow")
            self._folder = None


def steps(folder: pathlib.Path) -> list[int]:
    """Return the steps that have a snapshot, in ascending order; the files are not verified."""
    return [*_paths(folder)]


def discard(folder: pathlib.Path, after: int):
    """Remove the snapshots after a step, at which a run resumes. Call it only with the run's lock held."""
    for step, path in _paths(folder).items():
        if step > after:
            path.unlink()


def read(folder: pathlib.Path, step: int, like, config: str):
    """Read the parameters of a step and verify them.

    Args:
      folder: the folder of the run's snapshots.
      step: one of `steps(folder)`.
      like: parameters of the expected structure, shapes and dtypes.
      config: digest of the settings, from `identity.digest_of`.

    Raises:
      SnapshotError: the file cannot be read, is damaged, or is of another step, config, structure or shape.
    """
    path = _path(folder, step)
    try:
        with safetensors.safe_open(path, framework="np") as file:
            about = json.loads(file.metadata()[_ABOUT])
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 it is not a mapping
        digest = about.pop("digest")
    except Exception as error:  # safetensors raises many types for a damaged file, and its metadata may be anything
        raise SnapshotError(f"{path}: damaged ({reason(error)})") from None
    if digest != _digest(about, arrays):
        raise SnapshotError(f"{path}: damaged (it differs from its SHA-256)")
    if about["step"] != step:
        raise SnapshotError(f"{path}: damaged (it was written at step {about['step']:,})")
    if about["config"] != config:
        raise SnapshotError(f"{path}: was written with other settings than those of the run's config.json")
    expected = leaves_by_name(like)
    for name in sorted(expected.keys() | arrays.keys()):
        want, have = (describe(leaves.get(name)) for leaves in (expected, arrays))
        if want != have:
            raise SnapshotError(f"{path}: {name} is {have}, must be {want} for this config")
    return jax.tree.unflatten(jax.tree.structure(like), [arrays[name] for name in expected])


def _to_bytes(step: int, params, config: str) -> bytes:
    """Return the content of a file."""
    arrays = {name: np.ascontiguousarray(leaf) for name, leaf in leaves_by_name(params).items()}
    about = {"step": step, "config": config}
    about["digest"] = _digest(about, arrays)
    # One entry: safetensors writes several in an order that differs from process to process.
    return safetensors.numpy.save(arrays, {_ABOUT: json.dumps(about)})


def _digest(about: Mapping[str, int | str], arrays: Mapping[str, np.ndarray]) -> str:
    """Return the SHA-256 of everything in a file."""
    digests = {name: array_digest(name, array) for name, array in arrays.items()}
    return hashlib.sha256(json.dumps([about, digests], sort_keys=True).encode()).hexdigest()


def _path(folder: pathlib.Path, step: int) -> pathlib.Path:
    return folder / f"{step:08d}{_SUFFIX}"


def _paths(folder: pathlib.Path) -> dict[int, pathlib.Path]:
    """Return the files by their step, in ascending order."""
    names = (path for path in folder.glob(f"*{_SUFFIX}") if path.stem.isascii() and path.stem.isdigit())
    paths = {int(path.stem): path for path in names}
    return {step: paths[step] for step in sorted(paths) if paths[step] == _path(folder, step)}
