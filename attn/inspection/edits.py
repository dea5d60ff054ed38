"""Taps of interventions: they remove, replace, keep and exchange values of a model; see `attn.nn.taps`."""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from attn.nn.taps import Change, Context, Edit, Site, edited


class Head(NamedTuple):
    """A head of attention: its kind, "encoder", "decoder" or "cross", its layer and its number, both from 0."""

    kind: str
    layer: int
    head: int


@dataclasses.dataclass(frozen=True)
class Ablate:
    """Sets the weights of heads to zero, or to equal weights over all that a query may attend to.

    Attributes:
      heads: to remove.
      to: "zero" or "mean".
    """

    heads: frozenset[Head]
    to: str

    def __call__(self, site: Site) -> Change | None:
        numbers = [head.head for head in self.heads if (head.kind, head.layer) == site[1:]]
        if site.value != "weights" or not numbers:
            return None
        index = np.array(sorted(numbers))

        def change(weights: Float[Array, "N T S"], context: Context) -> Float[Array, "N T S"]:
            return weights.at[index].set(0.0 if self.to == "zero" else context.uniform()[index])

        return change


@dataclasses.dataclass(frozen=True, eq=False)
class AblateSome:
    """Does what `Ablate` does to the heads that arrays say, so that one program serves all choices of heads.

    Attributes:
      removed: `[L N]` by kind, True for heads to remove.
      to: as of `Ablate`.
    """

    removed: Mapping[str, Bool[Array, "L N"]]
    to: str

    def __call__(self, site: Site) -> Change | None:
        if site.value != "weights" or site.kind not in self.removed:
            return None

        def change(weights: Float[Array, "N T S"], context: Context) -> Float[Array, "N T S"]:
            removed = self.removed[site.kind][site.layer][:, None, None]
            return jnp.where(removed, 0.0 if self.to == "zero" else context.uniform(), weights)

        return change


@dataclasses.dataclass(frozen=True)
class EditWeights:
    """Changes all attention weights by a user's function `(kind, layer, weights [N T S]) -> weights`."""

    function: Edit

    def __call__(self, site: Site) -> Change | None:
        return (lambda weights, context: edited(self.function, site, weights)) if site.value == "weights" else None


@dataclasses.dataclass(frozen=True, eq=False)
class Replace:
    """Replaces the weights of heads by arrays `[T S]`, or by what functions of them return.

    Attributes:
      weights: the new ones, by head.
      after_source: kinds whose first row is the first token of the answer, which follows the source in the same text.
    """

    weights: Mapping[Head, Any]
    after_source: Collection[str]

    def __call__(self, site: Site) -> Change | None:
        new = {head: each for head, each in self.weights.items() if (head.kind, head.layer) == site[1:]}
        if site.value != "weights" or not new:
            return None

        def change(weights: Float[Array, "N T S"], context: Context) -> Float[Array, "N T S"]:
            first = context.q.example.source_length if site.kind in self.after_source else 0
            for head, each in new.items():
                old = weights[head.head]
                replaced = _returned(head, each, old) if callable(each) else _placed(head, each, old, context, first)
                weights = weights.at[head.head].set(replaced.astype(weights.dtype))
            return weights

        return change


def _returned(head: Head, function: Callable, old: Float[Array, "T S"]) -> Float[Array, "T S"]:
    """Return what a user's function makes of the weights of a head."""
    new = function(old)
    if getattr(new, "shape", None) != old.shape:
        found = getattr(new, "shape", type(new).__name__)
        raise ValueError(f"weights: the function of {head} returned {found}; must be weights {old.shape}")
    return jnp.asarray(new)


def _placed(head: Head, new, old: Float[Array, "T S"], context: Context, first) -> Float[Array, "T S"]:
    """Return the weights of a head with the rows of `new` in their places; other rows stay as they are.

    In decoding with a cache `old` has one row, and columns for tokens to come; in a batch there may be padding.
    """
    (T, S), (_, keys) = new.shape, old.shape
    if keys < S and head.kind != "decoder":  # the answer may be shorter than the one that the array is of
        raise ValueError(f"weights: got {[T, S]} for {head}, must have at most {keys} columns, the keys of this input")
    row, column = context.q.token - first, context.k.token
    values = jnp.asarray(new)[jnp.clip(row, 0, T - 1)][:, jnp.clip(column, 0, S - 1)]
    values = jnp.where((column >= 0) & (column < S), values, 0.0)
    return jnp.where(((row >= 0) & (row < T))[:, None], values, old)


