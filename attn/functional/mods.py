"""The common part of masks and scores: their pytree form, unset offsets, marks per head, and absolute positions.

A "mod" is a function of positions that modifies attention: a mask `(i, j) -> bool` or a score `(s, i, j) -> s`. Ours
are frozen dataclasses registered as pytrees. Fields that are or contain arrays are children, so they can be traced,
vmapped and differentiated. Python numbers and plain functions are static, so that an implementation can inspect them
before anything runs.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import GetAttrKey, all_leaves, register_pytree_with_keys

from attn.functional.checks import check_integer, check_scalar, check_shape, describe
from attn.functional.dtypes import FAR, Integer, clamp_known, clamped, is_array, known


def _is_child(x) -> bool:
    """Return True for an array or a container: a field that is a child of its mod's pytree."""
    return x is not None and (is_array(x) or not all_leaves([x]))


def register(cls):
    """Register a frozen dataclass as a pytree whose fields with arrays are children; a class decorator.

    The child fields are determined once per object and then kept, since JAX rebuilds pytrees with placeholders (axis
    numbers, None, ...) in place of the arrays.
    """
    names = tuple(field.name for field in dataclasses.fields(cls))

    def children_of(self):
        if "_children" not in self.__dict__:
            children = tuple(name for name in names if _is_child(getattr(self, name)))
            object.__setattr__(self, "_children", children)
        return self._children

    def flatten_with_keys(self):
        dynamic = children_of(self)
        static = tuple((name, getattr(self, name)) for name in names if name not in dynamic)
        return [(GetAttrKey(name), getattr(self, name)) for name in dynamic], (dynamic, static)

    def unflatten(structure, children):
        # Without __init__: its checks would reject the placeholders.
        dynamic, static = structure
        self = object.__new__(cls)
        for name, value in (*static, *zip(dynamic, children, strict=True), ("_children", dynamic)):
            object.__setattr__(self, name, value)
        return self

    register_pytree_with_keys(cls, flatten_with_keys, unflatten)
    cls._registered = cls
    return cls


