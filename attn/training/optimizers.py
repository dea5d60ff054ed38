"""The optimizers by name, for `config.optimizer.name`, and the arrays into which they pack a model's parameters.

AdamW packs all parameters into one vector, so that there are fewer, larger operations. Muon packs the matrices between
hidden layers into stacks of one shape, and the other parameters into one vector, which AdamW updates.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float
from optax.contrib import MuonDimensionNumbers, muon

from attn.training.groups import AdamW

_NEWTON_SCHULZ, _ITERATIONS = (3.4445, -4.7750, 2.0315), 5  # as published


class Matrices(NamedTuple):
    """Parameters packed for Muon.

    Attributes:
      stacks: `[k m n]`, the hidden matrices with m inputs and n outputs, by "m to n".
      rest: `[r]`, all other parameters.
    """

    stacks: dict[str, Float[Array, "k m n"]]
    rest: Float[Array, "r"]


class Packing(NamedTuple):
    """Functions between a model's parameters and the arrays that the optimizer updates; each undoes the other."""

    pack: Callable[[nnx.State], Matrices | Float[Array, "p"]]
    unpack: Callable[[Matrices | Float[Array, "p"]], nnx.State]


def learning_rate(settings: AdamW, steps: int) -> optax.Schedule:
    """Return the learning rate by the number of earlier updates: a linear warm-up, then a decay or none.

    A warm-up of w updates has 1/w, 2/w, ..., 1 of the rate, so that already the first update changes parameters. After
    it "cosine" and "linear" reach zero one step after the last; "inverse" is w/t of the rate at step t, whatever the
    number of steps.
    """
    return _schedule(settings.learning_rate, settings, steps)


def _schedule(peak: float, settings: AdamW, steps: int) -> optax.Schedule:
    warmup = round(settings.warmup_fraction * steps)
    after = {
        "cosine": optax.cosine_decay_schedule(peak, max(1, steps - warmup)),
        "linear": optax.linear_schedule(peak, 0.0, max(1, steps - warmup)),
        # `join_schedules` also calls it for steps of the warm-up, with negative counts, and discards the values.
        "inverse": lambda count: peak * max(1, warmup) / (max(1, warmup) + jnp.maximum(count, 0)),
        "none": optax.constant_schedule(peak),
    }[settings.decay]
    return optax.join_schedules([lambda count: peak * (count + 1) / max(1, warmup), after], [warmup])


def optimizer(settings: AdamW, steps: int) -> optax.GradientTransformation:
    """Return the optimizer of packed parameters: clipping by the global norm, then AdamW or Muon.

    Weight decay is that of all parameters in AdamW, of the matrices alone in Muon.

    Source: Loshchilov and Hutter 2019; Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks".
    """
    rate = learning_rate(settings, steps)
    if settings.name == "adamw":
        update = optax.adamw(rate, b1=settings.beta1, b2=settings.beta2, weight_decay=settings.weight_decay)
    else:
        update = muon(
            rate,
            ns_coeffs=(_NEWTON_SCHULZ,) * _ITERATIONS,  # one entry per iteration makes a loop; a single one is unrolled
            ns_steps=_ITERATIONS,
            beta=settings.momentum,
            weight_decay=settings.weight_decay,
            adam_learning_rate=_schedule(settings.rest_learning_rate, settings, steps),
            adam_b1=settings.beta1,
            adam_b2=settings.beta2,
            muon_weight_dimension_numbers=Matrices(MuonDimensionNumbers(1, 2), None),
        )
    return optax.chain(optax.clip_by_global_norm(settings.clip_norm), update)


def packing(settings: AdamW, like: nnx.State, *, apart: bool = False) -> Packing:
    """Return the packing for an optimizer of parameters with the structure and shapes of `like`.

    With `apart`, AdamW gets the parameters as they are, so that a mesh may divide each of them.
    """
    if settings.name == "adamw":
        return _apart(like) if apart else _as_vector(like)
    leaves, structure = jax.tree.flatten(like)
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(like)]
    shapes = [matrix_shape(name, leaf.shape) for name, leaf in zip(names, leaves)]
    stacked: dict[str, list[int]] = {}  # indices of the leaves of each stack
    for i, shape in enumerate(shapes):
        if shape is not None:
            stacked.setdefault("{} to {}".format(*shape), []).append(i)
    rest = [i for i, shape in enumerate(shapes) if shape is None]
    rest_packing = _as_vector([leaves[i] for i in rest])

    def pack(params: nnx.State) -> Matrices:
        arrays = jax.tree.leaves(params)
        stacks = {name: jnp.stack([arrays[i].reshape(shapes[i]) for i in indices]) for name, indices in stacked.items()}
        return Matrices(stacks, rest_packing.pack([arrays[i] for i in rest]))

    def unpack(packed: Matrices) -> nnx.State:
        arrays = dict(zip(rest, rest_packing.unpack(packed.rest)))
        for name, indices in stacked.items():
            arrays |= {i: packed.stacks[name][k].reshape(leaves[i].shape) for k, i in enumerate(indices)}
        return jax.tree.unflatten(structure, [arrays[i] for i in range(len(leaves))])

    return Packing(pack, unpack)


def matrix_shape(name: str, shape: tuple[int, ...]) -> tuple[int, int] | None:
    """Return (inputs, outputs) of a parameter that is a matrix between hidden layers; None for other parameters.

    These are the kernels and the parameters called W_...; not embeddings, tables, the matrix of the logits, or vectors.
    With three axes, as for heads, `[in heads out]`, the first is the input; for W_O, `[heads in out]`, the first two.
    """
    inner = "W_" in name or ("kernel" in name and "output" not in name)
    if not inner or len(shape) < 2:
        return None
    inputs = math.prod(shape[:-1]) if "W_O" in name else shape[0]
    return inputs, math.prod(shape) // inputs


def _apart(like) -> Packing:
    """Return the packing that leaves parameters as they are."""

    def same(tree):
        return jax.tree.unflatten(jax.tree.structure(like), jax.tree.leaves(tree))

    return Packing(same, same)


def _as_vector(like) -> Packing:
    """Return the packing into one vector."""
    leaves, structure = jax.tree.flatten(like)
    ends = [0]
    for leaf in leaves:
        ends.append(ends[-1] + math.prod(leaf.shape))

    def unpack(vector):
        parts = [vector[start:end].reshape(leaf.shape) for start, end, leaf in zip(ends, ends[1:], leaves)]
        return jax.tree.unflatten(structure, parts)

    return Packing(lambda tree: ravel_pytree(tree)[0], unpack)
