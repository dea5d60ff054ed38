"""Masks and scores at other positions: offsets and arrays of positions, bounds that survive, and what they become."""

import attention_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_skipping import Tiles, each, with_pullback

import attn
from attn import masks, per_head, scores
from attn.functional import cudnn
from attn.functional.blocks import positions_in_blocks
from attn.functional.contract import Call
from attn.functional.survey import needed_blocks

T, S, H, HV = 7, 10, 2, 3
I, J = cases.positions(T, S)
QUERIES, KEYS = np.array([0, 1, 4, 5, 9, 11, 12]), np.array([0, 2, 3, 5, 6, 7, 9, 12, 13, 14])
TABLE = np.random.default_rng(3).normal(size=31).astype("float32")  # of distances -15..15
ODD = lambda i, j: (i + j) % 2 == 1  # noqa: E731

# The positions of queries and keys as they are given, and as they are.
POSITIONS = {
    "offsets": ((3, 1), (I + 3, J + 1)),
    "traced offset": ((jnp.int32(5), 0), (I + 5, J)),
    "narrow offset": ((jnp.uint8(5), np.int16(-1)), (I + 5, J - 1)),
    "arrays": ((jnp.array(QUERIES), jnp.array(KEYS)), (QUERIES[I], KEYS[J])),
    "array of NumPy, offset": ((QUERIES, -2), (QUERIES[I], J - 2)),
}
MASKS = {
    "causal": (masks.causal(), lambda i, j: j <= i),
    "window": (masks.sliding_window(2, 1), lambda i, j: (j - i >= -2) & (j - i <= 1)),
    "composed": (
        masks.causal() & masks.padding(jnp.int32(8)) | (lambda i, j: j == 2),
        lambda i, j: (j <= i) & (j < 8) | (j == 2),
    ),
    "a function": (ODD, ODD),
}
SCORES = {
    "alibi": (scores.alibi(0.5), lambda s, i, j: s - 0.5 * abs(i - j)),
    "relative_bias": (scores.relative_bias(jnp.array(TABLE)), lambda s, i, j: s + TABLE[j - i + 15]),
    "chain": (scores.alibi(0.5) >> (lambda s, i, j: s + 0.1 * i), lambda s, i, j: s - 0.5 * abs(i - j) + 0.1 * i),
}


def weights(s, visible):
    e = np.where(visible, np.exp(s - s.max()), 0)
    return e / np.maximum(e.sum(axis=1, keepdims=True), 1e-30)


