"""The state of a run and the step that advances it.

A state is (parameters, optimizer state, step, averaged parameters if there are any). Everything random in a step is
folded in from (seed, step, example), so a run that resumes, or that shares a batch out over other devices, goes on with
the same examples.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from attn.nn.models import MODELS
from attn.tasks.examples import PAD, Example, decoder_input, example_keys, length_key, with_replaced
from attn.tasks.generated import Generated
from attn.tasks.stored import StackedBatches, Stored
from attn.tasks.vocabulary import Vocabulary
from attn.training.config import Config, model_settings
from attn.training.groups import Training
from attn.training.meshes import DATA
from attn.training.metrics import Mean, cross_entropy
from attn.training.optimizers import optimizer, packing

_WIDTHS = 4  # that batches of one length are padded to
_PARAMETERS = 0  # what the run's key is folded with for them; see `example_keys`
_REPLACED = 2**32 - 1  # what an example's key is folded with for its replaced tokens: the model splits it into fewer


class State(NamedTuple):
    """All that a run carries from step to step."""

    params: nnx.State
    optimizer: optax.OptState
    step: Int[Array, ""]
    average: nnx.State | None = None

    @property
    def kept(self) -> nnx.State:
        """The parameters that are evaluated, kept and shown: the average where the run makes one."""
        return self.params if self.average is None else self.average


class Report(NamedTuple):
    """What some steps have shown: the loss in nats a token, and how many source and target tokens were read."""

    loss: Mean
    tokens: Float[Array, ""]


def build_model(config: Config, vocabulary: Vocabulary, rngs: nnx.Rngs) -> nnx.Module:
    """The model that a config describes, with initial parameters."""
    return MODELS[config.model.name](vocabulary.size, **model_settings(config.model), rngs=rngs)


def model_structure(config: Config, vocabulary: Vocabulary) -> tuple[nnx.GraphDef, nnx.State]:
    """The model without numbers: its structure, and the shapes of its parameters."""
    return nnx.split(nnx.eval_shape(lambda: build_model(config, vocabulary, nnx.Rngs(0))), nnx.Param)


def initial_state(config: Config, vocabulary: Vocabulary) -> State:
    """The state before the first step, a pure function of the seed; to be jitted."""
    key = jax.random.fold_in(jax.random.key(config.training.seed), _PARAMETERS)
    params = nnx.state(build_model(config, vocabulary, nnx.Rngs(params=key)), nnx.Param)
    packed = packing(config.optimizer, params).pack(params)
    average = params if config.optimizer.averaging else None
    optimizer_state = optimizer(config.optimizer, config.training.steps).init(packed)
    return State(params, optimizer_state, jnp.zeros((), jnp.int32), average)


def example_loss(
    model: nnx.Module, begin: int, example: Example, key: Array | None, replace: Callable | None = None
) -> Report:
    """Predict each token of a target from those before it and the source.

    Args:
      model, example, key: as of the model's call.
      begin: the token before the first.
      replace: `(decoder input, key) -> decoder input`, to train on another one than the target's own tokens.
    """
    length, inputs = jnp.sum(example.target != PAD), decoder_input(example.target, begin)
    if replace is not None:
        inputs = replace(inputs, jax.random.fold_in(key, _REPLACED))
    logits = model(example.source, inputs, target_length=length, key=key)
    loss = cross_entropy(logits, example.target, PAD)
    return Report(loss, jnp.sum(example.source != PAD) + loss.count)


def dispatch_length(training: Training) -> int:
    """Return how many steps a dispatch has at most: one ends at every evaluation, checkpoint and at the last step."""
    return min(training.steps_per_dispatch, training.evaluate_every, training.checkpoint_every, training.steps)


def build_dispatch(config: Config, data: Generated | Stored, mesh: Mesh) -> Callable:
    """Make `(state, until, batches) -> (state, report)`: up to `steps_per_dispatch` steps, none beyond step `until`.

    `batches` are those of `Stored`, stacked, or None for a sampler. Each device differentiates the loss of its own
    examples; the gradients are added up in one message. The state's memory is used again.
    """
    differentiate = _sampled(config, data) if isinstance(data, Generated) else _given(config, data)
    pack, unpack = packing(config.optimizer, model_structure(config, data.vocabulary)[1])
    optimise, averaging = optimizer(config.optimizer, config.training.steps), config.optimizer.averaging

    def advance(state: State, batch) -> tuple[State, Report]:
        """One step of a state whose parameters are packed."""
        # Marked as differing by device, the parameters' gradients stay local until the one sum below.
        params = jax.tree.map(lambda x: jax.lax.pcast(x, DATA, to="varying"), unpack(state.params))
        gradients, report = differentiate(params, state.step, batch)
        gradients, report = jax.lax.psum((pack(gradients), report), DATA)
        gradients = jax.tree.map(lambda x: x / report.loss.count, gradients)
        updates, optimizer_state = optimise.update(gradients, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        return State(params, optimizer_state, state.step + 1, averaged(state, params)), report

    def averaged(state: State, new):
        # At step t the newest counts 1 / (1 + a t): the average spans a part of the steps so far.
        weight = 1 / (1 + averaging * state.step)
        return jax.tree.map(lambda mean, new: mean + (new - mean) * weight, state.average, new) if averaging else None

    def dispatch(state: State, until: Int[Array, ""], batches) -> tuple[State, Report]:
        nothing = Report(Mean(jnp.zeros(()), jnp.zeros(())), jnp.zeros(()))

        def step(state, batch):
            return jax.lax.cond(state.step < until, advance, lambda state, _: (state, nothing), state, batch)

        state = in_form(pack, state)
        state, reports = jax.lax.scan(step, state, batches, length=dispatch_length(config.training))
        return in_form(unpack, state), jax.tree.map(jnp.sum, reports)

    def in_form(change: Callable, state: State) -> State:
        average = None if state.average is None else change(state.average)
        return state._replace(params=change(state.params), average=average)

    everywhere, of_batches = PartitionSpec(), batches_specs(data)
    mapped = jax.shard_map(
        dispatch, mesh=mesh, in_specs=(everywhere, everywhere, of_batches), out_specs=(everywhere, everywhere)
    )
    return jax.jit(mapped, donate_argnums=0)


def batches_specs(data: Generated | Stored) -> StackedBatches | None:
    """How the batches of a dispatch are shared out: their examples by device."""
    if isinstance(data, Generated):
        return None
    by_device = PartitionSpec(None, DATA)
    return StackedBatches(PartitionSpec(), Example(by_device, by_device))


def _sampled(config: Config, data: Generated) -> Callable:
    """`(params, step, None) -> (gradients, report)` of examples that the device draws."""
    gradient, size = jax.grad(_local_loss(config, data.vocabulary), has_aux=True), config.training.batch_size
    if not config.training.one_length:
        return lambda params, step, _: gradient(params, step, size, jax.vmap(data.sample))

    def padded_to(width: int):
        task = dataclasses.replace(data.task, max_length=width)

        def of_length(params, step, length):
            return gradient(params, step, size, jax.vmap(lambda key: task.sample(key, length=length)))

        return of_length

    widths = sorted(
        {max(data.task.min_length, -(-data.task.max_length * part // _WIDTHS)) for part in range(1, _WIDTHS + 1)}
    )

    def differentiate(params, step, _):
        length = data.task.draw_length(length_key(config.training.seed, step))
        width = jnp.searchsorted(jnp.array(widths), length)
        return jax.lax.switch(width, [padded_to(width) for width in widths], params, step, length)

    return differentiate


def _given(config: Config, data: Stored) -> Callable:
    """`(params, step, (bucket, examples)) -> (gradients, report)`, of the examples cut to a batch of their bucket."""
    gradient = jax.grad(_local_loss(config, data.vocabulary), has_aux=True)

    def of_bucket(bucket: Example, size: int):
        def cut(params, step, examples):
            rows = _share_of(size)
            narrow = jax.tree.map(lambda tokens, like: tokens[:rows, : like.shape[1]], examples, bucket)
            return gradient(params, step, size, lambda keys: narrow)

        return cut

    sizes = data.batches(config.training.batch_size, config.training.seed).sizes
    branches = [of_bucket(bucket, size) for bucket, size in zip(data.training, sizes)]
    return lambda params, step, batch: jax.lax.switch(batch.bucket, branches, params, step, batch.examples)


def _share_of(size: int) -> int:
    """How many examples of a batch each device has; the last may lack some."""
    return -(-size // jax.lax.axis_size(DATA))


def _local_loss(config: Config, vocabulary: Vocabulary) -> Callable:
    """`(params, step, size, keys -> examples) -> (loss, report)` of one device's share of a batch."""
    graphdef, _ = model_structure(config, vocabulary)
    share, replace = config.training.replaced_tokens, None
    if share:
        replace = functools.partial(with_replaced, share=share, vocabulary_size=vocabulary.size)

    def loss(params, step, size: int, examples: Callable[[Array], Example]):
        each = _share_of(size)
        numbers = jax.lax.axis_index(DATA) * each + jnp.arange(each)
        sample_keys, dropout_keys = example_keys(config.training.seed, step, numbers)
        model = nnx.merge(graphdef, params)
        losses = jax.vmap(lambda example, key: example_loss(model, vocabulary.begin, example, key, replace))
        report = jax.tree.map(jnp.sum, losses(examples(sample_keys), dropout_keys))
        return report.loss.sum, report

    return loss
