"""`attn.interop.flax_attention_fn` against Flax's own attention, in functions and in layers."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from traces import equations, is_matrix_product

import attn
from attn.interop import flax_attention_fn

B, T, S, N, H, D = 2, 5, 7, 3, 11, 6
ROUNDINGS = 64 * np.finfo(np.float32).eps  # projections of 6 to 33 features around the attention
CLOSE = {"rtol": ROUNDINGS, "atol": ROUNDINGS}
WORLDS = {"nnx": nnx.dot_product_attention, "linen": linen.dot_product_attention}

# Compiling takes most of the time here, and half of that goes into making fast code.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def inputs(*batch, K=N):
    return normal(*batch, T, N, H), normal(*batch, S, K, H, seed=1), normal(*batch, S, K, H, seed=2)


def some_key_each(*shape):
    """A mask that leaves every query the first key at least."""
    mask = np.random.default_rng(3).random(shape) < 0.6
    mask[..., 0] = True
    return mask


def attend(function, arrays, **arguments):
    return jax.device_get(quick_jit(functools.partial(function, **arguments))(*arrays))


class TestFunction:
    @pytest.mark.parametrize("world", WORLDS)
    @pytest.mark.parametrize("batch", [(), (B,), (B, 1, 3)], ids=str)
    def test_batch_axes_mask_and_bias(self, batch, world):
        # With several batch axes, nnx's own takes a mask or bias that broadcasts over them only if it sows.
        bias, mask = normal(*batch[:1], *(1 for _ in batch[1:]), N, 1, S), some_key_each(*(1 for _ in batch), 1, T, S)
        arguments = {"bias": bias, "mask": mask.astype(np.float32)}
        ours = attend(flax_attention_fn, inputs(*batch), **arguments)
        theirs = attend(WORLDS[world], inputs(*batch), **arguments, module=Sown() if world == "nnx" else None)
        np.testing.assert_allclose(ours, theirs, **CLOSE)

    def test_bias_is_differentiated(self):
        bias = normal(B, N, T, S)

        def gradient(function):
            return quick_jit(jax.grad(lambda bias: (function(*inputs(B), bias) ** 2).sum()))(bias)

        np.testing.assert_allclose(gradient(flax_attention_fn), gradient(nnx.dot_product_attention), **CLOSE)

    @pytest.mark.parametrize("length", [T, S])
    def test_is_causal_counts_from_the_first_key(self, length):
        query, key, value = inputs(B)
        arrays = query, key[:, :length], value[:, :length]
        ours = attend(flax_attention_fn, arrays, is_causal=True)
        np.testing.assert_allclose(ours, attend(nnx.dot_product_attention, arrays, is_causal=True), **CLOSE)

    def test_grouped_queries(self):
        arrays = inputs(B, K=1)
        ours = attend(flax_attention_fn, arrays)
        np.testing.assert_allclose(ours, attend(nnx.dot_product_attention, arrays), **CLOSE)

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    @pytest.mark.parametrize("force", [False, True])
    def test_dtypes_of_output_and_weights(self, dtype, force):
        ours, theirs = Sown(), Sown()
        arguments = {"dtype": dtype, "force_fp32_for_softmax": force}
        out = attend(flax_attention_fn, inputs(), **arguments, module=ours)
        assert out.dtype == attend(linen.dot_product_attention, inputs(), **arguments, module=theirs).dtype
        assert ours.weights.dtype == theirs.weights.dtype
        exact = attend(flax_attention_fn, [x.astype(dtype).astype("float32") for x in inputs()])
        once = float(jnp.finfo(out.dtype).eps) / 2
        np.testing.assert_allclose(np.asarray(out, "float32"), exact, rtol=once + ROUNDINGS, atol=ROUNDINGS)

    def test_dtypes_are_promoted_together(self):
        query, key, value = inputs()
        mixed = query.astype("bfloat16"), key, value.astype("bfloat16")
        out = attend(flax_attention_fn, mixed)
        assert out.dtype == jnp.float32
        np.testing.assert_allclose(out, attend(nnx.dot_product_attention, mixed), **CLOSE)

    def test_promote_dtype_is_called(self):
        def promote(arrays, *, dtype):
            assert dtype == "float16"
            return tuple(x.astype("bfloat16") for x in arrays)

        out = attend(flax_attention_fn, inputs(), dtype="float16", promote_dtype=promote)
        assert out.dtype == jnp.bfloat16

    def test_a_query_without_a_key_gets_zero(self):
        mask = np.ones((T, S))
        mask[2] = 0

        def call(*arrays):
            sown = Sown()
            return flax_attention_fn(*arrays, mask=mask, module=sown), sown.weights

        out, weights = attend(call, inputs(B))
        assert not np.any(out[:, 2]) and np.all(np.any(out[:, 1], axis=-1))
        assert not np.any(weights[:, :, 2]) and np.all(np.any(weights[:, :, 1], axis=-1))

    def test_hidden_nan_reaches_nothing(self):
        query, key, value = inputs(B)
        mask = np.arange(S) < 4
        clean = attend(flax_attention_fn, inputs(B), mask=mask)
        key[:, 4:] = value[:, 4:] = np.nan
        out = attend(flax_attention_fn, [query, key, value], mask=mask)
        np.testing.assert_array_equal(out, clean)
        assert np.isfinite(out).all()

    def test_every_argument_of_flax_is_taken(self):
        """Linen leaves out silently what a hook does not name."""
        ours = inspect.signature(flax_attention_fn).parameters
        for function in WORLDS.values():
            for name, theirs in inspect.signature(function).parameters.items():
                defaults = {theirs.default, None} if name == "promote_dtype" else {theirs.default}
                assert ours[name].default in defaults, name

    def test_positional_arguments_mean_what_they_mean_in_flax(self):
        ours = list(inspect.signature(flax_attention_fn).parameters.values())
        positional = [p.name for p in ours if p.kind is p.POSITIONAL_OR_KEYWORD]
        for function in WORLDS.values():
            assert positional == list(inspect.signature(function).parameters)[: len(positional)]


class Sown:
    """What a Flax module does with weights."""

    def sow(self, collection, name, value):
        assert collection in ("intermediates", nnx.Intermediate) and name == "attention_weights"
        self.weights = value


@functools.partial(quick_jit, static_argnums=(0, 2, 3, 4))
def dropped_weights(length, rng, rate, broadcast, deterministic):
    zeros = jnp.zeros((B, length, N, 1))
    identity = jnp.broadcast_to(jnp.eye(length)[None, :, None, :], (B, length, N, length))
    out = flax_attention_fn(
        zeros,
        zeros,
        identity,
        broadcast_dropout=broadcast,
        dropout_rng=rng,
        dropout_rate=rate,
        deterministic=deterministic,
    )
    return out.swapaxes(1, 2) * length


class TestDropout:
    LENGTH, RATE = 64, 0.25

    def weights(self, seed=0, dropout_rate=RATE, broadcast_dropout=True, deterministic=False, **arguments):
        """Dropped uniform weights, `[B N T S]`, read off by values that form an identity."""
        rng = arguments.get("dropout_rng", jax.random.key(seed))
        return np.asarray(dropped_weights(self.LENGTH, rng, dropout_rate, broadcast_dropout, deterministic))

    def test_rate_and_scale(self):
        weights = self.weights(broadcast_dropout=False)
        kept = weights > 0
        np.testing.assert_allclose(weights[kept], 1 / (1 - self.RATE), rtol=1e-6)
        for share in (kept.mean((2, 3)), kept.mean((0, 1, 3)), kept.mean((0, 1, 2))):
            drawn = kept.size / share.size
            assert np.abs(share - (1 - self.RATE)).max() < 5 * np.sqrt(self.RATE * (1 - self.RATE) / drawn)

    def test_examples_and_heads_differ(self):
        kept = self.weights(broadcast_dropout=False).reshape(B * N, -1) > 0
        both = (kept[:, None] & kept[None]).mean(-1)
        pairs = both[np.triu_indices(B * N, 1)]
        independent = (1 - self.RATE) ** 2
        assert np.abs(pairs - independent).max() < 5 * np.sqrt(independent * (1 - independent) / kept.shape[1])

    def test_broadcast_is_over_batch_and_heads_as_in_flax(self):
        kept = self.weights(broadcast_dropout=True) > 0
        assert (kept == kept[0, 0]).all()
        deviation = np.sqrt(self.RATE * (1 - self.RATE) / kept[0, 0].size)
        assert abs(kept.mean() - (1 - self.RATE)) < 5 * deviation

    @pytest.mark.parametrize("broadcast", [False, True])
    def test_the_key_decides(self, broadcast):
        first, again, other = (self.weights(seed, broadcast_dropout=broadcast) for seed in (0, 0, 1))
        np.testing.assert_array_equal(first, again)
        assert (first != other).any()

    @pytest.mark.parametrize("broadcast", [False, True])
    def test_keys_of_the_old_kind(self, broadcast):
        assert (self.weights(dropout_rng=jax.random.PRNGKey(0), broadcast_dropout=broadcast) == 0).any()

    @pytest.mark.parametrize("arguments", [{"dropout_rate": 0.0}, {"deterministic": True}], ids=str)
    def test_nothing_is_dropped(self, arguments):
        np.testing.assert_allclose(self.weights(**arguments), 1, rtol=1e-6)
        np.testing.assert_allclose(self.weights(**arguments, dropout_rng=None), 1, rtol=1e-6)

    def test_several_batch_axes(self):
        arguments = {"dropout_rate": 0.5, "dropout_rng": jax.random.key(0), "broadcast_dropout": False}
        out = attend(flax_attention_fn, [np.broadcast_to(x, (2, 3, *x.shape)) for x in inputs()], **arguments)
        assert len(np.unique(out.reshape(6, -1), axis=0)) == 6

    def test_the_backward_pass_drops_the_same(self):
        query, key, value = inputs(B)
        arguments = {"dropout_rate": 0.5, "dropout_rng": jax.random.key(0), "broadcast_dropout": False}

        def total(value):
            return (flax_attention_fn(query, key, value, **arguments) * query).sum()

        out, gradient = quick_jit(jax.value_and_grad(total))(value)
        np.testing.assert_allclose(np.vdot(gradient, value), out, rtol=1e-4)  # the output is linear in the values


def dot_precisions(function, *arguments) -> set:
    """The precisions of all matrix products in a function, inner ones included."""
    return {one.params["precision"] for one, _ in equations(function, *arguments) if is_matrix_product(one)}


class TestPrecision:
    @pytest.mark.parametrize("precision", ["highest", "fastest", "float32", jax.lax.Precision.HIGH])
    def test_of_every_product_forward_and_backward(self, precision):
        expected = jax.lax.Precision(precision)

        def total(query):
            return flax_attention_fn(query, *inputs()[1:], precision=precision, module=Sown()).sum()

        assert dot_precisions(total, inputs()[0]) == {(expected, expected)}
        assert dot_precisions(jax.grad(total), inputs()[0]) == {(expected, expected)}
        without_sowing = jax.jit(lambda query: flax_attention_fn(query, *inputs()[1:], precision=precision).sum())
        assert dot_precisions(jax.grad(without_sowing), inputs()[0]) == {(expected, expected)}

    @pytest.mark.parametrize("precision", ["F32_F32_F32", jax.lax.DotAlgorithmPreset.F32_F32_F32])
    def test_of_presets(self, precision):
        called = functools.partial(flax_attention_fn, precision=precision)
        assert dot_precisions(called, *inputs()) == {jax.lax.DotAlgorithmPreset.F32_F32_F32}

    def test_none_leaves_the_surrounding_one(self):
        with jax.default_matmul_precision("highest"):
            assert dot_precisions(flax_attention_fn, *inputs()) == {(jax.lax.Precision.HIGHEST,) * 2}


def nnx_layer(hook, **arguments):
    arguments = {"num_heads": N, "in_features": D, "qkv_features": N * H, "decode": False} | arguments
    return nnx.MultiHeadAttention(**arguments, rngs=nnx.Rngs(0), **({"attention_fn": hook} if hook else {}))


def linen_layer(hook, **arguments):
    arguments = {"num_heads": N, "qkv_features": N * H} | arguments
    return linen.MultiHeadDotProductAttention(**arguments, **({"attention_fn": hook} if hook else {}))


def nnx_program(hook, **arguments):
    """A function of (parameters, inputs..., mask=), and parameters."""
    graph, params, rest = nnx.split(nnx_layer(hook, **arguments), nnx.Param, ...)
    return lambda params, *xs, **call: nnx.merge(graph, params, rest)(*xs, **call), params


def linen_program(hook, **arguments):
    return linen_layer(hook, **arguments).apply, linen_params()


@functools.cache
def linen_params():
    return linen_layer(None).init(jax.random.key(0), normal(B, T, D))


PROGRAMS = {"nnx": nnx_program, "linen": linen_program}


@functools.cache
def layer_gradients(world, hook):
    """Jitted: the output, and the gradients of parameters and inputs for a given cotangent."""
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
    """On the same parameters and on queries that see a key."""
    x, mask = normal(B, T, D), LAYER_MASKS[mask]
    seen = np.ones((B, T), bool) if mask is None else np.broadcast_to(mask, (B, N, T, T)).any((1, 3))
    cotangent = normal(B, T, D, seed=1) * seen[..., None]
    theirs = layer_gradients(world, None)(x, mask, cotangent)
    ours = layer_gradients(world, flax_attention_fn)(x, mask, cotangent)
    np.testing.assert_allclose(ours[0][seen], theirs[0][seen], **CLOSE)
    assert len(jax.tree.leaves(ours[1])) == 9
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **CLOSE), ours[1], theirs[1])


def both_hooks(function):
    """What a function of a hook gives for ours, and for Flax's own; each in one program."""
    return jax.device_get((quick_jit(lambda: function(flax_attention_fn))(), quick_jit(lambda: function(None))()))


