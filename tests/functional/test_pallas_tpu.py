"""The kernels for TPUs beyond what all implementations share: what can be inside, the list of tiles, and batches."""

import dataclasses
import functools

import attention_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.sharding import AbstractDevice, AbstractMesh
from traces import equations

import attn
from attn import masks, per_head, positions, scores
from attn.functional import pallas_tpu, pallas_tpu_layout
from attn.functional.attention import call_of_heads as checked_call
from attn.functional.contract import Call
from attn.functional.implementations import IMPLEMENTATIONS
from attn.functional.pallas_tpu_layout import FIRST, LAST, MOST_BLOCKS, NEEDED, WHOLE, steps
from attn.functional.plans import Blocks, plan_call

attend = functools.partial(attn.multi_head_attention, implementation="pallas_tpu")
NAMES = "pallas_tpu", "reference"

# What can be inside

X = jax.ShapeDtypeStruct((8, 128), jnp.float32)
INSIDE = {
    "add": lambda x: x + x,
    "sub": lambda x: x - 2 * x,
    "mul": lambda x: x * x,
    "div": lambda x: x / (2 + x),
    "neg": lambda x: -x,
    "abs": jnp.abs,
    "sign": jnp.sign,
    "max": lambda x: jnp.maximum(x, 0.5),
    "min": lambda x: jnp.minimum(x, 0.5),
    "rem": lambda x: jax.lax.rem(x.astype(jnp.int32), 3).astype(x.dtype),
    "floor": jnp.floor,
    "ceil": jnp.ceil,
    "round": jnp.round,
    "clamp": lambda x: jax.lax.clamp(0.0, x, 1.0),
    "exp": jnp.exp,
    "exp2": jnp.exp2,
    "log": jnp.log,
    "log1p": jnp.log1p,
    "tanh": jnp.tanh,
    "sin": jnp.sin,
    "cos": jnp.cos,
    "sqrt": jnp.sqrt,
    "rsqrt": jax.lax.rsqrt,
    "pow": lambda x: jnp.power(x, x),
    "integer_pow": lambda x: x**3,
    "square": jax.lax.square,
    "logistic": jax.nn.sigmoid,
    "select_n": lambda x: jnp.where(x > 0, x, 2 * x),
    "eq": lambda x: jnp.where(x == 1, x, 0),
    "ne": lambda x: jnp.where(x != 1, x, 0),
    "lt": lambda x: jnp.where(x < 1, x, 0),
    "le": lambda x: jnp.where(x <= 1, x, 0),
    "gt": lambda x: jnp.where(x > 1, x, 0),
    "ge": lambda x: jnp.where(x >= 1, x, 0),
    "and": lambda x: jnp.where((x > 1) & (x < 2), x, 0),
    "or": lambda x: jnp.where((x > 1) | (x < 0), x, 0),
    "xor": lambda x: jnp.where((x > 1) ^ (x < 0), x, 0),
    "not": lambda x: jnp.where(~(x > 1), x, 0),
    "is_finite": lambda x: jnp.where(jnp.isfinite(x), x, 0),
    "shift_left": lambda x: (x.astype(jnp.int32) << 2).astype(x.dtype),
    "shift_right_logical": lambda x: jax.lax.shift_right_logical(x.astype(jnp.int32), 2).astype(x.dtype),
    "shift_right_arithmetic": lambda x: (x.astype(jnp.int32) >> 2).astype(x.dtype),
    "convert_element_type": lambda x: x.astype(jnp.int32).astype(x.dtype),
    "broadcast_in_dim": lambda x: x + jnp.broadcast_to(x[:1], x.shape),
    "stop_gradient": jax.lax.stop_gradient,
    "custom_jvp_call": jax.nn.relu,
}
# Under `shard_map` alone; a kernel leaves them out.
OF_MESHES = {"pvary", "pcast"}


def test_every_primitive_that_can_be_inside_is_tried():
    assert INSIDE.keys() | OF_MESHES == pallas_tpu.INSIDE


@pytest.mark.parametrize("name", INSIDE)
def test_what_can_be_inside_lowers_for_a_tpu_and_so_does_its_derivative(name):
    def kernel(x_ref, out_ref):
        value, pullback = jax.vjp(INSIDE[name], x_ref[...])
        out_ref[...] = value + pullback(value)[0]

    call = jax.jit(lambda x: pl.pallas_call(kernel, out_shape=X)(x))
    device = AbstractDevice("TPU v5 lite", 1, "tpu")  # which the rule of `sign` asks for
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)):
        call.trace(X).lower(lowering_platforms=("tpu",))


@jax.custom_jvp
def with_a_body(s):
    return jnp.expm1(s)


with_a_body.defjvps(lambda t, result, s: t * (result + 1))


@jax.custom_jvp
def with_a_rule(s):
    return jnp.tanh(s)


