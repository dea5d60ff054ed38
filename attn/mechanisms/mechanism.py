"""A mechanism, the departure of an attention layer from softmax(Q K^T / sqrt(H)) V.

A mechanism is a class with settings, parameters and any of the functions below. They are written for one head of one
example; the layer maps them over heads. Mechanisms compose: `rotary() + softcap(20.0)`.

    class temperature(Mechanism):
        def setup(self, layer, rngs):
            self.log = HeadParam(jnp.zeros(layer.num_heads))

        def score(self, q, k):
            return lambda s, q, k: s * jnp.exp(self.log[...])

Settings are annotated fields, as of a dataclass. Parameters that `setup` makes, in float32, belong to one layer; a
mechanism with `embedding` is one object for the whole model; `scope` can say otherwise. Constant arrays are made in the
function that uses them, or with NumPy at the top of the file. The functions that change vectors return the dtype of
their arguments.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from attn.functional.masks import Mask
from attn.functional.scores import Score
from attn.mechanisms.rows import Rows

FUNCTIONS = ("embedding", "query", "key", "value", "score", "mask")  # of which a mechanism overrides some


class HeadParam(nnx.Param):
    """A parameter `[N ...]` with one slice per head; a mechanism's functions see the slice of their head."""


@dataclasses.dataclass(frozen=True)
class Layer:
    """The attention layer that a mechanism is set up for.

    Attributes:
      kind: "encoder", which attends to a whole text; "decoder", which attends to the text up to its own position; or
        "cross", which attends from one text to another.
      width, num_heads, head_width: D, N and H.
      scale: of the scores.
      dtype: of the computation.
      num_groups: K, the number of key/value heads; None for N.
    """

    kind: str
    width: int
    num_heads: int
    head_width: int
    scale: float
    dtype: jnp.dtype
    num_groups: int | None = None


