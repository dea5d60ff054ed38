"""An implementation in a file outside of the package: a Pallas kernel, registered, under the shared tests.

It takes all heads at once, in blocks of its own, and has masks and reverse mode alone: no score, no dropout, no
logsumexp, no forward mode, no second order.
"""

import runpy

import attention_cases as cases
import implementation_suite as suite
import jax
import numpy as np
import pytest
from implementation_suite import (  # noqa: F401  run here for the kernel
    test_many_heads_equal_one_at_a_time,
    test_what_is_not_declared_is_refused_and_what_is_declared_is_served,
)
from test_hidden import test_nan_or_infinity_in_a_value_or_key_reaches_the_rows_that_see_it  # noqa: F401
from test_semantics import (  # noqa: F401
    test_a_value_may_have_another_width,
    test_causal_with_an_offset_places_the_queries,
    test_the_scale_is_one_over_the_root_of_the_width_unless_given,
)
from test_structure import (  # noqa: F401
    test_causal_attention_never_depends_on_the_future,
    test_output_depends_on_its_own_query_alone,
    test_padded_attention_never_depends_on_the_padding,
)

import attn
from attn import masks
from attn.functional.implementations import IMPLEMENTATIONS, Implementation, register

KERNEL = '''
import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from attn import masks, multi_head_attention
from attn.functional import contract, dtypes, mods
from attn.functional.blocks import in_blocks
from attn.functional.implementations import Implementation, register

QUERIES, KEYS = 8, 4  # at most so many make a tile


def limits(mask):
    """Return the largest visible j - i, and the number of keys."""
    if isinstance(mask, masks.both):
        return tuple(map(jnp.minimum, limits(mask.left), limits(mask.right)))
    reach = dtypes.clamped(mask.offset) if isinstance(mask, masks.causal) else dtypes.FAR
    return jnp.int32(reach), jnp.int32(dtypes.clamped(mask.length) if isinstance(mask, masks.padding) else dtypes.FAR)


def unsupported_reason(call):
    parts = [part for part in mods.nested(call.mask) if not isinstance(part, masks.both)]
    known = all(isinstance(part, masks.causal | masks.padding) for part in parts)
    return None if known else f"mask {call.mask.expression()} (causal and padding, joined by &)"


def kernel(reach, length, scale, query, query_marks, key, key_marks, value, out):
    q = query[0, 0]  # [r H]
    r, (blocks, c) = len(q), key_marks.shape[1:]
    i = pl.program_id(1) * r + jnp.arange(r)[:, None]

    def step(n, carry):
        peak, total, weighted = carry
        j = n * c + jnp.arange(c)[None, :]
        s = scale[0] * (q @ key[0, n].T) + query_marks[0, 0][:, None] + key_marks[0, n][None, :]
        visible = (j - i <= reach[0]) & (j < length[0])
        s = jnp.where(visible, s, -jnp.inf)
        new = jnp.maximum(peak, s.max(axis=1))
        finite = jnp.where(new == -jnp.inf, 0, new)
        p, shrink = jnp.exp(s - finite[:, None]), jnp.exp(peak - finite)
        v = contract.zero_hidden_values(value[0, n], visible.any(axis=0))
        return new, total * shrink + p.sum(axis=1), weighted * shrink[:, None] + p @ v

    zeros = jnp.zeros(r, q.dtype)
    _, total, weighted = jax.lax.fori_loop(0, blocks, step, (zeros - jnp.inf, zeros, jnp.zeros((r, out.shape[-1]))))
    out[0, 0] = (weighted / jnp.where(total == 0, 1, total)[:, None]).astype(out.dtype)


@jax.custom_vjp
def attend_all(query, key, value, mask, scale):
    (T, N, _), S, wide = query.shape, len(key), dtypes.wide_dtype(query.dtype)
    marked, mask_of_head = mods.unwrap_per_head(mask, N)

    def limits_of_head(slices):
        mask = mask_of_head(slices)
        reach, length = (dtypes.FAR, S) if mask is None else limits(masks.as_mask(mask).resolve(T, S))
        return jnp.int32(reach), jnp.minimum(length, S)

    def by_head(x, size):  # [N blocks size ...]
        x = jnp.repeat(x, N // x.shape[1], axis=1).swapaxes(0, 1)
        return jax.vmap(lambda one: in_blocks(one, size))(x)

    def marked_blocks(x, size):
        x, nonfinite = contract.zero_nonfinite_rows(x)
        return by_head(x.astype(wide), size), by_head(jnp.where(nonfinite, jnp.nan, jnp.zeros((), wide)), size)

    reach, length = jax.vmap(limits_of_head, axis_size=N)(marked)
    scales = jnp.broadcast_to(jnp.asarray(scale, wide), N)
    (queries, query_marks), (keys, key_marks) = marked_blocks(query, QUERIES), marked_blocks(key, KEYS)
    arrays = reach, length, scales, queries, query_marks, keys, key_marks, by_head(value.astype(wide), KEYS)
    each = lambda x: pl.BlockSpec((1, *x.shape[1:]), lambda n, m: (n,) + (0,) * (x.ndim - 1))
    one_block = lambda x: pl.BlockSpec((1, 1, *x.shape[2:]), lambda n, m: (n, m) + (0,) * (x.ndim - 2))
    specs = [one_block(x) if x is queries or x is query_marks else each(x) for x in arrays]
    shape = jax.ShapeDtypeStruct((*queries.shape[:3], value.shape[-1]), wide)
    run = pl.pallas_call(
        kernel, shape, grid=queries.shape[:2], in_specs=specs, out_specs=one_block(shape), interpret=True
    )
    return run(*arrays).reshape(N, -1, value.shape[-1])[:, :T].swapaxes(0, 1).astype(value.dtype)


def backward(saved, g):  # by recomputation
    def again(query, key, value, scale):
        return multi_head_attention(query, key, value, mask=mask, scale=scale, implementation="reference")

    query, key, value, mask, scale = saved
    dquery, dkey, dvalue, dscale = jax.vjp(again, query, key, value, scale)[1](g)
    return dquery, dkey, dvalue, None, dscale


attend_all.defvjp(lambda *arguments: (attend_all(*arguments), arguments), backward)


def attend(call):
    return attend_all(call.query, call.key, call.value, call.mask, jnp.asarray(call.scale)), None


register("tiled", Implementation(attend, True, {"mask"}, {"reverse"}, unsupported_reason=unsupported_reason))
'''


