"""Attention inside `jax.shard_map`: heads, queries or nothing sharded over two devices."""

import attention_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from traces import equations

import attn
from attn import masks, per_head, scores
from attn.functional import blockwise, cpu

T, S, N, H, HV = 10, 14, 6, 2, 3
DEVICES = 2

pytestmark = pytest.mark.skipif(jax.device_count() < DEVICES, reason="one device")


def mesh(*shape, names=("x",)):
    axis_types = (AxisType.Auto,) * len(names)
    return jax.make_mesh(shape or (DEVICES,), names, axis_types=axis_types)


def arrays():
    """Query, key, value, and a table of biases by distance."""
    return cases.normal((T, N, H), (S, N, H), (S, N, HV), (T + S - 1,))


def attend(query, key, value, table, implementation, *, lengths, offset=S - T, first=0):
    """Many heads with a mask and a score that capture arrays; `first` is the place of query 0 among all queries."""
    mask = masks.causal(offset) & per_head(masks.padding(lengths))
    score = lambda s, i, j: s + table[j - (i + first) + T - 1]  # noqa: E731
    return attn.multi_head_attention(query, key, value, mask=mask, score=score, implementation=implementation)


LENGTHS = jnp.array([14, 3, 9, 14, 0, 6])


def heads_sharded(implementation):
    """Each device has half of the heads, and all of the table."""
    spec = P(None, "x")
    call = lambda q, k, v, table, lengths: attend(q, k, v, table, implementation, lengths=lengths)  # noqa: E731
    return call, (spec, spec, spec, P(), P("x")), spec


