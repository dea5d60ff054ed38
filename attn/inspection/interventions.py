"""Interventions: remove heads, replace weights, differentiate with respect to weights, exchange values of two inputs.

Each function takes a run (`attn.load`) or a pretrained model (`attn.pretrained.load`), also of a model that is
registered from outside of the package, and never changes it. An input is what the model's `look` takes: a text such as
"3 1 4 1 5" for a run; for a pretrained model a text, its tokens as numbers, or a picture.

    changed = attn.interventions.ablate(run, [("cross", 0, 2)])
    changed.predict(["3 1 4 1 5"]), changed.evaluate(), changed.look("3 1 4 1 5")

A head is named by its kind, its layer and its number, both counted from 0: see `Head`.
"""

import functools
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from attn.inspection import passes
from attn.inspection.checks import (
    HeadLike,
    check_to,
    checked_heads,
    checked_states,
    checked_weights,
    chosen_rows,
)
from attn.inspection.edits import Ablate, AblateSome, EditWeights, Head, Put, Replace, by_kind, one_hot_masks
from attn.inspection.passes import Inspectable, Loss, Pass, check_loss, kinds_of, loss_of
from attn.nn.taps import Edit, Site, Tap, tapped
from attn.tasks.examples import Questions
from attn.training.decoding import confirmed

__all__ = [
    "Head",
    "Patched",
    "ablate",
    "edit",
    "head_effects",
    "loss_effects",
    "patch",
    "patch_effects",
    "replace",
    "weight_gradients",
]

M = TypeVar("M", bound=Inspectable)
_AT_ONCE = 16  # changed passes that are computed together
_BATCH = 256  # held-out strings per call


class Patched(NamedTuple):
    """The logits of a patched pass, `[T V]` each.

    Attributes:
      before: of the target, as it is.
      patched: of the target with values of the source in it.
      source: of the source.
    """

    before: Float[np.ndarray, "T V"]
    patched: Float[np.ndarray, "T V"]
    source: Float[np.ndarray, "T V"]


def edit(model: M, function: Edit) -> M:
    """Return the model with all attention weights changed by a function `(kind, layer, weights [N T S]) -> weights`.

    In decoding with a cache the function gets the row of one token at a time, with columns for tokens to come.

    Raises:
      ValueError: not a model with attention, or not a function.
    """
    kinds_of(model)
    if not callable(function):
        raise ValueError(f"function: got {function!r}, must be a function (kind, layer, weights [N T S]) -> weights")
    return _with_tap(model, EditWeights(function))


def ablate(model: M, heads: Iterable[HeadLike], *, to: str = "zero") -> M:
    """Return the model without some heads.

    Args:
      model: a run or a pretrained model.
      heads: for example [("cross", 0, 2)].
      to: "zero" sets the weights to 0, so that the output of the head is 0; "mean" makes them equal over all that a
        query may attend to, so that its output is the mean of the values.

    Raises:
      ValueError: a head that the model does not have, or another `to`.

    Source: Michel et al. 2019, section 2.3; equal weights: the walkthrough of this project.
    """
    kinds = kinds_of(model)
    check_to(to)
    return _with_tap(model, Ablate(frozenset(checked_heads(heads, kinds)), to))


def replace(model: M, weights: Mapping[HeadLike, Any]) -> M:
    """Return the model with the weights of some heads replaced.

    Args:
      model: a run or a pretrained model.
      weights: by head, an array `[T S]` with the rows and columns of the maps that `look` returns, or a function of the
        weights `[T S]` to new ones. Rows that an array does not have keep their weights; columns get 0. So an array for
        one input also serves decoding with a cache. A function gets the rows that are computed: in decoding, one.

    Raises:
      ValueError: a head that the model does not have, or weights of a wrong shape or with NaN.
    """
    kinds = kinds_of(model)
    if not isinstance(weights, Mapping):
        raise ValueError(f"weights: got {type(weights).__name__}, must be a mapping from heads to arrays or functions")
    heads = checked_heads(weights, kinds)
    new = {head: checked_weights(head, each) for head, each in zip(heads, weights.values())}
    return _with_tap(model, Replace(new, kinds.after_source))


def weight_gradients(
    model: Inspectable, given, *, loss: Loss | None = None, answer=None
) -> dict[str, Float[np.ndarray, "L N T S"]]:
    """Compute d loss / d p of every attention weight p, in one pass over an input and the model's answer to it.

    The weights count as free: p + e with all other weights of the layer as they are. Weights of later layers follow.

    Args:
      model: a run or a pretrained model.
      given: the input.
      loss: a function of the logits `[T V]` to a number; None for minus the log-probability of the model's own answer,
        for a language model of the next tokens. A new function is compiled again.
      answer: that is read; None for the model's own.

    Returns:
      By kind, in the shapes of the maps of `look`.

    Source: gradients of attention weights as relevance: Chefer et al. 2021, section 3.
    """
    kinds = kinds_of(model)
    each = model.full_pass(given, answer)
    check_loss(loss, each)
    slopes = passes.weight_slopes(model.graphdef, model.params, each, loss=loss)
    gradients = {}
    for kind, (num_layers, _) in kinds.sizes.items():
        stacked = np.stack([np.asarray(slopes[Site("weights", kind, layer)]) for layer in range(num_layers)])
        gradients[kind] = stacked[:, :, -len(each.labels) :] if kind in kinds.after_source else stacked
    return gradients


