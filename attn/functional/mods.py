"""What masks and scores share: a pytree form, offsets that wait for the lengths, and marks for heads.

A "mod" is a function of positions that modifies attention: a mask `(i, j) -> bool` or a score
`(s, i, j) -> s`. Ours are frozen dataclasses registered as pytrees. Of their fields, arrays (and whatever
else holds arrays) are leaves, so they can be traced, vmapped and differentiated; Python numbers and plain
functions are static, so that an implementation can reason about them before anything runs.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import GetAttrKey, all_leaves, register_pytree_with_keys

from attn.functional.dtypes import clamped, is_array


def _is_leafy(x) -> bool:
    return x is not None and (is_array(x) or not all_leaves([x]))


def register(cls):
    """Class decorator: make a frozen dataclass a pytree whose array-holding fields are children.

    Which fields those are is settled when the object is built and kept from then on, since JAX rebuilds
    pytrees with placeholders (axis numbers, None, ...) in place of the arrays.
    """
    names = tuple(field.name for field in dataclasses.fields(cls))

    def children_of(self):
        if "_children" not in self.__dict__:
            found = tuple(name for name in names if _is_leafy(getattr(self, name)))
            object.__setattr__(self, "_children", found)
        return self._children

    def flatten_with_keys(self):
        dynamic = children_of(self)
        static = tuple((name, getattr(self, name)) for name in names if name not in dynamic)
        return [(GetAttrKey(name), getattr(self, name)) for name in dynamic], (dynamic, static)

    def unflatten(structure, children):
        dynamic, static = structure
        self = object.__new__(cls)
        for name, value in (*static, *zip(dynamic, children, strict=True), ("_children", dynamic)):
            object.__setattr__(self, name, value)
        return self

    register_pytree_with_keys(cls, flatten_with_keys, unflatten)
    cls._registered = cls
    return cls


class Mod:
    """Base of masks and scores."""

    _registered: type | None = None

    def __new__(cls, *_, **__):
        if cls._registered is not cls:
            raise TypeError(
                f"{cls.__name__} derives from {cls.__base__.__name__}, which needs a registered dataclass: "
                "leave the base class out, any callable can be a mask or a score"
            )
        return super().__new__(cls)

    def __bool__(self):
        raise TypeError(f"{describe(self)} is neither true nor false: combine masks by & | ~ and scores by >>")

    def at(self, T: int, S: int) -> "Mod":
        """This mod for T queries and S keys: unset offsets are filled in and array shapes checked.

        Raises:
          ValueError: an offset is unset although T != S, or an array does not fit T and S.
        """
        inner = {
            field.name: value.at(T, S)
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), Mod)
        }
        return (dataclasses.replace(self, **inner) if inner else self)._at(T, S)

    def _at(self, T: int, S: int) -> "Mod":
        return self

    def expression(self) -> str:
        """How to build this mod; arrays are shown by value if scalar, else by dtype and shape."""
        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        shown = [f"{name}={describe(value)}" for name, value in given.items() if value is not defaults[name]]
        return f"{type(self).__name__}({', '.join(shown)})"

    def __repr__(self) -> str:
        return self.expression()


def describe(value) -> str:
    """A mod, or a value inside it, in few words."""
    if isinstance(value, Mod):
        return value.expression()
    if not is_array(value):
        return getattr(value, "__name__", None) or str(value)
    known = not isinstance(value, jax.core.Tracer) and not getattr(value, "is_deleted", bool)()
    if value.shape == () and known:
        return str(value)
    return f"{value.dtype}{list(value.shape)}"


def check_integer_or_none(name: str, value):
    """Check an offset: an integer, an integer array, or None.

    Raises:
      TypeError: anything else.
    """
    if value is not None:
        check_integer(name, value)


def check_integer(name: str, value):
    """Check a length or a width.

    Raises:
      TypeError: neither an integer nor an integer array.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return
    if not (is_array(value) and jnp.issubdtype(value.dtype, jnp.integer)):
        raise TypeError(f"{name} must be an integer or an integer array, got {describe(value)}")


def check_array(name: str, value, kind):
    """Check that `value` is an array of dtype `kind` (a dtype or a family of them).

    Raises:
      TypeError: it is not.
    """
    if not is_array(value):
        raise TypeError(f"{name} must be an array of {kind.__name__}, got {value!r}")
    if not jnp.issubdtype(value.dtype, kind):
        raise TypeError(f"{name} must be an array of {kind.__name__}, got dtype {value.dtype}")


def check_shape(name: str, array, shape: tuple):
    """Check the shape of an array that lies along queries or keys.

    Raises:
      ValueError: it differs.
    """
    if tuple(array.shape) != shape:
        raise ValueError(f"{name} must have shape {shape} for these queries and keys, got {tuple(array.shape)}")


def check_function(kind: str, signature: str, mod):
    """Check what was given as a mask or as a score, which is none of ours.

    Raises:
      TypeError: an array, which is pointed to `dense`, or anything else that cannot be called with positions.
    """
    if is_array(mod):
        raise TypeError(
            f"a {kind} is a function {signature}, got an array of shape {tuple(mod.shape)}: "
            f"wrap it as attn.{kind}s.dense(array)"
        )
    if not callable(mod) or isinstance(mod, type):
        hint = f": call it, as in {mod.__name__}(...)" if isinstance(mod, type) else ""
        raise TypeError(f"a {kind} is a function {signature}, got {mod!r}{hint}")