class Mod:
    """Base class of masks and scores."""

    _registered: type | None = None

    def __new__(cls, *_, **__):
        if cls._registered is not cls:
            raise TypeError(
                f"{cls.__name__} derives from {cls.__base__.__name__} but is not a registered dataclass: "
                "remove the base class, any callable can be a mask or a score"
            )
        return super().__new__(cls)

    def __bool__(self):
        raise TypeError(f"{describe(self)} is neither true nor false: combine masks with & | ~ and scores with >>")

    def resolve(self, T: int, S: int) -> "Mod":
        """Return this mod for T queries and S keys: unset offsets are filled in and array shapes checked.

        Raises:
          ValueError: an offset is unset although T != S, or an array does not fit T and S.
        """
        inner = {
            field.name: value.resolve(T, S)
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), Mod)
        }
        return (dataclasses.replace(self, **inner) if inner else self)._resolve(T, S)

    def _resolve(self, T: int, S: int) -> "Mod":
        """Resolve the fields that are not mods themselves."""
        return self

    def extent(self) -> tuple[int, int]:
        """Return how many positions of queries and of keys its arrays by position hold; FAR where it has none."""
        inner = (value for field in dataclasses.fields(self) if isinstance(value := getattr(self, field.name), Mod))
        return tuple(map(min, zip((FAR, FAR), *(mod.extent() for mod in inner))))

    def expression(self) -> str:
        """Return the Python expression of this mod; arrays are shown by value if scalar, else by dtype and shape."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        shown = [f"{name}={describe(value)}" for name, value in values.items() if value is not defaults[name]]
        return f"{type(self).__name__}({', '.join(shown)})"

    def __repr__(self) -> str:
        return self.expression()


def returned(kind: str, mod, *arguments):
    """Call a mask or a score and return its result, an array or a number.

    Raises:
      TypeError: the result is neither; or the function mixes dtypes under strict dtype promotion.
    """
    try:
        value = mod(*arguments)
    except jax.dtypes.TypePromotionError as error:
        dtypes = ", ".join(
            f"{name} {argument.dtype}" for name, argument in zip("ij" if kind == "mask" else "sij", arguments)
        )
        raise TypeError(
            f"{kind} {describe(mod)} mixes dtypes, which jax_numpy_dtype_promotion='strict' forbids: convert the "
            f"arrays that it reads to the dtypes of its arguments ({dtypes})"
        ) from error
    if not is_array(value) and not isinstance(value, (bool, int, float)):
        raise TypeError(f"{kind} {describe(mod)} must return an array, got {type(value).__name__}")
    return value


def as_tile(kind: str, mod, value, i, j):
    """Return the result of a mod for a tile as an array of two axes that broadcasts to the tile.

    Raises:
      ValueError: it does not broadcast to the tile.
    """
    shape, tile = jnp.shape(value), (i.shape[0], j.shape[1])
    if len(shape) > 2 or any(n not in (1, full) for n, full in zip(shape[::-1], tile[::-1])):
        raise ValueError(
            f"{kind} {describe(mod)} returned shape {shape} for a tile of {tile[0]} by {tile[1]} positions, and does "
            "not broadcast to it: index arrays by the positions, as in array[i, j]"
        )
    return jnp.reshape(value, (1,) * (2 - len(shape)) + shape)


def resolve_offset(name: str, offset, T: int, S: int):
    """Return the offset of queries among keys: the given one, or 0 if T = S.

    Raises:
      ValueError: unset although T != S, or not a scalar.
    """
    if offset is not None:
        check_scalar(f"{name}: offset", offset)
        return int(offset) if isinstance(offset, (np.ndarray, np.generic)) else offset
    if T == S:
        return 0
    raise ValueError(
        f"{name} needs an offset when the lengths differ (T = {T} queries, S = {S} keys): offset=0 aligns the "
        f"first query with the first key, offset=S-T (here {S - T}) the last query with the last key"
    )


def shift(i, offset):
    """Return the positions of queries among the keys, i + offset; an unset offset means 0."""
    return i if offset is None else i + clamped(offset)


def holds_function(mod) -> bool:
    """Return True if a mod is or contains a user's callable, which may read variables that change, or tracers."""
    # Our own classes are callable too: so search their fields.
    if isinstance(mod, Mod) and type(mod).__module__.partition(".")[0] == __name__.partition(".")[0]:
        return any(holds_function(getattr(mod, field.name)) for field in dataclasses.fields(mod))
    return callable(mod)


def nested(mod):
    """Iterate over a mod and the mods inside it, at any depth."""
    if isinstance(mod, Mod):
        yield mod
        for field in dataclasses.fields(mod):
            yield from nested(getattr(mod, field.name))


# Marks for heads


@register
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class PerHead(Mod):
    """A mod whose array leaves have a leading axis of heads; made by `attn.per_head`."""

    mod: object

    def __call__(self, *positions):
        raise ValueError(
            f"{describe(self)} holds one value per head: give it to multi_head_attention, which unwraps it"
        )

    def resolve(self, T: int, S: int) -> "PerHead":
        """Return the mod unchanged: shapes are checked for the slice of one head, after `unwrap_per_head`."""
        return self

    def expression(self) -> str:
        return f"per_head({describe(self.mod)})"


def check_per_head(mod):
    """Check that `mod` can be marked.

    Raises:
      TypeError: not callable, or without an array leaf.
      ValueError: already marked.
    """
    if not callable(mod):
        raise TypeError(f"per_head takes a mask or a score, got {mod!r}")
    if any(isinstance(part, PerHead) for part in parts(mod)):
        raise ValueError(f"per_head: {describe(mod)} is marked already")
    if not any(is_array(leaf) for leaf in jax.tree.leaves(mod)):
        raise TypeError(
            f"per_head: {describe(mod)} holds no array that could differ between heads; pass one with a leading "
            "axis of heads, such as masks.padding(jnp.array([3, 5])) for two heads"
        )