@pytest.fixture(scope="module")
def registered(tmp_path_factory):
    """Run the file, which registers the implementation, and forget it afterwards."""
    file = tmp_path_factory.mktemp("outside") / "my_kernel.py"
    file.write_text(KERNEL)
    runpy.run_path(str(file))
    yield "tiled"
    del IMPLEMENTATIONS["tiled"]


@pytest.fixture
def implementation(registered):
    """The name under which the shared tests run."""
    return registered


SERVED = [
    cases.Case((13, 17, 3, 2), mask, "none", dtype)
    for mask, dtype in (("none", "float32"), ("causal", "bfloat16"), ("padding", "float64"), ("causal", "float16"))
]


@pytest.mark.parametrize("case", SERVED, ids=str)
@pytest.mark.parametrize("seed", [0, 1])
def test_value_and_gradient_agree_with_the_oracle(implementation, case, seed):
    suite.check_value_and_gradient(implementation, case, seed)


@pytest.mark.parametrize("mask", [masks.sliding_window(2, 0), masks.causal() | masks.prefix(2), lambda i, j: j <= i])
def test_masks_that_it_does_not_know_are_refused_in_its_own_words(implementation, mask):
    with pytest.raises(attn.Unsupported, match=r"'tiled' does not support mask .*joined by &\); these do: blockwise"):
        attn.attention(*cases.normal((5, 2), (5, 2), (5, 2)), mask=mask, implementation=implementation)


def test_examples_and_heads_with_masks_of_their_own_equal_the_reference(implementation):
    query, key, value = cases.normal((3, 9, 4, 2), (3, 9, 2, 2), (3, 9, 2, 5))
    lengths = np.array([[9, 2, 0, 7], [1, 9, 5, 6], [0, 0, 3, 9]])

    def run(name):
        def loss(query, key, value, lengths):
            mask = masks.causal() & attn.per_head(masks.padding(lengths))
            return (attn.multi_head_attention(query, key, value, mask=mask, implementation=name) ** 2).sum()

        return jax.jit(jax.vmap(jax.value_and_grad(loss, (0, 1, 2))))(query, key, value, lengths)

    for ours, expected in zip(jax.tree.leaves(run(implementation)), jax.tree.leaves(run("reference")), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)


def test_a_taken_name_is_refused_in_one_line(registered):
    for name in (registered, "reference", "auto"):
        with pytest.raises(ValueError, match=f"^an implementation '{name}' exists already: choose another name$"):
            register(name, Implementation(print))


def test_unknown_features_and_derivatives_are_refused():
    with pytest.raises(ValueError, match=r"features must be among mask, score, dropout, logsumexp, got .'bias'"):
        Implementation(print, features={"bias"})
    with pytest.raises(ValueError, match=r"derivatives must be among reverse, forward, second, got .'third'"):
        Implementation(print, derivatives={"third"})


def test_it_is_chosen_by_name_alone(registered):
    assert list(IMPLEMENTATIONS)[-1] == registered
    arrays = cases.normal((5, 2), (5, 2), (5, 2))
    for name in ("auto", "fastest"):
        trace = str(jax.make_jaxpr(lambda *a, name=name: attn.attention(*a, implementation=name))(*arrays))
        assert "pallas" not in trace
    trace = str(jax.make_jaxpr(lambda *a: attn.attention(*a, implementation=registered))(*arrays))
    assert "pallas" in trace