def patch(
    model: Inspectable,
    source,
    target,
    *,
    states: Collection[tuple[str, int]] = (),
    heads: Iterable[HeadLike] = (),
    weights: Iterable[HeadLike] = (),
    positions: Sequence[int] | None = None,
    answer=None,
) -> Patched:
    """Run the model on the target with values in it that it computed on the source.

    Args:
      model: a run or a pretrained model.
      source, target: inputs with equally many tokens.
      states: outputs of blocks, as (stack, layer): ("encoder", 0) is the output of the encoder's first block.
      heads: heads whose outputs are exchanged.
      weights: heads whose attention weights are exchanged; they are then applied to the values of the target.
      positions: of tokens, from 0; for heads and weights, of queries. Where source and answer are one text, the answer
        follows the source. None for all.
      answer: that both read; None for the model's own answer to each, which must then be equally long.

    Raises:
      ValueError: nothing to exchange, a place that the model does not have, or inputs of different lengths.

    Source: Vig et al. 2020, section 3; Meng et al. 2022, section 2.
    """
    kinds = kinds_of(model)
    wanted = {Site("hidden", *place): None for place in checked_states(states, kinds)}
    for value, named in (("heads", heads), ("weights", weights)):
        for head in checked_heads(named, kinds, value):
            site = Site(value, head.kind, head.layer)
            wanted[site] = [*(wanted.get(site) or ()), head.head]
    if not wanted:
        raise ValueError("patch: got nothing to exchange; give states=, heads= or weights=")
    of_source, of_target = _two_passes(model, source, target, answer)
    shapes = passes.shapes_of(model, of_target, lambda site: site in wanted)
    chosen = {site: chosen_rows(site, shapes[site].shape, numbers, positions) for site, numbers in wanted.items()}
    return Patched(*jax.device_get(_patched(model.graphdef, model.params, of_source, of_target, chosen)))


@functools.partial(jax.jit, static_argnames=("graphdef",))
def _patched(graphdef: nnx.GraphDef, params: nnx.State, source: Pass, target: Pass, chosen) -> tuple[Array, ...]:
    of_source, values = passes.kept(graphdef, params, source, lambda site: site in chosen)
    before = passes.run_with(graphdef, params, target)
    return before, passes.run_with(graphdef, params, target, Put(values, chosen)), of_source


def patch_effects(
    model: Inspectable, source, target, *, measure: Loss | None = None, answer=None
) -> dict[str, Float[np.ndarray, "L T"]]:
    """Compute the effect of each hidden state of the source in the target: a causal trace.

    The effect of (layer, position) is measure(target with this one state of the source) - measure(target).

    Args:
      model, source, target, answer: as of `patch`.
      measure: a function of the logits `[T V]` to a number; None for the log-probability of the source's answer.

    Returns:
      By stack, `[L T]`.

    Source: the indirect effect of Meng et al. 2022, section 2.1.
    """
    kinds = kinds_of(model)
    of_source, of_target = _two_passes(model, source, target, answer)
    check_loss(measure, of_source, "measure")
    stacks = tuple(kinds.stacks.items())
    effects = _traced(model.graphdef, model.params, of_source, of_target, loss=measure, kinds=stacks)
    return {kind: np.asarray(effect) for kind, effect in effects.items()}


@functools.partial(jax.jit, static_argnames=("graphdef", "loss", "kinds"))
def _traced(graphdef, params, source: Pass, target: Pass, *, loss: Loss | None, kinds) -> dict[str, Array]:
    """Compute the effects of all states, by one program per stack."""
    _, values = passes.kept(graphdef, params, source, lambda site: site.value == "hidden")

    def measure(*taps: Tap) -> Array:
        logits = passes.run_with(graphdef, params, target, *taps)
        return passes.log_probability(source.labels, logits) if loss is None else loss_of(loss, None, logits)

    before, effects = measure(), {}
    for kind, num_layers in kinds:
        length = len(values[Site("hidden", kind, 0)])

        def of_state(number, kind=kind, num_layers=num_layers, length=length):
            at = number == jnp.arange(num_layers * length).reshape(num_layers, length, 1)
            return measure(Put(values, {Site("hidden", kind, layer): at[layer] for layer in range(num_layers)}))

        measured = jax.lax.map(of_state, jnp.arange(num_layers * length), batch_size=_AT_ONCE)
        effects[kind] = measured.reshape(num_layers, length) - before
    return effects


