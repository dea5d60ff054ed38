"""Flax's attention layers with `attn.interop.flax_attention_fn`, compared with the same layers without it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from flax_cases import CLOSE, B, D, H, N, S, T, attend, some_key_each
from interop_cases import normal, quick_jit

import attn
from attn.interop import flax_attention_fn


def nnx_layer(hook, **arguments):
    """Return a layer of nnx; without a hook it uses Flax's attention function."""
    arguments = {"num_heads": N, "in_features": D, "qkv_features": N * H, "decode": False} | arguments
    return nnx.MultiHeadAttention(**arguments, rngs=nnx.Rngs(0), **({"attention_fn": hook} if hook else {}))


def linen_layer(hook, **arguments):
    """Return a layer of linen; without a hook it uses Flax's attention function."""
    arguments = {"num_heads": N, "qkv_features": N * H} | arguments
    return linen.MultiHeadDotProductAttention(**arguments, **({"attention_fn": hook} if hook else {}))


def nnx_program(hook, **arguments):
    """Return a function of (parameters, inputs..., mask=), and parameters for it."""
    graph, params, rest = nnx.split(nnx_layer(hook, **arguments), nnx.Param, ...)
    return lambda params, *xs, **call: nnx.merge(graph, params, rest)(*xs, **call), params


def linen_program(hook, **arguments):
    """Return a function of (parameters, inputs..., mask=), and parameters for it."""
    return linen_layer(hook, **arguments).apply, linen_params()


@functools.cache
def linen_params():
    return linen_layer(None).init(jax.random.key(0), normal(B, T, D))


PROGRAMS = {"nnx": nnx_program, "linen": linen_program}


@functools.cache
def layer_gradients(world, hook):
    """Return a jitted function that gives the output and, for a cotangent, the gradients of parameters and inputs."""
    apply, params = PROGRAMS[world](hook)

    @quick_jit
    def call(x, mask, cotangent):
        out, pullback = jax.vjp(lambda params, x: apply(params, x, mask=mask), params, x)
        return out, pullback(cotangent)

    return lambda *arrays: jax.device_get(call(*arrays))


TOKENS = jnp.array([[4, 3, 2, 5, 0], [1, 3, 0, 0, 0]])
LAYER_MASKS = {
    "none": None,
    "causal": linen.make_causal_mask(TOKENS),
    "padding": linen.make_attention_mask(jnp.ones_like(TOKENS), TOKENS > 0),
    "padding of queries too": linen.make_attention_mask(TOKENS > 0, TOKENS > 0),
    "both": nnx.combine_masks(nnx.make_causal_mask(TOKENS), nnx.make_attention_mask(TOKENS > 0, TOKENS > 0)),
    "bools by head": some_key_each(B, N, T, T),
}


@pytest.mark.some(3)
@pytest.mark.parametrize("world", PROGRAMS)
@pytest.mark.parametrize("mask", LAYER_MASKS)
def test_layers_agree_on_outputs_and_gradients(world, mask):
    """Compare them with the same parameters, at queries that see a key."""
    x, mask = normal(B, T, D), LAYER_MASKS[mask]
    seen = np.ones((B, T), bool) if mask is None else np.broadcast_to(mask, (B, N, T, T)).any((1, 3))
    cotangent = normal(B, T, D, seed=1) * seen[..., None]
    theirs = layer_gradients(world, None)(x, mask, cotangent)
    ours = layer_gradients(world, flax_attention_fn)(x, mask, cotangent)
    np.testing.assert_allclose(ours[0][seen], theirs[0][seen], **CLOSE)
    assert len(jax.tree.leaves(ours[1])) == 9
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **CLOSE), ours[1], theirs[1])


def both_hooks(function):
    """Return what a function of a hook returns for ours and for Flax's (None), each compiled as one program."""
    return jax.device_get((quick_jit(lambda: function(flax_attention_fn))(), quick_jit(lambda: function(None))()))


def test_layers_across_sequences_with_two_batch_axes():
    """Test linen only: nnx accepts a mask that broadcasts over several batch axes only if it sows."""
    x, memory, params = normal(B, 3, T, D), normal(B, 3, S, D, seed=1), linen_params()
    mask = some_key_each(B, 3, 1, 1, S)
    ours, theirs = both_hooks(lambda hook: linen_layer(hook).apply(params, x, memory, mask=mask))
    np.testing.assert_allclose(ours, theirs, **CLOSE)


def test_grouped_queries_in_a_causal_layer():
    ours, theirs = both_hooks(lambda hook: nnx_layer(hook, num_kv_heads=1)(normal(B, T, D), is_causal=True))
    np.testing.assert_allclose(ours, theirs, **CLOSE)


@pytest.mark.filterwarnings("ignore:SelfAttention will be deprecated")
def test_self_attention_of_linen():
    def call(hook):
        layer = linen.SelfAttention(N, qkv_features=N * H, **({"attention_fn": hook} if hook else {}))
        return layer.apply(linen_params(), normal(B, T, D))

    ours, theirs = both_hooks(call)
    np.testing.assert_allclose(ours, theirs, **CLOSE)