def queries_sharded(implementation):
    """Each device has half of the queries and half of the keys, and gathers the other half of the keys."""

    def call(query, key, value, table, lengths):
        key, value = (jax.lax.all_gather(x, "x", axis=0, tiled=True) for x in (key, value))
        first = jax.lax.axis_index("x") * (T // DEVICES)
        placed = {"offset": first + S - T, "first": first}
        return attend(query, key, value, table, implementation, lengths=lengths, **placed)

    return call, (P("x"), P("x"), P("x"), P(), P()), P("x")


def nothing_sharded(implementation):
    """Each device has everything and does the same."""
    return lambda *a: attend(*a[:4], implementation, lengths=a[4]), (P(),) * 5, P()


def with_gradient(call):
    def both(floats, lengths):
        out, pullback = jax.vjp(lambda *floats: call(*floats, lengths), *floats)
        return out, pullback(jnp.cos(out))

    return both


COLLECTIVES = ("psum", "all_gather", "reduce_scatter", "ppermute", "all_to_all")


def waiting_in_conditionals(call, *arguments) -> list[str]:
    """Collective operations that not every device comes to, so that the others wait forever."""
    found = [(equation.primitive.name, around) for equation, around in equations(call, *arguments)]
    return [name for name, around in found if name.startswith(COLLECTIVES) and any(map(devices_may_differ, around))]


def devices_may_differ(equation) -> bool:
    """Return whether an equation is a conditional whose predicate may differ by device."""
    predicate = equation.invars[0].aval if equation.primitive.name == "cond" else None
    return predicate is not None and bool(predicate.vma if hasattr(predicate, "vma") else predicate.mat.varying)


def skip_what_the_interpreter_cannot(implementation, check_vma):
    if check_vma and cases.is_kernel(implementation):
        pytest.skip("the interpreter of Pallas does not keep track of varying axes; tests/accelerators compiles this")


@pytest.fixture(scope="module")
def unsharded():
    return jax.jit(with_gradient(lambda *a: attend(*a[:4], "reference", lengths=a[4])))(arrays(), LENGTHS)


@pytest.mark.some(2)
@pytest.mark.parametrize("implementation", [n for n in cases.complete_implementations() if n != "reference"])
@pytest.mark.parametrize("check_vma", [True, False], ids=["checked", "unchecked"])
@pytest.mark.parametrize("sharded", [heads_sharded, queries_sharded, nothing_sharded], ids=lambda f: f.__name__)
def test_value_and_gradients_are_those_without_a_mesh(implementation, unsharded, sharded, check_vma):
    skip_what_the_interpreter_cannot(implementation, check_vma)
    call, in_specs, out_specs = sharded(implementation)
    call = jax.shard_map(call, mesh=mesh(), in_specs=in_specs, out_specs=out_specs, check_vma=check_vma)
    assert not waiting_in_conditionals(with_gradient(call), arrays(), LENGTHS)  # or what follows would hang
    found, expected = (jax.tree.leaves(x) for x in (jax.jit(with_gradient(call))(arrays(), LENGTHS), unsharded))
    for ours, theirs in zip(found, expected, strict=True):
        assert np.any(theirs)
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel", [name for name in cases.implementations() if cases.is_kernel(name)])
def test_a_kernel_says_that_rules_of_derivatives_need_unchecked_axes(kernel):
    arrays = cases.normal((8, 4, H), (8, 4, H), (8, 4, HV))

    def call(*arrays):
        score = lambda s, i, j: jax.nn.relu(s)  # noqa: E731
        return attn.multi_head_attention(*arrays, score=score, implementation=kernel)

    def gradient(check_vma):
        sharded = jax.shard_map(call, mesh=mesh(), in_specs=P(None, "x"), out_specs=P(None, "x"), check_vma=check_vma)
        return jax.jit(jax.grad(lambda *arrays: jnp.sum(sharded(*arrays) ** 2)))(*arrays)

    with pytest.raises(attn.Unsupported, match=r"jax\.nn\.relu, in the score.* with check_vma=True"):
        gradient(check_vma=True)
    np.testing.assert_allclose(
        gradient(check_vma=False), jax.grad(lambda *a: jnp.sum(call(*a) ** 2))(*arrays), atol=1e-5
    )


def test_tangents_and_second_order_pass_through_a_mesh():
    call, in_specs, out_specs = queries_sharded("blockwise")
    call = jax.shard_map(call, mesh=mesh(), in_specs=in_specs, out_specs=out_specs)
    plain = lambda *a: attend(*a[:4], "reference", lengths=a[4])  # noqa: E731

    def second(call):
        objective = lambda floats: jnp.sum(jnp.sin(call(*floats, LENGTHS)))  # noqa: E731
        return lambda floats: jax.jvp(jax.grad(objective), (floats,), (floats,))

    assert not waiting_in_conditionals(second(call), arrays())  # or what follows would hang
    found, expected = (jax.tree.leaves(jax.jit(second(f))(arrays())) for f in (call, plain))
    for ours, theirs in zip(found, expected, strict=True):
        assert np.any(theirs)
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_keys_that_every_device_has_get_their_gradient_after_all_conditionals():
    query, key, value = cases.normal((T, H), (T, H), (T, HV))

    def call(query, key, value):
        mask = masks.causal(jax.lax.axis_index("x") * len(query))
        return attn.attention(query, key, value, mask=mask, implementation="blockwise")

    local = jax.shard_map(call, mesh=mesh(), in_specs=(P("x"), P(), P()), out_specs=P("x"))
    gradient = jax.grad(lambda *a: jnp.sum(local(*a) ** 2), argnums=(0, 1, 2))
    assert not waiting_in_conditionals(gradient, query, key, value)


@pytest.mark.some(1)
@pytest.mark.parametrize("check_vma", [True, False], ids=["checked", "unchecked"])
@pytest.mark.parametrize("mask", [None, masks.causal(S - T)], ids=["all", "causal"])
def test_what_a_score_captures_may_alone_differ_by_device(implementation, mask, check_vma):
    skip_what_the_interpreter_cannot(implementation, check_vma)
    query, key, value, bias = cases.normal((T, H), (S, H), (S, HV), (DEVICES, S))

    def call(query, key, value, bias):
        score = lambda s, i, j: s + bias[0][j]  # noqa: E731
        return attn.attention(query, key, value, mask=mask, score=score, implementation=implementation)[None]

    sharded = jax.shard_map(call, mesh=mesh(), in_specs=(P(), P(), P(), P("x")), out_specs=P("x"), check_vma=check_vma)
    plain = lambda *a: jnp.stack([call(*a[:3], one[None])[0] for one in a[3]])  # noqa: E731

    def both(call):
        objective = lambda *a: jnp.sum(jnp.sin(call(*a)))  # noqa: E731
        return jax.jit(lambda *a: (call(*a), jax.grad(objective, argnums=(0, 1, 2, 3))(*a)))

    found, expected = (jax.tree.leaves(both(f)(query, key, value, bias)) for f in (sharded, plain))
    for ours, theirs in zip(found, expected, strict=True):
        assert np.any(theirs)
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_window_and_arrays_that_lie_along_the_positions_in_a_mesh():
    arrays = cases.normal((2, 20, H), (2, 20, H), (2, 20, HV))
    ids, bias = jnp.arange(20) // 7, cases.normal((20, 20), seed=1)[0]

    def batch(implementation):
        def call(query, key, value, ids, bias):
            mask = masks.sliding_window(3, 0) & (masks.segments(ids, ids) | (lambda i, j: j % 5 == 0))
            return attn.attention(query, key, value, mask=mask, score=scores.dense(bias), implementation=implementation)

        return jax.vmap(call, in_axes=(0, 0, 0, None, None))

    specs = (P("x"),) * 3 + (P(), P())
    sharded = jax.shard_map(batch("blockwise"), mesh=mesh(), in_specs=specs, out_specs=P("x"))
    expected = jax.jit(batch("reference"))(*arrays, ids, bias)
    np.testing.assert_allclose(jax.jit(sharded)(*arrays, ids, bias), expected, rtol=1e-5, atol=1e-6)


def outer_loops(call, length, *arguments) -> int:
    """Count the loops of so many rounds that are in no other loop."""
    is_loop = lambda equation: equation.primitive.name == "scan"  # noqa: E731
    loops = [e for e, around in equations(call, *arguments) if is_loop(e) and not any(map(is_loop, around))]
    return sum(equation.params["length"] == length for equation in loops)


def test_heads_take_turns_on_a_device_of_their_own_alone(monkeypatch):
    monkeypatch.setattr(cpu, "cores", lambda: DEVICES)
    N, seen = 22, []  # eleven heads a device, and no other loop has as many rounds
    query, key, value = cases.normal((9, N, H), (9, N, H), (9, N, HV))

    def call(query, key, value):
        seen.append(blockwise.heads_at_once(query.shape[1]))
        return attn.multi_head_attention(query, key, value, implementation="blockwise")

    heads = P(None, "x")
    local = jax.shard_map(call, mesh=mesh(), in_specs=heads, out_specs=heads)
    partly = jax.shard_map(
        call, mesh=mesh(DEVICES, 1, names=("x", "y")), in_specs=heads, out_specs=heads, axis_names={"x"}
    )
    found = [outer_loops(f, n, query, key, value) for f, n in ((call, N), (local, 11), (partly, 11))]
    assert seen == [N, 1, 11] and found == [0, 1, 0]
    np.testing.assert_allclose(jax.jit(local)(query, key, value), call(query, key, value), rtol=1e-5, atol=1e-6)
