"""Ring attention by kernels compiles; on TPUs its messages are under way while a part is computed."""

import functools

import jax
import jax.numpy as jnp
import pytest
from devices import compiled
from jax.sharding import NamedSharding, PartitionSpec
from ring import communication

import attn
from attn import masks, scores
from attn.functional.ring import ring_attention

ROWS, N, K, H = 1024, 4, 2, 128  # rows per device


@pytest.mark.parametrize("order", ["balanced", pytest.param("consecutive", marks=pytest.mark.nightly)])
@pytest.mark.parametrize("device, implementation", [("v5e-4", "pallas_tpu"), ("h100-8", "pallas_gpu")])
def test_the_gradient_by_kernels_compiles(mesh_of, device, implementation, order):
    mesh = mesh_of(device)
    (axis,), devices = mesh.axis_names, mesh.size
    sharded = NamedSharding(mesh, PartitionSpec(axis))
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16, sharding=sharded)
    query, *memory = shape((ROWS * devices, N, H)), *[shape((ROWS * devices, K, H))] * 2
    slopes = jax.ShapeDtypeStruct((N,), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))

    def call(slopes, *arrays):
        options = {
            "mask": masks.causal(),
            "score": attn.per_head(scores.alibi(slopes)),
            "implementation": implementation,
        }
        return ring_attention(*arrays, axis_name=axis, order=order, **options)

    local = jax.shard_map(call, mesh=mesh, in_specs=(PartitionSpec(), *[sharded.spec] * 3), out_specs=sharded.spec)
    gradient = jax.grad(lambda *a: jnp.sum(local(*a).astype(jnp.float32)), (0, 1, 2, 3))
    text = compiled(jax.jit(gradient), slopes, query, *memory, mesh=mesh).as_text()
    assert "attn_forward" in text and "attn_backward" in text
    if device == "v5e-4":
        assert communication(text)["overlapped"] >= 6  # keys and values, forward and backward, and their gradients
