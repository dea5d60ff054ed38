"""Pooled weights compile for a TPU and a GPU, the normaliser by the kernel, in memory of a few queries and results."""

import devices
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import attn
from attn import masks

T, N, K, H = 8192, 4, 2, 64
IMPLEMENTATIONS = {"v5e-1": "pallas_tpu", "h100-1": "pallas_gpu"}


@pytest.mark.parametrize("reduce", ["mass", "max"])
@pytest.mark.parametrize("device", IMPLEMENTATIONS)
def test_pooled_weights_compile_with_a_kernel(mesh_of, device, reduce):
    mesh = mesh_of(device)
    alone = NamedSharding(mesh, PartitionSpec())
    query, key = (jax.ShapeDtypeStruct((T, n, H), jnp.bfloat16, sharding=alone) for n in (N, K))
    options = {"mask": masks.causal(), "reduce": reduce, "implementation": IMPLEMENTATIONS[device]}
    call = jax.jit(lambda query, key: attn.pooled_attention_weights(query, key, **options))
    program = devices.compiled(call, query, key, mesh=mesh)
    assert "attn_forward" in program.as_text()
    assert devices.memory(program)["peak"] < T * T  # bytes: less than one for each pair of one head
