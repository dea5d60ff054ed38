"""Closure conversion: captured arrays become an argument, and derivatives of 16-bit floats are summed in float32.

A derivative with respect to a captured array is a sum over everything that reads it: pairs of positions, tiles, heads.
In bfloat16 a sum of ones stops at 256. So captured 16-bit floats are converted to float32, which changes no value, and
are indexed, sliced and broadcast in float32: the transposes of these operations are sums. Arithmetic stays in the dtype
of the function, and so do sums inside a user's derivative rule (`jax.custom_jvp`, `jax.custom_vjp`).
"""

import functools
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
from jax.extend.core import Literal

from attn.functional import dtypes, sharding

# Primitives that only move numbers.
_MOVE_ONLY = frozenset(
    (
        *("broadcast_in_dim", "reshape", "squeeze", "transpose", "rev", "copy", "pad", "concatenate"),
        *("slice", "dynamic_slice", "gather", "select_n"),
    )
)


def convert(function: Callable, *examples) -> tuple[Callable, list]:
    """Closure-convert a function: captured arrays become an explicit first argument, as `custom_jvp` and loops require.

    `jax.closure_convert` converts captured floats, but not integers and bools.

    Args:
      function: function from arrays, or trees of them, to an array or a tree of arrays.
      examples: arguments of the shapes to convert for; may be abstract (`jax.ShapeDtypeStruct`).

    Returns:
      (function of (captured, *arguments), captured); captured 16-bit floats become float32.
    """
    structure = None

    def flat(*arguments):
        nonlocal structure
        results, structure = jax.tree.flatten(function(*arguments))
        return results

    closed = jax.make_jaxpr(flat)(*examples)

    def converted(captured, *arguments):
        return structure.unflatten(_evaluate(closed.jaxpr, captured, jax.tree.leaves(arguments)))

    return converted, dtypes.widened(closed.consts)


def captured_tracers(function: Callable, *examples) -> list[jax.core.Tracer]:
    """Return the traced arrays that a function captures.

    Args:
      function: function from arrays to an array or a tree of arrays.
      examples: arguments; may be abstract (`jax.ShapeDtypeStruct`).
    """
    return [x for x in jax.make_jaxpr(function)(*examples).consts if isinstance(x, jax.core.Tracer)]


class Rebound:
    """A function with other arrays in the place of those that it captures; for arguments of any shape.

    Args:
      function: function from arrays to one array.
      captured: arrays that it captures, as from `captured_tracers`.
      replacements: an array for each of them; float32 may replace 16-bit floats.
    """

    def __init__(self, function: Callable, captured: Sequence, replacements: Sequence):
        self.function, self.captured, self.replacements = function, captured, replacements

    def __call__(self, *arguments):
        closed = jax.make_jaxpr(self.function)(*arguments)
        replaced = {id(x): other for x, other in zip(self.captured, self.replacements, strict=True)}
        consts = [replaced.get(id(x), x) for x in closed.consts]
        (result,) = _evaluate(closed.jaxpr, consts, arguments, is_rebound=True)
        return result


def call(function: Callable, *arguments):
    """Call a function of arrays; derivatives of captured 16-bit floats are summed in float32."""
    converted, captured = convert(function, *arguments)
    return converted(captured, *arguments)


def _evaluate(jaxpr, captured: Sequence, arguments: Sequence, *, is_rebound: bool = False) -> list:
    """Evaluate a jaxpr; a captured 16-bit float stays in float32 until arithmetic reads it.

    With `is_rebound`, captured arrays may vary over more mesh axes, under `shard_map`, than those of the jaxpr.
    """
    if not is_rebound and not any(map(dtypes.is_half, [variable.aval for variable in _variables(jaxpr)])):
        return jax.core.eval_jaxpr(jaxpr, captured, *arguments)
    # A value may be in float32 although its variable is a 16-bit float.
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*captured, *arguments), strict=True))

    def read(variable):
        return variable.val if isinstance(variable, Literal) else values[variable]

    def read_in_own_dtype(variable):
        value = read(variable)
        return jnp.asarray(value, variable.aval.dtype) if dtypes.is_half(variable.aval) else value

    evaluate = functools.partial(_evaluate, is_rebound=is_rebound)
    vary = _vary_alike if is_rebound else list
    for equation in jaxpr.eqns:
        name, inputs = equation.primitive.name, equation.invars
        if name in _RULES:
            results = _RULES[name](equation.params, vary(map(read, inputs)), evaluate)
        elif name == "convert_element_type":
            results = [jax.lax.convert_element_type(read(inputs[0]), equation.params["new_dtype"])]
        else:
            # Each variable once, although an equation may read it twice.
            variables = list(dict.fromkeys(variable for variable in inputs if not isinstance(variable, Literal)))
            if name in _MOVE_ONLY:
                operands = dtypes.widened([read(v) for v in variables])
            else:
                operands = [_broadcast_scalar(read(v), read_in_own_dtype(v), equation) for v in variables]
            if is_rebound:
                _check_custom_derivative(equation, operands)
                equation, variables, operands = _without_literals(equation, variables, operands)
            single = jaxpr.replace(constvars=[], invars=variables, eqns=[equation], outvars=equation.outvars)
            results = jax.core.eval_jaxpr(single, (), *vary(operands))
        values.update(zip(equation.outvars, results, strict=True))
    return [read_in_own_dtype(variable) for variable in jaxpr.outvars]


