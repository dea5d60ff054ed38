"""Pooled weights against the whole weights in NumPy, pooled by plain loops; their memory; and calls in error."""

import dataclasses

import attention_cases as cases
import attention_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

import attn
from attn import masks, per_head, scores
from attn.functional import blockwise
from attn.functional.implementations import IMPLEMENTATIONS

REDUCTIONS = ("mass", "max")
both = pytest.mark.parametrize("reduce", REDUCTIONS)
T, S, N, K, H = 13, 17, 4, 2, 8
CLOSE = {"float64": 1e-13, "float32": 1e-5, "bfloat16": 1e-5, "float16": 1e-5}  # of scores in float32 or wider


@pytest.fixture(autouse=True)
def _small_tiles(request, monkeypatch):
    """Take small tiles in the second pass, so that small arrays are many, and blocks are shorter and longer."""
    if "real_tiles" not in request.fixturenames:
        monkeypatch.setattr(blockwise, "BLOCK_SIZE", cases.BLOCK_SIZE)


@pytest.fixture
def real_tiles(monkeypatch):
    """Take tiles of the sizes that users get."""
    cases.use_real_blocks(monkeypatch)


def numpy_weights(query, key, visible=True, score=None, scale=None) -> np.ndarray:
    """Compute the weights of one head in NumPy: `[T S]` in 80 bits, 0 in rows that see nothing."""
    query, key = (np.asarray(x).astype(oracle.WIDE) for x in (query, key))
    s = query @ key.T * (oracle.WIDE(query.shape[1]) ** -0.5 if scale is None else scale)
    s = s if score is None else score(s, *cases.positions(*s.shape))
    s = np.where(visible, s, -np.inf)
    peak = s.max(axis=1, keepdims=True)
    e = np.exp(s - np.where(peak == -np.inf, 0, peak))
    total = e.sum(axis=1, keepdims=True)
    return e / np.where(total == 0, 1, total)


