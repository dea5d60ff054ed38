"""Checkpoints: one folder per step with the whole state of a run, stored by orbax and verified by SHA-256 digests.

A state is stored as a flat dictionary of arrays named by their path, such as `params.encoder.0.attention.W_Q`, so that
a message can name the array. `digests.json` in the step's folder holds the step, the digest of the config, and the
SHA-256 of each file and each array. It is written last, before the folder gets its final name, so that a folder named
by a step is complete. A checkpoint that does not verify is never used and never deleted.
"""

import contextlib
import errno
import gc
import hashlib
import json
import logging
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator

import absl.logging
import jax
import numpy as np
import orbax.checkpoint as ocp

from attn.training.leaves import array_digest, describe, leaves_by_name
from attn.training.state import State

_KEEP = 2  # complete checkpoints: the newest, and one before it in case the newest is damaged
_DIGESTS = "digests.json"
_OVERHEAD = 1 << 16  # bytes that orbax needs in addition to the arrays
_STEP = "[0-9]" * 8
# Folders that a killed process may leave behind.
_UNFINISHED = (f".writing-{_STEP}", f"{_STEP}.retired", f"*{_STEP}.orbax-checkpoint-tmp*")


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used; the message is one line for the user."""


def steps(folder: pathlib.Path) -> list[int]:
    """Return the steps that have a checkpoint, oldest first; an empty folder does not count."""
    if not folder.is_dir():
        return []
    names = (entry.name for entry in folder.iterdir() if entry.is_dir() and any(entry.iterdir()))
    return sorted(int(name) for name in names if name.isascii() and name.isdigit())


def newest_step(folder: pathlib.Path) -> int | None:
    """Return the newest step whose `digests.json` names the same step; the arrays are not verified."""
    for step in reversed(steps(folder)):
        with contextlib.suppress(CheckpointError):
            if _read_digests(_step_path(folder, step))["step"] == step:
                return step
    return None


def sweep(folder: pathlib.Path):
    """Remove folders that a killed process left half-written or half-deleted. Call it only with the run's lock held."""
    for pattern in _UNFINISHED:
        for unfinished in folder.glob(pattern):
            if unfinished.is_dir() and not unfinished.is_symlink():
                shutil.rmtree(unfinished)


def save(folder: pathlib.Path, state: State, config: str):
    """Write the state under `folder/step`, then remove all but the newest few.

    Args:
      folder: the folder of the run's checkpoints.
      state: the state to save.
      config: digest of the settings, from `identity.digest_of`.

    Raises:
      OSError: the checkpoint cannot be written, for instance because the disk is full.
    """
    state = jax.device_get(state)
    path = _step_path(folder, int(state.step))
    arrays = {name: np.asarray(leaf) for name, leaf in leaves_by_name(state).items()}
    array_digests = {name: array_digest(name, array) for name, array in arrays.items()}
    digests = {"step": int(state.step), "config": config, "arrays": array_digests}
    partial = path.with_name(f".writing-{path.name}")
    try:
        folder.mkdir(exist_ok=True)
        _check_disk_space(folder, sum(array.nbytes for array in arrays.values()))
        with _quiet_orbax(), _checkpointer() as checkpointer:
            checkpointer.save(partial, args=ocp.args.StandardSave(arrays), force=True)
        (partial / _DIGESTS).write_text(json.dumps(digests | {"files": _file_digests(partial)}, indent=1) + "\n")
        partial.rename(path)
    except Exception as error:  # for a full disk tensorstore raises other types than OSError
        with contextlib.suppress(OSError):
            sweep(folder)  # frees the disk space of the partial checkpoint
        others = [step for step in steps(folder) if step < int(state.step)]
        newest = f"; the newest checkpoint is of step {others[-1]:,}" if others else ""
        message = f"the checkpoint cannot be written ({reason(error)}){newest}"
        raise OSError(getattr(error, "errno", None), message, str(path)) from None
    for old in steps(folder)[:-_KEEP]:
        retired = _step_path(folder, old)
        # Renamed first, so that a half-removed checkpoint does not look complete.
        shutil.rmtree(retired.rename(f"{retired}.retired"))


def restore_newest(
    folder: pathlib.Path, like: State, config: str, say: Callable[[str], None], *, set_aside: bool
) -> State | None:
    """Read the newest state that verifies.

    Args:
      folder: the folder of the run's checkpoints.
      like: a state of the expected structure, shapes and dtypes.
      config: digest of the settings, from `identity.digest_of`.
      say: called with one line if the newest checkpoint is not used.
      set_aside: rename newer checkpoints that do not verify. Set it only with the run's lock held.

    Returns:
      The state; None if there is no checkpoint.

    Raises:
      CheckpointError: there are checkpoints, but none verifies; they stay where they are.
    """
    failed: dict[int, str] = {}  # error message by step
    while candidates := [step for step in steps(folder) if step not in failed]:
        step = candidates[-1]
        try:
            state = restore(folder, step, like, config)
        except CheckpointError as error:
            # If it does not exist, the process that trains has removed it in the meantime.
            if _step_path(folder, step).exists():
                failed[step] = str(error)
            continue
        if failed:
            renamed = [_set_aside(_step_path(folder, bad)) if set_aside else None for bad in failed]
            notes = [f", kept as {path.name}" if path else "" for path in renamed]
            reasons = "; ".join(f"{reason}{note}" for reason, note in zip(failed.values(), notes))
            say(f"{reasons}; using the checkpoint of step {step:,} instead")
        return state
    if failed:
        raise CheckpointError(f"no checkpoint can be used: {'; '.join(failed.values())}")
    return None


