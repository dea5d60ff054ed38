"""Measure and change trained models. Only this file of the studies depends on the inside of models."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Collection

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, PyTree

from attn.functional import masks
from attn.inspection.capture import answer_logits
from attn.inspection.influence import influence
from attn.inspection.passes import Pass, weight_slopes
from attn.inspection.relevance import gradient_weighted, rollout_to_source
from attn.mechanisms.rows import Example, rows
from attn.nn.departures import Sides
from attn.nn.model import PAD, Cache
from attn.nn.taps import Site
from attn.runs import Run
from attn.studies.jobs import Settings, configured, name_of
from attn.tasks.examples import Questions, decoder_input
from attn.tasks.generated import Generated
from attn.training.state import initial_state, model_structure


def untrained(settings: Settings) -> Run:
    """Return the run with these settings before its first step."""
    config = configured(settings)
    graphdef, _ = model_structure(config, config.task.vocabulary)
    params = jax.jit(lambda: initial_state(config, config.task.vocabulary).params)()
    return Run(pathlib.Path(name_of(config)), config, config.task.vocabulary, graphdef, params, 0)


def exact_match(run: Run, lengths: Collection[int], each: int) -> list[float]:
    """Return the fraction of exact answers to `each` held-out strings per length, in ascending order of length."""
    metrics = run.evaluate(sorted(lengths), each).exact_match
    return [float(metrics.sum[length] / metrics.count[length]) for length in sorted(lengths)]


def count_parameters(settings: Settings) -> int:
    """Return the number of parameters of the model with these settings."""
    config = configured(settings)
    return sum(leaf.size for leaf in jax.tree.leaves(model_structure(config, config.task.vocabulary)[1]))


def match_width(settings: Settings, count: int) -> Settings:
    """Return the settings with the greatest width for which the model has at most `count` parameters."""

    def with_width(width: int) -> Settings:
        return {**settings, "model": {**settings["model"], "width": width}}

    fits, exceeds = 1, 2
    while count_parameters(with_width(exceeds)) <= count:
        fits, exceeds = exceeds, 2 * exceeds
    while exceeds - fits > 1:
        middle = (fits + exceeds) // 2
        fits, exceeds = (middle, exceeds) if count_parameters(with_width(middle)) <= count else (fits, middle)
    return with_width(fits)


def held_out(run: Run, length: int, strings: int) -> Questions:
    """Return held-out strings of one length."""
    return Generated(run.config.task).questions_of_each_length("test", [length], strings, 0)


def encode(run: Run, source: Int[Array, "S"]) -> Float[Array, "S D"]:
    """Return the output of a Transformer's encoder."""

    def program(params, source):
        length = jnp.sum(source != PAD)
        of_source = rows(len(source), total=length, example=Example(length))
        return nnx.merge(run.graphdef, params).encode(source, Sides(of_source, of_source, masks.padding(length)))[0]

    return jax.jit(program)(run.params, source)


def position_table(run: Run) -> Float[np.ndarray, "P D"]:
    """Return the learned table of positions."""
    (table,) = (leaf[...] for path, leaf in nnx.to_flat_state(run.params) if path[-1] == "table")
    return np.asarray(table, np.float64)


def without(run: Run, *, inside: str, matrix: str, head: int | None = None) -> Run:
    """Return the run with a matrix of its attention layers, or one head's part of it, set to zero.

    Without W_O an attention layer adds nothing; without W_Q all scores are zero, so all weights are equal.

    Args:
      run: a run of a Transformer.
      inside: part of the matrix's path, such as "decoder.blocks.0.cross".
      matrix: "W_Q", "W_K", "W_V" or "W_O".
      head: the head whose part is set to zero; None for all heads.
    """
    axis = 0 if matrix == "W_O" else 1  # axis of the heads: W_O is [N H D], the others are [D N H]
    index = (slice(None),) * axis + (slice(None) if head is None else head,)
    return _replace(run, inside, matrix, lambda path, value: value.at[index].set(0.0))


def restored(run: Run, original: Run, *, inside: str, matrix: str) -> Run:
    """Return the run with a matrix of its attention layers as in the original; arguments as of `without`."""
    saved = dict(nnx.to_flat_state(original.params))
    return _replace(run, inside, matrix, lambda path, value: saved[path][...])


def _replace(run: Run, inside: str, matrix: str, change: Callable) -> Run:
    """Apply `(path, value) -> value` to a matrix of the attention layers."""
    flat = [
        (path, leaf.replace(change(path, leaf[...])))
        if path[-1] == matrix and inside in ".".join(map(str, path))
        else (path, leaf)
        for path, leaf in nnx.to_flat_state(run.params)
    ]
    return dataclasses.replace(run, params=nnx.from_flat_state(flat))


