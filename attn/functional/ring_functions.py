"""The mask, the score, the scale and the dropout of ring attention, taken apart into arrays.

The passes of a ring are functions of arrays (see `derivatives`): floats, which have a derivative, and fixed arrays,
which have none. Numbers are part of the program.
"""

import dataclasses
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from attn.functional import closures, dtypes, masks, mods, scores
from attn.functional.contract import Call
from attn.functional.masks import Mask, as_mask
from attn.functional.mods import register
from attn.functional.scores import Score, as_score

Arrays = Array | np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Functions:
    """The functions of a call without their arrays.

    Attributes:
      leaves: of the functions, and then `captured`; None in the place of an array.
      kinds: of each of these, "number", "float" or "fixed".
      has_heads: True for each array with one slice per head, `[N ...]`, as `attn.per_head` marks it.
      structure: of the functions.
      captured: the traced arrays that functions capture.
    """

    leaves: list
    kinds: list[str]
    has_heads: list[bool]
    structure: jax.tree_util.PyTreeDef
    captured: list[jax.core.Tracer]

    def of_kind(self, kind: str) -> list[bool]:
        """Return `has_heads` of the arrays of this kind."""
        return [has_heads for has_heads, each in zip(self.has_heads, self.kinds) if each == kind]

    def rebuild(self, floats: list[Arrays], fixed: list[Arrays]) -> tuple[tuple, list[Arrays]]:
        """Return (mask, score, scale, dropout) with these arrays, and replacements of `captured`.

        Args:
          floats: the floats.
          fixed: the fixed arrays, and the number of the first head, which dropout needs.
        """
        *fixed, first_head = fixed
        sources = {"float": iter(floats), "fixed": iter(fixed)}
        arrays = [x if kind == "number" else next(sources[kind]) for x, kind in zip(self.leaves, self.kinds)]
        count = len(arrays) - len(self.captured)
        mask, score, scale, dropout = self.structure.unflatten(arrays[:count])
        dropout = None if dropout is None else dropout.part(heads=first_head)
        return (mask, score, scale, dropout), arrays[count:]


def take_apart(call: Call, T: int, S: int) -> tuple[Functions, list[Arrays], list[Arrays]]:
    """Return the functions of a call for whole sequences of these lengths, their floats, and their fixed arrays."""
    functions, N = (call.mask, call.score, call.scale, call.dropout), call.query.shape[1]
    leaves, structure = jax.tree.flatten(functions)
    captured = _captured_by_functions(functions, dtypes.wide_dtype(call.query.dtype), N, T, S)
    arrays = [*leaves, *captured]
    kinds = ["number" if not dtypes.is_array(x) else "float" if _is_float(x) else "fixed" for x in arrays]
    floats, fixed = ([x for x, kind in zip(arrays, kinds) if kind == each] for each in ("float", "fixed"))
    numbers = [x if kind == "number" else None for x, kind in zip(arrays, kinds)]
    has_heads = [*_have_heads(functions), *[False] * len(captured)]
    return Functions(numbers, kinds, has_heads, structure, captured), floats, fixed


def _have_heads(functions) -> Iterator[bool]:
    """Iterate over the leaves: whether `attn.per_head` marks each."""
    for part in mods.parts(functions):
        yield from [isinstance(part, mods.PerHead)] * len(jax.tree.leaves(part))


def _captured_by_functions(functions, dtype, N: int, T: int, S: int) -> list[jax.core.Tracer]:
    """Return the traced arrays that the mask and the score capture and that are not leaves of them."""
    leaves, structure = jax.tree.flatten(functions)
    is_array = [dtypes.is_array(x) for x in leaves]

    def evaluate(arrays, s, i, j):
        arrays = iter(arrays)
        mask, score, *_ = structure.unflatten([next(arrays) if each else x for x, each in zip(leaves, is_array)])
        marked, of_head = mods.unwrap_per_head((mask, score), N)
        mask, score = of_head([x[0] for x in marked])
        visible = None if mask is None else masks.evaluate(as_mask(mask).resolve(T, S), i, j)
        return visible, None if score is None else scores.evaluate(as_score(score).resolve(T, S), s, i, j)

    s, i, j = (jax.ShapeDtypeStruct(*each) for each in (((2, 2), dtype), ((2, 1), jnp.int32), ((1, 2), jnp.int32)))
    return closures.captured_tracers(evaluate, [x for x, each in zip(leaves, is_array) if each], s, i, j)


def _is_float(x) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


# Functions of a pair of chunks, for implementations that take the marks of `attn.per_head` off themselves


@register
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class PairMask(Mask):
    """A mask in a pair: `place` places it once no marks are left in it, whenever it is resolved."""

    mod: Callable
    place: Callable

    def resolve(self, T: int, S: int) -> Mask:
        return self if _is_marked(self.mod) else self.place(as_mask(self.mod))


@register
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class PairScore(Score):
    """A score in a pair, as `PairMask`."""

    mod: Callable
    place: Callable

    def resolve(self, T: int, S: int) -> Score:
        return self if _is_marked(self.mod) else self.place(as_score(self.mod))


def _is_marked(mod) -> bool:
    return any(isinstance(part, mods.PerHead) for part in mods.parts(mod))