class Mechanism(nnx.Module):
    """Base of the mechanisms. A function that is not overridden leaves attention as it is.

    Attributes:
      scale: replaces 1 / sqrt(H); None to keep that.
    """

    scale = None

    def __init_subclass__(cls, **options):
        super().__init_subclass__(**options)
        if "__init__" in vars(cls):
            raise TypeError(f"mechanism {cls.__name__!r}: write settings as annotated fields, parameters in `setup`")
        dataclasses.dataclass(eq=False, repr=False)(cls)

    def __add__(self, other: "Mechanism | Chain") -> "Chain":
        """Compose both mechanisms, this one first."""
        return Chain((*parts(self), *parts(other)))

    @property
    def max_positions(self) -> int | None:
        """Number of positions that it can distinguish; None for any number."""
        return None

    @property
    def scope(self) -> str:
        """The part of a model that has its own parameters: each "layer", each "stack" of layers, or the "model"."""
        return "model" if self.has("embedding") else "layer"

    def has(self, name: str) -> bool:
        """Return whether it overrides the function of this name."""
        return getattr(type(self), name) is not getattr(Mechanism, name)

    def setup(self, layer: Layer, rngs: nnx.Rngs):
        """Make the parameters."""

    def embedding(self, rows: Rows) -> Float[Array, "T D"]:
        """Compute the vectors that are added to the embeddings at the bottom of a stack.

        In cross-attention they are added to the inputs of W_Q and W_K.
        """
        raise NotImplementedError

    def query(self, x: Float[Array, "T H"], q: Rows) -> Float[Array, "T H"]:
        """Change the queries of a head."""
        raise NotImplementedError

    def key(self, x: Float[Array, "S H"], k: Rows) -> Float[Array, "S H"]:
        """Change the keys of a head."""
        raise NotImplementedError

    def value(self, x: Float[Array, "S H"], k: Rows) -> Float[Array, "S H"]:
        """Change the values of a head."""
        raise NotImplementedError

    def score(self, q: Rows, k: Rows) -> Score | Callable | None:
        """Return the change of the scaled scores of a head.

        It is called once per head with all rows, so that terms of queries or keys alone are computed once.

        Args:
          q, k: the rows of queries and keys; `q.vectors` and `k.vectors` are the head's queries and keys.

        Returns:
          A function `(s, q, k) -> s` of the rows of a tile, q `[r 1]` and k `[1 c]`; a score of `attn.scores`, a
          function of positions; or None. In the function, `q.row` and `k.row` index terms that were computed for all
          rows, as in `terms[q.row]`; `position` is another number where a prompt is padded or a cache is used.
        """
        raise NotImplementedError

    def mask(self, q: Rows, k: Rows) -> Mask | Callable | None:
        """Return a mask in addition to padding and causality, the same for all heads.

        Returns:
          A mask of `attn.masks`, a function of positions, whose hidden blocks are skipped; a function
          `(q, k) -> bool` of the rows of a tile; or None.
        """
        raise NotImplementedError

    def expression(self) -> str:
        """Return the text from which `attn.mechanisms.parse` makes it."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        settings = [f"{name}={_as_text(value)}" for name, value in values.items() if value != defaults[name]]
        return f"{type(self).__name__}({', '.join(settings)})" if settings else type(self).__name__


@dataclasses.dataclass(frozen=True)
class Chain:
    """A sequence of mechanisms, written `first + second`."""

    parts: tuple[Mechanism, ...]

    def __add__(self, other: "Mechanism | Chain") -> "Chain":
        return Chain((*self.parts, *parts(other)))

    def __repr__(self) -> str:
        return " + ".join(part.expression() for part in self.parts)


def _as_text(value) -> str:
    return value.expression() if isinstance(value, Mechanism) else repr(value)


def parts(mechanism: Mechanism | Chain) -> tuple[Mechanism, ...]:
    """Return the mechanisms that it is composed of, in the order in which they are applied."""
    return mechanism.parts if isinstance(mechanism, Chain) else (mechanism,)


def having(mechanisms: Iterable[Mechanism], name: str) -> Iterator[Mechanism]:
    """Return the mechanisms that override the function of this name."""
    return (mechanism for mechanism in mechanisms if mechanism.has(name))


@contextlib.contextmanager
def named_in_errors(part: Mechanism, function: str) -> Iterator[None]:
    """Add a note to an error that the block raises: in which function of which mechanism it is."""
    try:
        yield
    except Exception as error:
        error.add_note(f"in `{function}` of the mechanism {part.expression()!r}")
        raise


def build(mechanism: Mechanism | Chain, layer: Layer, rngs: nnx.Rngs, shared: dict[str, Mechanism]) -> list[Mechanism]:
    """Make the parts of a mechanism for a layer, with new parameters.

    Args:
      mechanism: as parsed, without parameters.
      layer: the layer that it is for.
      rngs: keys for the initial parameters.
      shared: the parts that layers share, by their expressions; missing ones are added.
    """

    def with_parameters(part: Mechanism) -> Mechanism:
        part = dataclasses.replace(part)  # a copy, since every layer has its own parameters
        with named_in_errors(part, "setup"):
            part.setup(layer, rngs)
            for path, x in jax.tree.leaves_with_path(nnx.state(part, HeadParam)):
                name, shape = jax.tree_util.keystr(path[:-1], simple=True), jnp.shape(x)
                if shape[:1] != (layer.num_heads,):
                    raise ValueError(
                        f"HeadParam {name}: got shape {shape}, must have one slice per head: the first axis must be "
                        f"{layer.num_heads}"
                    )
            _check_groups(part, layer)
        return part

    built = []
    for part in parts(mechanism):
        known, name = {} if part.scope == "layer" else shared, part.expression()
        if name not in known:
            known[name] = with_parameters(part)
        built.append(known[name])
    return built


def _check_groups(part: Mechanism, layer: Layer):
    """Check that keys and values which several heads share are not changed by parameters of single heads."""
    changes = [name for name in ("key", "value") if part.has(name)]
    is_grouped = layer.num_groups not in (None, layer.num_heads)
    if changes and is_grouped and jax.tree.leaves(nnx.state(part, HeadParam)):
        raise ValueError(
            f"`{changes[0]}` has parameters per head, but {layer.num_heads} heads share {layer.num_groups} keys and "
            "values: num_groups must be num_heads"
        )


def build_shared(layers: Iterable[tuple[Mechanism | Chain, Layer]], rngs: nnx.Rngs) -> dict[str, Mechanism]:
    """Make the parts that a model has once, by their expressions.

    Each is set up for the first of the layers, given with their mechanisms, in which it occurs.
    """
    shared = {}
    for mechanism, layer in layers:
        layer = dataclasses.replace(layer, scale=scale(mechanism, layer.head_width))
        for part in parts(mechanism):
            if part.scope == "model":
                build(part, layer, rngs, shared)
    return shared


def max_positions(mechanisms: Iterable[Mechanism | Chain]) -> int | None:
    """Return the number of positions that all these mechanisms can distinguish; None for any number."""
    bounds = [part.max_positions for mechanism in mechanisms for part in parts(mechanism)]
    return min((bound for bound in bounds if bound is not None), default=None)


def scale(mechanism: Mechanism | Chain, head_width: int) -> float:
    """Return the scale of a layer's scores: that of the last part with a scale, else 1 / sqrt(H)."""
    return next((part.scale for part in reversed(parts(mechanism)) if part.scale is not None), head_width**-0.5)
