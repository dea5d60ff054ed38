"""`attn.interop.flax_attention_fn` as a function, compared with Flax's own attention functions."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from flax_cases import CLOSE, ROUNDINGS, B, H, N, S, T, attend, some_key_each
from interop_cases import normal, quick_jit
from traces import equations, is_matrix_product

import attn
from attn.interop import flax_attention_fn

WORLDS = {"nnx": nnx.dot_product_attention, "linen": linen.dot_product_attention}


def inputs(*batch, K=N):
    return normal(*batch, T, N, H), normal(*batch, S, K, H, seed=1), normal(*batch, S, K, H, seed=2)


class TestFunction:
    @pytest.mark.parametrize("world", WORLDS)
    @pytest.mark.parametrize("batch", [(), (B,), (B, 1, 3)], ids=str)
    def test_batch_axes_mask_and_bias(self, batch, world):
        # With several batch axes, nnx's function accepts a mask or bias that broadcasts over them only if it sows.
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
        """Linen silently drops an argument that the hook does not have."""
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
    """A stand-in for a Flax module that keeps the weights that are sown into it."""

    def sow(self, collection, name, value):
        assert collection in ("intermediates", nnx.Intermediate) and name == "attention_weights"
        self.weights = value


@functools.partial(quick_jit, static_argnums=(0, 2, 3, 4))
def dropped_weights(length, rng, rate, broadcast, deterministic):
    """Return `length` times the weights of equal scores after dropout, `[B N T S]`, with T = S = length."""
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
        """Return uniform weights after dropout, `[B N T S]`: with the identity as values, the output is the weights."""
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
    """Return the precisions of all matrix products in a function, including those in inner jaxprs."""
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