with_a_rule.defjvps(lambda t, result, s: t * jnp.sort(s, axis=1))
BYTES = jnp.arange(40, dtype=jnp.int8)


@pytest.mark.parametrize(
    "score, reason",
    [
        (lambda s, i, j: jnp.sort(s, axis=1), r"primitive 'sort' in the score, .*test_pallas_tpu.py:\d+"),
        (lambda s, i, j: jnp.expm1(s), r"primitive 'expm1' in the score, .*test_pallas_tpu.py:\d+"),
        (lambda s, i, j: s + jnp.arange(32.0)[i + j], r"primitive '\w+' in the score, .*test_pallas_tpu.py:\d+"),
        (lambda s, i, j: with_a_body(s), r"primitive 'expm1' in the score, .*test_pallas_tpu.py:\d+"),
        (lambda s, i, j: with_a_rule(s), r"primitive 'sort' in the score, .*test_pallas_tpu.py:\d+"),
        (lambda s, i, j: s + (BYTES[i] > BYTES[j]), r"dtype int8 in the score, .*test_pallas_tpu.py:\d+"),
    ],
    ids=["sort", "expm1", "a table at i + j", "a body", "a rule", "bytes"],
)
def test_what_a_kernel_cannot_do_it_says_with_primitive_and_line(score, reason):
    arrays = cases.normal((40, 1, 4), (40, 1, 4), (40, 1, 4))
    with pytest.raises(attn.Unsupported, match=f"'pallas_tpu' does not support {reason}.*these do: blockwise"):
        attend(*arrays, score=score)


def test_lists_that_do_not_fit_into_scalar_memory_are_refused():
    def reason(T, N, mask):
        x = jax.ShapeDtypeStruct((T, N, 4), "bfloat16")
        return pallas_tpu.unsupported_reason(Call(x, x, x, mask, None, 1.0, None))

    assert reason(2**19, 1, masks.causal()) == "524800 tiles in the lists of all heads, of at most 229376"
    assert reason(2**19, 1, masks.sliding_window(1000, 0)) is None
    lengths = per_head(masks.padding(jnp.arange(32)))
    assert reason(2**16, 32, lengths) == "524288 tiles in the lists of all heads, of at most 229376"
    assert reason(2**22 + 1, 1, masks.sliding_window(1000, 0)) == "more than 4194304 queries or keys"


# The list of tiles

T, S = 19, 27
BLOCKS = Blocks(4, 4, 4)


def listed(mask, order, flags=(), **options):
    """Return (rows, columns, and the flags of each step), for one head."""
    query, key, value = cases.normal((T, 1, 4), (S, 1, 4), (S, 1, 4))
    call = checked_call(query, key, value, mask, None, None)
    plan, _, flags = plan_call(call, BLOCKS, pallas_tpu.PROCESSOR)
    (code,) = np.asarray(steps(plan if order == "rows" else plan.transposed(), flags, **options))[0]
    main, other = code & (MOST_BLOCKS - 1), (code >> 13) & (MOST_BLOCKS - 1)
    rows, columns = (main, other) if order == "rows" else (other, main)
    return rows, columns, *((code & flag) != 0 for flag in (FIRST, LAST, NEEDED, WHOLE))


def visible_tiles(mask):
    """Return `[rows columns]`: if some pair of a tile is visible, and if all are, and are no padding."""
    i, j = np.arange(T)[:, None], np.arange(S)[None, :]
    visible = np.zeros((20, 28), bool)
    visible[:T, :S] = np.broadcast_to(mask.resolve(T, S)(i, j), (T, S))
    tiles = visible.reshape(5, 4, 7, 4)
    full = visible.copy()
    full[T:] = full[T - 1]  # queries of padding do not matter
    return tiles.any(axis=(1, 3)), full.reshape(5, 4, 7, 4).all(axis=(1, 3))


