"""Every derivative of a function that a kernel computes: reverse mode by a kernel, all others by ordinary JAX.

A kernel has no derivative of its own, and `jax.custom_vjp` would allow reverse mode alone. Here a function is given in
three forms: `value`, a kernel; `like`, the same function in ordinary JAX, such as the recurrences of `blockwise`; and
`pullback`, a kernel for its reverse mode. Its tangent is one primitive, which is linear in the tangents of the inputs:

    forward mode        evaluates the primitive: `jax.jvp` of `like`
    reverse mode        transposes the primitive: `pullback`
    second order        differentiates the primitive or `pullback`, each by means of `like`
    a batch             is `jax.vmap` of each form

So a gradient runs the two kernels; `like` is not even traced.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array


@dataclasses.dataclass(frozen=True, eq=False)
class Forms:
    """A function of inputs and of fixed arrays, which have no derivative, in three forms. They capture no traced array.

    Attributes:
      value: (inputs, fixed) -> results; lists of arrays, and a tree of arrays `fixed`.
      like: the same function in ordinary JAX.
      pullback: (inputs, fixed, results, cotangents, wanted) -> one cotangent per wanted input; `wanted` holds one bool
        per input.
    """

    value: Callable
    like: Callable
    pullback: Callable


def differentiable(forms: Forms) -> Callable:
    """Return the function (inputs, fixed) -> results with every derivative in its inputs."""

    @jax.custom_jvp
    def call(inputs: list[Array], fixed):
        return list(forms.value(inputs, fixed))

    @functools.partial(call.defjvp, symbolic_zeros=True)
    def _(primals, tangents):
        results = call(*primals)
        is_wanted = tuple(not isinstance(tangent, SymbolicZero) for tangent in tangents[0])
        moving = [tangent for tangent, wanted in zip(tangents[0], is_wanted) if wanted]
        if not moving:
            return results, list(map(jnp.zeros_like, results))
        residuals, structure = jax.tree.flatten((*primals, results))
        point = _TangentMap(
            functools.partial(_push, forms, is_wanted, structure),
            functools.partial(_pull, forms, is_wanted, structure),
            len(residuals),
            tuple(jax.typeof(x) for x in results),
        )
        return results, _tangent.bind(*residuals, *moving, point=point)

    return call


def _push(forms: Forms, is_wanted, structure, residuals: Sequence[Array], tangents: Sequence[Array]) -> list[Array]:
    """Map tangents of the wanted inputs to those of the results."""
    inputs, fixed, _ = structure.unflatten(residuals)
    function, moving = _of_wanted(forms, is_wanted, inputs, fixed)
    return jax.jvp(function, moving, list(tangents))[1]


def _pull(forms: Forms, is_wanted, structure, residuals: Sequence[Array], cotangents: Sequence[Array]) -> list[Array]:
    """Map cotangents of the results to those of the wanted inputs."""

    @jax.custom_jvp
    def by_kernel(inputs, cotangents, fixed, results):
        return list(forms.pullback(inputs, fixed, results, cotangents, is_wanted))

    @by_kernel.defjvp
    def _(primals, tangents):
        inputs, cotangents, fixed, _ = primals

        def like(inputs, cotangents):
            function, wanted = _of_wanted(forms, is_wanted, inputs, fixed)
            return list(jax.vjp(function, *wanted)[1](list(cotangents)))

        # The results are functions of the inputs, so `like` has their tangents already.
        return by_kernel(*primals), jax.jvp(like, (inputs, cotangents), tangents[:2])[1]

    inputs, fixed, results = structure.unflatten(residuals)
    return by_kernel(inputs, list(cotangents), fixed, results)


def _of_wanted(forms: Forms, is_wanted, inputs: list, fixed) -> tuple[Callable, list]:
    """Return `like` as a function of the wanted inputs, and these inputs."""

    def function(*moving):
        moving = iter(moving)
        return list(forms.like([next(moving) if wanted else x for x, wanted in zip(inputs, is_wanted)], fixed))

    return function, [x for x, wanted in zip(inputs, is_wanted) if wanted]


# The primitive


@dataclasses.dataclass(frozen=True, eq=False)
class _TangentMap:
    """A linear map at a point.

    Attributes:
      push: (residuals, tangents) -> tangents of the results.
      pull: its transpose, (residuals, cotangents of the results) -> cotangents of the tangents.
      num_residuals: how many of the primitive's arguments are residuals; the others are tangents.
      results: types of the results.
    """

    push: Callable
    pull: Callable
    num_residuals: int
    results: tuple

    def __call__(self, *arrays: Array) -> list[Array]:
        return self.push(arrays[: self.num_residuals], arrays[self.num_residuals :])


_tangent = Primitive("tangent_of_kernel")
_tangent.multiple_results = True
_tangent.def_impl(lambda *arrays, point: jax.jit(point)(*arrays))
_tangent.def_abstract_eval(lambda *arrays, point: list(point.results))
mlir.register_lowering(_tangent, mlir.lower_fun(lambda *arrays, point: point(*arrays), multiple_results=True))


def _transpose(cotangents, *arrays, point: _TangentMap):
    residuals = arrays[: point.num_residuals]
    return [None] * len(residuals) + point.pull(residuals, list(map(ad.instantiate_zeros, cotangents)))


def _jvp(primals, tangents, *, point: _TangentMap):
    is_moving = [type(tangent) is not ad.Zero for tangent in tangents]

    def of_moving(*moving):
        moving = iter(moving)
        return list(point(*(next(moving) if each else x for x, each in zip(primals, is_moving))))

    return jax.jvp(of_moving, *(tuple(x for x, each in zip(xs, is_moving) if each) for xs in (primals, tangents)))


def _batch(arrays, axes, *, point: _TangentMap):
    of_residuals, of_tangents = list(axes[: point.num_residuals]), list(axes[point.num_residuals :])

    def push(residuals, tangents):
        return jax.vmap(point.push, in_axes=(of_residuals, of_tangents))(list(residuals), list(tangents))

    def pull(residuals, cotangents):
        found = jax.vmap(point.pull, in_axes=(of_residuals, 0))(list(residuals), list(cotangents))
        # A tangent that the batch shares gets the sum over the batch.
        return [x.sum(axis=0) if axis is None else jnp.moveaxis(x, 0, axis) for x, axis in zip(found, of_tangents)]

    size = next(x.shape[axis] for x, axis in zip(arrays, axes) if axis is not None)
    results = tuple(aval.update(shape=(size, *aval.shape)) for aval in point.results)
    batched = _TangentMap(push, pull, point.num_residuals, results)
    return _tangent.bind(*arrays, point=batched), [0] * len(results)


ad.primitive_transposes[_tangent] = _transpose
ad.primitive_jvps[_tangent] = _jvp
batching.primitive_batchers[_tangent] = _batch
