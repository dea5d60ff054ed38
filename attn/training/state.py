"""The state of a run and its initial value.

All random numbers of a step come from (seed, step, example), so a run that resumes, also on another number of devices,
continues with the same examples.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Int

from attn.nn.models import MODELS
from attn.tasks.vocabulary import Vocabulary
from attn.training.config import Config
from attn.training.optimizers import optimizer, packing

_PARAMETERS = 0  # folded into the run's key for the initial parameters; see `example_keys`


class State(NamedTuple):
    """The state that a run carries from step to step; `average` are averaged parameters, if the config has them."""

    params: nnx.State
    optimizer: optax.OptState
    step: Int[Array, ""]
    average: nnx.State | None = None

    @property
    def kept(self) -> nnx.State:
        """The parameters that are evaluated, kept and shown: the average if the run has one."""
        return self.params if self.average is None else self.average


def build_model(config: Config, vocabulary: Vocabulary, rngs: nnx.Rngs) -> nnx.Module:
    """Build the model that a config describes, with initial parameters."""
    return MODELS[config.model.name](vocabulary.size, config.model, rngs)


def model_structure(config: Config, vocabulary: Vocabulary) -> tuple[nnx.GraphDef, nnx.State]:
    """Return the structure of the model and the shapes of its parameters, without computing parameters."""
    return nnx.split(nnx.eval_shape(lambda: build_model(config, vocabulary, nnx.Rngs(0))), nnx.Param)


def initial_state(config: Config, vocabulary: Vocabulary) -> State:
    """Compute the state before the first step, a pure function of config and vocabulary; to be jitted."""
    key = jax.random.fold_in(jax.random.key(config.training.seed), _PARAMETERS)
    params = nnx.state(build_model(config, vocabulary, nnx.Rngs(params=key)), nnx.Param)
    packed = packing(config.optimizer, params).pack(params)
    average = params if config.optimizer.averaging else None
    optimizer_state = optimizer(config.optimizer, config.training.steps).init(packed)
    return State(params, optimizer_state, jnp.zeros((), jnp.int32), average)
