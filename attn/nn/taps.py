"""Taps: functions that see and change what a model computes on its way, without a change of the model's code.

A tap is called once for each site of each layer, and returns a function of the value there, or None to leave it. Taps
are part of the structure of a stack, as `flax.nnx.split` gives it, so whatever takes a structure and parameters
(decoding with a cache, evaluation, attention maps) works with them. The parameters stay as they are.

    value      shape        what it is
    "weights"  [N T S]      attention weights, with which the values are averaged
    "heads"    [T N H]      outputs of the heads, before W_O
    "hidden"   [T D]        output of a block; its kind is that of the stack

The kind is "encoder" or "decoder" for self-attention and "cross" for cross-attention; layers count from 0.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from attn.mechanisms.rows import Rows


class Site(NamedTuple):
    """A place in a model where a value can be seen and changed: see the table above."""

    value: str
    kind: str
    layer: int


class Context(NamedTuple):
    """The surroundings of a value.

    Attributes:
      q, k: rows of the queries and of the keys; `q.token` are the numbers of the tokens in their text.
      uniform: of weights, computes weights that are equal over all keys that a query may attend to.
    """

    q: Rows
    k: Rows
    uniform: Callable[[], Float[Array, "N T S"]] | None = None


Change = Callable[[Array, Context], Array]
Tap = Callable[[Site], Change | None]


Edit = Callable[[str, int, Float[Array, "N T S"]], Float[Array, "N T S"]]  # (kind, layer, weights) -> weights


class Taps(NamedTuple):
    """The changes of the values of one attention layer; None leaves a value as it is."""

    weights: Change | None = None
    heads: Change | None = None


NO_TAPS = Taps()


class BlockTaps(NamedTuple):
    """The changes of the values of one block."""

    attention: Taps = NO_TAPS
    cross: Taps = NO_TAPS
    hidden: Change | None = None


NO_BLOCK_TAPS = BlockTaps()


class Tapped(nnx.Module):
    """Base of what has layers with taps.

    Attributes:
      kind: of the self-attention: "encoder" or "decoder".
      taps: applied one after another.
    """

    kind: str
    taps: tuple[Tap, ...] = ()

    def taps_of(self, layer: int) -> BlockTaps:
        """Return the changes of the values of a layer."""

        def of_attention(kind: str) -> Taps:
            return Taps(*(self._change(Site(value, kind, layer)) for value in ("weights", "heads")))

        hidden = self._change(Site("hidden", self.kind, layer))
        return BlockTaps(of_attention(self.kind), of_attention("cross"), hidden)

    def _change(self, site: Site) -> Change | None:
        changes = [change for tap in self.taps if (change := tap(site)) is not None]
        if not changes:
            return None

        def all_changes(value: Array, context: Context) -> Array:
            for change in changes:
                value = change(value, context)
            return value

        return all_changes


def tapped(graphdef: nnx.GraphDef, params: nnx.State, tap: Tap) -> nnx.GraphDef:
    """Return the structure of the same model with one more tap in each of its stacks, applied after those it has.

    Args:
      graphdef, params: of any model that uses `attn.nn.block.Stack`, also one from outside of the package.
      tap: compiled programs are found again by it, so equal taps should be equal values, as frozen dataclasses are.
    """
    model = nnx.merge(graphdef, params)
    for stack in stacks(model):
        stack.taps = (*stack.taps, tap)
    return nnx.split(model, nnx.Param)[0]


def stacks(model: nnx.Module) -> list[Tapped]:
    """Return the stacks of a model, wherever they are in it."""
    return [node for _, node in nnx.iter_graph(model) if isinstance(node, Tapped)]


def edited(edit: Edit, site: Site, weights: Float[Array, "N T S"]) -> Float[Array, "N T S"]:
    """Return the weights that a user's function returns for a site.

    Raises:
      ValueError: it returns something else.
    """
    changed = edit(site.kind, site.layer, weights)
    if getattr(changed, "shape", None) != weights.shape:
        found = getattr(changed, "shape", type(changed).__name__)
        raise ValueError(
            f"edit: returned {found} for {site.kind!r}, layer {site.layer}; must be weights {weights.shape}"
        )
    return jnp.asarray(changed, weights.dtype)