class Keep:
    """Keeps values in one pass, by site; parts of a text that are computed one after another are joined.

    Args:
      wanted: says of which sites.
    """

    def __init__(self, wanted: Callable[[Site], bool]):
        self.wanted = wanted
        self.values: dict[Site, Array] = {}

    def __call__(self, site: Site) -> Change | None:
        if not self.wanted(site):
            return None

        def change(value: Array, context: Context) -> Array:
            before = [self.values[site]] if site in self.values else []
            self.values[site] = jnp.concatenate([*before, value], axis=_rows_axis(site))
            return value

        return change


@dataclasses.dataclass(frozen=True, eq=False)
class Put:
    """Puts values of another pass in the place of those that are computed.

    Attributes:
      values: as `Keep` keeps them.
      chosen: `[T N]` by site, True for the rows and heads that are exchanged; of hidden states `[T 1]`.
    """

    values: Mapping[Site, Array]
    chosen: Mapping[Site, Bool[Array, "T N"]]

    def __call__(self, site: Site) -> Change | None:
        if site not in self.chosen:
            return None

        def change(value: Array, context: Context) -> Array:
            row, axis = context.q.token, _rows_axis(site)
            new, chosen = jnp.take(self.values[site], row, axis=axis), self.chosen[site][row]
            if site.value == "hidden":
                return jnp.where(chosen, new, value)
            return jnp.where((chosen if axis == 0 else chosen.T)[:, :, None], new, value)

        return change


@dataclasses.dataclass(frozen=True, eq=False)
class Add:
    """Adds arrays to values; derivatives with respect to these are derivatives with respect to the values.

    Attributes:
      values: by site, in the shapes that `Keep` keeps.
    """

    values: Mapping[Site, Array]

    def __call__(self, site: Site) -> Change | None:
        if site not in self.values:
            return None
        return lambda value, context: (
            value + jnp.take(self.values[site], context.q.token, axis=_rows_axis(site)).astype(value.dtype)
        )


def _rows_axis(site: Site) -> int:
    """Return the axis of the rows: weights are [N T S], outputs of heads [T N H], hidden states [T D]."""
    return 1 if site.value == "weights" else 0


def one_hot_masks(sizes: Mapping[str, tuple[int, int]]) -> dict[str, Bool[np.ndarray, "heads L N"]]:
    """Return masks of no head, and then of each head alone, of all kinds together in the order of `sizes`."""
    total = 1 + sum(L * N for L, N in sizes.values())
    flat, masks, first = np.eye(total, total - 1, -1, dtype=bool), {}, 0
    for kind, (L, N) in sizes.items():
        masks[kind] = flat[:, first : first + L * N].reshape(total, L, N)
        first += L * N
    return masks


def by_kind(effects: Float[np.ndarray, "heads"], sizes: Mapping[str, tuple[int, int]]) -> dict[str, np.ndarray]:
    """Return values of each head, in the order of `one_hot_masks` without its first, as `[L N]` by kind."""
    masks = one_hot_masks(sizes)
    return {kind: np.asarray(effects)[mask[1:].argmax(0)] for kind, mask in masks.items()}


def sizes_of(stacks) -> dict[str, tuple[int, int]]:
    """Return the numbers of layers and heads by kind of attention.

    Raises:
      ValueError: there are none, or two stacks have one kind.
    """
    sizes: dict[str, tuple[int, int]] = {}
    for stack in stacks:
        attention, cross = stack.blocks[0].attention, stack.blocks[0].cross
        kinds = {stack.kind: attention} | ({} if cross is None else {"cross": cross})
        for kind, layer in kinds.items():
            if kind in sizes:
                raise ValueError(f"model: has two stacks of kind {kind!r}, so that heads cannot be named")
            sizes[kind] = len(stack.blocks), layer.num_heads
    if not sizes:
        raise ValueError("model: has no attention layers of `attn.nn.block.Stack`, so that there is nothing to change")
    return sizes