def by_loops(weights: np.ndarray, shape, reduce: str) -> np.ndarray:
    """Pool weights `[T S]` block by block."""
    a, b = (-(-length // most) for length, most in zip(weights.shape, shape))
    rows = []
    for first_row in range(0, weights.shape[0], a):
        row = []
        for first_column in range(0, weights.shape[1], b):
            block = weights[first_row : first_row + a, first_column : first_column + b]
            row.append(block.max() if reduce == "max" else block.sum() / len(block))
        rows.append(row)
    return np.array(rows, weights.dtype)


def check(pooled, expected, tolerance=1e-5):
    assert pooled.shape == expected.shape
    np.testing.assert_allclose(np.asarray(pooled, oracle.WIDE), expected, rtol=tolerance, atol=tolerance)


# Values


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("case", cases.typical(), ids=str)
def test_every_mask_and_score_in_every_dtype(case, reduce):
    mask, score = cases.MASKS[case.mask], cases.SCORES[case.score]
    (T, S, H, _), rng = case.shape, np.random.default_rng(7)
    with jax.enable_x64(case.dtype == "float64"):
        query, key = (jnp.asarray(rng.normal(size=size), case.dtype) for size in ((T, H), (S, H)))
        wide = "float64" if case.dtype == "float64" else "float32"
        mask_values, score_values = ([cases.rounded(x, wide) for x in each.draw(rng, T, S)] for each in (mask, score))
        shape = tuple(int(n) for n in (rng.integers(1, T + 2), rng.integers(1, S + 2)))

        @jax.jit
        def call(query, key, mask_values, score_values):
            options = {"mask": mask.ours(mask_values), "score": score.ours(score_values), "scale": 0.7}
            return [_by(name, query, key, shape, reduce, options) for name in ("reference", "blockwise")]

        results = call(query, key, mask_values, score_values)
    visible = mask.numpy(mask_values, *cases.positions(T, S))
    wide_values = [np.asarray(x, oracle.WIDE) if np.asarray(x).dtype.kind == "f" else x for x in score_values]
    weights = numpy_weights(query, key, visible, lambda s, i, j: score.numpy(wide_values, s, i, j)[0], 0.7)
    for pooled in results:
        assert pooled.dtype == wide
        check(pooled, by_loops(weights, shape, reduce), CLOSE[case.dtype])


def _by(implementation, query, key, shape, reduce, options):
    return attn.pooled_attention_weights(
        query, key, shape=shape, reduce=reduce, implementation=implementation, **options
    )


# Blocks of one position, of less than a tile of 4, of one tile, of several, and of several with padding inside.
SHAPES = [(1, 1), (2, 3), (3, 2), (4, 5), (7, 6), (13, 17), (14, 1), (256, 256), (1, 256), (6, 4)]


@both
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape(shape, reduce):
    query, key = cases.normal((T, H), (S, H))
    # The distance is read from a table, whose entries for padding are the largest.
    table = np.linspace(0, 4, T + S - 1).astype("float32")
    score, visible = (lambda s, i, j: s + jnp.exp(jnp.asarray(table)[j - i + T - 1])), np.tri(T, S, 3, dtype=bool)
    pooled = _by("blockwise", query, key, shape, reduce, {"mask": masks.causal(3), "score": score})
    weights = numpy_weights(query, key, visible, lambda s, i, j: s + np.exp(table.astype(oracle.WIDE))[j - i + T - 1])
    check(pooled, by_loops(weights, shape, reduce))


@both
@pytest.mark.parametrize("shape", [(45, 45), (9, 15), (4, 2)], ids=str)
def test_a_narrow_band(shape, reduce):
    query, key = cases.normal((45, H), (45, H))
    pooled = _by("blockwise", query, key, shape, reduce, {"mask": masks.sliding_window(2, 0)})
    i, j = cases.positions(45, 45)
    check(pooled, by_loops(numpy_weights(query, key, (i - 2 <= j) & (j <= i)), shape, reduce))


@both
def test_grouped_heads_with_masks_and_scores_of_their_own(implementation, reduce):
    query, key = cases.normal((T, N, H), (S, K, H))
    lengths, slopes = np.array([17, 3, 0, 9]), np.array([0.5, 0.0, 1.0, 2.0], "float32")
    options = {"mask": per_head(masks.padding(lengths)) & masks.causal(4), "score": per_head(scores.alibi(slopes, 4))}
    pooled = _by(implementation, query, key, (5, 4), reduce, options)
    i, j = cases.positions(T, S)
    for n in range(N):
        visible, slope = (j < lengths[n]) & (j <= i + 4), slopes[n]
        weights = numpy_weights(
            query[:, n], key[:, n // 2], visible, lambda s, i, j, slope=slope: s - slope * abs(i + 4 - j)
        )
        check(pooled[n], by_loops(weights, (5, 4), reduce))


@both
def test_one_head_is_the_same_without_its_axis(implementation, reduce):
    query, key = cases.normal((T, H), (S, H))
    options = {"mask": masks.sliding_window(3, 2, 4), "score": scores.softcap(1.5)}
    one = _by(implementation, query, key, (5, 6), reduce, options)
    many = _by(implementation, query[:, None], key[:, None], (5, 6), reduce, options)
    np.testing.assert_array_equal(one, many[0])
    i, j = cases.positions(T, S)
    weights = numpy_weights(query, key, (i + 1 <= j) & (j <= i + 6), lambda s, i, j: 1.5 * np.tanh(s / 1.5))
    check(one, by_loops(weights, (5, 6), reduce))


def test_every_query_and_every_key_may_be_a_block_of_its_own(implementation):
    query, key = cases.normal((T, H), (S, H))
    pooled = _by(implementation, query, key, (T, S + 5), "mass", {})
    check(pooled, attn.attention_weights(query, key))


@pytest.mark.parametrize("causal", [False, True])
def test_rows_sum_to_one_at_real_sizes(real_tiles, causal):
    query, key = cases.normal((1500, 2, 16), (1301, 1, 16))
    options = {"mask": masks.causal(0) if causal else None}
    pooled = _by("auto", query, key, (37, 41), "mass", options)
    assert pooled.shape == (2, 37, 41)
    np.testing.assert_allclose(np.asarray(pooled).sum(axis=2), 1, atol=1e-5)
    for reduce in REDUCTIONS:
        pooled = _by("auto", query, key, (37, 41), reduce, options)
        visible = np.tri(1500, 1301, dtype=bool) if causal else True
        weights = numpy_weights(query[:, 1], key[:, 0], visible)
        check(pooled[1], by_loops(weights, (37, 41), reduce))


# Semantics


@both
def test_a_query_without_a_visible_key_counts_as_zero(implementation, reduce):
    query, key = cases.normal((T, H), (S, H))
    sees = np.arange(T) % 3 == 0
    pooled = _by(implementation, query, key, (3, 4), reduce, {"mask": lambda i, j: (i % 3 == 0) & (j >= 0)})
    check(pooled, by_loops(numpy_weights(query, key, sees[:, None]), (3, 4), reduce))
    nothing = _by(implementation, query, key, (3, 4), reduce, {"mask": masks.padding(0)})
    np.testing.assert_array_equal(nothing, np.zeros((3, 4)))


@both
@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_hidden_numbers_that_are_not_finite_reach_nothing_and_seen_ones_the_rows_of_their_blocks(
    implementation, reduce, number
):
    query, key = cases.normal((T, H), (S, H))
    spoiled = key.at[9].set(number)
    options = {"mask": masks.causal(0) & (lambda i, j: j != 9)}
    hidden = _by(implementation, query, spoiled, (4, 4), reduce, options)
    np.testing.assert_array_equal(hidden, _by(implementation, query, key, (4, 4), reduce, options))
    # Query 9 is the first to see it, in block 2 of 4 queries.
    seen = np.asarray(_by(implementation, query, spoiled, (4, 4), reduce, {"mask": masks.causal(0)}))
    before = _by(implementation, query, key, (4, 4), reduce, {"mask": masks.causal(0)})
    np.testing.assert_allclose(seen[:2], before[:2], rtol=1e-6, atol=1e-7)
    assert np.all(np.isnan(seen[2:]))


@both
def test_a_score_of_minus_infinity_hides_a_pair(implementation, reduce):
    query, key = cases.normal((T, H), (S, H))
    bias = np.where(np.random.default_rng(1).random((T, S)) < 0.5, -np.inf, 0.0).astype("float32")
    bias[4:8] = -np.inf
    pooled = _by(implementation, query, key, (4, 5), reduce, {"score": scores.dense(bias)})
    check(pooled, by_loops(numpy_weights(query, key, bias == 0), (4, 5), reduce))


@both
@pytest.mark.parametrize("name", ["reference", "blockwise"])
def test_strict_settings_of_jax_are_kept(strict, name, reduce):
    query, key = cases.normal((T, H), (S, H), dtype="float64")
    with jax.numpy_dtype_promotion("strict"):
        pooled = _by(name, query, key, (4, 5), reduce, {"mask": masks.causal(-2), "score": scores.softcap(2.0)})
    weights = numpy_weights(query, key, np.tri(T, S, -2, dtype=bool), lambda s, i, j: 2 * np.tanh(s / 2))
    check(pooled, by_loops(weights, (4, 5), reduce), 1e-13)


@both
def test_a_large_additive_score_cancels(implementation, reduce):
    query, key = cases.normal((T, H), (S, H))
    pooled = _by(implementation, query, key, (4, 5), reduce, {"score": lambda s, i, j: 0 * s - 1e9})
    weights = np.full((T, S), oracle.WIDE(1) / S)
    check(pooled, by_loops(weights, (4, 5), reduce), 1e-6)


# Transformations


@both
def test_it_works_under_jit_and_vmap(implementation, reduce):
    query, key = cases.normal((3, T, N, H), (3, S, K, H))
    offsets, lengths = jnp.array([0, 4, -3]), jnp.array([17, 5, 11])

    @jax.jit
    @jax.vmap
    def batch(query, key, offset, length):
        options = {"mask": masks.causal(offset) & masks.padding(length), "score": scores.alibi(0.3, offset)}
        return _by(implementation, query, key, (5, 4), reduce, options)

    pooled = batch(query, key, offsets, lengths)
    i, j = cases.positions(T, S)
    for b in range(3):
        visible = (j <= i + int(offsets[b])) & (j < int(lengths[b]))
        score = lambda s, i, j, b=b: s - oracle.WIDE(np.float32(0.3)) * abs(i + int(offsets[b]) - j)  # noqa: E731
        for n in range(N):
            weights = numpy_weights(query[b, :, n], key[b, :, n // 2], visible, score)
            check(pooled[b, n], by_loops(weights, (5, 4), reduce))


@pytest.mark.parametrize("shape", [(4, 5), (2, 2)])
def test_the_mass_has_a_gradient(implementation, shape):
    (query, key), (g,) = cases.normal((T, N, H), (S, K, H)), cases.normal((N, *shape), seed=3)
    # A row without a visible key, and a bias with a gradient.
    mask, bias = masks.causal(-1), cases.normal((T + S - 1,), seed=4)[0]

    def gradients(pool):
        return jax.grad(lambda *a: jnp.sum(pool(*a) * g), argnums=(0, 1, 2))(query, key, bias)

    def ours(query, key, bias):
        return _by(implementation, query, key, shape, "mass", {"mask": mask, "score": scores.relative_bias(bias, 0)})

    def whole(query, key, bias):
        weights = attn.multi_head_attention_weights(query, key, mask=mask, score=scores.relative_bias(bias, 0))
        a, b = (-(-length // most) for length, most in zip((T, S), shape))
        rows, columns = jnp.arange(T) // a, jnp.arange(S) // b
        size = np.bincount(rows)[:, None]
        return jnp.einsum("nij,mi,jk->nmk", weights, jax.nn.one_hot(rows, len(size)).T / size,
                          jax.nn.one_hot(columns, shape[1]))  # fmt: skip

    for got, expected in zip(gradients(ours), gradients(whole)):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


@both
@pytest.mark.parametrize("order", [1, pytest.param(2, marks=pytest.mark.nightly)])
def test_derivatives_are_those_of_finite_differences(x64, order, reduce):
    query, key, bias = cases.normal((7, 2, 3), (9, 1, 3), (15,), dtype="float64")

    def pooled(query, key, bias):
        query, key, bias = map(jnp.asarray, (query, key, bias))  # differences are taken in NumPy
        options = {"mask": masks.causal(-1), "score": scores.relative_bias(bias, 0)}
        return jnp.sin(_by("blockwise", query, key, (1, 2), reduce, options))

    check_grads(pooled, (query, key, bias), order=order, eps=1e-5, atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(jax.device_count() < 2, reason="one device")
@both
def test_heads_may_be_sharded(implementation, reduce):
    query, key = cases.normal((T, N, H), (S, N, H))
    lengths = jnp.array([17, 3, 0, 9])

    def call(query, key, lengths):
        options = {"mask": per_head(masks.padding(lengths)) & masks.causal(4), "score": scores.softcap(2.0)}
        return _by(implementation, query, key, (5, 4), reduce, options)

    expected = call(query, key, lengths)
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,))
    specs = (P(None, "x"), P(None, "x"), P("x"))
    is_checked = not cases.is_kernel(implementation)  # the interpreter of Pallas keeps no track of varying axes
    local = jax.jit(jax.shard_map(call, mesh=mesh, in_specs=specs, out_specs=P("x"), check_vma=is_checked))
    np.testing.assert_allclose(local(query, key, lengths), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.skipif(jax.device_count() < 2, reason="one device")
@pytest.mark.parametrize("spec", [P("x"), P(None, "x")], ids=["rows", "heads"])
@pytest.mark.parametrize("name", ["reference", "blockwise"])
def test_arrays_may_be_sharded_on_an_explicit_mesh(name, spec):
    query, key = cases.normal((12, N, H), (16, N, H))
    options = {"mask": masks.causal(4)}
    expected = _by(name, query, key, (5, 4), "mass", options)
    with jax.set_mesh(jax.make_mesh((2,), ("x",), axis_types=(AxisType.Explicit,))):
        query, key = (jax.device_put(x, spec) for x in (query, key))
        np.testing.assert_allclose(_by(name, query, key, (5, 4), "mass", options), expected, rtol=1e-6, atol=1e-7)


# Work and memory


def test_tiles_that_the_mask_hides_are_skipped(monkeypatch):
    seen = []

    def score(s, i, j):
        def note(i, j):
            seen.append((int(np.min(i)), int(np.min(j))))
            return np.zeros((), np.float32)

        return s + jax.pure_callback(note, jax.ShapeDtypeStruct((), s.dtype), i, j)

    query, key = cases.normal((16, H), (16, H))
    for mask in (masks.causal(), masks.causal(jnp.int32(0))):
        seen.clear()
        jax.block_until_ready(_by("blockwise", query, key, (8, 8), "max", {"mask": mask, "score": score}))
        tiles = [(i, j) for i in range(0, 16, 4) for j in range(0, 16, 4) if j <= i]
        assert sorted(seen) == sorted(2 * tiles)  # in both passes


@both
def test_memory_grows_linearly(real_tiles, optimized, reduce):
    def temporary(T):
        array = jax.ShapeDtypeStruct((T, 8, 64), jnp.float32)
        call = jax.jit(lambda q, k: attn.pooled_attention_weights(q, k, mask=masks.causal(), reduce=reduce))
        return call.lower(array, array).compile().memory_analysis().temp_size_in_bytes

    short, long = temporary(8192), temporary(32768)
    assert long < 4.5 * short and long < 6 * 4 * 32768 * 8 * 64  # a few copies of the queries
    assert long < 4 * 32768 * 256 * 8  # [N T s]


# Arguments


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"shape": (0, 4)}, ValueError, r"shape must be two whole numbers of at least 1, got \(0, 4\)"),
        ({"shape": (4,)}, ValueError, r"shape must be two whole numbers of at least 1, got \(4,\)"),
        ({"shape": ()}, ValueError, r"shape must be two whole numbers of at least 1, got \(\)"),
        ({"shape": 256}, TypeError, "shape must be a tuple of two whole numbers, got 256"),
        ({"shape": (2.0, 4)}, TypeError, r"shape must be a tuple of two whole numbers, got \(2.0, 4\)"),
        ({"shape": (True, 4)}, TypeError, r"shape must be a tuple of two whole numbers, got \(True, 4\)"),
        ({"reduce": "mean"}, ValueError, "reduce must be one of 'mass', 'max', got 'mean'"),
        ({"reduce": None}, ValueError, "reduce must be one of 'mass', 'max', got None"),
        ({"mask": masks.causal()}, ValueError, "causal needs an offset when the lengths differ"),
        ({"mask": np.ones((T, S), bool)}, TypeError, "wrap it as attn.masks.dense"),
        ({"scale": "big"}, TypeError, "scale must be a real number"),
        ({"implementation": "quick"}, ValueError, "unknown implementation 'quick'"),
        ({"implementation": "cudnn"}, attn.Unsupported, "'cudnn' does not support"),
        ({"query": np.zeros((T, H, 1, 1), "float32")}, ValueError, r"query must have shape \[T N H\], got .*jax.vmap"),
        ({"query": np.zeros((T, H), "float32")}, ValueError, r"key must have shape \[S H\], got \(17, 2, 8\)"),
        ({"query": np.zeros((T, 3, H), "float32")}, ValueError, "the N = 3 query heads must be a multiple"),
        ({"query": [[1.0]]}, TypeError, r"query must be an array of shape \[T N H\], got list"),
        ({"query": np.zeros((T, N, H), int)}, TypeError, "query must be a real floating-point array"),
        ({"mask": per_head(masks.padding(np.ones(3, int)))}, ValueError, "must be the N = 4 query heads"),
    ],
)
def test_arguments_in_error_are_named_with_what_is_allowed(untyped, arguments, error, message):
    query, key = cases.normal((T, N, H), (S, K, H))
    with pytest.raises(error, match=message):
        attn.pooled_attention_weights(**({"query": query, "key": key} | arguments))


def test_one_head_takes_no_marks_per_head():
    query, key = cases.normal((T, H), (S, H))
    with pytest.raises(ValueError, match="differs by head"):
        attn.pooled_attention_weights(query, key, mask=per_head(masks.padding(np.array([3]))))


def test_an_implementation_without_a_logsumexp_is_refused(monkeypatch):
    partial = dataclasses.replace(IMPLEMENTATIONS["blockwise"], features={"mask"})
    monkeypatch.setitem(IMPLEMENTATIONS, "partial", partial)
    query, key = cases.normal((T, H), (S, H))
    with pytest.raises(attn.Unsupported, match="'partial' does not support logsumexp"):
        attn.pooled_attention_weights(query, key, implementation="partial")
