"""The optimizers by name, for `config.optimizer.name`, and the arrays in which they hold a model's parameters.

AdamW holds all parameters as one vector: fewer, larger operations. Muon holds the matrices between hidden layers as
stacks of one shape, and the other parameters as one vector, which it leaves to AdamW.
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
    """Parameters as Muon holds them.

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

    A warm-up of w updates has 1/w, 2/w, ..., 1 of the rate, so that the first update is one. After it "cosine" and
    "linear" fall to zero behind the last step; "inverse" is w/t of the rate at step t, wherever the last step may be.
    """
    return _schedule(settings.learning_rate, settings, steps)


def _schedule(peak: float, settings: AdamW, steps: int) -> optax.Schedule:
    warmup = round(settings.warmup_fraction * steps)
    after = {
        "cosine": optax.cosine_decay_schedule(peak, max(1, steps - warmup)),
        "linear": optax.linear_schedule(peak, 0.0, max(1, steps - warmup)),
        # It is asked for steps of the warm-up as well, which count as negative, though not for what it answers.
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
            ns_coeffs=(_NEWTON_SCHULZ,) * _ITERATIONS,  # of each: a loop, where one for all would be unrolled
            ns_steps=_ITERATIONS,
            beta=settings.momentum,
            weight_decay=settings.weight_decay,
            adam_learning_rate=_schedule(settings.rest_learning_rate, settings, steps),
            adam_b1=settings.beta1,
            adam_b2=settings.beta2,
            muon_weight_dimension_numbers=Matrices(MuonDimensionNumbers(1, 2), None),
        )
    return optax.chain(optax.clip_by_global_norm(settings.clip_norm), update)


def packing(settings: AdamW, like: nnx.State) -> Packing:
    """Return the packing of parameters of this structure and these shapes for an optimizer."""
    if settings.name == "adamw":
        return _as_vector(like)
    leaves, structure = jax.tree.flatten(like)
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(like)]
    shapes = [matrix_shape(name, leaf.shape) for name, leaf in zip(names, leaves)]
    places: dict[str, list[int]] = {}  # of the leaves of each stack
    for place, shape in enumerate(shapes):
        if shape is not None:
            places.setdefault("{} to {}".format(*shape), []).append(place)
    others = [place for place, shape in enumerate(shapes) if shape is None]
    of_rest = _as_vector([leaves[place] for place in others])

    def pack(params: nnx.State) -> Matrices:
        arrays = jax.tree.leaves(params)
        stacks = {
            name: jnp.stack([arrays[place].reshape(shapes[place]) for place in some]) for name, some in places.items()
        }
        return Matrices(stacks, of_rest.pack([arrays[place] for place in others]))

    def unpack(packed: Matrices) -> nnx.State:
        arrays = dict(zip(others, of_rest.unpack(packed.rest)))
        for name, some in places.items():
            arrays |= {place: packed.stacks[name][k].reshape(leaves[place].shape) for k, place in enumerate(some)}
        return jax.tree.unflatten(structure, [arrays[place] for place in range(len(leaves))])

    return Packing(pack, unpack)


def matrix_shape(name: str, shape: tuple[int, ...]) -> tuple[int, int] | None:
    """Return (inputs, outputs) of a parameter that is a matrix between hidden layers; None for another one.

    These are the kernels and the parameters called W_...; not embeddings, tables, the matrix of the logits, or vectors.
    Of three axes, as of heads, `[in heads out]`, the first is the input, but of W_O, `[heads in out]`, the first two.
    """
    inner = "W_" in name or ("kernel" in name and "output" not in name)
    if not inner or len(shape) < 2:
        return None
    inputs = math.prod(shape[:-1]) if "W_O" in name else shape[0]
    return inputs, math.prod(shape) // inputs


def _as_vector(like) -> Packing:
    leaves, structure = jax.tree.flatten(like)
    ends = [0]
    for leaf in leaves:
        ends.append(ends[-1] + math.prod(leaf.shape))

    def unpack(vector):
        parts = [vector[start:end].reshape(leaf.shape) for start, end, leaf in zip(ends, ends[1:], leaves)]
        return jax.tree.unflatten(structure, parts)

    return Packing(lambda tree: ravel_pytree(tree)[0], unpack)
