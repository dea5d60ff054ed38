"""Training steps: draw the batches, update the parameters.

Several steps are one call of four programs: the first packs the parameters for the optimizer, the second draws the
batches of all steps, the third takes the steps, the last unpacks the parameters. As separate programs they compile in
parallel, and the batches of all steps are drawn at once.
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from attn.nn.sharding import RULES, constrain_parameters, shardings
from attn.tasks.examples import PAD, Bucket, Example, decoder_input, example_keys, with_replaced
from attn.tasks.generated import Generated
from attn.tasks.stored import StackedBatches, Stored
from attn.training.config import Config
from attn.training.meshes import DATA, is_divided
from attn.training.metrics import Mean, cross_entropy
from attn.training.optimizers import optimizer, packing
from attn.training.placement import shapes_on
from attn.training.state import State, model_structure

_REPLACED = 2**32 - 1  # folded into an example's key for its replaced tokens; the model splits the key into fewer
_LARGEST = 1 << 24  # bytes of the batches of a call; drawing them takes a few times as much
_REPLICATED, _SHARDED = (
    PartitionSpec(),
    PartitionSpec(None, RULES["examples"]),
)  # the second for arrays [step example ...]
_STORED = StackedBatches(_REPLICATED, Example(_SHARDED, _SHARDED))


class Report(NamedTuple):
    """The loss of some steps, in nats per token, and their number of source and target tokens."""

    loss: Mean
    tokens: Float[Array, ""]


class Batches(NamedTuple):
    """The batches of K steps; only dropout is still to be drawn.

    Attributes:
      step: of each batch.
      bucket: the number of each batch's `Bucket`, to whose shape it is cut.
      examples: padded to the widest bucket.
      inputs: the tokens that the decoder reads to predict the targets.
    """

    step: Int[Array, "K"]
    bucket: Int[Array, "K"]
    examples: Example
    inputs: Int[Array, "K B T"]


_BATCHES = Batches(_REPLICATED, _REPLICATED, Example(_SHARDED, _SHARDED), _SHARDED)


class StepPrograms(NamedTuple):
    """Programs that together compute `(state, until, stored) -> (state, report)`: a call's steps, none beyond `until`.

    `stored` are the stacked batches of `Stored` data; None for generated data. Each device differentiates the loss of
    its own examples; gradients are all-reduced in one `psum`.

    Attributes:
      pack: (parameters, their average or None) -> both packed for the optimizer.
      draw: (step, stored) -> the batches of the steps from this one on.
      advance: (packed state, until, batches) -> (packed state, report); the packed state is donated.
      unpack: the inverse of `pack`.
    """

    pack: Callable
    draw: Callable[[Int[Array, ""], StackedBatches | None], Batches]
    advance: Callable[[State, Int[Array, ""], Batches], tuple[State, Report]]
    unpack: Callable

    def __call__(self, state: State, until: Int[Array, ""], stored: StackedBatches | None = None):
        [(state, report)] = self.in_parts(state, [until], stored)
        return state, report

    def in_parts(
        self, state: State, ends: Iterable[Int[Array, ""]], stored: StackedBatches | None = None
    ) -> Iterator[tuple[State, Report]]:
        """Take the same steps, but yield at each of the ascending `ends` the state, and the report of its part.

        The batches are drawn once. The parameters of a state stay valid when the next part is taken, the rest does not.
        """
        batches = self.draw(state.step, stored)
        packed = _with_parameters(state, self.pack)
        for until in ends:
            packed, report = self.advance(packed, until, batches)
            yield _with_parameters(packed, self.unpack), report


def build_step_programs(config: Config, data: Generated | Stored, mesh: Mesh) -> StepPrograms:
    """Make the programs, each jitted.

    On a mesh that divides the model only the data axis is manual: along the others the compiler adds communication.
    """
    divided = is_divided(mesh)
    pack, unpack = packing(config.optimizer, model_structure(config, data.vocabulary)[1], apart=divided)
    draw = jax.shard_map(
        _make_draw(config, data), mesh=mesh, in_specs=(_REPLICATED, stored_specs(data)), out_specs=_BATCHES
    )
    advance = jax.shard_map(
        _make_advance(config, data, pack, unpack),
        mesh=mesh,
        in_specs=(_REPLICATED, _REPLICATED, _BATCHES),
        out_specs=(_REPLICATED, _REPLICATED),
        # Kernels in Pallas's interpret mode do not pass the check, which nothing here needs.
        check_vma=False,
        axis_names={DATA} if divided else {*mesh.axis_names},
    )
    packed = unpacked = None
    if divided:  # otherwise the compiler would choose where results are
        state = shapes_on(config, data.vocabulary, mesh)
        unpacked, packed = (shardings(x, mesh) for x in (state, _packed_shapes(state, _both(pack))))
    return StepPrograms(
        _for_both(pack, packed),
        jax.jit(draw),
        jax.jit(advance, donate_argnums=0, out_shardings=packed and (packed, NamedSharding(mesh, _REPLICATED))),
        _for_both(unpack, unpacked),
    )


def arguments_of(
    programs: StepPrograms, config: Config, data: Generated | Stored, mesh: Mesh, state: State
) -> dict[str, tuple]:
    """Return the arguments of each program, as shapes with their shardings, to compile for.

    Args:
      programs: made of the same config, data and mesh.
      state: a state, or the shapes of one.
    """

    def shapes(tree, spec: PartitionSpec):
        sharding = NamedSharding(mesh, spec)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)

    def divided(tree):
        places = shardings(tree, mesh)
        return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree, places)

    count, buckets = steps_per_call(config, data), _buckets(config, data)
    rows = mesh.shape[DATA] * -(-max(bucket.size for bucket in buckets) // mesh.shape[DATA])
    number = jax.ShapeDtypeStruct((count,), jnp.int32)
    source, target = (
        jax.ShapeDtypeStruct((count, rows, max(widths)), jnp.int32)
        for widths in ((bucket.source for bucket in buckets), (bucket.target for bucket in buckets))
    )
    number, examples = shapes(number, _REPLICATED), shapes(Example(source, target), _SHARDED)
    state = divided(state)
    packed = divided(_packed_shapes(state, programs.pack))
    return {
        "pack": (state.params, state.average),
        "draw": (state.step, None if isinstance(data, Generated) else StackedBatches(number, examples)),
        "advance": (packed, state.step, Batches(number, number, examples, examples.target)),
        "unpack": (packed.params, packed.average),
    }


def steps_per_call(config: Config, data: Generated | Stored) -> int:
    """Return the largest number of steps per call.

    A call ends at every evaluation, at every checkpoint and at the last step, and holds all its batches in memory.
    """
    training = config.training
    widest = max(bucket.size * (bucket.source + 2 * bucket.target) for bucket in _buckets(config, data))
    fit = max(1, _LARGEST // (widest * jnp.dtype(jnp.int32).itemsize))
    wanted = min(training.steps_per_call, training.evaluate_every, training.checkpoint_every, training.steps)
    calls = -(-wanted // fit)  # as few as memory allows
    return -(-wanted // calls)  # so that the calls have equal size


def stored_specs(data: Generated | Stored) -> StackedBatches | None:
    """Return the sharding of stacked batches: by examples."""
    return None if isinstance(data, Generated) else _STORED


def example_loss(
    model: nnx.Module, example: Example, inputs: Int[Array, "T"], key: Array | None, *, knows_length: bool = True
) -> Report:
    """Compute the loss of predicting each token of a target from the tokens before it and the source.

    Args:
      model: the model.
      example: source and target.
      inputs: the tokens that the decoder reads: begin, then the target without its last; some may be replaced.
      key: for dropout; None for none.
      knows_length: whether the model may know the length of the answer, as in decoding.
    """
    length = jnp.sum(example.target != PAD) if knows_length else None
    logits = model(example.source, inputs, answer_length=length, key=key)
    loss = cross_entropy(logits, example.target, PAD)
    return Report(loss, jnp.sum(example.source != PAD) + loss.count)


def _for_both(change: Callable, places: State | None) -> Callable:
    """Make the jitted function that applies `change` to parameters and to their average, if there is one.

    `places` are the shardings of the results; None to leave them to the compiler.
    """
    return jax.jit(_both(change), out_shardings=places and (places.params, places.average))


def _both(change: Callable) -> Callable:
    return lambda params, average: (change(params), None if average is None else change(average))


def _with_parameters(state: State, change: Callable) -> State:
    """Return the state after applying `change` to its parameters and their average."""
    params, average = change(state.params, state.average)
    return state._replace(params=params, average=average)


def _packed_shapes(state: State, pack: Callable) -> State:
    """Return the shapes of the state after `pack`, a function of parameters and their average."""
    return jax.eval_shape(functools.partial(_with_parameters, change=pack), state)


def _buckets(config: Config, data: Generated | Stored) -> tuple[Bucket, ...]:
    """Return the shapes of batches."""
    return data.batches(config.training.batch_size, config.training.seed).buckets


def _make_draw(config: Config, data: Generated | Stored) -> Callable:
    """Make `(step, stored) -> batches`: one device's rows of the batches from a step on."""
    seed, vocabulary = config.training.seed, data.vocabulary
    source = data.batches(config.training.batch_size, seed)
    buckets = source.buckets
    count, sizes = steps_per_call(config, data), jnp.array([bucket.size for bucket in buckets])
    replace = functools.partial(with_replaced, rate=config.training.replaced_tokens, vocabulary_size=vocabulary.size)

    def inputs(target, key):
        tokens = decoder_input(target, vocabulary.begin)
        return replace(tokens, jax.random.fold_in(key, _REPLACED)) if config.training.replaced_tokens else tokens

    def batch(step, stored: StackedBatches | None) -> Batches:
        bucket, sample = (stored.bucket, None) if stored else source.draw(step)
        # Every device draws as many rows as the largest bucket needs; only the first `bucket_rows` are used.
        bucket_rows = _rows_per_device(sizes[bucket])
        rows = _rows_per_device(max(bucket.size for bucket in buckets))
        numbers = jax.lax.axis_index(DATA) * bucket_rows + jnp.arange(rows)
        keys, keys_of_replaced = example_keys(seed, step, numbers)
        examples = stored.examples if stored else jax.vmap(sample)(keys)
        batches = Batches(step, bucket, examples, jax.vmap(inputs)(examples.target, keys_of_replaced))
        # With 64-bit types XLA cannot divide a text among devices that do not divide its length.
        return jax.tree.map(lambda tokens: tokens.astype(jnp.int32), batches)

    return lambda step, stored: jax.vmap(batch)(step + jnp.arange(count), stored)


