"""Offsets: unset ones are 0 where T = S and an error elsewhere, at any depth; they may be traced."""

import attention_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attn
from attn import masks, per_head, scores

N, H = 2, 3
PLAIN = lambda i, j: j == 0  # noqa: E731
PLAIN_SCORE = lambda s, i, j: s * 2  # noqa: E731


def weights(T, S, mod):
    query, key = cases.normal((T, N, H), (S, N, H))
    kind = "mask" if isinstance(mod, masks.Mask) else "score"
    return attn.multi_head_attention_weights(query, key, **{kind: mod})


# Each builds a mod from an offset; None leaves it unset.
NESTED = {
    "causal": lambda o: masks.causal(o),
    "sliding_window": lambda o: masks.sliding_window(1, 1, o),
    "and": lambda o: masks.padding(4) & masks.causal(o),
    "or": lambda o: masks.causal(o) | masks.prefix(1),
    "not": lambda o: ~masks.causal(o) | PLAIN,
    "deep": lambda o: PLAIN | ~(masks.padding(4) & ~(masks.sliding_window(1, 1, o) | PLAIN)),
    "per_head": lambda o: per_head(masks.sliding_window(jnp.array([1, 2]), 1, o)),
    "within per_head": lambda o: per_head(masks.padding(jnp.array([3, 2])) & ~(~masks.causal(o))),
    "beside per_head": lambda o: per_head(masks.padding(jnp.array([3, 2]))) & masks.causal(o),
    "alibi": lambda o: scores.alibi(0.7, o),
    "chain": lambda o: PLAIN_SCORE >> scores.alibi(0.7, o) >> scores.softcap(2.0),
    "alibi, per_head": lambda o: per_head(scores.alibi(jnp.array([0.7, 0.2]), o)) >> scores.softcap(2.0),
    "chain, per_head": lambda o: per_head(scores.softcap(jnp.array([1.0, 3.0])) >> scores.alibi(0.7, o)),
}


@pytest.mark.some(6)
@pytest.mark.parametrize("name", NESTED)
def test_an_unset_offset_is_zero_where_the_lengths_agree(name):
    np.testing.assert_array_equal(weights(5, 5, NESTED[name](None)), weights(5, 5, NESTED[name](0)))
    assert np.any(weights(5, 5, NESTED[name](0)) != weights(5, 5, NESTED[name](1)))


def test_an_unset_offset_of_a_relative_bias_is_zero_where_the_lengths_agree():
    table = cases.normal((9,))[0]
    ours, expected = (weights(5, 5, scores.relative_bias(table, offset)) for offset in (None, 0))
    np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize("name", [*NESTED, "relative_bias"])
def test_an_unset_offset_is_an_error_where_the_lengths_differ(name):
    build = {**NESTED, "relative_bias": lambda o: scores.relative_bias(jnp.ones(9), o) >> PLAIN_SCORE}[name]
    with pytest.raises(ValueError, match=r"offset=0.*offset=S-T \(here 2\)"):
        weights(3, 5, build(None))
    with pytest.raises(ValueError, match=r"offset=0.*offset=S-T \(here -2\)"):
        weights(5, 3, build(None))


@pytest.mark.some(5)
@pytest.mark.parametrize("name", [name for name in NESTED if "within" not in name and "chain, per" not in name])
def test_offsets_may_be_traced(name):
    shared = lambda o: jnp.broadcast_to(o, N) if name in ("per_head", "alibi, per_head") else o  # noqa: E731
    call = jax.jit(lambda offset: weights(3, 5, NESTED[name](shared(offset))))
    for offset in (0, 2):
        np.testing.assert_allclose(call(jnp.int32(offset)), weights(3, 5, NESTED[name](offset)), rtol=1e-6, atol=1e-7)


def test_offsets_may_differ_by_head_and_by_example():
    query, key, value = cases.normal((3, 2, H), (5, 2, H), (5, 2, 7))
    offsets = jnp.array([0, 2])
    out = attn.multi_head_attention(query, key, value, mask=per_head(masks.causal(offsets)))
    batch = jax.vmap(lambda o: attn.multi_head_attention(query, key, value, mask=masks.causal(o)))(offsets)
    for n in range(2):
        one = attn.attention(query[:, n], key[:, n], value[:, n], mask=masks.causal(int(offsets[n])))
        np.testing.assert_allclose(out[:, n], one, rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(batch[n, :, n], one, rtol=1e-6, atol=1e-7)


def test_decoding_step_by_step_equals_the_whole_sequence(implementation):
    query, key, value = cases.normal((5, H), (5, H), (5, 7))
    score = scores.alibi(0.3)
    whole = attn.attention(query, key, value, mask=masks.causal(), score=score, implementation=implementation)

    @jax.jit
    def step(t):
        row = jax.lax.dynamic_slice_in_dim(query, t, 1)
        options = {"mask": masks.causal(t), "score": scores.alibi(0.3, t), "implementation": implementation}
        return attn.attention(row, key, value, **options)[0]

    for t in range(5):
        np.testing.assert_allclose(step(t), whole[t], rtol=1e-5, atol=1e-6)


def test_by_hand_an_unset_offset_means_zero():
    i, j = map(jnp.asarray, cases.positions(3, 5))
    np.testing.assert_array_equal(masks.causal()(i, j), masks.causal(0)(i, j))
    np.testing.assert_array_equal(masks.sliding_window(1, 0)(i, j), masks.sliding_window(1, 0, 0)(i, j))
    np.testing.assert_array_equal(scores.alibi(0.5)(jnp.float32(0), i, j), scores.alibi(0.5, 0)(jnp.float32(0), i, j))
    assert not masks.causal()(1, 2) and masks.causal()(2, 2)


def test_the_callers_mask_is_left_as_it_was():
    mask = masks.causal() & PLAIN
    weights(5, 5, mask)
    assert mask.left.offset is None
