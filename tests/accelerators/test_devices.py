"""The analyses of compiled programs, and which parts of a host an all-reduce compiles for."""

from collections.abc import Callable

import devices
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from devices import Collective, collectives, compiled
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from attn.functional import sharding
from attn.training.meshes import DATA, num_devices

TEXT = """
  %all-reduce.1 = (f32[8,4]{1,0:T(8,128)}, bf16[3]{0}, f32[]) all-reduce(%a, %b, %c), replica_groups={{0,1}}
  %x = pred[16]{0} all-gather(%y), dimensions={0}
  %s = (f32[2]{0}, f32[4]{0}) all-gather-start(%y), dimensions={0}
  %d = f32[4]{0} all-gather-done(%s)
  %p = (s32[5]{0}, s32[5]{0}, u32[], u32[]) collective-permute-start(%y), source_target_pairs={{0,1}}
  %r = (f32[6]{0}, f32[7]{0}) all-reduce-start(%y, %z), to_apply=%add
  ROOT %e = f32[4]{0} add(%d, %all-reduce.1)
"""


def test_collectives_are_counted_with_the_bytes_of_their_results():
    assert collectives(TEXT) == {
        "all-reduce": Collective(2, 4 * 32 + 2 * 3 + 4 + 4 * 13),
        "all-gather": Collective(2, 16 + 4 * 4),
        "collective-permute": Collective(1, 4 * 5),
    }
    assert collectives("%e = f32[4]{0} add(%a, %b)") == {}


def test_a_program_of_this_machine_is_counted_too():
    mesh = Mesh(np.array(jax.devices()[:2]), (DATA,))
    x = jax.ShapeDtypeStruct((8, 3), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(DATA)))
    program = compiled(_sum_over(mesh), x, mesh=mesh)
    assert collectives(program.as_text()) == {"all-reduce": Collective(1, 4 * 4 * 3)}
    assert devices.memory(program)["arguments"] == 4 * 4 * 3


def _sum_over(mesh: Mesh, seen: Callable = lambda x: x):
    def body(x):
        return jax.lax.psum(seen(x), DATA)

    return jax.jit(jax.shard_map(body, mesh=mesh, in_specs=PartitionSpec(DATA), out_specs=PartitionSpec()))


def test_what_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(devices.importlib.util, "find_spec", lambda module: None)
    assert devices.missing("v5e-4").startswith("compiling for v5e-4 needs libtpu: see requirements-accelerators.txt")
    assert "needs jax-cuda13-plugin and nvidia-cuda-nvcc" in devices.missing("h100-8")


@pytest.mark.parametrize("name, kind", [("v5e-4", "TPU v5 lite"), ("h100-8", "NVIDIA H100 80GB HBM3")])
def test_a_program_knows_the_device_that_it_is_compiled_for(mesh_of, name, kind):
    mesh, known = mesh_of(name), []

    def seen(x):
        known.append((sharding.platform(), sharding.device_kind(), sharding.device_count()))
        return x

    x = jax.ShapeDtypeStruct((8 * mesh.size, 3), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(DATA)))
    program = compiled(_sum_over(mesh, seen), x, mesh=mesh)
    compiled(jax.jit(seen), x, mesh=mesh)  # outside of shard_map as well
    platform = {"v5e-4": "tpu", "h100-8": "gpu"}[name]
    assert len(known) == 2 and set(known) == {(platform, kind, mesh.size)}
    assert collectives(program.as_text()) == {"all-reduce": Collective(1, 4 * 8 * 3)}


@pytest.mark.parametrize("batch_size, number", [(32, 8), (30, 2), (12, 4), (7, 1)])
def test_an_all_reduce_compiles_for_the_part_of_a_host_that_a_batch_gets(mesh_of, batch_size, number):
    host = mesh_of("v5e-8").devices
    assert num_devices(batch_size, len(host), host[0].platform) == number
    mesh = Mesh(host[:number], (DATA,))
    x = jax.ShapeDtypeStruct((batch_size, 3), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(DATA)))
    program = compiled(_sum_over(mesh), x, mesh=mesh)
    assert ("all-reduce" in collectives(program.as_text())) == (number > 1)


def test_a_trace_for_another_default_device_is_another_one(mesh_of):
    known = []
    traced = jax.jit(lambda x: (known.append(sharding.platform()), x)[1])
    x = jax.ShapeDtypeStruct((4,), jnp.float32)
    traced.trace(x)
    with jax.default_device(mesh_of("v5e-4").devices.flat[0]):
        traced.trace(x)
    assert known == [jax.default_backend(), "tpu"]
