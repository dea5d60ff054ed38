"""Ring attention on 2, 4 and 8 devices compared with NumPy, and with the reference of the whole sequence.

The tests run on the two devices of every test. `test_on_more_devices` runs them again in a process with 8 or 4.
"""

import collections
import functools
import os
import subprocess
import sys

import attention_cases as cases
import attention_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from implementation_suite import BOUND, draw_head, errors, oracle_head
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.tree_util import Partial
from traces import equations

import attn
from attn import masks, per_head, positions, scores
from attn.functional import blockwise, zigzag
from attn.functional.ring import ring_attention

DEVICES = jax.device_count()
pytestmark = pytest.mark.skipif(DEVICES < 2, reason="one device")
ORDERS = ("balanced", "consecutive", "zigzag")
AXIS = "sequence"
ROWS = P(AXIS)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(blockwise, "BLOCK_SIZE", cases.BLOCK_SIZE)


def on_devices(call, in_specs, out_specs=ROWS, devices=DEVICES, **options):
    mesh = jax.make_mesh((devices,), (AXIS,), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])
    return jax.shard_map(call, mesh=mesh, in_specs=in_specs, out_specs=out_specs, **options)


def ring(query, key, value, *, order="balanced", **options):
    """Ring attention of consecutive rows, in any order."""
    if order != "zigzag":
        return ring_attention(query, key, value, axis_name=AXIS, order=order, **options)
    moved = zigzag.to_zigzag((query, key, value), AXIS)
    return zigzag.from_zigzag(ring_attention(*moved, axis_name=AXIS, order=order, **options), AXIS)


def whole(query, key, value, *, order=None, **options):
    """The same of the whole sequence, on one device."""
    return attn.multi_head_attention(query, key, value, implementation="reference", **options)


# Compared with NumPy


def ring_cases() -> list[tuple[cases.Case, str]]:
    """Every mask and every score; dtypes and orders take turns."""
    names, dtypes = list(cases.SCORES), ("float32", "float64", "bfloat16", "float32", "float16")
    shape = 10 * DEVICES, 6 * DEVICES, 3, 5  # blocks of 4 do not divide the chunks
    drawn = [cases.Case(shape, mask, names[n % len(names)], dtypes[n % 5]) for n, mask in enumerate(cases.MASKS)]
    return [(case, ORDERS[n % 3]) for n, case in enumerate(drawn)]


@functools.cache
def value_and_gradient(mask: str, score: str, order: str):
    """Jitted: (out, logsumexp) and (dq, dk, dv) of one head for given cotangents, rows of devices put together."""

    def call(mask_values, score_values, scale, *arrays):
        options = {"mask": cases.MASKS[mask].ours(mask_values), "score": cases.SCORES[score].ours(score_values)}
        one_head = [x[:, None] for x in arrays]
        results = ring(*one_head, **options, scale=scale, order=order, return_logsumexp=True)
        return jax.tree.map(lambda x: x[:, 0], results)

    @functools.partial(jax.jit, compiler_options=cases.AS_USERS_DO)
    def both(query, key, value, mask_values, score_values, scale, cotangents):
        local = on_devices(call, (P(), P(), P(), *[P(AXIS)] * 3))
        results, pullback = jax.vjp(functools.partial(local, mask_values, score_values, scale), query, key, value)
        return results, pullback(cotangents)

    return both


@pytest.mark.some(4)
@pytest.mark.parametrize("case, order", ring_cases(), ids=str)
def test_value_and_gradients_are_those_of_numpy(case, order):
    with jax.enable_x64(case.dtype == "float64"):
        arrays, mask_values, score_values, scale, cotangents = draw_head(case, 0, 1.0)
        call = value_and_gradient(case.mask, case.score, order)
        got, gradients = call(*arrays, mask_values, score_values, scale, cotangents)
    assert got[0].dtype == case.dtype and all(g.dtype == case.dtype for g in gradients)
    head = oracle_head(case, arrays, mask_values, score_values, scale)
    found = errors(case, head, got, gradients, cotangents)
    assert max(found.values()) <= BOUND, found


# Compared with the whole sequence on one device, in float64

N, K, H, HV = 4, 2, 3, 5
T, S = 6 * DEVICES, 10 * DEVICES


