"""Runs of a tiny model on meshes of a shape (data, model, sequence); as a script, on eight virtual CPU devices.

`python mesh_runs.py PRECISION STEPS SETTINGS SHAPES FOLDER` prints a line of JSON, with the losses, for each shape.
"""

import dataclasses
import functools
import json
import os
import pathlib
import sys
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh

from attn.tasks.generated import Generated
from attn.training import checkpoints, meshes
from attn.training.config import Config, from_mapping
from attn.training.identity import digest_of
from attn.training.placement import Placement, placement_of
from attn.training.state import State, initial_state
from attn.training.steps import StepPrograms, build_step_programs

TINY = {
    "task": {"name": "reverse", "symbols": 6, "max_length": 6},  # sources and answers of 7 tokens, which is odd
    "model": {
        **{"name": "transformer", "width": 16, "num_heads": 4, "feed_forward_width": 32, "dropout": 0.1},
        "mechanism": "t5 + sinusoidal",  # with parameters per head
    },
    "optimizer": {"name": "adamw"},
    "training": {"steps": 200, "steps_per_call": 1, "batch_size": 8},
}


def tiny(**settings: dict) -> Config:
    """The config, with other settings in some groups."""
    return from_mapping({group: TINY.get(group, {}) | settings.get(group, {}) for group in {**TINY, **settings}})


def mesh_of(shape: Sequence[int]) -> Mesh:
    """A mesh of the first devices."""
    devices = np.array(jax.devices()[: np.prod(shape)]).reshape(shape)
    return Mesh(devices, ("data", "model", "sequence"), axis_types=(AxisType.Auto,) * 3)


def start(config: Config) -> State:
    """The whole state before the first step; in float64 where 64-bit types are enabled."""
    state = jax.jit(lambda: initial_state(config, config.task.vocabulary))()
    wide = jnp.float64 if jax.config.jax_enable_x64 else jnp.float32
    return jax.tree.map(lambda x: x.astype(wide) if x.dtype == jnp.float32 else x, state)


@functools.cache
def programs_on(config: Config, shape: tuple[int, ...], dtype: str) -> tuple[StepPrograms, Placement, Mesh]:
    """The programs of a step on a mesh, compiled once, for a model that computes in this dtype."""
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype=dtype))
    mesh = mesh_of(shape)
    placement = placement_of(config, config.task.vocabulary, mesh)
    return build_step_programs(config, Generated(config.task), mesh), placement, mesh


def run(config: Config, shape: Sequence[int], whole: State, steps: int) -> tuple[list[float], State, State]:
    """Take some steps, one per call, from a whole state.

    Returns:
      The loss of each step, the state on the mesh, and the whole state.
    """
    dtype = "float64" if jax.config.jax_enable_x64 else config.model.dtype
    programs, placement, mesh = programs_on(config, tuple(shape), dtype)
    state, losses = placement.place(jax.device_get(whole)), []  # from copies, since steps take their arrays
    for step in range(int(whole.step), int(whole.step) + steps):
        state, report = programs(state, meshes.replicate(np.int32(step + 1), mesh), None)
        losses.append(float(report.loss.value()))
    return losses, state, jax.device_get(placement.whole(state))


def moved(config: Config, folder: pathlib.Path, whole: State) -> State:
    """Save a state and return what is restored from it."""
    checkpoints.save(folder, whole, digest_of(config))
    return checkpoints.restore(folder, int(whole.step), whole, digest_of(config))


def main(precision: str, steps: int, settings: dict, shapes: list[list[int]], folder: str | None) -> Iterator[dict]:
    """Run on every shape: each from the first step; with a folder, each from the checkpoint that the last one saved."""
    jax.config.update("jax_enable_x64", precision == "float64")
    jax.config.update("jax_default_matmul_precision", "highest")
    config = tiny(**settings)
    state = start(config)
    for shape in shapes:
        losses, _, whole = run(config, shape, state, steps)
        state = state if folder is None else moved(config, pathlib.Path(folder), whole)
        yield {"shape": shape, "losses": losses}


if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    for line in main(sys.argv[1], int(sys.argv[2]), *map(json.loads, sys.argv[3:])):
        print(json.dumps(line), flush=True)
