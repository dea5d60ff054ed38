"""The drop-ins for `jax.nn` and Flax compile to kernels for a TPU and a GPU, with the gradient of a bias."""

import functools
import re

import devices
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from attn.interop import dot_product_attention, flax_attention_fn

B, T, S, N, K, H = 2, 640, 1024, 4, 2, 64
IMPLEMENTATIONS = {"v5e-1": "pallas_tpu", "h100-1": "pallas_gpu"}


@pytest.mark.parametrize("bias", [(B, N, T, S), (1, N, 1, S)], ids=str)
@pytest.mark.parametrize("function", [dot_product_attention, flax_attention_fn], ids=lambda f: f.__name__)
@pytest.mark.parametrize("device", IMPLEMENTATIONS)
def test_a_gradient_with_a_bias_compiles_to_kernels(mesh_of, device, function, bias):
    mesh = mesh_of(device)
    alone = NamedSharding(mesh, PartitionSpec())
    shapes = [((B, T, N, H), "bfloat16"), ((B, S, K, H), "bfloat16"), ((B, S, K, H), "bfloat16"), (bias, "float32")]
    arrays = [jax.ShapeDtypeStruct(*each, sharding=alone) for each in shapes]
    call = functools.partial(function, is_causal=True, implementation=IMPLEMENTATIONS[device])
    gradient = jax.jit(jax.grad(lambda *xs: jnp.sum(call(*xs).astype(jnp.float32)), argnums=(0, 1, 2, 3)))
    text = devices.compiled(gradient, *arrays, mesh=mesh).as_text()
    assert set(re.findall(r"\battn_(forward|backward)", text)) == {"forward", "backward"}
    # No product of matrices is left to XLA.
    assert not re.search(r"= \S+ (dot|convolution)\(|__cublas", text)
