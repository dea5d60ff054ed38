"""The device that is compiled for: that of the mesh, also if this process has no such device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

import attn
from attn.functional import blockwise, cpu, sharding
from attn.functional.contract import Call
from attn.functional.implementations import IMPLEMENTATIONS, choose

DEVICES = {"tpu": ("TPU v5 lite", 1), "gpu": ("NVIDIA H100 80GB HBM3", 132), "cpu": ("cpu", None)}


def mesh_of(platform: str, size: int = 4, axis_type: AxisType = AxisType.Auto) -> AbstractMesh:
    kind, cores = DEVICES[platform]
    device = AbstractDevice(device_kind=kind, num_cores=cores, platform=platform)
    return AbstractMesh((size,), ("data",), (axis_type,), abstract_device=device)


@pytest.fixture
def call() -> Call:
    """A call that cuDNN serves."""
    x = jax.ShapeDtypeStruct((64, 2, 64), jnp.bfloat16)
    return Call(x, x, x, mask=None, score=None, scale=0.125)


def test_without_a_mesh_it_is_the_default_backend():
    assert sharding.platform() == jax.default_backend()
    assert sharding.device_kind() == jax.devices()[0].device_kind
    assert sharding.device_count() == jax.device_count()


@pytest.mark.parametrize("device", [jax.devices()[-1], jax.default_backend()], ids=["device", "name"])
def test_a_default_device_is_asked(device, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "another")
    assert sharding.platform() == "another"
    with jax.default_device(device):
        assert sharding.platform() == jax.devices()[0].platform
        assert sharding.device_kind() == jax.devices()[0].device_kind


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("platform", DEVICES)
def test_a_mesh_is_asked_first(platform, axis_type):
    with jax.default_device(jax.devices()[0]), jax.sharding.use_abstract_mesh(mesh_of(platform, 4, axis_type)):
        assert sharding.platform() == platform
        assert sharding.device_kind() == DEVICES[platform][0]
        assert sharding.device_count() == 4


def test_a_mesh_without_a_device_says_nothing_of_it():
    with jax.sharding.use_abstract_mesh(AbstractMesh((4,), ("data",))):
        assert sharding.platform() == jax.default_backend()
        assert sharding.device_count() == 4


def test_inside_shard_map_it_is_known():
    seen = []

    def body(x):
        seen.append((sharding.platform(), sharding.device_count()))
        return x

    mesh, rows = mesh_of("tpu"), PartitionSpec("data")
    jax.make_jaxpr(jax.shard_map(body, mesh=mesh, in_specs=rows, out_specs=rows))(jnp.zeros(8))
    assert seen == [("tpu", 4)]


def test_a_cached_trace_is_of_one_platform_only():
    @jax.jit
    def doubled_on_tpu(x):
        return 2 * x if sharding.platform() == "tpu" else x

    def text() -> str:
        return doubled_on_tpu.trace(jax.ShapeDtypeStruct((4,), jnp.float32)).jaxpr.pretty_print()

    plain = text()
    with jax.sharding.use_abstract_mesh(mesh_of("tpu")):
        assert "mul" in text() and "mul" not in plain
    with jax.sharding.use_abstract_mesh(mesh_of("gpu")):
        assert "mul" not in text()
    assert text() == plain


def test_the_choice_is_of_the_device_that_is_compiled_for(call):
    with jax.sharding.use_abstract_mesh(mesh_of("gpu")):
        assert choose("fastest", call) is IMPLEMENTATIONS["cudnn"]
    with jax.sharding.use_abstract_mesh(mesh_of("tpu")):
        assert choose("fastest", call) is not IMPLEMENTATIONS["cudnn"]
        with pytest.raises(attn.Unsupported, match="'cudnn' does not support backend 'tpu'"):
            choose("cudnn", call)


@pytest.mark.parametrize("platform, size, expected", [("tpu", 1, 8), ("gpu", 1, 8), ("cpu", 1, 2), ("cpu", 4, 8)])
def test_heads_run_one_by_one_on_one_cpu_only(platform, size, expected, monkeypatch):
    monkeypatch.setattr(cpu, "cores", lambda: 2 * jax.local_device_count())
    with jax.sharding.use_abstract_mesh(mesh_of(platform, size)):
        assert blockwise.heads_at_once(8) == expected


def test_on_a_mesh_of_this_process_it_is_that_of_its_devices():
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",), axis_types=(AxisType.Auto,))
    seen = []
    x = jax.ShapeDtypeStruct((4,), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))
    with jax.set_mesh(mesh):
        jax.jit(lambda x: (seen.append((sharding.platform(), sharding.device_count())), x)[1]).trace(x)
    assert seen == [(jax.devices()[0].platform, 1)]
