"""The influence of each source token on the answer, by gradients: for models with or without attention."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int


def influence(
    model: nnx.Module, source: Int[Array, "S"], read: Int[Array, "T"], steps: Int[Array, "R"]
) -> Float[Array, "R S"]:
    """Compute the Frobenius norm of the Jacobian `[V D]` d(logits of step t) / d(embedding of source token j).

    Args:
      model: any `attn.nn.model.Model`.
      source: `[S]` tokens.
      read: `[T]` tokens that the decoder reads, the begin token first.
      steps: `[R]`, the steps t of the decoder.

    Source: gradients over a distance as a measure of memory: Bengio et al. 1994; Pascanu et al. 2013.
    """
    shift = jnp.zeros_like(model.source_vectors(source))

    def logits(shift):
        return model(source, read, answer_length=len(read), shift=shift)

    def of_step(step):
        jacobian = jax.jacrev(lambda shift: logits(shift)[step])(shift)  # [V S D]
        return jnp.sqrt(jnp.sum(jacobian**2, axis=(0, 2)))

    return jax.lax.map(of_step, steps)