def restore(folder: pathlib.Path, step: int, like: State, config: str) -> State:
    """Read the state of a step and verify it.

    Args:
      folder: the folder of the run's checkpoints.
      step: one of `steps(folder)`.
      like: a state of the expected structure, shapes and dtypes.
      config: digest of the settings, from `identity.digest_of`.

    Raises:
      CheckpointError: the checkpoint is of another step, config, structure, shape or dtype, it cannot be read, or an
        array has other values than were saved.
    """
    path = _step_path(folder, step)
    digests = _read_digests(path)
    if digests["step"] != step:
        raise CheckpointError(f"{path}: damaged (it was written at step {digests['step']:,})")
    if digests["config"] != config:
        raise CheckpointError(f"{path}: was written with other settings than those of the run's config.json")
    # Damaged files are found before orbax reads them, since its threads would print tracebacks.
    for name, digest in _file_digests(path, digests["files"]).items():
        if digest != digests["files"][name]:
            raise CheckpointError(f"{path}: damaged ({name} {'differs from its SHA-256' if digest else 'is missing'})")
    arrays, expected = _read_arrays(path), leaves_by_name(like)
    for name in sorted(expected.keys() | arrays.keys()):
        want, have = (describe(leaves.get(name)) for leaves in (expected, arrays))
        if want != have:
            raise CheckpointError(f"{path}: {name} is {have}, must be {want} for this config")
        if digests["arrays"].get(name) != array_digest(name, arrays[name]):
            raise CheckpointError(f"{path}: damaged ({name} differs from its SHA-256)")
    state = jax.tree.unflatten(jax.tree.structure(like), [arrays[name] for name in expected])
    if int(state.step) != step:
        raise CheckpointError(f"{path}: damaged (its state is of step {int(state.step):,})")
    return state


def _step_path(folder: pathlib.Path, step: int) -> pathlib.Path:
    return folder.resolve() / f"{step:08d}"


def _read_digests(path: pathlib.Path) -> dict:
    """Return the content of `digests.json`: `step`, `config`, and digests of `arrays` and `files` by name."""
    try:
        digests = json.loads((path / _DIGESTS).read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{path}: has no {_DIGESTS} to verify it by (damaged, or of an old version)") from None
    except (ValueError, OSError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged ({_DIGESTS} cannot be read: {reason(error)})") from None
    types = {"step": int, "config": str, "arrays": dict, "files": dict}
    if not isinstance(digests, dict) or not all(isinstance(digests.get(name), type_) for name, type_ in types.items()):
        raise CheckpointError(f"{path}: damaged ({_DIGESTS} is not a table of digests)")
    return digests


def _read_arrays(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Read the arrays of a checkpoint by name, without verifying them."""
    try:
        with _quiet_orbax(), _checkpointer() as checkpointer:
            arrays = checkpointer.restore(path, args=ocp.args.StandardRestore())
        return {name: np.asarray(array) for name, array in arrays.items()}
    except Exception as error:  # orbax and tensorstore raise many types for a damaged checkpoint
        raise CheckpointError(f"{path}: damaged ({reason(error)})") from None


def _check_disk_space(folder: pathlib.Path, size: int):
    """Check that a file of `size` bytes can be written, since orbax prints tracebacks when its writing fails.

    Raises:
      OSError: the file cannot be written.
    """
    if hasattr(os, "posix_fallocate"):
        with tempfile.TemporaryFile(dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, size + _OVERHEAD)


def _file_digests(folder: pathlib.Path, names: Collection[str] | None = None) -> dict[str, str | None]:
    """Return the SHA-256 per file of a checkpoint, by its path; None for a file that is missing."""
    if names is None:
        names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    digests = dict.fromkeys(names)
    for name in names:
        with contextlib.suppress(OSError, ValueError):  # ValueError: a name that no file can have
            digests[name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    return digests


def _set_aside(path: pathlib.Path) -> pathlib.Path | None:
    """Rename a damaged checkpoint, so that it is kept but not used. Return its new path; None if renaming fails."""
    renamed, count = path.with_name(f"damaged-{path.name}"), 1
    while renamed.exists():
        count += 1
        renamed = path.with_name(f"damaged-{path.name}-{count}")
    try:
        return path.rename(renamed)
    except OSError:
        return None


def reason(error: Exception) -> str:
    """Return the cause of an error in a few words."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS, errno.EIO):
        if os.strerror(code) in text:
            return os.strerror(code)
    return f"{type(error).__name__}: {' '.join(text.split())[:120]}"


@contextlib.contextmanager
def _quiet_orbax() -> Iterator[None]:
    """Keep orbax and its asyncio tasks from writing to the terminal while the block runs."""
    loggers = [absl.logging.get_absl_logger(), logging.getLogger("asyncio")]
    before = [logger.disabled for logger in loggers]
    for logger in loggers:
        logger.disabled = True
    try:
        yield
    except BaseException:
        gc.collect()  # asyncio logs a failed task when it is collected: collect it while logging is disabled
        raise
    finally:
        for logger, disabled in zip(loggers, before):
            logger.disabled = disabled


def _checkpointer() -> ocp.Checkpointer:
    """Make a checkpointer for this process only: every host has the whole state, and only one host writes."""
    index = jax.process_index()
    options = ocp.options.MultiprocessingOptions(
        primary_host=index, active_processes={index}, barrier_sync_key_prefix=f"host{index}"
    )
    handler = ocp.StandardCheckpointHandler(multiprocessing_options=options)
    return ocp.Checkpointer(handler, multiprocessing_options=options)