class TestSowing:
    def test_nnx(self):
        x, mask = normal(B, T, D), LAYER_MASKS["causal"]
        ours, theirs = both_hooks(
            lambda hook: nnx.capture(nnx_layer(hook), nnx.Intermediate)(x, mask=mask, sow_weights=True)[1]
        )
        assert ours["attention_weights"][0].shape == (B, N, T, T)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **CLOSE), ours, theirs)

    @pytest.mark.filterwarnings("ignore:Using 'Module.sow:DeprecationWarning")
    def test_nnx_on_the_module(self):
        layer = nnx_layer(flax_attention_fn)
        layer(jnp.asarray(normal(B, T, D)), sow_weights=True)
        assert type(layer.attention_weights) is nnx.Intermediate
        assert layer.attention_weights[0].shape == (B, N, T, T)

    def test_linen_before_dropout(self):
        x, mask, params = normal(B, T, D), LAYER_MASKS["causal"], linen_params()
        call = {"rngs": {"dropout": jax.random.key(0)}, "mutable": ["intermediates"], "sow_weights": True}

        def state(hook):
            return linen_layer(hook, dropout_rate=0.5, deterministic=False).apply(params, x, mask=mask, **call)[1]

        ours, theirs = both_hooks(state)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **CLOSE), ours, theirs)

    def test_nothing_is_sown_unasked(self):
        state = linen_layer(flax_attention_fn).apply(linen_params(), normal(B, T, D), mutable=["intermediates"])[1]
        assert "intermediates" not in state


class TestDecoding:
    """Decoding one position at a time with a cache gives what a causal mask gives for the whole sequence."""

    def test_nnx(self):
        def call(hook):
            layer = nnx_layer(hook, decode=True)
            layer.init_cache((B, T, D))
            return jnp.concatenate([layer(normal(B, T, D)[:, t : t + 1]) for t in range(T)], axis=1)

        ours, theirs = both_hooks(call)
        whole = attend(nnx_layer(None), [normal(B, T, D)], mask=LAYER_MASKS["causal"])
        np.testing.assert_allclose(ours, theirs, **CLOSE)
        np.testing.assert_allclose(ours, whole, **CLOSE)

    def test_linen(self):
        x, params = normal(B, T, D), linen_params()

        def call(hook):
            layer = linen_layer(hook, decode=True)
            state, steps = {"cache": layer.init(jax.random.key(0), x)["cache"]}, []
            for t in range(T):
                out, state = layer.apply(params | state, x[:, t : t + 1], mutable=["cache"])
                steps.append(out)
            return jnp.concatenate(steps, axis=1)

        ours, theirs = both_hooks(call)
        whole = linen_layer(None).apply(params, x, mask=LAYER_MASKS["causal"])
        np.testing.assert_allclose(ours, theirs, **CLOSE)
        np.testing.assert_allclose(ours, whole, **CLOSE)


class TestDropoutInLayers:
    def test_nnx(self):
        x = normal(B, T, D)

        @quick_jit
        def call():
            layer = nnx_layer(flax_attention_fn, dropout_rate=0.5, deterministic=False)
            streamed = [layer(x), layer(x)]  # the layer draws a new key per call
            given = [layer(x, rngs=nnx.Rngs(dropout=1)) for _ in range(2)]
            return streamed, given, layer(x, deterministic=True), nnx_layer(None)(x)

        streamed, given, deterministic, plain = call()
        assert (streamed[0] != streamed[1]).any() and (streamed[0] != given[0]).any()
        np.testing.assert_array_equal(*given)
        np.testing.assert_allclose(deterministic, plain, **CLOSE)

    def test_linen(self):
        x, params = normal(B, T, D), linen_params()
        layer = linen_layer(flax_attention_fn, dropout_rate=0.5)
        call = quick_jit(lambda key: layer.apply(params, x, deterministic=False, rngs={"dropout": key}))
        first, again, other = (call(jax.random.key(seed)) for seed in (0, 0, 1))
        np.testing.assert_array_equal(first, again)
        assert (first != other).any()
        plain = linen_layer(None).apply(params, x)
        np.testing.assert_allclose(layer.apply(params, x, deterministic=True), plain, **CLOSE)


def test_an_einsum_of_a_linen_layer_is_not_ignored():
    layer = linen_layer(
        flax_attention_fn,
        qk_attn_weights_einsum_cls=lambda: jnp.einsum,
        attn_weights_value_einsum_cls=lambda: jnp.einsum,
    )
    with pytest.raises(attn.Unsupported, match="qk_attn_weights_einsum"):
        layer.init(jax.random.key(0), normal(B, T, D))


def test_an_implementation_by_partial():
    x, params = normal(B, T, D), linen_params()
    layer = linen_layer(functools.partial(flax_attention_fn, implementation="reference"))
    np.testing.assert_allclose(layer.apply(params, x), linen_layer(None).apply(params, x), **CLOSE)
    unknown = linen_layer(functools.partial(flax_attention_fn, implementation="abacus"))
    with pytest.raises(ValueError, match="abacus"):
        unknown.apply(params, x)