def parts(mod) -> list:
    """Return the leaves of a mod; a mod marked by `per_head` counts as one leaf."""
    return jax.tree.leaves(mod, is_leaf=lambda part: isinstance(part, PerHead))


def unwrap_per_head(tree, num_heads: int) -> tuple[list, Callable]:
    """Remove the marks of `attn.per_head` from a mod, or from a tree of mods.

    Args:
      tree: mods, with marked mods at any depth.
      num_heads: N.

    Returns:
      (arrays, of_head): the marked arrays, each `[N ...]`, and a function from one head's slices of them to the tree
      for that head. `of_head(arrays)` is the tree without marks, its arrays still with their axis of heads.

    Raises:
      ValueError: a marked array whose leading axis is not `num_heads`.
    """
    nodes, structure = jax.tree.flatten(tree, is_leaf=lambda part: isinstance(part, PerHead))
    has_heads = []  # one bool per leaf of the unmarked tree
    for part in nodes:
        leaves = jax.tree.leaves(part)
        has_heads += [isinstance(part, PerHead) and is_array(leaf) for leaf in leaves]
        for leaf in leaves if isinstance(part, PerHead) else ():
            if is_array(leaf) and (not leaf.shape or leaf.shape[0] != num_heads):
                raise ValueError(
                    f"{describe(part)}: the leading axis of every array must be the N = {num_heads} query heads, "
                    f"got shape {tuple(leaf.shape)}"
                )
    unmarked = structure.unflatten([part.mod if isinstance(part, PerHead) else part for part in nodes])
    leaves, structure = jax.tree.flatten(unmarked)

    def of_head(slices):
        slices = iter(slices)
        return structure.unflatten([next(slices) if marked else leaf for marked, leaf in zip(has_heads, leaves)])

    return [leaf for marked, leaf in zip(has_heads, leaves, strict=True) if marked], of_head


# Absolute positions


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Placed(Mod):
    """Base class of `masks.placed` and `scores.placed`: a mod evaluated at absolute positions, not row numbers.

    Arrays by position, as of `dense`, hold positions 0, 1, ...: reading others is an error where they are known, and
    otherwise hides the pair (a mask) or makes its score NaN.
    """

    mod: Callable
    query_positions: Integer
    key_positions: Integer

    def __post_init__(self):
        for name in ("query_positions", "key_positions"):
            check_integer(f"placed: {name}", getattr(self, name))
        clamp_known(self, "query_positions", "key_positions")

    def resolve(self, T: int, S: int) -> Mod:
        """Check the positions. The inner mod is not resolved: T and S are not the lengths of its sequences."""
        for name, length, size in zip(("query_positions", "key_positions"), (T, S), self.mod.extent()):
            if is_array(positions := getattr(self, name)) and positions.shape:
                check_shape(f"placed: {name}", positions, (length,))
            last = known(_positions_of(np.array([length - 1]), positions))  # those before 0 are of padding
            if last is not None and last.max() >= size:
                raise ValueError(
                    f"{describe(self.mod)} holds {size} {name.replace('_', ' ')}, but here they go up to {last.max()}"
                )
        return self

    def extent(self) -> tuple[int, int]:
        """Return that no array is read at the positions of the outer mod."""
        return FAR, FAR

    def positions(self, i, j):
        """Return the absolute positions of rows i of the queries and j of the keys."""
        return _positions_of(i, self.query_positions), _positions_of(j, self.key_positions)

    def in_range(self, i, j):
        """Return whether arrays by position have entries for these positions; None if the mod has no such arrays."""
        T, S = self.mod.extent()
        return None if min(T, S) == FAR else (i >= 0) & (i < T) & (j >= 0) & (j < S)

    def expression(self) -> str:
        return f"placed({describe(self.mod)}, {describe(self.query_positions)}, {describe(self.key_positions)})"


def _positions_of(index, positions):
    positions = clamped(positions)
    if not (is_array(positions) and positions.shape):
        return index + positions
    # NumPy stays NumPy, so that the bounds of blocks are known while tracing.
    return (positions if isinstance(index, np.ndarray) else jnp.asarray(positions))[index]