def teacher_forced(function: Callable, run: Run, questions: Questions) -> PyTree:
    """Apply `function(model, source, read)`, such as the functions below, to every string.

    `read` is the decoder's input: the begin token, then the correct tokens.
    """
    sources, targets, begin = questions.sources, questions.targets, run.vocabulary.begin
    return jax.tree.map(np.asarray, _map_strings(function, run.graphdef, begin, run.params, sources, targets))


# The parameters are an argument, so that runs of equal structure share a compiled program.
@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _map_strings(function: Callable, graphdef: nnx.GraphDef, begin: int, params: nnx.State, sources, targets) -> PyTree:
    model = nnx.merge(graphdef, params)
    return jax.vmap(lambda source, target: function(model, source, decoder_input(target, begin)))(sources, targets)


def cross_weights(model: nnx.Module, source, read) -> Float[Array, "L N T S"]:
    """Return the cross-attention weights of a Transformer."""
    return model(source, read, return_weights=True)[1]["cross"]


def gradient_norms(model: nnx.Module, source, read) -> Float[Array, "S"]:
    """Return the norm of d(logits of the last symbol) / d(embedding of source token j); see `influence`.

    The last symbol is right before the target's end token, so strings must not be padded.
    """
    return influence(model, source, read, jnp.array([len(read) - 2]))[0]


def log2_likelihoods(model: nnx.Module, source, read) -> Float[Array, "n"]:
    """Return log2 q(y_t | x, y_1 ... y_{t-1}), the model's probability of each correct symbol of the answer.

    For strings of n independent symbols, each one of V, the mean over strings of n log2 V plus the sum is a lower bound
    of the bits of the answer that the decoder reads from the encoder; with one state between the two, of what the state
    holds. Strings must not be padded.
    """
    logs = jax.nn.log_softmax(model(source, read, answer_length=len(read)), axis=-1)
    return jnp.take_along_axis(logs[:-1], read[1:, None], axis=-1)[:, 0] / jnp.log(2.0)  # without the end token


def last_state(model: nnx.Module, source, read) -> Float[Array, "D"]:
    """Return the state from which a recurrent decoder starts: all that it knows of the source without attention."""
    cache, _ = model.start(source, len(read))
    return jnp.concatenate([part.ravel() for part in jax.tree.leaves(cache.own)])


def answers_without(
    model: nnx.Module, source, read
) -> tuple[Float[Array, "L N T S"], Int[Array, "T"], Int[Array, "S T"]]:
    """Return cross-attention weights, the answer, and the answer without source token j, for each j.

    A token is hidden only from the cross-attention, as if it were masked.
    """
    cache, _ = model.start(source, len(read))
    logits, _, weights = model.extend(read, cache, return_weights=True)
    hidden = jax.vmap(lambda j: model.extend(read, hide(cache, j))[0].argmax(-1))(jnp.arange(len(source)))
    return weights["cross"], logits.argmax(-1), hidden


def source_maps(model: nnx.Module, source, read) -> dict[str, Float[Array, "T S"]]:
    """Return the maps that say from which source token each answer comes, by name.

    "argmax" and "largest" are the mean and the largest of the last layer's heads of cross-attention, "rollout" follows
    all layers. "gradients" weighs the last layer by d y_t / d p[t, s], where y_t is the largest logit of step t. In the
    last layer a weight p[t, s] changes step t alone, so that one pass for the sum over t gives all of these.
    """
    weights = model(source, read, return_weights=True)[1]
    last = len(weights["cross"]) - 1
    each = Pass(answer_logits, dict(source=source, read=read, answer_length=None), None)
    slopes = weight_slopes(*nnx.split(model, nnx.Param), each, loss=_sum_of_largest)[Site("weights", "cross", last)]
    cross = weights["cross"][last]
    return {
        "argmax": cross.mean(0),
        "largest": cross.max(0),
        "rollout": rollout_to_source(weights["encoder"], weights["decoder"], weights["cross"]),
        "gradients": gradient_weighted(cross, slopes),
    }


def _sum_of_largest(logits: Float[Array, "T V"]) -> Float[Array, ""]:
    return logits.max(-1).sum()


def answers_after_another(model: nnx.Module, source, read) -> Int[Array, "T"]:
    """Return the answer at each step if the symbol read at that step is replaced: 1 by 2, any other by the one below.

    One symbol is replaced at a time. The begin token, at step 0, is not a symbol.
    """
    other = jnp.where(read == 1, 2, read - 1)
    return jax.vmap(lambda t: model(source, read.at[t].set(other[t]))[t].argmax(-1))(jnp.arange(len(read)))


def hide(cache: Cache, j: int | Int[Array, ""]) -> Cache:
    """Return a cache without the keys and values of source token j; later ones move to the front by one row."""

    def remove(rows):
        index = jnp.arange(len(rows))
        return rows[jnp.where(index < j, index, jnp.minimum(index + 1, len(rows) - 1))]

    example = dataclasses.replace(cache.example, source_length=cache.example.source_length - 1)
    return cache._replace(memory=jax.tree.map(remove, cache.memory), example=example)
