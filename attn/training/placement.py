"""The placement of the state of a run: divided among the devices of a mesh, and whole, as checkpoints have it.

A checkpoint does not depend on the mesh. It has each array whole, and what AdamW keeps as one vector of all parameters.
On a mesh that divides the model, AdamW keeps the parameters apart instead, so that each array lies where its parameter
does. Muon orthogonalises whole matrices, so what it keeps is replicated.
"""

from typing import NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from attn.nn.sharding import shardings
from attn.tasks.vocabulary import Vocabulary
from attn.training.config import Config
from attn.training.meshes import fetch, is_divided
from attn.training.optimizers import Packing, packing
from attn.training.state import State, initial_state, model_structure


class Placement(NamedTuple):
    """The place of a run's state on a mesh.

    Attributes:
      mesh: with the axes data, model and sequence, or data alone.
      vector: between parameters and the vector that a checkpoint has in their place in the optimizer's state; None if
        the state on the mesh is that of a checkpoint.
    """

    mesh: Mesh
    vector: Packing | None

    def spread(self, state: State) -> State:
        """Return a checkpoint's state as it is on the mesh, without moving it."""
        if self.vector is None:
            return state
        optimizer = jax.tree.map(lambda x: self.vector.unpack(x) if x.ndim else x, state.optimizer)
        return state._replace(optimizer=optimizer)

    def place(self, state: State) -> State:
        """Move a checkpoint's state to the mesh; every host must pass the same."""
        state = self.spread(state)
        return jax.device_put(state, shardings(state, self.mesh))

    def shapes(self, state: State) -> State:
        """Return the shapes of a state on the mesh, with their shardings, from the shapes of a checkpoint's state."""
        state = jax.eval_shape(self.spread, state)
        places = shardings(state, self.mesh)
        return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), state, places)

    def whole(self, state: State) -> State:
        """Return the state on the mesh as a checkpoint's; if the mesh divides it, in memory of the host.

        Every host must call it.
        """
        if not is_divided(self.mesh):
            return state
        state = fetch(state)
        if self.vector is None:
            return state

        def gathered(x):
            return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(x)]) if _is_parameters(x) else x

        return state._replace(optimizer=jax.tree.map(gathered, state.optimizer, is_leaf=_is_parameters))


def placement_of(config: Config, vocabulary: Vocabulary, mesh: Mesh) -> Placement:
    """Return the place of a run's state on a mesh."""
    like = model_structure(config, vocabulary)[1]
    keeps_apart = is_divided(mesh) and config.optimizer.name == "adamw"
    return Placement(mesh, packing(config.optimizer, like) if keeps_apart else None)


def shapes_on(config: Config, vocabulary: Vocabulary, mesh: Mesh) -> State:
    """Return the shapes of a run's state on a mesh, with their shardings."""
    whole = jax.eval_shape(lambda: initial_state(config, vocabulary))
    return placement_of(config, vocabulary, mesh).shapes(whole)


def _is_parameters(x) -> bool:
    return isinstance(x, nnx.State)
