"""Bounds of blocks: what a mask tells about a block of queries by a block of keys, compared with every pair."""

import dataclasses
import operator
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from attn import masks
from attn.functional.blocks import positions_in_blocks
from attn.functional.survey import needed_blocks

# The annotations would refuse the scalars of NumPy, which the masks accept.
pytestmark = pytest.mark.usefixtures("untyped")
drawn = settings(
    deadline=None,
    max_examples=15,
    derandomize="CI" in os.environ,
    database=None,
    phases=[Phase.generate],  # what is drawn is small; to shrink it would compile for minutes
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def blocks(length: int, size: int) -> np.ndarray:
    """Positions in blocks, ascending, what fills up the last one repeating its last."""
    count = -(-length // size)
    return np.minimum(np.arange(count * size, dtype=np.int32), length - 1).reshape(count, size)


def looked_at(visible, rows, columns) -> tuple[np.ndarray, np.ndarray]:
    """(some, every) of each block `[q k]`, pair by pair."""
    pairs = np.asarray(visible)[rows[:, None, :, None], columns[None, :, None, :]]
    return pairs.any(axis=(2, 3)), pairs.all(axis=(2, 3))


def bounds(mask, rows, columns) -> tuple[np.ndarray, np.ndarray]:
    return tuple(np.broadcast_to(b, (len(rows), len(columns))) for b in mask.bounds(rows, columns))


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A mask, the pairs `[T S]` that it shows, and whether its bounds are exact or estimates."""

    mask: object
    visible: np.ndarray
    some_exact: bool = True
    every_exact: bool = True


def integers(least: int, most: int):
    """Integers as Python numbers and as arrays of several dtypes, unsigned where they can be."""

    def forms(n):
        kinds = [int, np.int64, jnp.int32, np.int8] + ([np.uint8, jnp.uint8, jnp.uint32] if n >= 0 else [])
        return st.sampled_from(kinds).map(lambda kind: kind(n))

    return st.integers(least, most).flatmap(forms)


LARGEST = 2**31 - 1
ENDLESS = st.sampled_from([10 * LARGEST, np.int32(LARGEST), jnp.int32(LARGEST)])

PLAIN = {
    "parity": (lambda i, j: (i + 2 * j) % 3 == 0),
    "one key": (lambda i, j: j == 2),
    "one query": (lambda i, j: i == 3),
    "everything": (lambda i, j: True),
    "nothing": (lambda i, j: jnp.zeros((1, 1), bool)),
    "far": (lambda i, j: abs(i - j) > 2),
}


def leaf(kind: str, T: int, S: int):
    """Strategy of one mask of a kind."""
    i, j = np.arange(T)[:, None], np.arange(S)[None, :]
    all_of = lambda visible: np.broadcast_to(visible, (T, S))  # noqa: E731
    offsets = integers(-T - 2, S + 2)
    ids = lambda n: st.lists(st.integers(-2, 3), min_size=n, max_size=n).map(np.array)  # noqa: E731

    def window(left, right, offset):
        distance, (least, most) = j - i - int(offset), (-int(left), int(right))
        visible = (least <= distance) & (distance <= most)
        return Drawn(masks.sliding_window(left, right, offset), visible, some_exact=least <= most)

    def segments(query_ids, key_ids, in_jax):
        ours = masks.segments(*(map(jnp.asarray, (query_ids, key_ids)) if in_jax else (query_ids, key_ids)))
        return Drawn(ours, query_ids[:, None] == key_ids[None, :], some_exact=False)

    def dense(seed, density):
        array = np.random.default_rng(seed).random((T, S)) < density
        return Drawn(masks.dense(array), array)

    def plain(name):
        return Drawn(masks.as_mask(PLAIN[name]), all_of(PLAIN[name](i, j)))

    return {
        "causal": offsets.map(lambda o: Drawn(masks.causal(o), j <= i + int(o))),
        "padding": integers(-2, S + 2).map(lambda n: Drawn(masks.padding(n), all_of(j < int(n)))),
        "prefix": integers(-2, S + 2).map(lambda n: Drawn(masks.prefix(n), all_of(j < int(n)))),
        "window": st.builds(window, integers(-3, 5), integers(-3, 5), offsets),
        "endless window": st.builds(window, ENDLESS | integers(0, 2), ENDLESS, offsets),
        "segments": st.builds(segments, ids(T), ids(S), st.booleans()),
        "sorted segments": st.builds(segments, ids(T).map(np.sort), ids(S).map(np.sort), st.booleans()),
        "dense": st.builds(dense, st.integers(0, 99), st.sampled_from([0.0, 0.1, 0.9, 1.0])),
        "plain": st.sampled_from(sorted(PLAIN)).map(plain),
    }[kind]


KINDS = ("causal", "padding", "prefix", "window", "endless window", "segments", "sorted segments", "dense", "plain")
lengths, sizes = st.sampled_from([1, 7, 10]), st.sampled_from([1, 3])  # few, so that little is compiled


def conjunction(a: Drawn, b: Drawn) -> Drawn:
    return Drawn(a.mask & b.mask, a.visible & b.visible, False, a.every_exact and b.every_exact)


def disjunction(a: Drawn, b: Drawn) -> Drawn:
    return Drawn(a.mask | b.mask, a.visible | b.visible, a.some_exact and b.some_exact, False)


def negation(a: Drawn) -> Drawn:
    return Drawn(~a.mask, ~a.visible, a.every_exact, a.some_exact)


def nested(T: int, S: int):
    """Strategy of masks in masks."""
    leaves = st.sampled_from(KINDS).flatmap(lambda kind: leaf(kind, T, S))
    deeper = lambda inner: (  # noqa: E731
        st.builds(conjunction, inner, inner) | st.builds(disjunction, inner, inner) | inner.map(negation)
    )
    return st.recursive(leaves, deeper, max_leaves=4)


def check(found: Drawn, rows, columns, bounds=bounds):
    """Sound always; exact where promised."""
    some, every = bounds(found.mask.resolve(*found.visible.shape), rows, columns)
    any_pair, all_pairs = looked_at(found.visible, rows, columns)
    assert np.all(some | ~any_pair), "a visible pair is passed over"
    assert np.all(~every | all_pairs), "a hidden pair is taken for visible"
    if found.some_exact:
        np.testing.assert_array_equal(some, any_pair)
    if found.every_exact:
        np.testing.assert_array_equal(every, all_pairs)


def bounds_in_jax(mask, rows, columns):
    return tuple(jnp.broadcast_to(b, (len(rows), len(columns))) for b in mask.bounds(rows, columns))


def bounds_traced(mask, rows, columns):
    """With the mask's arrays as arguments of a jitted function."""
    return map(np.asarray, jax.jit(lambda mask: bounds_in_jax(mask, rows, columns))(mask))


@pytest.mark.some(3)
@pytest.mark.parametrize("kind", KINDS)
@drawn
@given(data=st.data(), T=lengths, S=lengths, r=sizes, c=sizes)
def test_bounds_of_one_mask_and_of_its_negation_are_true_of_every_pair(kind, data, T, S, r, c):
    found = data.draw(leaf(kind, T, S))
    check(found, blocks(T, r), blocks(S, c))
    check(negation(found), blocks(T, r), blocks(S, c))


@settings(drawn, max_examples=30)
@given(data=st.data(), T=lengths, S=lengths, r=sizes, c=sizes)
def test_bounds_of_nested_masks_are_true_of_every_pair(data, T, S, r, c):
    check(data.draw(nested(T, S)), blocks(T, r), blocks(S, c))


@settings(drawn, max_examples=15)
@given(data=st.data(), T=lengths, S=lengths, r=sizes, c=sizes)
def test_bounds_of_traced_values_are_true_of_every_pair(data, T, S, r, c):
    check(data.draw(nested(T, S)), blocks(T, r), blocks(S, c), bounds_traced)


@drawn
@given(T=lengths, S=lengths, r=sizes, c=sizes, offset=st.integers(-5, 9), n=st.integers(0, 9))
def test_bounds_of_what_is_usual_beside_causal_are_exact(T, S, r, c, offset, n):
    i, j = np.arange(T)[:, None], np.arange(S)[None, :]
    causal = masks.causal(offset)
    for mask, visible in (
        (causal & masks.padding(n), (j <= i + offset) & (j < n)),
        (causal & masks.sliding_window(n, 2, offset), (j <= i + offset) & (j >= i + offset - n)),
        (causal | masks.prefix(n), (j <= i + offset) | (j < n)),
    ):
        some, _ = looked_at(visible, blocks(T, r), blocks(S, c))
        np.testing.assert_array_equal(bounds(mask, blocks(T, r), blocks(S, c))[0], some)


@drawn
@given(data=st.data(), T=lengths, S=lengths, r=sizes, c=sizes)
def test_documents_in_order_need_no_blocks_but_their_own(data, T, S, r, c):
    ids = lambda n, most: np.cumsum(data.draw(st.lists(st.integers(0, most), min_size=n, max_size=n)))  # noqa: E731
    gaps, query_ids, key_ids = ids(T, 3), ids(T, 1), ids(S, 1)
    for queries, keys, columns in ((gaps, gaps, blocks(T, c)), (query_ids, key_ids, blocks(S, c))):
        some, every = bounds(masks.segments(queries, keys), blocks(T, r), columns)
        any_pair, all_pairs = looked_at(queries[:, None] == keys[None, :], blocks(T, r), columns)
        np.testing.assert_array_equal(some, any_pair)
        np.testing.assert_array_equal(every, all_pairs)


STATIC = {
    "causal": masks.causal(),
    "causal, placed": masks.causal(2),
    "padding": masks.padding(3),
    "prefix": masks.prefix(3),
    "window": masks.sliding_window(2, 1),
    "and": masks.causal() & masks.padding(3),
    "or": masks.causal() | masks.prefix(3),
    "not": ~masks.causal(),
    "deep": ~(masks.sliding_window(2, 1) & ~(masks.causal(-1) | masks.padding(2))),
}
TRACED = {
    "causal": lambda n: masks.causal(n),
    "padding": lambda n: masks.padding(n),
    "window, left": lambda n: masks.sliding_window(n, 1, 0),
    "window, offset": lambda n: masks.sliding_window(1, 1, n),
    "beside what is known": lambda n: masks.causal(0) & masks.padding(n),
    "plain": lambda n: masks.as_mask(lambda i, j: j < n),
    "segments": lambda n: masks.segments(jnp.arange(9) // n, jnp.arange(9) // n),
}


def is_known(bound) -> bool:
    return isinstance(bound, (np.ndarray, np.bool_, bool))


@pytest.mark.parametrize("name", STATIC)
def test_bounds_of_numbers_are_known_while_tracing(name):
    mask, seen = STATIC[name].resolve(9, 9), []
    rows, columns = blocks(9, 4), blocks(9, 2)

    @jax.jit
    def call(x):
        seen.extend([*mask.bounds(rows, columns), needed_blocks(mask, rows, columns)])
        return x

    call(0.0)
    assert len(seen) == 3 and all(is_known(bound) for bound in seen)


@pytest.mark.parametrize("name", TRACED)
def test_bounds_of_traced_values_are_not_taken_for_known(name):
    seen = []

    @jax.jit
    def call(n):
        rows, columns = blocks(9, 4), blocks(9, 2)
        seen.extend([*TRACED[name](n).bounds(rows, columns), needed_blocks(TRACED[name](n), rows, columns)])
        return n

    call(2)
    assert len(seen) == 3 and not any(is_known(bound) for bound in seen)


@pytest.mark.some(3)
@pytest.mark.parametrize("build", TRACED.values(), ids=TRACED)
def test_bounds_under_vmap_are_those_of_each(build):
    numbers = jnp.arange(1, 4)
    rows, columns = blocks(9, 4), blocks(9, 2)
    together = jax.vmap(lambda n: bounds_in_jax(build(n), rows, columns))(numbers)
    for n in range(3):
        for all_bounds, its_own in zip(together, bounds(build(numbers[n]), rows, columns)):
            np.testing.assert_array_equal(all_bounds[n], its_own)


@pytest.mark.parametrize("operation", [operator.and_, operator.or_])
def test_bounds_of_a_function_that_is_not_boolean_are_refused(operation):
    with pytest.raises(TypeError, match=r"additive values belong in score="):
        operation(masks.causal(0), lambda i, j: i + j).bounds(blocks(4, 2), blocks(4, 2))


@pytest.mark.parametrize("length", [*range(1, 18), 97])
@pytest.mark.parametrize("block_size", [1, 4, 7])
def test_blocks_hold_every_position_once_and_are_as_equal_as_they_can_be(length, block_size):
    index = positions_in_blocks(length, block_size)
    count, size = index.shape
    assert count == -(-length // block_size) and size <= block_size
    assert count * (size - 1) < length  # no smaller blocks would do
    np.testing.assert_array_equal(index.ravel()[:length], np.arange(length))
    assert np.all(index.ravel()[length:] == length - 1)


@pytest.mark.parametrize("query_block, key_block", [(4, 4), (3, 5)])
def test_a_survey_names_the_blocks_that_hold_a_visible_pair(query_block, key_block):
    i, j = np.arange(11)[:, None], np.arange(14)[None, :]
    rows, columns = positions_in_blocks(11, query_block), positions_in_blocks(14, key_block)
    for mask, visible in (
        (masks.causal(2), j <= i + 2),
        (masks.padding(jnp.int32(5)), (j < 5) & (i >= 0)),
        (masks.as_mask(lambda i, j: j == 2 * i), j == 2 * i),
    ):
        expected, _ = looked_at(visible, rows, columns)
        assert expected.any() and not expected.all()
        np.testing.assert_array_equal(needed_blocks(mask, rows, columns), expected)
