"""A plan of a foreign model: how it is built from our parts, and which tensors fill it."""

from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

from flax import nnx

from attn.pretrained.rules import Rule


class Plan(NamedTuple):
    """A way to build a model, and the rules of its tensors.

    Attributes:
      build: makes the model, with initial parameters.
      rules: of all tensors.
      ignored: patterns of the names of tensors that are not parameters of the model.
      copies: names of tensors that repeat another one; they may be left out, and must be equal if they are there.
    """

    build: Callable[[nnx.Rngs], nnx.Module]
    rules: list[Rule]
    ignored: tuple[str, ...] = ()
    copies: Mapping[str, str] = {}


def prefix_of(prefix: str, names: Collection[str]) -> str:
    """Return the prefix if any name has it, else "": files of models without a head leave it out."""
    return prefix if any_begins(names, prefix) else ""


def any_begins(names: Collection[str], beginning: str) -> bool:
    """Return whether any name has this beginning: whether the tensors of a head are there, or some of them."""
    return any(name.startswith(beginning) for name in names)
