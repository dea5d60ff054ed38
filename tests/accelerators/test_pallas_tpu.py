"""The kernels for TPUs compile for each generation: masks, scores and gradients, heads divided among its devices."""

import functools
import re

import devices
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from registers import CASES

from attn.functional import pallas_tpu
from attn.functional.contract import Call
from attn.training.meshes import DATA

N = 4
_BY_DAY = {
    "v4-1": ("bfloat16", 128),
    "v5e-1": ("bfloat16", 64),
    "v5p-1": ("float32", 128),
    "v6e-1": ("float32", 64),
    "tpu7x-1": ("bfloat16", 128),
}


def chips() -> list:
    """Return every chip with every dtype and width; by day each chip once."""
    every = [(chip, dtype, width) for chip in _BY_DAY for dtype in ("bfloat16", "float32") for width in (64, 128)]
    return [pytest.param(*each, marks=() if _BY_DAY[each[0]] == each[1:] else pytest.mark.nightly) for each in every]


def kernels(mesh, names, length: int, dtype: str, width: int) -> list[str]:
    """Compile the gradient of the sum of some cases; return "forward" or "backward" for each kernel."""
    of_heads = {"slopes": P(DATA), "cap": P(), "table": P()}
    specs = (of_heads, *[P(None, DATA)] * 3, P())

    def shape(spec, *sizes, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=NamedSharding(mesh, spec))

    floats = {name: shape(of_heads[name], *size) for name, size in (("slopes", (N,)), ("cap", ()), ("table", (32,)))}
    arrays = [shape(P(None, DATA), length, N, width, dtype=dtype)] * 3

    def attend(make, floats, query, key, value, ids):
        mask, score = make(floats, ids)
        return pallas_tpu.attend(Call(query, key, value, mask, score, 0.1))[0]

    def total(inputs, ids):
        calls = [functools.partial(attend, CASES[name]) for name in names]
        local = [jax.shard_map(call, mesh=mesh, in_specs=specs, out_specs=P(None, DATA)) for call in calls]
        return sum(jnp.sum(call(*inputs, ids).astype(jnp.float32)) for call in local)

    inputs, ids = (floats, *arrays), shape(P(), length, dtype=jnp.int32)
    text = devices.compiled(jax.jit(jax.grad(total)), inputs, ids, mesh=mesh).as_text()
    return re.findall(r"custom-call\(.*op_name=\"[^\"]*/attn_(\w+?)(?:_\w+)?/pallas_call", text)


@pytest.mark.parametrize("chip, dtype, width", chips())
def test_kernels_and_gradients_compile(mesh_of, chip, dtype, width):
    found = kernels(mesh_of(chip), CASES, 1024, dtype, width)
    assert found.count("forward") == len(CASES) and found.count("backward") >= len(CASES)


@pytest.mark.parametrize("length", [5, 300])  # 300: a tile of three vectors
def test_sequences_shorter_than_a_tile_compile(mesh_of, length):
    assert set(kernels(mesh_of("v5e-1"), ["causal", "T5's buckets"], length, "float32", 16)) == {"forward", "backward"}
