"""Checkpoints: the whole state of a run in one folder per step, stored by orbax and verified by digests of our own.

A state is stored as a flat dictionary of arrays named by their path, such as `params.encoder.0.attention.W_Q`, so that
a message can name the array. `digests.json` in the step's folder holds the step, the digest of the config, and the
SHA-256 of each file and each array. It is written last, before the folder gets its final name, so that a folder named
by a step is complete. What does not verify is never used and never deleted.
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

from attn.training.state import State

_KEEP = 2  # the newest complete one, and one before it
_DIGESTS = "digests.json"
_OVERHEAD = 1 << 16  # bytes that orbax needs beside the arrays
_NUMBER = "[0-9]" * 8
# Folders that a killed process may leave.
_UNFINISHED = (f".writing-{_NUMBER}", f"{_NUMBER}.retired", f"*{_NUMBER}.orbax-checkpoint-tmp*")


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used; the message is one line for the user."""


def steps(folder: pathlib.Path) -> list[int]:
    """Return the steps that have a checkpoint, oldest first; an empty folder does not count."""
    if not folder.is_dir():
        return []
    names = (entry.name for entry in folder.iterdir() if entry.is_dir() and any(entry.iterdir()))
    return sorted(int(name) for name in names if name.isascii() and name.isdigit())


def newest_step(folder: pathlib.Path) -> int | None:
    """Return the newest step whose checkpoint says that it is of this step, not verified otherwise."""
    for step in reversed(steps(folder)):
        with contextlib.suppress(CheckpointError):
            if _read_digests(_place(folder, step))["step"] == step:
                return step
    return None


def sweep(folder: pathlib.Path):
    """Remove what a killed process left half-written or half-deleted; only for the holder of the run's lock."""
    for pattern in _UNFINISHED:
        for left in folder.glob(pattern):
            if left.is_dir() and not left.is_symlink():
                shutil.rmtree(left)


def save(folder: pathlib.Path, state: State, config: str):
    """Write the state under `folder/step`, then remove all but the newest few.

    Args:
      folder: of the run's checkpoints.
      state: to save.
      config: digest of the settings, from `identity.digest_of`.

    Raises:
      OSError: it cannot be written, for instance since the disk is full.
    """
    state = jax.device_get(state)
    place = _place(folder, int(state.step))
    arrays = {name: np.asarray(leaf) for name, leaf in _flat(state).items()}
    digests = {"step": int(state.step), "config": config, "arrays": {n: _digest(n, a) for n, a in arrays.items()}}
    writing = place.with_name(f".writing-{place.name}")
    try:
        folder.mkdir(exist_ok=True)
        _check_room(folder, sum(array.nbytes for array in arrays.values()))
        with _quietly(), _checkpointer() as checkpointer:
            checkpointer.save(writing, args=ocp.args.StandardSave(arrays), force=True)
        (writing / _DIGESTS).write_text(json.dumps(digests | {"files": _file_digests(writing)}, indent=1) + "\n")
        writing.rename(place)
    except Exception as error:  # tensorstore raises other kinds than OSError for a full disk
        with contextlib.suppress(OSError):
            sweep(folder)  # makes room again
        others = [step for step in steps(folder) if step < int(state.step)]
        left = f"; the newest checkpoint is of step {others[-1]:,}" if others else ""
        why = f"the checkpoint cannot be written ({_why(error)}){left}"
        raise OSError(getattr(error, "errno", None), why, str(place)) from None
    for old in steps(folder)[:-_KEEP]:
        retired = _place(folder, old)
        shutil.rmtree(retired.rename(f"{retired}.retired"))  # half-removed, it must not look complete


def restore_newest(
    folder: pathlib.Path, like: State, config: str, say: Callable[[str], None], *, set_aside: bool
) -> State | None:
    """Read the newest state that verifies.

    Args:
      folder: of the run's checkpoints.
      like: a state of the expected structure, shapes and dtypes.
      config: digest of the settings, from `identity.digest_of`.
      say: is given one line if the newest checkpoint was not the one.
      set_aside: rename newer checkpoints that do not verify; only for the holder of the run's lock.

    Returns:
      The state; None if there is no checkpoint.

    Raises:
      CheckpointError: there are checkpoints, but none verifies; they stay where they are.
    """
    failed: dict[int, str] = {}
    while left := [step for step in steps(folder) if step not in failed]:
        step = left[-1]
        try:
            state = restore(folder, step, like, config)
        except CheckpointError as error:
            if _place(folder, step).exists():  # else the process that trains has removed it by now
                failed[step] = str(error)
            continue
        if failed:
            moved = [_set_aside(_place(folder, bad)) if set_aside else None for bad in failed]
            kept = [f", kept as {place.name}" if place else "" for place in moved]
            reasons = "; ".join(f"{reason}{where}" for reason, where in zip(failed.values(), kept))
            say(f"{reasons}; using the checkpoint of step {step:,} instead")
        return state
    if failed:
        raise CheckpointError(f"no checkpoint can be used: {'; '.join(failed.values())}")
    return None


