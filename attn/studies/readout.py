"""A linear probe that estimates how many bits of some symbols a vector holds, such as a recurrent network's state."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

_ITERATIONS = 100  # of L-BFGS
_PENALTIES = (1e-3, 1e-2, 1e-1, 1.0)  # times the sum of squared weights; the loss is a mean over strings, in nats


class Readings(NamedTuple):
    """Vectors, and the symbols that are to be read from them, 0 to V - 1."""

    vectors: Float[np.ndarray, "B D"]
    symbols: Int[np.ndarray, "B n"]


def linear_bits(fitted: Readings, held_out: Readings, count: int) -> Float[np.ndarray, "n"]:
    """Estimate per position how many bits of its symbol a linear probe reads from the vector.

    The probe is a multinomial logistic regression per position, q(symbol | vector), with a penalty on its weights. A
    quarter of the strings to fit decides which of some penalties is best for a position: with many numbers per vector
    and few strings, a probe with a small one reads noise.

    The result is log2 V minus its cross-entropy on held-out strings, which is a lower bound of the mutual information
    of vector and symbol when all V symbols are equally likely; below 0 if the probe does worse than a guess. For
    independent symbols the sum over positions is a lower bound of what the vector holds of all of them together.

    Args:
      fitted: what the probe is fitted to.
      held_out: what it is measured on.
      count: V.

    Source: Alain and Bengio 2017, section 3; the bound: Barber and Agakov 2003, section 2.
    """
    mean, deviation = fitted.vectors.mean(0), fitted.vectors.std(0) + 1e-6
    fitted, held_out = (each._replace(vectors=(each.vectors - mean) / deviation) for each in (fitted, held_out))
    cut = len(fitted.vectors) * 3 // 4
    used, kept = (Readings(fitted.vectors[part], fitted.symbols[part]) for part in (slice(cut), slice(cut, None)))
    probes = [_fit(*used, count, penalty) for penalty in _PENALTIES]
    # [penalty n]: on the strings that decide, and on those that are measured.
    deciding, losses = (np.array([_cross_entropy(probe, *each) for probe in probes]) for each in (kept, held_out))
    best = np.take_along_axis(losses, deciding.argmin(0)[None], axis=0)[0]
    return np.log2(count) - best / np.log(2)


def _cross_entropy(probe: tuple[Array, Array], vectors, symbols) -> Float[Array, "n"]:
    weights, bias = probe
    logits = jnp.einsum("bd,dnv->bnv", vectors, weights) + bias
    return optax.softmax_cross_entropy_with_integer_labels(logits, symbols).mean(0)


@functools.partial(jax.jit, static_argnums=2)
def _fit(
    vectors: Float[Array, "B D"], symbols: Int[Array, "B n"], count: int, penalty: Float[Array, ""] | float
) -> tuple[Float[Array, "D n V"], Float[Array, "n V"]]:
    """Return weights and bias of the probes of all positions; their losses are independent."""

    def loss(probe):
        return _cross_entropy(probe, vectors, symbols).sum() + penalty * jnp.sum(probe[0] ** 2)

    optimizer, value_and_gradient = optax.lbfgs(), optax.value_and_grad_from_state(loss)

    def step(carry, _):
        probe, state = carry
        value, gradient = value_and_gradient(probe, state=state)
        updates, state = optimizer.update(gradient, state, probe, value=value, grad=gradient, value_fn=loss)
        return (optax.apply_updates(probe, updates), state), None

    positions = symbols.shape[1]
    probe = jnp.zeros((vectors.shape[1], positions, count)), jnp.zeros((positions, count))
    (probe, _), _ = jax.lax.scan(step, (probe, optimizer.init(probe)), length=_ITERATIONS)
    return probe
