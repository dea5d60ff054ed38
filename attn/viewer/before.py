"""Masks, scores and weights of the attention functions as maps, before or without a model."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from attn.viewer.arrays import MASKED, as_array
from attn.viewer.kinds import Axis, Kind, as_names, is_whole

_MOST_CELLS = 64_000_000  # of maps that are computed whole
_CELLS_AT_ONCE = 16_000_000  # of those of which only the largest of each row are kept


def kinds_of_functions(mask, score, query, key, scale, shape, rows, columns) -> list[Kind]:
    """Return the maps of a mask and a score, composed as `attn.multi_head_attention` composes them.

    Without queries and keys the score changes products of 0. With both, the weights come first; above `_MOST_CELLS`
    cells these are pooled, and the only maps.

    Args:
      mask, score, scale: as for `attn.multi_head_attention`.
      query, key: `[T N H]` and `[S K H]`, or `[T H]` and `[S H]`; None for none.
      shape: (T, S), without queries and keys; None for the numbers of names.
      rows, columns: names, or None.

    Raises:
      TypeError, ValueError: as `attn.multi_head_attention_weights`; no sizes are given, or they differ.
    """
    from attn.functional import before_softmax

    names = _names(rows, columns)
    if query is None and key is None:
        heads = before_softmax.marked_heads(mask, score) or 1
        T, S = _sizes(shape, names)
        if heads * T * S > _MOST_CELLS:
            cells = f"{heads} x {T:,} x {S:,} is over {_MOST_CELLS:,} cells"
            raise ValueError(f"shape: {cells}; view a part, such as shape=(2048, 2048)")
        query, key, scale = jnp.zeros((T, heads, 1)), jnp.zeros((S, heads, 1)), 1.0
        shown = [] if score is None else ["scores"]
    else:
        if shape is not None:
            raise ValueError("shape: goes with a mask or a score alone; queries and keys have their lengths")
        query, key = _queries_and_keys(query, key)
        shown = ["attention", "scores"]
    (T, N, _), (S, K, _) = query.shape, key.shape
    for axis, each, size in (("rows", names[0], T), ("columns", names[1], S)):
        if each is not None and len(each) != size:
            raise ValueError(f"{size:,} {axis}, but {len(each):,} names")
    sides = dict(rows=Axis("query", names[0]), columns=Axis("key", names[1]), groups=K if K < N else None)
    options = dict(mask=mask, score=score, scale=scale)
    if N * T * S > _MOST_CELLS:
        weights, largest = _pooled(query, key, options)
        return [Kind("attention", "attention", [weights], **sides, pooled_from=(T, S), largest=[largest])]
    shown += [] if mask is None else ["mask"]
    scores, visible = map(np.asarray, before_softmax.scores_and_visibility(query, key, **options))
    values = {"scores": lambda: scores, "mask": lambda: 1, "attention": lambda: _weights(query, key, options)}
    # In float32 before the masked cells are put in: their bits would not survive a conversion.
    return [_kind(name, np.where(visible, np.float32(values[name]()), MASKED), sides) for name in shown]


def _names(rows, columns) -> list[tuple[str, ...] | None]:
    for axis, each in (("rows", rows), ("columns", columns)):
        if isinstance(each, Mapping):
            raise ValueError(
                f"{axis}: got a dictionary, must be a list: the maps of a mask and a score share their names"
            )
    return [None if each is None else as_names(axis, each) for axis, each in (("rows", rows), ("columns", columns))]


def _queries_and_keys(query, key) -> tuple[jax.Array, jax.Array]:
    """Return queries `[T N H]` and keys `[S K H]`."""
    if query is None or key is None:
        raise ValueError("query and key: got one without the other, must be both or none")
    arrays = [
        x if isinstance(x, jax.Array) else jnp.asarray(as_array(x, n)) for n, x in (("query", query), ("key", key))
    ]
    arrays = [x[:, None] if x.ndim == 2 else x for x in arrays]
    if any(x.ndim != 3 for x in arrays):
        shapes = " and ".join(str(list(x.shape)) for x in arrays)
        raise ValueError(f"query and key: got {shapes}, must be [T N H] and [S K H], or [T H] and [S H]")
    return tuple(arrays)


def _weights(query: jax.Array, key: jax.Array, options) -> np.ndarray:
    from attn.functional import multi_head_attention_weights

    return np.asarray(multi_head_attention_weights(query, key, **options))


def _kind(name: str, layer: np.ndarray, sides) -> Kind:
    """Return the kind "attention", "scores" or "mask" of one layer `[N T S]`, masked where a pair is hidden."""
    title = {"scores": "scores before the softmax"}.get(name, name)
    return Kind(name, title, [layer], **sides, quantity={"attention": "weights"}.get(name, name))


def _pooled(query: jax.Array, key: jax.Array, options) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """Return the pooled weights `[N t s]`, and the exact largest of each row."""
    from attn.functional import pooled_attention_weights

    pooled = jax.jit(lambda query, key: pooled_attention_weights(query, key, **options))(query, key)
    return np.asarray(pooled, np.float32), _largest_of_rows(query, key, options)


def _largest_of_rows(query, key, options) -> tuple[np.ndarray, np.ndarray]:
    """Return the column and the value `[N T 1]` of the largest weight of each row, a few rows at a time."""
    from attn.functional import multi_head_attention_weights

    T, S, N = query.shape[0], key.shape[0], query.shape[1]
    at_once = max(1, _CELLS_AT_ONCE // (N * S))

    def of_all(query, key, rows):
        def of_rows(rows):
            weights = multi_head_attention_weights(query, key, rows=rows, **options)  # [N R S]
            return weights.argmax(axis=-1), weights.max(axis=-1)

        return jax.lax.map(of_rows, rows)

    rows = jnp.minimum(jnp.arange(-(-T // at_once) * at_once), T - 1).reshape(-1, at_once)
    index, value = jax.jit(of_all)(query, key, rows)  # [T/R N R]
    index, value = (np.moveaxis(np.asarray(x), 1, 0).reshape(N, -1, 1)[:, :T] for x in (index, value))
    return np.where(value > 0, index, 0xFFFFFFFF).astype("<u4"), value.astype("<f4")


def _sizes(shape, names) -> tuple[int, int]:
    """Return (T, S), from `shape` or the names."""
    if shape is None:
        if None in names:
            raise ValueError("shape: give (T, S), the numbers of queries and keys, or names of rows and columns")
        return len(names[0]), len(names[1])
    sizes = tuple(shape) if isinstance(shape, Sequence) else (shape, shape)
    if len(sizes) != 2 or not all(is_whole(size) for size in sizes):
        raise ValueError(f"shape: got {shape!r}, must be (T, S), two positive whole numbers")
    return int(sizes[0]), int(sizes[1])
