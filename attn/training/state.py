"""The state of a run and the step that advances it.

A state is (parameters, optimiser state, step). Everything random in a step is folded in from (seed, step, example),
so a run that resumes, or that shares a batch out over other devices, goes on with the same examples.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from attn.nn.models import MODELS
from attn.tasks.examples import PAD, Example, decoder_input, example_keys, length_key
from attn.tasks.generated import Generated
from attn.tasks.stored import StackedBatches, Stored
from attn.tasks.vocabulary import Vocabulary
from attn.training.config import Config, Optimizer, Training, model_settings
from attn.training.meshes import DATA
from attn.training.metrics import Mean, cross_entropy

_WIDTHS = 4  # that batches of one length are padded to
_PARAMETERS = 0  # what the run's key is folded with for them; see `example_keys`


class State(NamedTuple):
    """All that a run carries from step to step."""

    params: nnx.State
    optimizer: optax.OptState
    step: Int[Array, ""]


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
    return State(params, optimizer(config).init(ravel_pytree(params)[0]), jnp.zeros((), jnp.int32))


def learning_rate(settings: Optimizer, steps: int) -> optax.Schedule:
    """Linear warm-up over a fraction of the steps, then cosine decay to zero, or none."""
    warmup = round(settings.warmup_fraction * steps)
    after = {
        "cosine": optax.cosine_decay_schedule(settings.learning_rate, max(1, steps - warmup)),
        "none": optax.constant_schedule(settings.learning_rate),
    }[settings.decay]
    return optax.join_schedules([optax.linear_schedule(0.0, settings.learning_rate, max(1, warmup)), after], [warmup])


def optimizer(config: Config) -> optax.GradientTransformation:
    """AdamW after clipping by the global norm, on all parameters as one flat vector: fewer, larger operations.

    Source: Loshchilov and Hutter 2019.
    """
    settings = config.optimizer
    return optax.chain(
        optax.clip_by_global_norm(settings.clip_norm),
        optax.adamw(
            learning_rate(settings, config.training.steps),
            b1=settings.beta1,
            b2=settings.beta2,
            weight_decay=settings.weight_decay,
        ),
    )


def example_loss(model: nnx.Module, begin: int, example: Example, key: Array | None) -> Report:
    """Predict each token of a target from those before it and the source."""
    length = jnp.sum(example.target != PAD)
    logits = model(example.source, decoder_input(example.target, begin), target_length=length, key=key)
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
    optimise = optimizer(config)

    def advance(state: State, batch) -> tuple[State, Report]:
        # Marked as differing by device, the parameters' gradients stay local until the one sum below.
        params = jax.tree.map(lambda x: jax.lax.pcast(x, DATA, to="varying"), state.params)
        gradients, report = differentiate(params, state.step, batch)
        gradients, report = jax.lax.psum((ravel_pytree(gradients)[0], report), DATA)
        flat, unravel = ravel_pytree(state.params)
        updates, optimizer_state = optimise.update(gradients / report.loss.count, state.optimizer, flat)
        return State(unravel(optax.apply_updates(flat, updates)), optimizer_state, state.step + 1), report

    def dispatch(state: State, until: Int[Array, ""], batches) -> tuple[State, Report]:
        nothing = Report(Mean(jnp.zeros(()), jnp.zeros(())), jnp.zeros(()))

        def step(state, batch):
            return jax.lax.cond(state.step < until, advance, lambda state, _: (state, nothing), state, batch)

        state, reports = jax.lax.scan(step, state, batches, length=dispatch_length(config.training))
        return state, jax.tree.map(jnp.sum, reports)

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

    def loss(params, step, size: int, examples: Callable[[Array], Example]):
        each = _share_of(size)
        numbers = jax.lax.axis_index(DATA) * each + jnp.arange(each)
        sample_keys, dropout_keys = example_keys(config.training.seed, step, numbers)
        model = nnx.merge(graphdef, params)
        losses = jax.vmap(lambda example, key: example_loss(model, vocabulary.begin, example, key))
        report = jax.tree.map(jnp.sum, losses(examples(sample_keys), dropout_keys))
        return report.loss.sum, report

    return loss
