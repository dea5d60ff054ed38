"""Equations that JAX has traced: every one of a function's jaxpr, and what it is nested in."""

from collections.abc import Iterator

import jax


def equations(call, *arguments) -> list[tuple[object, tuple]]:
    """(equation, the equations that it is nested in, outermost first), inner jaxprs included."""
    return list(_nested(jax.make_jaxpr(call)(*arguments).jaxpr, ()))


def _nested(jaxpr, around) -> Iterator:
    for equation in jaxpr.eqns:
        yield equation, around
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from _nested(inner, (*around, equation))


def is_matrix_product(equation) -> bool:
    """Return whether both factors have an axis of their own in it; in a sum of products, one per row, neither has."""
    if equation.primitive.name != "dot_general":
        return False
    contracted, batch = equation.params["dimension_numbers"]
    return all(x.aval.ndim > len(c) + len(b) for x, c, b in zip(equation.invars, contracted, batch))
