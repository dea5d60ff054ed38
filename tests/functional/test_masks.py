"""Masks: each against its formula, combination with plain functions, pictures, and bad arguments."""

import operator

import attention_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attn
from attn import masks

T, S, H, HV = 3, 5, 2, 7
I, J = cases.positions(T, S)
QUERY_IDS, KEY_IDS = np.array([0, 1, 1]), np.array([0, 0, 1, 1, 2])
ARRAY = np.random.default_rng(0).random((T, S)) < 0.5
PLAIN = lambda i, j: (i + j) % 2 == 0  # noqa: E731

FORMULAS = {
    "causal(0)": (masks.causal(0), J <= I),
    "causal(2)": (masks.causal(2), J <= I + 2),
    "causal(-1)": (masks.causal(-1), J <= I - 1),
    "causal by hand": (masks.causal(), J <= I),
    "padding(3)": (masks.padding(3), (J < 3) & (I >= 0)),
    "padding(0)": (masks.padding(0), (J < 0) & (I >= 0)),
    "prefix(2)": (masks.prefix(2), (J < 2) & (I >= 0)),
    "prefix-LM": (masks.causal(0) | masks.prefix(2), (J <= I) | (J < 2)),
    "window": (masks.sliding_window(1, 2, 1), (J - I - 1 >= -1) & (J - I - 1 <= 2)),
    "window by hand": (masks.sliding_window(1, 0), (J - I >= -1) & (J <= I)),
    "segments": (masks.segments(jnp.array(QUERY_IDS), jnp.array(KEY_IDS)), QUERY_IDS[:, None] == KEY_IDS[None, :]),
    "dense": (masks.dense(jnp.array(ARRAY)), ARRAY),
    "negation": (~masks.causal(1), J > I + 1),
    "and": (masks.causal(2) & masks.padding(3), (J <= I + 2) & (J < 3)),
    "and a function": (masks.causal(2) & PLAIN, (J <= I + 2) & PLAIN(I, J)),
    "a function and": (PLAIN & masks.causal(2), (J <= I + 2) & PLAIN(I, J)),
    "or a function": (masks.causal(0) | PLAIN, (J <= I) | PLAIN(I, J)),
    "a function or": (PLAIN | masks.causal(0), (J <= I) | PLAIN(I, J)),
    "depth": (~(masks.causal(0) & ~(masks.padding(2) | PLAIN)), ~((J <= I) & ~((J < 2) | PLAIN(I, J)))),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_masks_called_by_hand_are_their_formulas(name):
    mask, expected = FORMULAS[name]
    np.testing.assert_array_equal(np.broadcast_to(mask(jnp.array(I), jnp.array(J)), (T, S)), expected)
    assert bool(mask(2, 3)) == expected[2, 3] and bool(mask(0, 0)) == expected[0, 0]


@pytest.mark.parametrize("name", [name for name in FORMULAS if "by hand" not in name])
def test_attention_weights_are_positive_where_the_formula_says(name):
    mask, expected = FORMULAS[name]
    weights = attn.attention_weights(jnp.ones((T, H)), jnp.ones((S, H)), mask=mask)
    np.testing.assert_array_equal(weights > 0, expected)


def rebuilt(mask):
    return jax.tree.map(lambda leaf: leaf, mask)


@pytest.mark.parametrize("name", FORMULAS)
def test_masks_survive_flattening(name):
    mask, expected = FORMULAS[name]
    again = rebuilt(mask)
    assert jax.tree.structure(again) == jax.tree.structure(mask)
    np.testing.assert_array_equal(np.broadcast_to(again(jnp.array(I), jnp.array(J)), (T, S)), expected)
    assert str(again) == str(mask)


def test_arrays_are_leaves_and_numbers_are_static(untyped):
    assert jax.tree.leaves(masks.causal(2)) == jax.tree.leaves(masks.causal()) == []
    assert jax.tree.leaves(masks.sliding_window(1, jnp.int32(7), 0)) == [7]
    assert len(jax.tree.leaves(masks.segments(jnp.array(QUERY_IDS), jnp.array(KEY_IDS)))) == 2
    assert jax.tree.leaves(masks.padding(jnp.int32(4)) & masks.causal(1) | PLAIN) == [4]
    assert jax.tree.leaves(masks.padding(np.int32(4))) == [4]
    assert jax.tree.structure(masks.causal(2)) == jax.tree.structure(masks.causal(2))
    assert jax.tree.structure(masks.causal(2)) != jax.tree.structure(masks.causal(3))
    assert jax.tree.structure(masks.padding(4)) != jax.tree.structure(masks.prefix(4))


def test_leaves_have_names():
    paths = jax.tree_util.tree_leaves_with_path(masks.causal() & masks.padding(jnp.int32(4)))
    assert [jax.tree_util.keystr(path) for path, _ in paths] == [".right.length"]


def test_a_leaf_may_be_mapped_to_anything():
    mask = masks.causal(jnp.int32(1)) & masks.padding(jnp.int32(4))
    for thing in (None, "placeholder", object(), 0, mask):
        mapped = jax.tree.map(lambda leaf, thing=thing: thing, mask)
        assert isinstance(mapped, masks.both)
    doubled = jax.tree.map(lambda leaf: 2 * leaf, mask)
    assert jax.tree.structure(doubled) == jax.tree.structure(mask) and jax.tree.leaves(doubled) == [2, 8]


def test_lengths_of_a_batch_by_vmap():
    query, key, value = cases.normal((2, T, H), (2, S, H), (2, S, HV))
    lengths = jnp.array([2, 4])
    call = jax.vmap(lambda q, k, v, n: attn.attention(q, k, v, mask=masks.causal(2) & masks.padding(n)))
    batch = call(query, key, value, lengths)
    whole = jax.vmap(lambda q, k, v, m: attn.attention(q, k, v, mask=m))(
        query, key, value, masks.causal(2) & masks.padding(lengths)
    )
    np.testing.assert_array_equal(whole, batch)
    for b in range(2):
        one = attn.attention(query[b], key[b], value[b], mask=masks.causal(2) & masks.padding(int(lengths[b])))
        np.testing.assert_allclose(batch[b], one, rtol=1e-6, atol=1e-7)


NEW_VALUES = {
    "causal": lambda n: masks.causal(jnp.int32(n)),
    "padding": lambda n: masks.padding(jnp.int32(n)) & masks.causal(1),
    "prefix": lambda n: masks.causal(0) | masks.prefix(jnp.int32(n)),
    "window": lambda n: ~masks.sliding_window(jnp.int32(n), 1, jnp.int32(n)),
    "segments": lambda n: masks.segments(jnp.full(T, n), jnp.full(S, n + 1)),
    "dense": lambda n: masks.dense(jnp.full((T, S), n > 2)),
}


@pytest.mark.parametrize("name", NEW_VALUES)
def test_new_values_do_not_recompile(name):
    query, key = cases.normal((T, H), (S, H))
    traces = []

    @jax.jit
    def call(query, key, mask):
        traces.append(mask)
        return attn.attention_weights(query, key, mask=mask)

    for n in range(1, 4):
        np.testing.assert_array_equal(
            call(query, key, NEW_VALUES[name](n)) > 0,
            np.broadcast_to(NEW_VALUES[name](n)(jnp.array(I), jnp.array(J)), (T, S)),
        )
    assert len(traces) == 1


@pytest.mark.some(2)
@pytest.mark.parametrize("dtype", ["bool", "int32", "float32", "float16", "uint8"])
def test_closures_over_traced_values_of_any_dtype(implementation, dtype):
    query, key, value = cases.normal((T, H), (S, H), (S, HV))
    flags = np.array([1, 0, 1, 1, 0]).astype(dtype)

    @jax.jit
    def call(flags):
        mask = lambda i, j: (flags[j] != 0) & (i >= 0)  # noqa: E731
        out = lambda value: attn.attention(query, key, value, mask=mask, implementation=implementation)  # noqa: E731
        return out(value), jax.grad(lambda value: out(value).sum())(value)

    out, gradient = call(jnp.asarray(flags))
    keys = np.flatnonzero(flags)
    expected = attn.attention(query, key[keys], value[keys])
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(np.any(np.asarray(gradient) != 0, axis=1), flags != 0)


# Pictures

PICTURES = {
    "causal": (masks.causal(), "causal()", np.tril(np.ones((8, 8), bool))),
    "offset": (masks.causal(2), "causal(offset=2)", np.tril(np.ones((8, 8), bool), 2)),
    "array": (masks.padding(jnp.int32(3)), "padding(length=3)", np.arange(8)[None, :].repeat(8, 0) < 3),
    "window": (masks.sliding_window(2, 0), None, np.tril(np.ones((8, 8), bool)) & ~np.tril(np.ones((8, 8), bool), -3)),
    "segments": (
        masks.segments(jnp.array(QUERY_IDS), jnp.array(KEY_IDS)),
        None,
        QUERY_IDS[:, None] == KEY_IDS[None, :],
    ),
    "dense": (masks.dense(jnp.array(ARRAY)), "dense(array=bool[3, 5])", ARRAY),
    "composed": (~masks.dense(jnp.array(ARRAY)) & masks.causal(1), None, ~ARRAY & (J <= I + 1)),
    "function": (masks.causal() & PLAIN, None, np.tril(np.ones((8, 8), bool)) & PLAIN(*cases.positions(8, 8))),
}


@pytest.mark.parametrize("name", PICTURES)
def test_a_repr_shows_the_matrix(name):
    mask, expression, pattern = PICTURES[name]
    first, *rows = repr(mask).splitlines()
    assert first == (mask.expression() if expression is None else expression)
    shown = np.array([[{"■": True, "·": False}[cell] for cell in row.split()] for row in rows])
    np.testing.assert_array_equal(shown, pattern)


def raises(i, j):
    raise RuntimeError("not made for these positions")


def test_a_repr_never_fails(untyped):
    table = jnp.arange(4)
    marked = attn.per_head(masks.padding(table))
    partial = jax.tree_util.Partial(lambda n, i, j: j < n, table)
    difficult = [
        masks.padding(table),
        masks.causal(table) & masks.dense(jnp.ones((2, T, S), bool)),
        masks.segments(jnp.ones((2, T), int), jnp.ones((2, S), int)),
        marked,
        marked & masks.causal(),
        ~attn.per_head(partial),
        masks.causal() & raises,
        masks.causal() & partial,
        masks.causal() & (lambda i, j: jnp.ones((3, 3), bool)),
        masks.causal() & (lambda i, j: 1.5),
    ]
    for mask in difficult + [jax.tree.map(lambda leaf: None, mask) for mask in difficult]:
        assert isinstance(repr(mask), str) and repr(mask) and mask.expression() in repr(mask)


def test_a_repr_of_traced_values_never_fails():
    shown = []

    def call(length, array):
        mask = masks.causal() & masks.padding(length) & masks.dense(array) & (lambda i, j: j < length)
        shown.extend(map(repr, (mask, masks.causal(length), ~masks.padding(length), masks.causal())))
        return length

    jax.jit(call)(jnp.int32(3), jnp.ones((T, S), bool))
    jax.vmap(call)(jnp.arange(2), jnp.ones((2, T, S), bool))
    assert len(shown) >= 8 and all("causal" in each or "padding" in each for each in shown)


# Bad arguments


@pytest.mark.parametrize("bad", [1.5, "1", True, np.float32(1), np.ones(2, bool)])
def test_offsets_and_lengths_must_be_integers(untyped, bad):
    for build in (
        lambda: masks.causal(bad),
        lambda: masks.padding(bad),
        lambda: masks.prefix(bad),
        lambda: masks.sliding_window(bad, 0),
        lambda: masks.sliding_window(0, bad),
        lambda: masks.sliding_window(0, 0, bad),
    ):
        with pytest.raises(TypeError, match="integer"):
            build()


def test_padding_needs_a_length(untyped):
    with pytest.raises(TypeError, match="length"):
        masks.padding(None)


@pytest.mark.parametrize("bad", [[[True]], np.ones((T, S)), np.ones((T, S), int), None])
def test_dense_takes_an_array_of_bools(untyped, bad):
    with pytest.raises(TypeError, match=r"masks\.dense"):
        masks.dense(bad)


@pytest.mark.parametrize("bad", [[0, 1, 1], np.ones(T), np.ones(T, bool)])
def test_segments_take_arrays_of_integers(untyped, bad):
    with pytest.raises(TypeError, match="query_ids"):
        masks.segments(bad, KEY_IDS)
    with pytest.raises(TypeError, match="key_ids"):
        masks.segments(QUERY_IDS, bad)


MISFITS = {
    "dense": (lambda: masks.dense(jnp.ones((S, T), bool)), r"masks\.dense.*\(3, 5\).*\(5, 3\)"),
    "dense, batched": (lambda: masks.dense(jnp.ones((2, T, S), bool)), r"masks\.dense.*\(3, 5\)"),
    "query_ids": (lambda: masks.segments(KEY_IDS, KEY_IDS), r"query_ids.*\(3,\).*\(5,\)"),
    "key_ids": (lambda: masks.segments(QUERY_IDS, QUERY_IDS), r"key_ids.*\(5,\).*\(3,\)"),
    "lengths": (lambda: masks.padding(jnp.array([1, 2])), r"length.*scalar.*vmap.*per_head"),
    "prefixes": (lambda: masks.causal(0) | masks.prefix(jnp.array([1, 2])), r"length.*scalar"),
    "offsets": (lambda: ~masks.causal(jnp.array([1, 2])), r"offset.*scalar"),
    "lefts": (lambda: masks.sliding_window(jnp.array([1, 2]), 0, 0), r"left.*scalar"),
    "rights": (lambda: masks.sliding_window(0, jnp.array([1, 2]), 0), r"right.*scalar"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_arrays_that_do_not_fit_are_explained(untyped, name):
    build, message = MISFITS[name]
    query, key, value = cases.normal((T, H), (S, H), (S, HV))
    with pytest.raises(ValueError, match=message):
        attn.attention(query, key, value, mask=build())
    with pytest.raises(ValueError, match=message):
        attn.attention_weights(query, key, mask=build() & PLAIN)


@pytest.mark.parametrize("operation", [operator.and_, operator.or_])
@pytest.mark.parametrize("other", [np.ones((T, S), bool), jnp.ones((T, S), bool)])
def test_an_array_beside_a_mask_is_sent_to_masks_dense(untyped, operation, other):
    for pair in ((masks.causal(), other), (other, masks.causal())):
        with pytest.raises(TypeError, match=r"masks\.dense"):
            operation(*pair)


def test_the_truth_of_a_mask_or_a_score_is_refused(untyped):
    for build in (lambda: masks.causal() and masks.padding(3), lambda: not attn.scores.softcap(2.0)):
        with pytest.raises(TypeError, match=r"neither true nor false.*&"):
            build()


def test_a_score_beside_a_mask_is_refused(untyped):
    with pytest.raises(TypeError, match="score="):
        masks.causal() & attn.scores.softcap(2.0)


def test_a_base_class_without_a_registered_dataclass_is_refused():
    for base in (masks.Mask, masks.causal, attn.scores.Score):
        with pytest.raises(TypeError, match=f"own derives from {base.__name__}.*any callable"):
            type("own", (base,), {"__call__": lambda self, i, j: j <= i})()


def test_a_repr_of_a_deleted_array_never_fails():
    length = jnp.int32(3) + 0
    mask = masks.causal() & masks.padding(length)
    length.delete()  # as donation to a jitted function does
    assert "causal" in repr(mask)


@pytest.mark.parametrize("combine", [operator.and_, operator.or_])
def test_nothing_cannot_be_combined(untyped, combine):
    for pair in ((masks.causal(), None), (None, masks.causal())):
        with pytest.raises(TypeError, match=r"unsupported operand.*NoneType"):
            combine(*pair)
