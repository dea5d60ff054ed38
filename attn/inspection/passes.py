"""One pass of a model over an input: what interventions need to know of runs and of pretrained models alike."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from attn.inspection.edits import Add, Keep, sizes_of
from attn.nn.taps import Site, Tap, stacks, tapped

Loss = Callable[[Float[Array, "T V"]], Float[Array, ""]]
NO_TOKEN = -1  # the label of a row whose token is not known


@dataclasses.dataclass(frozen=True)
class Pass:
    """One pass of a model over one input.

    Attributes:
      call: `(model, inputs) -> [T V]`, the logits, or the last hidden state of a model without logits. A function of a
        module, since compiled programs are found again by it.
      inputs: arrays of the input, by name; None for an optional one that is not there.
      labels: `[T]`, the token of the model's own answer in each row of the logits, `NO_TOKEN` for rows without one; for
        a language model the next token of the text. None of a model without logits.
    """

    call: Callable[[nnx.Module, Mapping[str, Any]], Float[Array, "T V"]]
    inputs: Mapping[str, Any]
    labels: Int[Array, "T"] | None


@runtime_checkable
class Inspectable(Protocol):
    """A model with parameters that interventions can change: `attn.runs.Run`, `attn.pretrained.Pretrained`."""

    @property
    def graphdef(self) -> nnx.GraphDef:
        """The structure of the model."""

    @property
    def params(self) -> nnx.State:
        """Its parameters."""

    def with_graphdef(self, graphdef: nnx.GraphDef) -> "Inspectable":
        """Return the same with another structure for the same parameters."""

    def full_pass(self, given, answer=None) -> Pass:
        """Return the pass over an input and the answer to it, None for the model's own."""


class Kinds(NamedTuple):
    """The attention of a model.

    Attributes:
      sizes: numbers of layers and heads, by kind.
      stacks: numbers of layers, by kind of the self-attention.
      after_source: kinds whose maps have rows for the answer alone, in a text that begins with the source.
    """

    sizes: dict[str, tuple[int, int]]
    stacks: dict[str, int]
    after_source: frozenset[str]


def kinds_of(model: Inspectable) -> Kinds:
    """Describe the attention of a model.

    Raises:
      ValueError: not a model, or it has no attention.
    """
    if not isinstance(model, Inspectable):
        raise ValueError(f"model: got {type(model).__name__}, must be a run (attn.load) or of attn.pretrained.load")
    merged = nnx.merge(model.graphdef, model.params)
    found = stacks(merged)
    after = (name for name, rows, columns in getattr(merged, "maps", ()) if (rows, columns) == ("answer", "both"))
    return Kinds(sizes_of(found), {stack.kind: len(stack.blocks) for stack in found}, frozenset(after))


def run_with(graphdef: nnx.GraphDef, params: nnx.State, each: Pass, *taps: Tap) -> Float[Array, "T V"]:
    """Compute the logits of a pass with taps in the model; inside of `jax.jit`."""
    for tap in taps:
        graphdef = tapped(graphdef, params, tap)
    return each.call(nnx.merge(graphdef, params), each.inputs)


def kept(
    graphdef: nnx.GraphDef, params: nnx.State, each: Pass, wanted: Callable[[Site], bool]
) -> tuple[Float[Array, "T V"], dict[Site, Array]]:
    """Compute the logits of a pass and the values at the sites that are wanted; inside of `jax.jit`."""
    keep = Keep(wanted)
    return run_with(graphdef, params, each, keep), keep.values


def shapes_of(model: Inspectable, each: Pass, wanted: Callable[[Site], bool]) -> dict[Site, jax.ShapeDtypeStruct]:
    """Return the shapes of the values of a pass, without computing them."""
    return jax.eval_shape(lambda params: kept(model.graphdef, params, each, wanted)[1], model.params)


def log_probability(labels: Int[Array, "T"], logits: Float[Array, "T V"]) -> Float[Array, ""]:
    """Compute the log-probability of tokens, the sum over rows that have one."""
    log_probs = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.maximum(labels, 0)[:, None], axis=1)[:, 0]
    return jnp.sum(jnp.where(labels == NO_TOKEN, 0.0, log_probs))


def loss_of(loss: Loss | None, labels: Int[Array, "T"] | None, logits: Float[Array, "T V"]) -> Float[Array, ""]:
    """Compute a user's loss of logits, or minus the log-probability of the model's own answer.

    Raises:
      ValueError: the loss is not a scalar.
    """
    if loss is None:
        return -log_probability(labels, logits)
    value = jnp.asarray(loss(logits))
    if value.shape != () or not jnp.issubdtype(value.dtype, jnp.floating):
        raise ValueError(f"loss: returned {value.dtype}{[*value.shape]}, must be one real number of logits [T V]")
    return value


@functools.partial(jax.jit, static_argnames=("graphdef", "loss"))
def weight_slopes(
    graphdef: nnx.GraphDef, params: nnx.State, each: Pass, *, loss: Loss | None
) -> dict[Site, Float[Array, "N T S"]]:
    """Compute d loss / d p of the attention weights p of each layer: see `attn.interventions.weight_gradients`."""
    _, values = jax.eval_shape(lambda: kept(graphdef, params, each, lambda site: site.value == "weights"))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), values)

    def of(shifts):
        return loss_of(loss, each.labels, run_with(graphdef, params, each, Add(shifts)))

    return jax.grad(of)(zeros)


def check_loss(loss, each: Pass, name: str = "loss"):
    """Check that a loss is a function, or that the model has an answer whose probability is one.

    Raises:
      ValueError: neither.
    """
    if loss is None and each.labels is None:
        raise ValueError(f"{name}: none given, must be a function of the last hidden state: the model has no logits")
    if loss is not None and not callable(loss):
        raise ValueError(f"{name}: got {loss!r}, must be a function of the logits [T V] that returns a number")


# A pass is an argument of compiled programs: its arrays are traced, its function is a part of the program's key.
jax.tree_util.register_dataclass(Pass, ["inputs", "labels"], ["call"])