MASKS = {
    "causal": masks.causal(2),
    "window": masks.sliding_window(3, 1, 4),
    "traced": masks.causal(jnp.int32(2)),
    "own": masks.as_mask(lambda i, j: (i // 4 + j // 4) % 3 != 1),
    "padding, in part traced": masks.causal(5) & masks.padding(jnp.int32(9)),
    "nothing": masks.padding(0),
}


@pytest.mark.parametrize("order", ["rows", "columns"])
@pytest.mark.parametrize("name", MASKS)
def test_tiles_that_a_mask_hides_are_neither_computed_nor_fetched(name, order):
    rows, columns, first, last, needed, whole = listed(MASKS[name], order)
    some, every = visible_tiles(MASKS[name])
    main, other = (rows, columns) if order == "rows" else (columns, rows)
    np.testing.assert_array_equal(np.unique(main), np.arange(5 if order == "rows" else 7))  # every result is written
    np.testing.assert_array_equal(first, np.r_[True, main[1:] != main[:-1]])
    np.testing.assert_array_equal(last, np.r_[main[1:] != main[:-1], True])
    computed = np.zeros_like(some)
    computed[rows[needed], columns[needed]] = True
    np.testing.assert_array_equal(computed, some)
    assert np.all(every[rows[whole], columns[whole]])
    # A block is fetched where it differs from that of the step before.
    fetched = np.r_[True, other[1:] != other[:-1]]
    assert not np.any(fetched[1:] & ~needed[1:]) or name in ("nothing", "window", "causal")
    if name in ("causal", "window"):  # known while tracing: the list has nothing else but one step per empty block
        assert len(rows) - needed.sum() == len(np.unique(main)) - len(np.unique(main[needed]))


def test_one_list_per_example_of_a_batch_and_no_loop_over_the_batch():
    query, key, value = cases.normal((3, 9, 2, 4), (3, 9, 2, 4), (3, 9, 2, 4))
    lengths = jnp.array([9, 2, 5])

    def gradient(implementation, query, key, value, length):
        def total(*arrays):
            out = attn.multi_head_attention(*arrays, mask=masks.padding(length), implementation=implementation)
            return jnp.sum(jnp.sin(out))

        return jax.grad(total, (0, 1, 2))(query, key, value)

    batched = jax.vmap(functools.partial(gradient, "pallas_tpu"))
    around = [outer for e, outer in equations(batched, query, key, value, lengths) if e.primitive.name == "pallas_call"]
    assert around and not any(o.primitive.name in ("scan", "while") for outer in around for o in outer)
    found = jax.jit(batched)(query, key, value, lengths)
    for n, length in enumerate(lengths):
        one = gradient("reference", query[n], key[n], value[n], length)
        for ours, theirs in zip(found, one, strict=True):
            np.testing.assert_allclose(ours[n], theirs, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("most, turns", [(40, 1), (20, 2), (8, 4)])
def test_examples_whose_lists_do_not_fit_together_take_turns(most, turns, monkeypatch):
    """Nine tiles per example."""
    monkeypatch.setattr(pallas_tpu_layout, "MOST_STEPS", most)
    query, key, value = cases.normal((4, 9, 2, 4), (9, 2, 4), (4, 9, 2, 4))
    lengths = jnp.array([9, 2, 5, 0])

    def gradient(implementation, query, value, length):
        mask = masks.padding(length)
        call = functools.partial(attn.multi_head_attention, mask=mask, implementation=implementation)
        return jax.grad(lambda *a: jnp.sum(jnp.sin(call(*a))), (0, 1, 2))(query, key, value)

    batched = jax.vmap(functools.partial(gradient, "pallas_tpu"))
    around = [outer for e, outer in equations(batched, query, value, lengths) if e.primitive.name == "pallas_call"]
    loops = [[o.params["length"] for o in outer if o.primitive.name == "scan"] for outer in around]
    assert loops == [[turns] if turns > 1 else []] * len(around) and around
    found, wanted = (jax.jit(jax.vmap(functools.partial(gradient, name)))(query, value, lengths) for name in NAMES)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), found, wanted)


# Both ways to the gradients


@pytest.mark.parametrize("mask", [None, masks.causal(), masks.sliding_window(3, 0)], ids=["all", "causal", "window"])
def test_one_backward_kernel_gives_what_two_give(mask, monkeypatch):
    query, key, value = cases.normal((11, 4, 3), (11, 2, 3), (11, 2, 5))
    slopes = jnp.array([0.1, 0.2, 0.3, 0.4])

    def gradient(query, key, value, slopes):
        score = per_head(scores.alibi(slopes, 0))
        call = lambda *a: jnp.sum(jnp.sin(attend(*a, mask=mask, score=score)))  # noqa: E731
        return jax.grad(call, (0, 1, 2))(query, key, value)

    names = lambda: {  # noqa: E731
        e.params["name"]
        for e, _ in equations(lambda *a: gradient(*a), query, key, value, slopes)
        if e.primitive.name == "pallas_call"
    }
    assert names() == {"attn_forward", "attn_backward_both"}
    one = jax.jit(gradient)(query, key, value, slopes)
    monkeypatch.setattr(pallas_tpu, "_MEMORY_OF_BOTH", 0)
    assert names() == {"attn_forward", "attn_backward_rows", "attn_backward_columns"}
    two = jax.jit(lambda *a: gradient(*a))(query, key, value, slopes)
    for a, b in zip(one, two, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("memory", [0, pallas_tpu._MEMORY_OF_BOTH], ids=["separate kernels", "one kernel"])
@pytest.mark.parametrize("lengths", [(16, 24), (19, 22)], ids=["whole tiles", "padding"])
def test_tiles_of_several_vectors_give_what_the_equation_gives(lengths, memory, monkeypatch):
    """A tile of 8 x 8 has three diagonals of squares of 4 x 4."""
    implementation = IMPLEMENTATIONS["pallas_tpu"]
    attend = functools.partial(pallas_tpu.attend, interpret=True, block_size=8, lanes=4)
    monkeypatch.setitem(IMPLEMENTATIONS, "pallas_tpu", dataclasses.replace(implementation, attend=attend))
    monkeypatch.setattr(pallas_tpu, "_MEMORY_OF_BOTH", memory)
    T, S = lengths
    query, key, value, cotangent = cases.normal((T, 2, 4), (S, 1, 4), (S, 1, 4), (T, 2, 4))
    by_distance, by_query, by_key, bias = cases.normal((T + S - 1,), (T,), (S,), (T, S), seed=1)
    captured = by_distance, by_query, by_key, bias, jnp.float32(0.3)

    def total(query, key, value, captured, implementation):
        by_distance, by_query, by_key, bias, slope = captured

        def score(s, i, j):
            s = s + by_distance[j - i + T - 1] * by_query[i] + by_key[j] - slope * jnp.abs(i - j)
            return s + bias[i, j] + jax.nn.softplus(slope * (j - i))

        mask = masks.causal(4) & (lambda i, j: (j - i) % 5 != 1)
        options = {"mask": mask, "score": score, "implementation": implementation}
        return jnp.vdot(attn.multi_head_attention(query, key, value, **options), cotangent)

    found, expected = (
        jax.value_and_grad(total, (0, 1, 2, 3))(query, key, value, captured, name)
        for name in ("pallas_tpu", "reference")
    )
    for each, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(each, other, rtol=2e-4, atol=2e-5)


def test_gradients_that_nobody_wants_are_not_computed():
    query, key, value = cases.normal((9, 1, 4), (9, 1, 4), (9, 1, 4))
    table = jnp.ones(32)
    score = lambda s, i, j: s + table[positions.relative_buckets(j - i)]  # noqa: E731
    gradient = jax.grad(lambda query: jnp.sum(attend(query, key, value, score=score)))
    found = [e for e, _ in equations(gradient, query) if e.primitive.name == "pallas_call"]
    assert [e.params["name"] for e in found] == ["attn_forward", "attn_backward_rows"]
    assert len(found[1].outvars) == 1


@pytest.mark.parametrize(
    "mask",
    [masks.causal(2), masks.causal(jnp.int32(2)), masks.padding(jnp.int32(9))],
    ids=["known", "traced", "length"],
)
def test_the_gradient_of_a_bias_is_zero_in_tiles_that_the_mask_hides_and_right_in_the_others(mask):
    query, key, value, cotangent = cases.normal((T, 2, 4), (S, 2, 4), (S, 2, 4), (T, 2, 4))
    bias = cases.normal((T, S), seed=1)[0]

    def gradient(bias, implementation):
        def total(bias):
            options = {"mask": mask, "score": scores.dense(bias), "implementation": implementation}
            return jnp.vdot(attn.multi_head_attention(query, key, value, **options), cotangent)

        return jax.grad(total)(bias)

    found, expected = gradient(bias, "pallas_tpu"), gradient(bias, "reference")
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    hidden = ~np.broadcast_to(mask.resolve(T, S)(np.arange(T)[:, None], np.arange(S)[None, :]), (T, S))
    assert hidden.any() and not np.any(np.asarray(found)[hidden])


@pytest.mark.parametrize("kind", ["TPU v4", "TPU v5 lite"])
@pytest.mark.parametrize("block_size", [8, 12])  # blocks of three vectors too: no power of two
def test_numbers_per_distance_and_their_gradient_are_right_on_every_chip(kind, block_size, monkeypatch):
    monkeypatch.setattr(pallas_tpu_layout.sharding, "device_kind", lambda: kind)
    query, key, value, cotangent = cases.normal((20, 2, 4), (20, 2, 4), (20, 2, 4), (20, 2, 4))
    table = cases.normal((32,), seed=1)[0]

    def total(table, attend):
        score = lambda s, i, j: s + table[positions.relative_buckets(j - i)]  # noqa: E731
        out = attend(checked_call(query, key, value, masks.causal(), score, None))
        return jnp.vdot(out, cotangent), out

    def by_kernel(call):
        return pallas_tpu.attend(call, interpret=True, block_size=block_size, lanes=4)[0]

    def expected(call):
        options = {"mask": call.mask, "score": call.score, "implementation": "reference"}
        return attn.multi_head_attention(call.query, call.key, call.value, **options)

    (gradient, out), wanted = (jax.grad(total, has_aux=True)(table, attend) for attend in (by_kernel, expected))
    np.testing.assert_allclose(out, wanted[1], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(gradient, wanted[0], rtol=1e-5, atol=1e-6)
