"""Ring attention compared with NumPy, and with the reference of the whole sequence; on the two devices of every test.

`test_on_more_devices` in test_ring_work.py runs these tests again in a process with 8 or 4.
"""

import dataclasses
import functools

import attention_cases as cases
import attention_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import ring_cases
from implementation_suite import BOUND, draw_head, errors, oracle_head
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from ring_cases import AXIS, DEVICES, HV, ORDERS, H, K, N, T, compare, on_devices, ring, whole

import attn
from attn import masks, per_head, scores
from attn.functional import ring_heads, zigzag
from attn.functional.implementations import IMPLEMENTATIONS
from attn.functional.ring import ring_attention

pytestmark = pytest.mark.skipif(DEVICES < 2, reason="one device")
small_blocks = ring_cases.small_blocks  # a fixture


# Compared with NumPy


def mask_and_score_cases() -> list[tuple[cases.Case, str]]:
    """Every mask and every score; dtypes and orders take turns."""
    names, dtypes = list(cases.SCORES), ("float32", "float64", "bfloat16", "float32", "float16")
    shape = 10 * DEVICES, 6 * DEVICES, 3, 5  # blocks of 4 do not divide the chunks
    drawn = [cases.Case(shape, mask, names[n % len(names)], dtypes[n % 5]) for n, mask in enumerate(cases.MASKS)]
    return [(case, ORDERS[n % 3]) for n, case in enumerate(drawn)]


@functools.cache
def value_and_gradient(mask: str, score: str, order: str, implementation: str):
    """Jitted: (out, logsumexp) and (dq, dk, dv) of one head for given cotangents, rows of devices put together."""
    check_vma = implementation == "blockwise"  # the interpreter of Pallas does not keep track of varying axes

    def call(mask_values, score_values, scale, *arrays):
        options = {"mask": cases.MASKS[mask].ours(mask_values), "score": cases.SCORES[score].ours(score_values)}
        one_head = [x[:, None] for x in arrays]
        options |= {"scale": scale, "order": order, "implementation": implementation}
        results = ring(*one_head, **options, return_logsumexp=True)
        return jax.tree.map(lambda x: x[:, 0], results)

    @functools.partial(jax.jit, compiler_options=cases.AS_USERS_DO)
    def both(query, key, value, mask_values, score_values, scale, cotangents):
        local = on_devices(call, (P(), P(), P(), *[P(AXIS)] * 3), check_vma=check_vma)
        results, pullback = jax.vjp(functools.partial(local, mask_values, score_values, scale), query, key, value)
        return results, pullback(cotangents)

    return both


@pytest.mark.some(4)
@pytest.mark.parametrize("case, order", mask_and_score_cases(), ids=str)
def test_value_and_gradients_are_those_of_numpy(case, order):
    check_as_numpy(case, order, "blockwise")


def check_as_numpy(case: cases.Case, order: str, implementation: str):
    with jax.enable_x64(case.dtype == "float64"):
        arrays, mask_values, score_values, scale, cotangents = draw_head(case, 0, 1.0)
        call = value_and_gradient(case.mask, case.score, order, implementation)
        got, gradients = call(*arrays, mask_values, score_values, scale, cotangents)
    assert got[0].dtype == case.dtype and all(g.dtype == case.dtype for g in gradients)
    head = oracle_head(case, arrays, mask_values, score_values, scale)
    found = errors(case, head, got, gradients, cotangents)
    assert max(found.values()) <= BOUND, found


KERNELS = ("pallas_tpu", "pallas_gpu")


def kernel_cases() -> list[tuple[cases.Case, str]]:
    """What kernels evaluate inside and what they read, masks by arrays among it."""
    pairs = ("causal", "none"), ("window", "softcap"), ("causal", "alibi"), ("segments", "none"), ("padding", "lambda")
    shape = 10 * DEVICES, 6 * DEVICES, 3, 5
    dtypes = ("float32", "bfloat16", "float64", "float32", "float32")
    return [(cases.Case(shape, *pair, dtypes[n]), ORDERS[n % 3]) for n, pair in enumerate(pairs)]


@pytest.mark.parametrize("implementation", KERNELS)
@pytest.mark.parametrize("case, order", kernel_cases(), ids=str)
def test_kernels_compute_the_parts_as_numpy(case, order, implementation):
    check_as_numpy(case, order, implementation)


# Compared with the whole sequence on one device, in float64


@pytest.mark.some(2)
@pytest.mark.parametrize("transform", ring_cases.TRANSFORMS)
@pytest.mark.parametrize("function", ring_cases.FUNCTIONS)
def test_every_derivative_is_that_of_the_whole_sequence(x64, function, transform):
    compare(transform, function)


