"""The kernels for GPUs compile for each generation, and keep everything in registers."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import attn
from attn import masks, scores
from attn.functional import pallas_gpu
from attn.functional.contract import Call

T, N = 2048, 4


def t5(table, s, i, j):
    return s + table[attn.positions.relative_buckets(j - i)]


CALLS = {
    "causal": lambda p: (masks.causal(), None),
    "segments": lambda p: (masks.segments(p["ids"], p["ids"]) & masks.causal(), None),
    "ALiBi": lambda p: (masks.causal(), attn.per_head(scores.alibi(p["slopes"]))),
    "T5": lambda p: (masks.causal(), scores.function(jax.tree_util.Partial(t5, p["table"]))),
}


@pytest.mark.parametrize(
    "gpu", ["h100-1", *(pytest.param(name, marks=pytest.mark.nightly) for name in ("a100-1", "b200-1"))]
)
@pytest.mark.parametrize("H", [64, 128])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_kernels_and_gradients_compile_without_memory_for_registers(mesh_of, gpu, H, dtype):
    mesh = mesh_of(gpu)

    def shape(*sizes, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=NamedSharding(mesh, PartitionSpec()))

    floats, ids = {"slopes": shape(N), "table": shape(32)}, shape(T, dtype=jnp.int32)
    arrays = [shape(T, N, H, dtype=dtype)] * 3

    def losses(floats, ids, q, k, v):
        calls = [make(floats | {"ids": ids}) for make in CALLS.values()]
        outs = [pallas_gpu.attend(Call(q, k, v, mask, score, 0.1))[0] for mask, score in calls]
        return sum(out.astype(jnp.float32).sum() for out in outs)

    with jax.set_mesh(mesh):
        lowered = jax.jit(jax.grad(losses, argnums=(0, 2, 3, 4))).lower(floats, ids, *arrays)
    text = lowered.compile({"xla_gpu_fail_ptx_compilation_on_register_spilling": True}).as_text()
    for kernel in ("attn_forward_rows", "attn_backward_rows", "attn_backward_columns"):
        assert text.count(f'"{kernel}"') == len(CALLS)