def restore(folder: pathlib.Path, step: int, like: State, config: str) -> State:
    """Read the state of a step and verify it.

    Args:
      folder: of the run's checkpoints.
      step: one of `steps(folder)`.
      like: a state of the expected structure, shapes and dtypes.
      config: digest of the settings, from `identity.digest_of`.

    Raises:
      CheckpointError: it is of another step, config, structure, shape or dtype, it cannot be read, or an array has
        other values than were saved.
    """
    place = _place(folder, step)
    digests = _read_digests(place)
    if digests["step"] != step:
        raise CheckpointError(f"{place}: damaged (it was written at step {digests['step']:,})")
    if digests["config"] != config:
        raise CheckpointError(f"{place}: was written with other settings than the run's config.json has")
    # Damaged files are found before orbax reads them: its threads would print tracebacks of their own.
    for name, digest in _file_digests(place, digests["files"]).items():
        if digest != digests["files"][name]:
            raise CheckpointError(f"{place}: damaged ({name} {'differs from its SHA-256' if digest else 'is missing'})")
    found, expected = _read(place), _flat(like)
    for name in sorted(expected.keys() | found.keys()):
        want, have = (_describe(arrays.get(name)) for arrays in (expected, found))
        if want != have:
            raise CheckpointError(f"{place}: {name} is {have}, the config makes it {want}")
        if digests["arrays"].get(name) != _digest(name, found[name]):
            raise CheckpointError(f"{place}: damaged ({name} differs from its SHA-256)")
    state = jax.tree.unflatten(jax.tree.structure(like), [found[name] for name in expected])
    if int(state.step) != step:
        raise CheckpointError(f"{place}: damaged (it holds step {int(state.step):,})")
    return state


def _place(folder: pathlib.Path, step: int) -> pathlib.Path:
    return folder.resolve() / f"{step:08d}"


def _read_digests(place: pathlib.Path) -> dict:
    """Return what `digests.json` holds: `step`, `config`, and digests of `arrays` and `files` by name."""
    try:
        digests = json.loads((place / _DIGESTS).read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{place}: has no {_DIGESTS} to verify it by (damaged, or of an old version)") from None
    except (ValueError, OSError, RecursionError) as error:
        raise CheckpointError(f"{place}: damaged ({_DIGESTS} cannot be read: {_why(error)})") from None
    kinds = {"step": int, "config": str, "arrays": dict, "files": dict}
    if not isinstance(digests, dict) or not all(isinstance(digests.get(name), kind) for name, kind in kinds.items()):
        raise CheckpointError(f"{place}: damaged ({_DIGESTS} is not a table of digests)")
    return digests


def _read(place: pathlib.Path) -> dict[str, np.ndarray]:
    """Return the arrays that orbax finds, not verified."""
    try:
        with _quietly(), _checkpointer() as checkpointer:
            found = checkpointer.restore(place, args=ocp.args.StandardRestore())
        return {name: np.asarray(leaf) for name, leaf in found.items()}
    except Exception as error:  # orbax and tensorstore raise many kinds for a damaged checkpoint
        raise CheckpointError(f"{place}: damaged ({_why(error)})") from None


def _check_room(folder: pathlib.Path, size: int):
    """Find out whether a file of so many bytes can be written, since orbax does not fail quietly when it cannot.

    Raises:
      OSError: it cannot be.
    """
    if hasattr(os, "posix_fallocate"):
        with tempfile.TemporaryFile(dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, size + _OVERHEAD)


def _file_digests(place: pathlib.Path, names: Collection[str] | None = None) -> dict[str, str | None]:
    """Return the SHA-256 per file of a checkpoint, by its path; None for a file that is missing."""
    if names is None:
        names = sorted(path.relative_to(place).as_posix() for path in place.rglob("*") if path.is_file())
    digests = dict.fromkeys(names)
    for name in names:
        with contextlib.suppress(OSError, ValueError):  # ValueError: a name that no file can have
            digests[name] = hashlib.sha256((place / name).read_bytes()).hexdigest()
    return digests


def _set_aside(place: pathlib.Path) -> pathlib.Path | None:
    """Rename a damaged checkpoint, so that it is kept and no longer counts; return where, None if it cannot be."""
    aside, count = place.with_name(f"damaged-{place.name}"), 1
    while aside.exists():
        count += 1
        aside = place.with_name(f"damaged-{place.name}-{count}")
    try:
        return place.rename(aside)
    except OSError:
        return None


def _flat(state: State) -> dict:
    return {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}


def _name(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _digest(name: str, array: np.ndarray) -> str:
    """Return the SHA-256 of an array's name, dtype, shape and values: swapped arrays differ as well."""
    digest = hashlib.sha256(f"{name} {_describe(array)}\n".encode())
    digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _describe(leaf) -> str:
    return "missing" if leaf is None else f"{np.dtype(leaf.dtype)}{list(leaf.shape)}"


def _why(error: Exception) -> str:
    """Return the cause of a failure in a few words."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS, errno.EIO):
        if os.strerror(code) in text:
            return os.strerror(code)
    return f"{type(error).__name__}: {' '.join(text.split())[:120]}"


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Keep orbax, and what it leaves to the garbage collector, from writing to the terminal."""
    loggers = [absl.logging.get_absl_logger(), logging.getLogger("asyncio")]
    before = [logger.disabled for logger in loggers]
    for logger in loggers:
        logger.disabled = True
    try:
        yield
    except BaseException:
        gc.collect()  # asyncio complains of a failed task when it is collected
        raise
    finally:
        for logger, disabled in zip(loggers, before):
            logger.disabled = disabled


def _checkpointer() -> ocp.Checkpointer:
    """Return one that knows this process alone: states are whole on every host, and only one host writes."""
    me = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"host{me}"
    )
    handler = ocp.StandardCheckpointHandler(multiprocessing_options=alone)
    return ocp.Checkpointer(handler, multiprocessing_options=alone)