def _broadcast_scalar(value, in_own_dtype, equation):
    """Broadcast a 16-bit scalar in float32 before arithmetic does so in 16 bits: a broadcast's transpose is a sum."""
    shape = equation.outvars[0].aval.shape
    others = {v.aval.shape for v in equation.invars} - {()}
    if in_own_dtype.shape == () and dtypes.is_half(in_own_dtype) and shape and others == {shape}:
        return jnp.broadcast_to(dtypes.widened(value), shape).astype(in_own_dtype.dtype)
    return in_own_dtype


def _call(parameters: dict, inputs: list, evaluate: Callable) -> list:
    inner = parameters["jaxpr"]
    return evaluate(inner.jaxpr, inner.consts, inputs)


def _checkpoint(parameters: dict, inputs: list, evaluate: Callable) -> list:
    def inside(*inputs):
        return evaluate(parameters["jaxpr"], (), inputs)

    return jax.checkpoint(inside, prevent_cse=parameters["prevent_cse"], policy=parameters["policy"])(*inputs)


def _cond(parameters: dict, inputs: list, evaluate: Callable) -> list:
    def branch(closed):
        return lambda *inputs: evaluate(closed.jaxpr, closed.consts, inputs)

    index, *operands = inputs
    return jax.lax.switch(index, [branch(closed) for closed in parameters["branches"]], *operands)


def _scan(parameters: dict, inputs: list, evaluate: Callable) -> list:
    """Evaluate a scan: arrays that every step reads stay in float32; the carry has the function's dtype."""
    closed, num_consts, num_carry = parameters["jaxpr"], parameters["num_consts"], parameters["num_carry"]
    consts, carry, xs = (
        inputs[:num_consts],
        inputs[num_consts : num_consts + num_carry],
        inputs[num_consts + num_carry :],
    )
    carry_avals = [v.aval for v in closed.jaxpr.invars[num_consts : num_consts + num_carry]]
    carry = [x.astype(aval.dtype) if dtypes.is_half(aval) else x for x, aval in zip(carry, carry_avals)]

    def step(carry, xs):
        results = evaluate(closed.jaxpr, closed.consts, [*consts, *carry, *xs])
        return results[:num_carry], results[num_carry:]

    options = {name: parameters[name] for name in ("length", "reverse", "unroll")}
    carry, ys = jax.lax.scan(step, carry, xs, **options)
    return [*carry, *ys]


def _pvary(parameters: dict, inputs: list, evaluate: Callable) -> list:
    return [_vary(inputs[0], parameters["axes"])]


def _vary_alike(arrays: Iterable) -> list:
    """Make all arrays vary over the mesh axes over which one of them varies, as operations require."""
    arrays = list(arrays)
    axes = sharding.varying_axes(arrays)
    return [_vary(x, axes) if dtypes.is_array(x) else x for x in arrays]


def _without_literals(equation, variables: list, operands: list):
    """Make the numbers of an equation operands: they too must vary as the other operands do."""
    literals = [x for x in equation.invars if isinstance(x, Literal)]
    values = [jnp.asarray(x.val, x.aval.dtype) for x in literals]
    new = iter(jax.make_jaxpr(lambda *values: values)(*values).jaxpr.invars)
    inputs = [next(new) if isinstance(x, Literal) else x for x in equation.invars]
    added = [x for x, old in zip(inputs, equation.invars) if isinstance(old, Literal)]
    return equation.replace(invars=inputs), [*variables, *added], [*operands, *values]


def _check_custom_derivative(equation, operands: list):
    """Check that no function with its own derivative, whose jaxpr is fixed, gets arrays that vary over more axes.

    Raises:
      NotImplementedError: it does.
    """
    before = frozenset().union(*(x.aval.mat.varying for x in equation.invars))
    if equation.primitive.name.startswith("custom_") and sharding.varying_axes(operands) != before:
        raise NotImplementedError(
            "a mask or score of ring attention computes something from captured arrays alone by a function with its "
            "own derivative (jax.custom_jvp, as jax.nn.softplus): compute it before, outside of the mask or score, "
            "or give the arrays as leaves of a jax.tree_util.Partial"
        )


def _vary(x, axes: Iterable[str]):
    missing = tuple(axis for axis in axes if axis not in sharding.varying_axes(x))
    return jax.lax.pcast(x, missing, to="varying") if missing else x


# Primitives that are evaluated by functions above; most contain a jaxpr, which is evaluated in the same way.
_RULES = {
    "pvary": _pvary,
    **dict.fromkeys(("jit", "pjit", "closed_call"), _call),
    **dict.fromkeys(("checkpoint", "remat2"), _checkpoint),
    "cond": _cond,
    "scan": _scan,
}


def _variables(jaxpr) -> list:
    of_equations = (variable for equation in jaxpr.eqns for variable in (*equation.invars, *equation.outvars))
    return [*jaxpr.constvars, *jaxpr.invars, *of_equations]
