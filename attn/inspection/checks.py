"""Checks of what interventions are given: heads, states, weights and positions; messages are one line."""

from collections.abc import Collection, Iterable, Sequence

import jax
import numpy as np
from jaxtyping import Bool

from attn.inspection.edits import Head
from attn.inspection.passes import Kinds
from attn.nn.taps import Site
from attn.settings import nearest

HeadLike = Head | tuple[str, int, int]


def checked_heads(heads: Iterable[HeadLike], kinds: Kinds, name: str = "heads") -> list[Head]:
    """Return heads that the model has.

    Raises:
      ValueError: it does not have one.
    """
    if isinstance(heads, str) or not isinstance(heads, Iterable) or isinstance(heads, Head):
        raise ValueError(f"{name}: got {heads!r}, must be a list of heads, such as [('cross', 0, 2)]")
    checked = []
    for head in heads:
        if not isinstance(head, tuple | list) or len(head) != 3:
            raise ValueError(f"{name}: got {head!r}, must be (kind, layer, head), such as ('cross', 0, 2)")
        kind, *numbers = head
        if kind not in kinds.sizes:
            known = ", ".join(map(repr, kinds.sizes))
            raise ValueError(f"{name}: got kind {kind!r}, must be of {known}{nearest(str(kind), kinds.sizes)}")
        for what, number, size in zip(("layer", "head"), numbers, kinds.sizes[kind]):
            if not _is_number(number) or not 0 <= number < size:
                raise ValueError(f"{name}: got {what} {number!r} of {kind!r}, must lie in 0..{size - 1}")
        checked.append(Head(kind, *map(int, numbers)))
    return checked


def checked_states(states: Collection[tuple[str, int]], kinds: Kinds) -> list[tuple[str, int]]:
    """Return places after blocks that the model has.

    Raises:
      ValueError: it does not have one.
    """
    for place in states:
        if not isinstance(place, tuple | list) or len(place) != 2:
            raise ValueError(f"states: got {place!r}, must be (stack, layer), such as ('encoder', 0)")
        stack, layer = place
        if stack not in kinds.stacks:
            raise ValueError(f"states: got stack {stack!r}, must be of {', '.join(map(repr, kinds.stacks))}")
        if not _is_number(layer) or not 0 <= layer < kinds.stacks[stack]:
            raise ValueError(f"states: got layer {layer!r} of {stack!r}, must lie in 0..{kinds.stacks[stack] - 1}")
    return [(stack, int(layer)) for stack, layer in states]


def checked_weights(head: Head, weights):
    """Return new weights of a head: a function, or an array `[T S]`."""
    if callable(weights):
        return weights
    if not isinstance(weights, jax.Array):
        try:
            weights = np.asarray(weights, float)
        except (TypeError, ValueError):
            raise ValueError(f"weights: got {weights!r:.60} for {head}, must be an array [T S] or a function") from None
    if weights.ndim != 2 or 0 in weights.shape:
        raise ValueError(f"weights: got shape {[*weights.shape]} for {head}, must be [T S]")
    if not isinstance(weights, jax.core.Tracer) and not np.isfinite(np.asarray(weights)).all():
        raise ValueError(f"weights: got NaN or infinity for {head}, must be numbers")
    return weights


def _is_number(number) -> bool:
    return isinstance(number, int | np.integer) and not isinstance(number, bool)


def check_to(to: str):
    """Check what takes the place of the weights of an ablated head.

    Raises:
      ValueError: neither "zero" nor "mean".
    """
    if to not in ("zero", "mean"):
        raise ValueError(f"to: got {to!r}, must be 'zero' or 'mean'")


def chosen_rows(
    site: Site, shape: tuple[int, ...], numbers: list[int] | None, positions: Sequence[int] | None
) -> Bool[np.ndarray, "T N"]:
    """Return which rows and heads of a value are exchanged, as `attn.inspection.edits.Put` takes it.

    Args:
      site, shape: of the value.
      numbers: of heads; None for hidden states.
      positions: rows; None for all.

    Raises:
      ValueError: a position that the value does not have.
    """
    heads, rows = {"hidden": (1, shape[0]), "heads": (shape[1], shape[0]), "weights": shape[:2]}[site.value]
    rows_wanted = range(rows) if positions is None else list(positions)
    for position in rows_wanted:
        if not _is_number(position) or not 0 <= position < rows:
            raise ValueError(f"positions: got {position!r}, must lie in 0..{rows - 1} for {site.kind!r}")
    chosen = np.zeros((rows, heads), bool)
    chosen[np.ix_(rows_wanted, range(heads) if numbers is None else numbers)] = True
    return chosen
