"""Checkpoints: the whole state of a run, one folder a step, through orbax.

On disk a state is a flat dictionary of arrays named by their path, such as
`params.encoder.0.attention.W_Q`, so that what is missing or misshapen can be named.
"""

import pathlib
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp

from attn.training.state import State

_KEEP = 2  # the newest complete one, and one before it


class CheckpointError(RuntimeError):
    """A checkpoint that does not fit the run; the message is one line for the user."""


def steps(folder: pathlib.Path) -> list[int]:
    """The steps that have a complete checkpoint, oldest first; orbax names a folder so once it is complete."""
    if not folder.is_dir():
        return []
    return sorted(int(entry.name) for entry in folder.iterdir() if entry.name.isdigit() and any(entry.iterdir()))


def save(folder: pathlib.Path, state: State):
    """Write the state under `folder/step`, then remove all but the newest few."""
    step = int(state.step)
    if step not in steps(folder):
        with _checkpointer() as checkpointer:
            checkpointer.save(
                folder.resolve() / f"{step:08d}", args=ocp.args.StandardSave(_flat(jax.device_get(state)))
            )
    for old in steps(folder)[:-_KEEP]:
        retired = (folder / f"{old:08d}").rename(folder / f"{old:08d}.retired")  # half-removed, it must not look whole
        shutil.rmtree(retired)


def restore(folder: pathlib.Path, step: int, like: State) -> State:
    """Read the state of a step.

    Args:
      folder: as given to `save`.
      step: one of `steps(folder)`.
      like: a state of the expected structure, shapes and dtypes.

    Raises:
      CheckpointError: what is there has other arrays, shapes or dtypes, or cannot be read.
    """
    place = folder.resolve() / f"{step:08d}"
    expected = _flat(like)
    try:
        with _checkpointer() as checkpointer:
            found = checkpointer.restore(place, args=ocp.args.StandardRestore())
    except Exception as error:  # orbax raises many kinds for a damaged checkpoint
        words = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{place}: cannot be read ({type(error).__name__}: {words})") from error
    for name in sorted(expected.keys() | found.keys()):
        want, have = (_describe(flat.get(name)) for flat in (expected, found))
        if want != have:
            raise CheckpointError(f"{place}: {name} is {have}, the config makes it {want}")
    return jax.tree.unflatten(jax.tree.structure(like), [found[name] for name in expected])


def _flat(state: State) -> dict:
    return {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}


def _name(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _describe(leaf) -> str:
    return "missing" if leaf is None else f"{np.dtype(leaf.dtype)}{list(leaf.shape)}"


def _checkpointer() -> ocp.Checkpointer:
    """One that knows this process alone: states are whole on every host, and only one host writes."""
    me = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"host{me}"
    )
    handler = ocp.StandardCheckpointHandler(multiprocessing_options=alone)
    return ocp.Checkpointer(handler, multiprocessing_options=alone)