def setting(dtype="float64") -> dict:
    """Arrays of every kind that a call may differentiate."""
    shapes = (T, N, H), (S, K, H), (S, K, HV), (N, 8), (N,), (T,), (S,), (T + S - 1,), ()
    drawn = cases.normal(*shapes, dtype=dtype)
    names = ("query", "key", "value", "buckets", "slopes", "of_query", "of_key", "table", "scale")
    return dict(zip(names, drawn)) | {"offset": jnp.int32(S - T)}


SHARDED = {name: P(AXIS) if name in ("query", "key", "value") else P() for name in setting("float32")}
IDS = jnp.arange(S) * 3 // S


def t5(table, s, i, j):
    return s + table[positions.relative_buckets(j - i, num_buckets=8, max_distance=16)]


def everything(attend, x, order="balanced"):
    """A mask and a score of all kinds: pytrees, marked and not, functions that capture arrays, traced integers."""
    mask = masks.causal(x["offset"]) & per_head(masks.padding(jnp.arange(N) + S - N)) | (lambda i, j: j == x["offset"])
    score = per_head(Partial(t5, x["buckets"])) >> per_head(scores.alibi(x["slopes"], 0)) >> scores.softcap(20.0)
    score = score >> (lambda s, i, j: s * x["of_query"][i] + x["of_key"][j]) >> scores.relative_bias(x["table"], 0)
    options = {"scale": x["scale"], "dropout": attn.Dropout(0.3, jax.random.key(5)), "return_logsumexp": True}
    return attend(x["query"], x["key"], x["value"], mask=mask, score=score, order=order, **options)


def packed(attend, x, order="balanced"):
    """Segments, which a window joins, and a score by distance from a function."""
    mask = masks.segments(IDS[:T], IDS) | masks.sliding_window(2, 1, x["offset"])
    score = lambda s, i, j: s + x["table"][j - i + T - 1] * x["of_query"][i]  # noqa: E731
    return attend(x["query"], x["key"], x["value"], mask=mask, score=score, order=order)


def unmasked(attend, x, order="balanced"):
    return attend(x["query"], x["key"], x["value"], order=order, return_logsumexp=True)


def objective(call):
    """A number from everything that a call returns, as a function of the floats."""

    def of_floats(floats, offset):
        leaves = jax.tree.leaves(call(floats | {"offset": offset}))
        return sum(jnp.sum(jnp.sin(jnp.where(jnp.isfinite(x), x, 0))) for x in leaves)

    return of_floats


def value(call):
    return lambda x: call(x)


def gradient(call):
    return lambda x: jax.grad(objective(call))(floats(x), x["offset"])


def tangent(call):
    return lambda x: jax.jvp(lambda f: call(f | {"offset": x["offset"]}), (floats(x),), (direction(x),))[1]


def forward_over_reverse(call):
    return lambda x: jax.jvp(lambda f: jax.grad(objective(call))(f, x["offset"]), (floats(x),), (direction(x),))[1]


def reverse_over_reverse(call):
    def of(x):
        inner = lambda f: jax.tree.leaves(jax.grad(objective(call))(f, x["offset"]))  # noqa: E731
        products = lambda f: sum(map(jnp.vdot, inner(f), jax.tree.leaves(direction(x))))  # noqa: E731
        return jax.grad(products)(floats(x))

    return of


def floats(x):
    return {name: array for name, array in x.items() if name != "offset"}


def direction(x):
    return jax.tree.map(jnp.cos, floats(x))


def compare(transform, function, order="balanced", **options):
    """Compare a transformed call on the devices with that of the whole sequence."""
    local = on_devices(lambda x: function(ring, x, order), (SHARDED,), **options)
    expected = jax.jit(transform(lambda x: function(whole, x)))(setting())
    found = jax.jit(transform(local))(setting())
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-10)


@pytest.mark.some(2)
@pytest.mark.parametrize("transform", [forward_over_reverse, tangent, gradient, value, reverse_over_reverse])
@pytest.mark.parametrize("function", [everything, packed, unmasked])
def test_every_derivative_is_that_of_the_whole_sequence(x64, function, transform):
    compare(transform, function)


