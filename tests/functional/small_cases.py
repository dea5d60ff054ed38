"""Small arrays of one head and of several, and gradients, for the tests of arguments and of semantics."""

import attention_cases as cases
import jax
import jax.numpy as jnp

T, S, H, HV = 3, 5, 2, 7
HIDDEN = 1  # the key that no query may attend to, where a test hides one


def head(dtype="float32"):
    return cases.normal((T, H), (S, H), (S, HV), dtype=dtype)


def heads(dtype="float32"):
    return cases.normal((T, 4, H), (S, 2, H), (S, 2, HV), dtype=dtype)


def gradients(call, *arrays):
    """Gradients of the sum of squares of everything finite that `call` returns."""

    def objective(*arrays):
        leaves = jax.tree.leaves(call(*arrays))
        return sum(jnp.sum(jnp.where(jnp.isfinite(x), x, 0) ** 2) for x in leaves)

    return jax.grad(objective, argnums=tuple(range(len(arrays))))(*arrays)