def loss_effects(
    model: Inspectable, given, *, loss: Loss | None = None, to: str = "zero", answer=None
) -> dict[str, Float[np.ndarray, "L N"]]:
    """Compute by how much the loss on one input rises without each head, all in one program.

    Args:
      model, given, loss, answer: as of `weight_gradients`.
      to: as of `ablate`.
    """
    kinds = kinds_of(model)
    check_to(to)
    each = model.full_pass(given, answer)
    check_loss(loss, each)
    losses = _losses(model.graphdef, model.params, each, one_hot_masks(kinds.sizes), loss=loss, to=to)
    return by_kind(np.asarray(losses[1:] - losses[0]), kinds.sizes)


@functools.partial(jax.jit, static_argnames=("graphdef", "loss", "to"))
def _losses(graphdef, params, each: Pass, masks, *, loss: Loss | None, to: str) -> Float[Array, "heads"]:
    def without(removed):
        return loss_of(loss, each.labels, passes.run_with(graphdef, params, each, AblateSome(removed, to)))

    return jax.lax.map(without, masks, batch_size=_AT_ONCE)


def head_effects(
    run: Inspectable, lengths: Sequence[int] | None = None, *, examples: int = 20, to: str = "zero"
) -> dict[str, Float[np.ndarray, "L N"]]:
    """Compute the change in exact match on held-out strings when each head is removed, all in one program.

    It is what `ablate(run, [head]).evaluate(lengths, examples)` finds, minus the same of the run. An answer is not
    decoded but checked in one pass: see `attn.training.decoding.confirmed`.

    Args:
      run: a trained run.
      lengths: of the sources in tokens; None for those of training.
      examples: largest number per length.
      to: as of `ablate`.

    Returns:
      By kind; -1 where every answer is right with the head and wrong without it.

    Raises:
      ValueError: not a run, or lengths or numbers that it does not have.

    Source: Michel et al. 2019, section 3.2.
    """
    kinds = kinds_of(run)
    check_to(to)
    if not hasattr(run, "questions"):
        raise ValueError(f"run: got {type(run).__name__}, must be a run: only its held-out strings have right answers")
    questions = run.questions(lengths, examples)
    masks = one_hot_masks(kinds.sizes)
    exact = _exact(run, questions, lambda *rows: _confirmed(run, masks, to, *rows))  # [heads B]
    return by_kind(exact[1:].mean(axis=1) - exact[0].mean(), kinds.sizes)


def _exact(run, questions: Questions, check) -> np.ndarray:
    """Return which questions have an exact answer, for each mask: any of the accepted answers counts."""
    sources, targets, found = questions.sources[questions.source_rows], questions.targets, []
    for first in range(0, len(targets), _BATCH):
        rows = sources[first : first + _BATCH], targets[first : first + _BATCH]
        missing = ((0, min(_BATCH, len(targets)) - len(rows[0])), (0, 0))  # one shape, so that one program serves all
        found.append(np.asarray(check(*(np.pad(each, missing) for each in rows)))[:, : len(rows[0])])
    starts = np.flatnonzero(np.diff(questions.source_rows, prepend=-1))
    return np.logical_or.reduceat(np.concatenate(found, axis=1), starts, axis=1)


def _confirmed(run, masks, to: str, sources, targets) -> Array:
    return _confirmed_by_mask(run.graphdef, run.params, masks, sources, targets, vocabulary=run.vocabulary, to=to)


@functools.partial(jax.jit, static_argnames=("graphdef", "vocabulary", "to"))
def _confirmed_by_mask(graphdef, params, masks, sources, targets, *, vocabulary, to: str) -> Array:
    def without(removed):
        model = nnx.merge(tapped(graphdef, params, AblateSome(removed, to)), params)
        return confirmed(model, vocabulary, sources, targets)

    return jax.lax.map(without, masks)


def _with_tap(model: M, tap: Tap) -> M:
    return model.with_graphdef(tapped(model.graphdef, model.params, tap))


def _two_passes(model: Inspectable, source, target, answer) -> tuple[Pass, Pass]:
    """Return the passes over two inputs.

    Raises:
      ValueError: they have different lengths.
    """
    both = model.full_pass(source, answer), model.full_pass(target, answer)
    for name in both[0].inputs:
        one, other = (each.inputs[name] for each in both)
        if jnp.shape(one) != jnp.shape(other):
            hint = "; give answer=, which both read" if name in ("read", "decoder_input_ids") else ""
            shapes = f"{[*jnp.shape(one)]} for the source and {[*jnp.shape(other)]} for the target"
            raise ValueError(f"{name}: got shapes {shapes}, must be equal to exchange values{hint}")
    return both