@pytest.mark.some(1)
@pytest.mark.parametrize("transform", (ring_cases.gradient, ring_cases.tangent))
@pytest.mark.parametrize("order", ORDERS[1:])
@pytest.mark.parametrize("check_vma", [True, False])
def test_orders_and_checks_do_not_matter(x64, order, transform, check_vma):
    compare(transform, ring_cases.everything, order, check_vma=check_vma)


@pytest.mark.parametrize("transform", (ring_cases.gradient, ring_cases.forward_over_reverse))
def test_heads_that_take_no_turns_compute_the_same(x64, monkeypatch, transform):
    monkeypatch.setattr(ring_heads, "TURN", 2**18)
    compare(transform, ring_cases.everything)


def test_turns_have_the_fewest_heads_that_make_a_long_message(monkeypatch):
    monkeypatch.setattr(ring_heads, "TURN", 1000)
    found = [ring_heads.turns_of(K, rows, 10) for K, rows in ((8, 100), (8, 99), (8, 30), (8, 10), (6, 50), (1, 1000))]
    assert found == [8, 4, 2, 1, 3, 1]


@pytest.mark.parametrize("implementation", KERNELS)
@pytest.mark.parametrize("function", (ring_cases.everything, ring_cases.packed))
def test_kernels_have_the_gradients_of_the_whole_sequence(x64, function, implementation):
    """By every float that functions hold or capture, with grouped queries, marks of heads, and dropout."""
    attend = functools.partial(ring, implementation=implementation)
    compare(ring_cases.gradient, function, attend=attend, check_vma=False)


@pytest.mark.nightly
@pytest.mark.parametrize("transform", (ring_cases.tangent, ring_cases.forward_over_reverse))
def test_rings_of_kernels_have_every_derivative(x64, transform):
    attend = functools.partial(ring, implementation="pallas_tpu")
    compare(transform, ring_cases.everything, attend=attend, check_vma=False)


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
        (
            2,
            {"implementation": "cudnn"},
            ValueError,
            "must be one of 'blockwise', 'pallas_tpu', 'pallas_gpu', got 'cudnn'",
        ),
        (2, {"mask": masks.dense(jnp.ones((2, 2), bool))}, ValueError, r"masks.dense must have shape \(\d+, \d+\)"),
        (2, {"mask": jnp.ones((2, 2), bool)}, TypeError, "wrap it as attn.masks.dense"),
    ],
)
def test_errors_name_what_was_given(untyped, rows, options, error, message):
    query = cases.normal((rows * DEVICES, 1, H))[0]
    local = on_devices(lambda x: ring_attention(x, x, x, **{"axis_name": AXIS, **options}), P(AXIS))
    with pytest.raises(error, match=message):
        local(query)


def test_kernels_on_another_backend_are_refused(monkeypatch):
    for_tpus = dataclasses.replace(IMPLEMENTATIONS["pallas_tpu"], backends={"tpu"})
    monkeypatch.setitem(IMPLEMENTATIONS, "pallas_tpu", for_tpus)
    query = cases.normal((2 * DEVICES, 1, H))[0]
    local = on_devices(lambda x: ring(x, x, x, implementation="pallas_tpu"), P(AXIS))
    with pytest.raises(attn.Unsupported, match="'pallas_tpu' does not support backend 'cpu'; use 'blockwise'"):
        local(query)


def test_a_derivative_of_its_own_on_captured_arrays_is_refused_but_not_on_leaves():
    """Types of varying axes are checked inside of it; the arrays of a pytree have the right ones."""
    query, slope = cases.normal((4 * DEVICES, 1, H), ())

    def score(slope, s, i, j):
        return s - jax.nn.softplus(slope) * jnp.abs(i - j)

    def call(as_score, query, slope):
        return ring(query, query, query, score=as_score(score, slope))

    local = lambda as_score: on_devices(functools.partial(call, as_score), (P(AXIS), P()))  # noqa: E731
    with pytest.raises(NotImplementedError, match="compute it before, outside of the mask or score"):
        jax.jit(local(functools.partial))(query, slope)
    leaf = lambda slope: jnp.sum(local(jax.tree_util.Partial)(query, slope) ** 2)  # noqa: E731
    expected = lambda slope: jnp.sum(whole(query, query, query, score=functools.partial(score, slope)) ** 2)  # noqa: E731
    np.testing.assert_allclose(jax.jit(jax.grad(leaf))(slope), jax.grad(expected)(slope), rtol=1e-4)


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