def test_layers_across_sequences_with_two_batch_axes():
    """In linen alone, since nnx's own takes masks for several batch axes only if it sows."""
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
    """One position at a time through a cache, against the whole sequence at once under a causal mask."""

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
            streamed = [layer(x), layer(x)]  # the layer's own stream of keys moves on
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


BAD = [
    ({"query": normal(T, H)}, ValueError, r"query must have shape \[batch... length heads width\], got \(5, 11\)"),
    ({"query": None}, TypeError, "query must be an array, got NoneType"),
    ({"value": normal(3, S, N, H)}, ValueError, "query, key and value must agree on their batch axes, got "),
    ({"key": normal(B, S, 2, H), "value": normal(B, S, 2, H)}, ValueError, "N = 3 query heads must be a multiple of"),
    ({"bias": normal(B, T, S)}, ValueError, r"bias must broadcast to \[batch... N T S\] = \(2, 3, 5, 7\), got shape"),
    ({"bias": jnp.ones((T, S), bool)}, TypeError, "bias must be real numbers .* bools belong in mask"),
    (
        {"mask": normal(3, 1, T, S)},
        ValueError,
        r"mask must broadcast to \[batch... N T S\] = \(2, 3, 5, 7\)",
    ),
    ({"mask": attn.masks.causal()}, TypeError, "mask must be an array, got causal"),
    ({"dropout_rate": 1.0}, ValueError, r"dropout_rate must lie in \[0, 1\), got 1.0"),
    ({"dropout_rate": "0.1"}, TypeError, "dropout_rate must be a Python number, got 0.1"),
    ({"dropout_rate": 0.1}, ValueError, "dropout_rng must be a random key where the dropout_rate is 0.1, got None"),
    ({"deterministic": None}, TypeError, "deterministic must be True or False, got None"),
    ({"broadcast_dropout": "heads"}, TypeError, "broadcast_dropout must be True or False, got heads"),
    ({"is_causal": jnp.array(True)}, TypeError, "is_causal must be True or False"),
    ({"precision": "exact"}, ValueError, "precision must be a jax.lax.Precision, .* got 'exact'"),
    (
        {"precision": ("high", "default")},
        attn.Unsupported,
        r"precision must be a single .* \('high', 'default'\)",
    ),
    ({"einsum_dot_general": jax.lax.dot_general}, attn.Unsupported, "does not support einsum_dot_general"),
    ({"qk_attn_weights_einsum": jnp.einsum}, attn.Unsupported, "does not support qk_attn_weights_einsum"),
    ({"attn_weights_value_einsum": jnp.einsum}, attn.Unsupported, "does not support attn_weights_value_einsum"),
    ({"implementation": "abacus"}, ValueError, "unknown implementation 'abacus'"),
]


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize("arguments, kind, message", BAD, ids=[message for _, _, message in BAD])
def test_bad_calls(arguments, kind, message):
    with pytest.raises(kind, match=message):
        flax_attention_fn(**dict(zip(("query", "key", "value"), inputs(B))) | arguments)


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
