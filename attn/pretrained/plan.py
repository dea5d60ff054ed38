"""A plan of a foreign model: how it is built from our parts, and which tensors fill it."""

from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

from flax import nnx

from attn.pretrained.rules import Rule
from attn.pretrained.settings import Keys


class Plan(NamedTuple):
    """How to build a model, and the rules of its tensors.

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
    return prefix if any(name.startswith(prefix) for name in names) else ""


def has_head(keys: Keys, names: Collection[str], tensors: str, architectures: str = "") -> bool:
    """Return whether a model has a head: config.json says so, or a tensor of it is there.

    Args:
      keys: of config.json.
      names: of the tensors.
      tensors: the beginning of the names of the head's tensors.
      architectures: endings of the names of models that have it, separated by blanks.
    """
    named = [each for each in keys.values.get("architectures") or () if isinstance(each, str)]
    return any(name.startswith(tensors) for name in names) or any(
        each.endswith(tuple(architectures.split())) for each in named
    )
