"""Masks, scores and weights of the attention functions as maps, before or without a model."""

import jax
import jax.numpy as jnp
import numpy as np

from attn.viewer.arrays import MASKED
from attn.viewer.kinds import Axis, Kind, as_names

_MOST_CELLS = 64_000_000  # of maps that are computed whole
_CELLS_AT_ONCE = 16_000_000  # of those of which only the largest of each row are kept


def kinds_of_functions(mask, score, query, key, scale, shape, rows, columns) -> list[Kind]:
    """Return the maps of a mask and a score, composed as `attn.multi_head_attention` composes them.

    Without queries and keys the score changes products of 0. With both, the weights come first.

    Args:
      mask, score, scale: as for `attn.multi_head_attention`.
      query, key: `[T N H]` and `[S K H]`, or `[T H]` and `[S H]`; None for none.
      shape: (T, S); None for those of the queries and keys or of the names.
      rows, columns: names, or None.

    Raises:
      TypeError, ValueError: as `attn.multi_head_attention_weights`; no sizes are given, or they differ.
    """
    from attn.functional import before_softmax, multi_head_attention_weights

    if (query is None) != (key is None):
        raise ValueError("query and key: got one without the other, must be both or none")
    names = [None if each is None else as_names(axis, each) for axis, each in (("rows", rows), ("columns", columns))]
    axes = [Axis(label, each) for label, each in zip(("query", "key"), names)]
    if query is None:
        T, S = _sizes(shape, names)
        heads = before_softmax.marked_heads(mask, score) or 1
        query, key, scale = jnp.zeros((T, heads, 1)), jnp.zeros((S, heads, 1)), 1.0
        maps = [] if score is None else ["scores"]
    else:
        query, key = (x[:, None] if jnp.ndim(x) == 2 else jnp.asarray(x) for x in (query, key))
        if jnp.ndim(query) != 3 or jnp.ndim(key) != 3:
            raise ValueError(
                f"query and key: got {list(query.shape)} and {list(key.shape)}, must be [T N H] and [S K H], or [T H] "
                "and [S H]"
            )
        maps = ["attention", "scores"]
    maps += [] if mask is None else ["mask"]
    T, S, N = query.shape[0], key.shape[0], query.shape[1]
    _check_names(names, T, S)
    options, common = dict(mask=mask, score=score, scale=scale), dict(rows=axes[0], columns=axes[1])
    if N * T * S > _MOST_CELLS:
        if "attention" not in maps:
            cells = f"{N} x {T:,} x {S:,} is over {_MOST_CELLS:,} cells"
            raise ValueError(f"shape: {cells}; view a part, such as shape=(2048, 2048)")
        from attn.functional import pooled_attention_weights

        pooled = jax.jit(lambda query, key: pooled_attention_weights(query, key, **options))(query, key)
        weights = np.asarray(pooled, np.float32)
        largest = _largest_of_rows(query, key, options)
        return [Kind("attention", "attention", [weights], *axes, pooled_from=(T, S), largest=[largest])]
    scores, visible = map(np.asarray, before_softmax.scores_and_visibility(query, key, **options))
    computed = {
        "scores": lambda: np.where(visible, scores.astype(np.float32), MASKED),
        "mask": lambda: np.where(visible, np.float32(1), MASKED),
        "attention": lambda: np.where(
            visible, np.asarray(multi_head_attention_weights(query, key, **options), np.float32), MASKED
        ),
    }
    titles = {"scores": "scores before the softmax", "mask": "mask", "attention": "attention"}
    groups = key.shape[1] if key.shape[1] < N else None
    quantities = {"attention": "weights"}
    return [
        Kind(name, titles[name], [computed[name]()], **common, groups=groups, quantity=quantities.get(name, name))
        for name in maps
    ]


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
    sizes = (shape, shape) if isinstance(shape, int) else tuple(shape)
    if len(sizes) != 2 or not all(isinstance(size, int | np.integer) and size > 0 for size in sizes):
        raise ValueError(f"shape: got {shape!r}, must be (T, S), two positive whole numbers")
    return int(sizes[0]), int(sizes[1])


def _check_names(names, T: int, S: int):
    for axis, each, size in (("rows", names[0], T), ("columns", names[1], S)):
        if each is not None and len(each) != size:
            raise ValueError(f"{size:,} {axis}, but {len(each):,} names")