def _make_advance(config: Config, data: Generated | Stored, pack: Callable, unpack: Callable) -> Callable:
    """Make `(packed state, until, batches) -> (packed state, report)` on one device's rows of the batches."""
    differentiate = _make_differentiate(config, data)
    update_rule, averaging = optimizer(config.optimizer, config.training.steps), config.optimizer.averaging

    def advance(state: State, batch: Batches) -> tuple[State, Report]:
        gradients, report = differentiate(unpack(state.params), state.step, batch)
        # The gradients are those of the device's own rows until they are all-reduced here, once.
        gradients, report = _sum_over_devices((pack(gradients), report))
        gradients = jax.tree.map(lambda x: x / report.loss.count, gradients)
        updates, optimizer_state = update_rule.update(gradients, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        return State(params, optimizer_state, state.step + 1, averaged(state, params)), report

    def averaged(state: State, new):
        # At step t the newest parameters have weight 1 / (1 + a t): the average spans a fraction of the steps so far.
        weight = 1 / (1 + averaging * state.step)
        return jax.tree.map(lambda mean, new: mean + (new - mean) * weight, state.average, new) if averaging else None

    def call(state: State, until: Int[Array, ""], batches: Batches) -> tuple[State, Report]:
        empty = Report(Mean(jnp.zeros(()), jnp.zeros(())), jnp.zeros(()))

        def step(state, batch):
            # The batches of earlier parts of the call are skipped.
            is_next = (batch.step == state.step) & (state.step < until)
            return jax.lax.cond(is_next, advance, lambda state, _: (state, empty), state, batch)

        state, reports = jax.lax.scan(step, state, batches)
        return state, jax.tree.map(jnp.sum, reports)

    return call


def _make_differentiate(config: Config, data: Generated | Stored) -> Callable:
    """Make `(params, step, batch) -> (gradients, report)` on one device's rows of a batch, cut to its bucket."""
    graphdef, _ = model_structure(config, data.vocabulary)
    knows_length = data.vocabulary.answer_length(1) is not None

    def of_bucket(bucket: Bucket) -> Callable:
        def loss(params, step, batch: Batches):
            rows = _rows_per_device(bucket.size)
            numbers = jax.lax.axis_index(DATA) * rows + jnp.arange(rows)
            _, dropout_keys = example_keys(config.training.seed, step, numbers)
            source, target = batch.examples
            examples = Example(source[:rows, : bucket.source], target[:rows, : bucket.target])
            model = nnx.merge(graphdef, constrain_parameters(params))
            losses = jax.vmap(functools.partial(example_loss, model, knows_length=knows_length))
            report = jax.tree.map(jnp.sum, losses(examples, batch.inputs[:rows, : bucket.target], dropout_keys))
            return report.loss.sum, report

        return jax.grad(loss, has_aux=True)

    branches = [of_bucket(bucket) for bucket in _buckets(config, data)]
    return lambda params, step, batch: jax.lax.switch(batch.bucket, branches, params, step, batch)


def _sum_over_devices(tree):
    """Sum over the devices of the data axis; with other axes, XLA cannot compile the sum over a single device."""
    return tree if jax.lax.axis_size(DATA) == 1 else jax.lax.psum(tree, DATA)


def _rows_per_device(size):
    """Return the number of examples of a batch per device; the last device may have fewer."""
    return -(-size // jax.lax.axis_size(DATA))