def returned(kind: str, mod, *arguments):
    """What a mask or a score returns.

    Raises:
      TypeError: neither an array nor a number.
    """
    try:
        value = mod(*arguments)
    except jax.dtypes.TypePromotionError as error:
        given = ", ".join(
            f"{name} {argument.dtype}" for name, argument in zip("ij" if kind == "mask" else "sij", arguments)
        )
        raise TypeError(
            f"{kind} {describe(mod)} mixes dtypes, which jax_numpy_dtype_promotion='strict' forbids: convert what it "
            f"reads to the dtypes that it is given ({given})"
        ) from error
    if not is_array(value) and not isinstance(value, (bool, int, float)):
        raise TypeError(f"{kind} {describe(mod)} must return an array, got {type(value).__name__}")
    return value


def as_tile(kind: str, mod, value, i, j):
    """What a mod returned for a tile, as an array of two axes that broadcasts to it.

    Raises:
      ValueError: it does not broadcast to the tile.
    """
    shape, tile = jnp.shape(value), (i.shape[0], j.shape[1])
    if len(shape) > 2 or any(n not in (1, full) for n, full in zip(shape[::-1], tile[::-1])):
        raise ValueError(
            f"{kind} {describe(mod)} returned shape {shape} for a tile of {tile[0]} by {tile[1]} positions, to which "
            "it does not broadcast: index arrays by the positions, as in array[i, j]"
        )
    return jnp.reshape(value, (1,) * (2 - len(shape)) + shape)


def check_scalar(name: str, value):
    """Check that an array leaf has lost its batch and head axes by now.

    Raises:
      ValueError: the array is not a scalar.
    """
    if is_array(value) and value.shape != ():
        raise ValueError(
            f"{name} must be a scalar here, got shape {tuple(value.shape)}: "
            "use jax.vmap for one value an example, attn.per_head for one a head"
        )


def resolve_offset(name: str, offset, T: int, S: int):
    """The offset of queries among keys: as given, or 0 where T = S.

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


def place(i, offset):
    """Query positions among the keys; an unset offset means 0."""
    return i if offset is None else i + clamped(offset)


@register
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class PerHead(Mod):
    """A mod whose array leaves carry a leading axis of heads; made by `attn.per_head`."""

    mod: object

    def __call__(self, *positions):
        raise ValueError(
            f"{describe(self)} holds one value for each head: give it to multi_head_attention, which takes it apart"
        )

    def expression(self) -> str:
        return f"per_head({describe(self.mod)})"


def check_per_head(mod):
    """Check that `mod` can be marked.

    Raises:
      TypeError: not callable, or without an array leaf.
      ValueError: marked already.
    """
    if not callable(mod):
        raise TypeError(f"per_head takes a mask or a score, got {mod!r}")
    if any(isinstance(part, PerHead) for part in parts(mod)):
        raise ValueError(f"per_head: {describe(mod)} is marked already")
    if not any(is_array(leaf) for leaf in jax.tree.leaves(mod)):
        raise TypeError(
            f"per_head: {describe(mod)} holds no array that could differ between heads; give one with a leading "
            "axis of heads, such as masks.padding(jnp.array([3, 5])) for two heads"
        )


def holds_function(mod) -> bool:
    """Whether a mod is or holds a callable of the user's: it may read variables that change, or tracers."""
    if isinstance(mod, Mod) and type(mod).__module__.partition(".")[0] == __name__.partition(".")[0]:
        return any(holds_function(getattr(mod, field.name)) for field in dataclasses.fields(mod))
    return callable(mod)


def parts(mod) -> list:
    """The leaves of a mod, with marked sub-mods kept whole."""
    return jax.tree.leaves(mod, is_leaf=lambda part: isinstance(part, PerHead))


def split_heads(mod, num_heads: int):
    """Take the marks off a mod.

    Returns:
      (unmarked mod, list that says for each of its leaves whether it carries the axis of heads).

    Raises:
      ValueError: a marked leaf whose leading axis is not `num_heads`.
    """
    marked, structure = jax.tree.flatten(mod, is_leaf=lambda part: isinstance(part, PerHead))
    carries = []
    for part in marked:
        leaves = jax.tree.leaves(part)
        carries += [isinstance(part, PerHead) and is_array(leaf) for leaf in leaves]
        for leaf in leaves if isinstance(part, PerHead) else ():
            if is_array(leaf) and (not leaf.shape or leaf.shape[0] != num_heads):
                raise ValueError(
                    f"{describe(part)}: the leading axis of every array must be the N = {num_heads} query heads, "
                    f"got shape {tuple(leaf.shape)}"
                )
    bare = [part.mod if isinstance(part, PerHead) else part for part in marked]
    return structure.unflatten(bare), carries


def check_real(name: str, value):
    """Check a real number or a real array.

    Raises:
      TypeError: anything else.
    """
    if is_array(value):
        real = jnp.issubdtype(value.dtype, jnp.floating) or jnp.issubdtype(value.dtype, jnp.integer)
    else:
        real = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not real:
        raise TypeError(f"{name} must be a real number, got {describe(value)}")
