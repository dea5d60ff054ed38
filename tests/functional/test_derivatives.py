"""The derivatives of a function in three forms, each checked against the same function in ordinary JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn.functional.derivatives import Forms, differentiable

X, Y = jnp.array([0.3, -1.2, 0.7]), jnp.array([1.1, 0.4, -0.6])
INTEGERS = jnp.array([2, 0, 1])


def plain(inputs, fixed):
    x, y = inputs
    (order,) = fixed
    return [jnp.sin(x) * y[order], jnp.sum(x * x * y, keepdims=True)]


def no_derivative(primals, tangents):
    raise AssertionError("a kernel was differentiated")


def counted():
    """The function, whose value and pullback count their calls and have no derivative of JAX's."""
    calls = []

    def opaque(name, function, *arguments):
        calls.append(name)
        without_derivative = jax.custom_jvp(function)
        without_derivative.defjvp(no_derivative)
        return without_derivative(*arguments)

    def value(inputs, fixed):
        return opaque("value", plain, inputs, fixed)

    def pullback(inputs, fixed, results, cotangents, wanted):
        def pulled(inputs, fixed, cotangents):
            every = jax.vjp(lambda inputs: plain(inputs, fixed), inputs)[1](cotangents)[0]
            return [x for x, is_wanted in zip(every, wanted) if is_wanted]

        np.testing.assert_equal([x.shape for x in results], [x.shape for x in cotangents])
        return opaque(("pullback", wanted), pulled, inputs, fixed, cotangents)

    return differentiable(Forms(value, plain, pullback)), calls


def scalar(function):
    def of(x, y):
        first, second = function([x, y], [INTEGERS])
        return jnp.sum(jnp.cos(first)) + jnp.sum(second**2)

    return of


def against(direction):
    """Reverse over reverse: the gradient of a product with the gradient."""
    return lambda f: jax.grad(lambda x, y: jnp.vdot(jax.grad(f)(x, y), direction), (0, 1))


MODES = {
    "value": (lambda f: f, {"value"}),
    "reverse": (lambda f: jax.grad(f, (0, 1)), {"value", ("pullback", (True, True))}),
    "reverse in one input": (lambda f: jax.grad(f, 1), {"value", ("pullback", (False, True))}),
    "forward": (lambda f: jax.jacfwd(f, (0, 1)), {"value"}),
    "forward over reverse": (jax.hessian, {"value", ("pullback", (True, False))}),
    "reverse over reverse": (against(Y), {"value", ("pullback", (True, False)), ("pullback", (True, True))}),
    "reverse over forward": (lambda f: jax.jacrev(jax.jacfwd(f, 1), 0), None),
    "third order": (lambda f: jax.jacfwd(jax.hessian(f)), None),
    "a batch of gradients": (
        lambda f: lambda x, y: jax.vmap(jax.grad(f, (0, 1)), (0, None))(jnp.stack([x, 2 * x]), y),
        {"value", ("pullback", (True, True))},
    ),
    "the gradient of a batch": (
        lambda f: jax.grad(lambda x, y: jnp.sum(jax.vmap(f, (0, None))(jnp.stack([x, 2 * x]), y)), (0, 1)),
        {"value", ("pullback", (True, True))},
    ),
    "a batch along the last axis": (
        lambda f: lambda x, y: jax.vmap(jax.grad(f, (0, 1)), (1, 1))(jnp.stack([x, x + y], 1), jnp.stack([y, x], 1)),
        {"value", ("pullback", (True, True))},
    ),
    "checkpointed": (lambda f: jax.grad(jax.checkpoint(f), (0, 1)), {"value", ("pullback", (True, True))}),
    "scanned": (
        lambda f: jax.grad(lambda x, y: jax.lax.scan(lambda c, _: (c + f(x * c, y), None), 0.5, None, length=3)[0]),
        {"value", ("pullback", (True, False))},
    ),
}


@pytest.mark.parametrize("compile_", [jax.jit, lambda f: f], ids=["jitted", "plain"])
@pytest.mark.parametrize("mode", MODES)
def test_every_derivative_is_right_and_runs_the_kernels_where_it_can(mode, compile_):
    transform, kernels = MODES[mode]
    function, calls = counted()
    with jax.enable_x64(True):
        x, y = X.astype(float), Y.astype(float)
        found = compile_(transform(scalar(function)))(x, y)
        expected = transform(scalar(plain))(x, y)
    assert kernels is None or set(calls) == kernels
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-13, atol=1e-13)


def test_a_gradient_does_not_trace_the_ordinary_form():
    def like(inputs, fixed):
        raise AssertionError("traced")

    def pullback(inputs, fixed, results, cotangents, wanted):
        return [cotangents[0] * 2]

    double = differentiable(Forms(lambda inputs, fixed: [inputs[0] * 2], like, pullback))
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(double([x], [])[0])))(X)
    np.testing.assert_array_equal(gradient, 2 * np.ones(3))