@pytest.mark.parametrize("where", POSITIONS)
@pytest.mark.parametrize("name", MASKS)
def test_a_placed_mask_sees_absolute_positions(untyped, implementation, name, where):
    (mask, formula), (given, (i, j)) = MASKS[name], POSITIONS[where]
    query, key, value = cases.normal((T, H), (S, H), (S, HV))
    visible = np.broadcast_to(formula(i, j), (T, S))
    assert visible.any() and not visible.all()
    options = {"mask": masks.placed(mask, *given), "implementation": implementation}
    expected = weights(np.asarray(query @ key.T) / np.sqrt(H), visible) @ np.asarray(value)
    np.testing.assert_allclose(attn.attention(query, key, value, **options), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("where", POSITIONS)
@pytest.mark.parametrize("name", SCORES)
def test_a_placed_score_sees_absolute_positions(untyped, implementation, name, where):
    (score, formula), (given, (i, j)) = SCORES[name], POSITIONS[where]
    query, key, value = cases.normal((T, H), (S, H), (S, HV))
    options = {"score": scores.placed(score, *given), "implementation": implementation}
    s = formula(np.asarray(query @ key.T) / np.sqrt(H), i, j)
    expected = weights(s, np.ones((T, S), bool)) @ np.asarray(value)
    np.testing.assert_allclose(attn.attention(query, key, value, **options), expected, rtol=1e-5, atol=1e-6)


def test_a_window_at_a_traced_offset_skips_blocks():
    T, S = 9, 45
    tiles = Tiles(T, S)
    arrays = cases.normal((T, H), (S, H), (S, HV))

    def call(offset, *arrays):
        mask = masks.placed(masks.sliding_window(2, 0), offset, 0)
        return attn.attention(*arrays, mask=mask, score=tiles.score, implementation="blockwise")

    run = jax.jit(lambda offset, *arrays: with_pullback(lambda *a: call(offset, *a))(*arrays))
    i, j = cases.positions(T, S)
    for offset in (20, 33):
        visible = (j - i - offset >= -2) & (j <= i + offset)
        expected = tiles.holding(visible)
        assert 0 < len(expected) < 10
        results = run(jnp.int32(offset), *arrays)
        assert tiles.taken(results) == each(expected, 2)
        query, key, value = map(np.asarray, arrays)
        dense = weights(query @ key.T / np.sqrt(H), visible) @ value
        np.testing.assert_allclose(results[0], dense, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("where", ["offsets", "array of NumPy, offset"])
def test_bounds_at_known_positions_are_known_while_tracing(where):
    given, (i, j) = POSITIONS[where]
    rows, columns = positions_in_blocks(T, 3), positions_in_blocks(S, 4)
    seen = []

    @jax.jit
    def call(x):
        seen.append(needed_blocks(masks.placed(masks.causal(), *given).resolve(T, S), rows, columns))
        return x

    call(0.0)
    pairs = np.broadcast_to(j <= i, (T, S))[rows[:, None, :, None], columns[None, :, None, :]]
    assert isinstance(seen[0], np.ndarray)
    np.testing.assert_array_equal(seen[0], pairs.any(axis=(2, 3)))


def test_a_mask_placed_at_the_rows_is_the_mask_itself():
    mask = masks.causal() & masks.padding(jnp.int32(3))
    resolved = masks.placed(mask, 0, 0).resolve(T, T)
    assert isinstance(resolved, masks.both) and resolved.left.offset == 0
    call = Call(*cases.normal((T, 8), (T, 8), (T, 8), dtype="bfloat16"), resolved, None, 0.5)
    assert cudnn.unsupported_reason(call) is None
    assert isinstance(masks.placed(mask, 0, 0).resolve(T, S), masks.placed)
    assert isinstance(masks.placed(mask, jnp.int32(0), 0).resolve(T, T), masks.placed)


def test_a_placed_score_does_not_depend_on_how_many_queries_there_are():
    bias = scores.placed(scores.relative_bias(jnp.arange(2.0 * T + 5)), 0, 0)  # distance 0 is T + 2, in the middle
    for num_queries in (1, T):
        assert bias.resolve(num_queries, T)(jnp.float32(0), jnp.int32(0), jnp.int32(0)) == T + 2


def test_placed_masks_combine_with_others_and_differ_by_head_and_example():
    query, key, value = cases.normal((2, T, 2, H), (2, S, 2, H), (2, S, 2, HV))
    lengths, offsets = np.array([4, 9]), jnp.array([0, 2])

    def call(query, key, value, offset):
        mask = masks.placed(masks.causal() & per_head(masks.padding(jnp.array(lengths))), offset, 1) & masks.padding(8)
        return attn.multi_head_attention(query, key, value, mask=mask, implementation="blockwise")

    out = jax.vmap(call)(query, key, value, offsets)
    for b, n in np.ndindex(2, 2):
        visible = (I + int(offsets[b]) >= J + 1) & (lengths[n] > J + 1) & (J < 8)
        q, k, v = (np.asarray(x[b, :, n]) for x in (query, key, value))
        np.testing.assert_allclose(out[b, :, n], weights(q @ k.T / np.sqrt(H), visible) @ v, rtol=1e-5, atol=1e-6)


def test_positions_that_do_not_fit_are_explained(untyped):
    query, key, value = cases.normal((T, H), (S, H), (S, HV))
    with pytest.raises(ValueError, match=r"placed: key_positions must have shape \(10,\).*got \(7,\)"):
        attn.attention(query, key, value, mask=masks.placed(masks.causal(), 0, jnp.arange(7)))
    with pytest.raises(TypeError, match="placed: query_positions must be an integer"):
        scores.placed(scores.alibi(0.5), 1.5, 0)
    with pytest.raises(TypeError, match="score="):
        masks.placed(scores.alibi(0.5), 0, 0)


def test_a_placed_mask_shows_itself():
    assert repr(masks.placed(masks.causal(), 1, 0)).startswith("placed(causal(), 1, 0)\n■ ■ · ·")
    assert len(repr(masks.placed(masks.causal(), np.array([0, 5]), 0)).splitlines()) == 3


BOOLS = np.random.default_rng(4).integers(2, size=(9, 8)).astype(bool)
BY_POSITION = {
    "masks.dense": (masks.dense(BOOLS), BOOLS),
    "segments": (
        masks.segments(np.arange(9) // 3, np.arange(8) // 3),
        np.equal.outer(np.arange(9) // 3, np.arange(8) // 3),
    ),
    "not": (~masks.dense(~BOOLS) | masks.dense(~BOOLS) & (lambda i, j: j < 0), BOOLS),
}


@pytest.mark.parametrize("start", [-2, 0, 2, 5])
@pytest.mark.parametrize("name", BY_POSITION)
def test_an_array_by_position_hides_the_positions_that_it_does_not_hold(implementation, name, start):
    """The nearest row would be read otherwise, and the weights would be plausible and wrong."""
    mask, array = BY_POSITION[name]
    query, key, value = cases.normal((T, H), (S, H), (S, HV))

    @jax.jit
    def call(*starts):
        return attn.attention(query, key, value, mask=masks.placed(mask, *starts), implementation=implementation)

    held = {(i, j): array[i, j] for i, j in np.ndindex(array.shape)}
    visible = np.array([[held.get((i + start, j - 1), False) for j in range(S)] for i in range(T)])
    expected = weights(np.asarray(query @ key.T) / np.sqrt(H), visible) @ np.asarray(value)
    np.testing.assert_allclose(call(start, -1), expected, rtol=1e-5, atol=1e-6)
    placed = masks.placed(mask, jnp.int32(start), -1)
    rows, columns = positions_in_blocks(T, 3), positions_in_blocks(S, 4)
    pairs = visible[rows[:, None, :, None], columns[None, :, None, :]]
    some, every = (np.broadcast_to(bound, pairs.shape[:2]) for bound in placed.bounds(rows, columns))
    assert not (pairs.any(axis=(2, 3)) & ~some).any() and not (every & ~pairs.all(axis=(2, 3))).any()


def test_a_bias_by_position_is_not_a_number_where_it_is_not_held(implementation):
    query, key, value = cases.normal((T, H), (S, H), (S, HV))
    bias = scores.dense(jnp.ones((9, S + 1)))
    call = lambda start: attn.attention(  # noqa: E731
        query, key, value, score=scores.placed(bias, start, 1), implementation=implementation
    )
    out = jax.jit(call)(4)
    np.testing.assert_array_equal(np.isnan(out).all(axis=1), np.arange(T) + 4 >= 9)
    expected = attn.attention(query, key, value)
    np.testing.assert_allclose(out[:5], expected[:5], rtol=1e-5, atol=1e-6)


def test_known_positions_beyond_an_array_are_an_error(untyped):
    query, key, value = cases.normal((T, H), (S, H), (S, HV))
    with pytest.raises(ValueError, match=r"holds 9 query positions, but here they go up to 9$"):
        attn.attention(query, key, value, score=scores.placed(scores.dense(jnp.ones((9, S))), 3, 0))
    with pytest.raises(ValueError, match=r"holds 8 key positions, but here they go up to 9$"):
        attn.attention(query, key, value, mask=masks.placed(masks.causal() & masks.dense(BOOLS), 0, 0))
    held = masks.placed(masks.dense(np.ones((9, S + 1), bool)), 2, 0)  # more than there are
    np.testing.assert_array_equal(attn.attention(query, key, value, mask=held), attn.attention(query, key, value))