@pytest.mark.some(1)
@pytest.mark.parametrize("transform", [gradient, tangent])
@pytest.mark.parametrize("order", ORDERS[1:])
@pytest.mark.parametrize("check_vma", [True, False])
def test_orders_and_checks_do_not_matter(x64, order, transform, check_vma):
    compare(transform, everything, order, check_vma=check_vma)


# Special cases of the contract


def test_hidden_keys_that_are_not_numbers_reach_nothing_and_empty_rows_are_zero():
    query, key, value = cases.normal((4 * DEVICES, 1, H), (4 * DEVICES, 1, H), (4 * DEVICES, 1, HV))
    first, last = 2, 4 * DEVICES - 3  # visible keys; the others are on these and on other devices

    def hidden(x):
        position = jnp.arange(len(x))[:, None, None]
        return jnp.where((position >= first) & (position < last), x, jnp.nan)

    mask = masks.causal() & masks.padding(last) & (lambda i, j: j >= first)
    arrays = query, hidden(key), hidden(value)
    local = on_devices(lambda *a: ring(*a, mask=mask, return_logsumexp=True), (P(AXIS),) * 3)
    (out, logsumexp), pullback = jax.jit(lambda *a: jax.vjp(local, *a))(*arrays)
    expected, of_expected = oracle.forward(
        oracle.Head(*(x[:, 0] for x in (query, key, value)), np.asarray(mask.resolve(*[4 * DEVICES] * 2)(*grid())))
    )
    np.testing.assert_allclose(out[:, 0], expected.astype(float), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(logsumexp[:, 0], of_expected.astype(float), rtol=1e-5, atol=1e-6)
    assert not np.any(out[:first]) and np.all(np.isneginf(logsumexp[:first]))
    gradients = pullback((jnp.ones_like(out), jnp.zeros_like(logsumexp)))
    assert all(np.all(np.isfinite(x)) for x in gradients)
    assert not np.any(gradients[2][:first]) and not np.any(gradients[2][last:])


def grid():
    return cases.positions(4 * DEVICES, 4 * DEVICES)


@pytest.mark.parametrize("shift", [-1e9, 1e7])
def test_a_constant_added_to_all_scores_cancels(shift):
    arrays = cases.normal((4 * DEVICES, 1, H), (4 * DEVICES, 1, H), (4 * DEVICES, 1, HV))
    local = on_devices(lambda *a: ring(*a, score=lambda s, i, j: s * 0 + shift), (P(AXIS),) * 3)
    out, pullback = jax.jit(lambda *a: jax.vjp(local, *a))(*arrays)
    np.testing.assert_allclose(out, jnp.broadcast_to(arrays[2].mean(axis=0), out.shape), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(pullback(jnp.ones_like(out))[2], np.ones(out.shape), rtol=1e-5)


def test_positions_and_the_two_moves_of_the_zigzag_order():
    def call(x):
        moved = zigzag.to_zigzag(x, AXIS)
        return moved, zigzag.zigzag_positions(len(x), AXIS), zigzag.from_zigzag(moved, AXIS)

    chunks = np.arange(6 * DEVICES).reshape(2 * DEVICES, 3)
    expected = np.concatenate([[chunks[device], chunks[2 * DEVICES - 1 - device]] for device in range(DEVICES)])
    moved, positions, back = jax.jit(on_devices(call, P(AXIS)))(jnp.arange(6 * DEVICES))
    np.testing.assert_array_equal(moved, expected.ravel())
    np.testing.assert_array_equal(positions, expected.ravel())
    np.testing.assert_array_equal(back, np.arange(6 * DEVICES))


def from_vectors(query, key):
    return lambda s, i, j: s


@pytest.mark.parametrize(
    "rows, options, error, message",
    [
        (
            2,
            {"order": "zig-zag"},
            ValueError,
            "order must be one of 'balanced', 'consecutive', 'zigzag', got 'zig-zag'",
        ),
        (3, {"order": "zigzag"}, ValueError, "its number of rows must be even, got 3"),
        (2, {"axis_name": "batch"}, ValueError, "axis_name must be a manual mesh axis: .* got 'batch'"),
        (2, {"score": scores.from_vectors(from_vectors)}, attn.Unsupported, "scores made from vectors"),
        (2, {"mask": masks.dense(jnp.ones((2, 2), bool))}, ValueError, r"masks.dense must have shape \(\d+, \d+\)"),
        (2, {"mask": jnp.ones((2, 2), bool)}, TypeError, "wrap it as attn.masks.dense"),
    ],
)
def test_errors_name_what_was_given(untyped, rows, options, error, message):
    query = cases.normal((rows * DEVICES, 1, H))[0]
    local = on_devices(lambda x: ring_attention(x, x, x, **{"axis_name": AXIS, **options}), P(AXIS))
    with pytest.raises(error, match=message):
        local(query)


# Inside of other transformations


@pytest.mark.some(1)
@pytest.mark.parametrize("check_vma", [False, True])
def test_a_batch_in_layers_that_are_checkpointed_and_scanned(check_vma):
    query, lengths = cases.normal((3, T, N, H))[0], jnp.array([T, T // 3, 1])
    slopes = cases.normal((2, N))[0]

    def layers(attend):
        def one(query, length, slopes):
            @jax.checkpoint
            def layer(x, slope):
                mask = masks.causal() & masks.padding(length) & (lambda i, j: j != length // 2)
                return jnp.tanh(x + attend(x, x, x, mask=mask, score=per_head(scores.alibi(slope)))), None

            return jax.lax.scan(layer, query, slopes)[0]

        return jax.vmap(one, (0, 0, None))

    local = on_devices(layers(ring), (P(None, AXIS), P(), P()), P(None, AXIS), check_vma=check_vma)
    found, expected = (
        jax.jit(jax.grad(lambda *a, call=call: jnp.sum(call(*a) ** 2), (0, 2)))(query, lengths, slopes)
        for call in (local, layers(whole))
    )
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.some(1)
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("axis_names", [{"data", AXIS}, {AXIS}])
def test_a_batch_over_the_other_axis_of_a_mesh(axis_type, axis_names):
    """A function that captures an array shared by all devices, and a length that differs by example."""
    if axis_type == AxisType.Explicit and axis_names == {AXIS}:
        pytest.skip("a batch on an axis that is not manual is for auto axes")
    query, key, value = cases.normal((2, T, N, H), (2, T, K, H), (2, T, K, HV))
    table, lengths = cases.normal((2 * T - 1,))[0], jnp.array([T, T // 2])

    def batch(attend):
        def one(query, key, value, length, table):
            score = lambda s, i, j: s + table[j - i + T - 1]  # noqa: E731
            return attend(query, key, value, mask=masks.causal() & masks.padding(length), score=score)

        return jax.vmap(one, (0, 0, 0, 0, None))

    mesh = jax.make_mesh((2, DEVICES // 2), ("data", AXIS), axis_types=(axis_type,) * 2)
    data = "data" if "data" in axis_names else None
    specs = [P(data, AXIS)] * 3 + [P(data), P()]
    arrays = [jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip((query, key, value, lengths, table), specs)]
    local = jax.shard_map(batch(ring), mesh=mesh, in_specs=tuple(specs), out_specs=specs[0], axis_names=axis_names)
    gradient = lambda call: jax.jit(jax.grad(lambda *a: jnp.sum(jnp.sin(call(*a))), (0, 1, 2, 4)))  # noqa: E731
    with jax.set_mesh(mesh):
        found = gradient(local)(*arrays)
    expected = gradient(batch(whole))(query, key, value, lengths, table)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.nightly
def test_without_jit():
    mask = masks.causal()
    arrays = cases.normal((2 * DEVICES, 1, H), (2 * DEVICES, 1, H), (2 * DEVICES, 1, HV))
    local = on_devices(lambda *a: ring(*a, mask=mask), (P(AXIS),) * 3)
    np.testing.assert_allclose(local(*arrays), whole(*arrays, mask=mask), rtol=1e-5, atol=1e-6)


# What is computed


class Tiles:
    """Counts tiles by the device of their queries at run time, with a score that calls back."""

    def __init__(self, device_of_row):
        self.device_of_row, self.counts = device_of_row, collections.Counter()

    def score(self, s, i, j):
        return s + jax.pure_callback(self._note, jax.ShapeDtypeStruct((), s.dtype), i, j)

    def _note(self, i, j):
        self.counts[self.device_of_row(int(np.min(i)))] += 1
        return np.zeros((), np.float32)

    def taken(self, results) -> list[int]:
        """Return the tiles that each device has computed since the last call, once `results` are there."""
        jax.block_until_ready(results)
        taken, self.counts = self.counts, collections.Counter()
        return [taken[device] for device in range(DEVICES)]


@pytest.mark.parametrize("order", ["zigzag", "consecutive"])
def test_hidden_parts_are_skipped_and_causal_work_is_balanced(order):
    """With a tile per chunk, a causal mask takes 2 P + 1 tiles per device in zig-zag order, and d + 1 in the other."""
    chunk, chunks = cases.BLOCK_SIZE, (2 if order == "zigzag" else 1) * DEVICES
    tiles = Tiles(lambda i: min(i // chunk, chunks - 1 - i // chunk) if order == "zigzag" else i // chunk)
    arrays = cases.normal(*[(chunk * chunks, 1, H)] * 3)
    expected = [chunks + 1] * DEVICES if order == "zigzag" else list(range(1, DEVICES + 1))

    def call(offset, *arrays):
        return ring_attention(*arrays, axis_name=AXIS, order=order, mask=masks.causal(offset), score=tiles.score)

    local = on_devices(call, (P(), *[P(AXIS)] * 3), check_vma=False)  # callbacks have no type of varying axes
    with_gradient = jax.jit(lambda *a: jax.value_and_grad(lambda *a: jnp.sum(local(*a) ** 2), (1, 2, 3))(*a))
    assert tiles.taken(jax.jit(local)(jnp.int32(0), *arrays)) == expected
    assert tiles.taken(with_gradient(jnp.int32(0), *arrays)) == [2 * n for n in expected]
    assert tiles.taken(jax.jit(local)(jnp.int32(-chunk * chunks), *arrays)) == [0] * DEVICES


def test_no_message_waits_in_a_conditional_and_the_next_keys_leave_first():
    x = setting("float32")
    local = on_devices(lambda x: everything(ring, x), (SHARDED,))
    found = equations(gradient(local), x)
    is_message = lambda equation: equation.primitive.name.startswith(("ppermute", "psum", "pmax", "all_"))  # noqa: E731
    assert not [e for e, around in found if is_message(e) and any(a.primitive.name == "cond" for a in around)]
    rings = collections.defaultdict(list)
    for equation, around in found:
        for loop in around:
            if loop.primitive.name == "scan" and loop.params["length"] == DEVICES:
                rings[id(loop)].append(equation.primitive.name)
    rings = [names for names in rings.values() if "ppermute" in names]
    assert len(rings) == 2
    for names in rings:
        last = max(n for n, name in enumerate(names) if name == "ppermute")
        assert last < names.index("dot_general")


@pytest.mark.skipif(DEVICES < 8, reason="needs different numbers of devices")
def test_memory_per_device_does_not_grow_with_the_devices_at_the_same_rows_per_device():
    def temporary(devices):
        array = jax.ShapeDtypeStruct((64 * devices, 2, 32), jnp.float32)
        call = lambda *a: ring(*a, mask=masks.causal())  # noqa: E731
        local = on_devices(call, (P(AXIS),) * 3, devices=devices)
        gradient = jax.jit(jax.grad(lambda *a: jnp.sum(local(*a) ** 2), (0, 1, 2)))
        return gradient.lower(array, array, array).compile().memory_analysis().temp_size_in_bytes

    few, many = temporary(2), temporary(8)
    assert many <= 1.05 * few, (few, many)


# More devices


@pytest.mark.skipif(DEVICES != 2, reason="starts the tests on more devices, once")
@pytest.mark.some(1)
@pytest.mark.parametrize("devices, chosen", [(8, ["-k", "numpy or packed or skipped or memory"]), (4, ["-m", ""])])
def test_on_more_devices(devices, chosen):
    words = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", __file__, *chosen]
    done = subprocess.run(words, env=os.environ | {"ATTN_TEST_DEVICES": str(devices)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
