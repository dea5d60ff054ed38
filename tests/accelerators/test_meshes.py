"""A training step and decoding compile on meshes that divide a model, with the kernels inside and keys that travel."""

import re

import devices
import pytest
from jax.sharding import AxisType, Mesh
from programs import load, programs_of

from attn.nn.sharding import DATA, MODEL, SEQUENCE

CASES = [
    ("v5e-4", (1, 1, 4), "reverse", "pallas_tpu"),
    ("v5e-8", (2, 2, 2), "decoder_only", "auto"),
    ("v5e-8", (2, 4, 1), "reverse", "pallas_tpu"),
    ("h100-8", (2, 2, 2), "reverse", "pallas_gpu"),
]


@pytest.mark.parametrize("device, shape, config, implementation", CASES)
def test_training_and_decoding_compile(mesh_of, device, shape, config, implementation):
    mesh = Mesh(mesh_of(device).devices.reshape(shape), (DATA, MODEL, SEQUENCE), axis_types=(AxisType.Auto,) * 3)
    sizes = {f"mesh.{name}": str(size) for name, size in zip((MODEL, SEQUENCE), shape[1:])}
    programs = programs_of(*load(config, sizes | {"model.implementation": implementation}), mesh)
    advance, _ = (
        devices.compiled(function, *shapes, mesh=mesh).as_text()
        for function, shapes in (programs["advance"], programs["decode"])
    )
    kernels = set(re.findall(r"\battn_(forward|backward)", advance))
    assert kernels == (set() if implementation == "auto" else {"forward", "backward"})
    assert shape[-1] == 1 or "collective-permute" in devices.collectives(advance)
