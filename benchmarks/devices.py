"""Compile for TPUs and GPUs that this machine does not have, and read what the compiler made of a program.

    for_no_device()  # before JAX computes anything
    mesh = mesh_of("v5e-8")
    program = compiled(jax.jit(function), *shapes, mesh=mesh)
    collectives(program.as_text()), memory(program)

TPUs need libtpu, GPUs the CUDA plugin of JAX and NVIDIA's assembler: requirements-accelerators.txt has them. Nothing is
run. The GPU compiler chooses its matrix products by measuring them, which it cannot do without the device.

Sources: names of topologies: `jax.experimental.topologies`; an example without devices: tests/aot_test.py of JAX.
"""

import dataclasses
import functools
import importlib.util
import math
import os
import pathlib
import re
from collections.abc import Iterable

import jax
import numpy as np
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import AxisType, Mesh
from jax.stages import Compiled

from attn.training.meshes import DATA
from attn.training.programs import compiled

__all__ = ["DEVICES", "Collective", "collectives", "compiled", "for_no_device", "memory", "mesh_of", "missing"]

_TARGETS = pathlib.Path(__file__).parent / "targets"
_KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
_COLLECTIVE = re.compile(rf" = (?P<result>.*?) (?P<kind>{_KINDS})(?P<start>-start)?\(")
_ARRAY = re.compile(r"\b(?:pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")  # bits and sizes, such as bf16[8,128]


@dataclasses.dataclass(frozen=True)
class Target:
    """Devices to compile for.

    Attributes:
      platform: "tpu" or "cuda".
      topology: its name for the compiler; of GPUs "partitions x hosts x devices per host".
      host: chips of a host along the three axes; None for the compiler's default.
      gpu: file of `targets` that describes the GPU; None for a TPU.
    """

    platform: str
    topology: str
    host: tuple[int, int, int] | None = None
    gpu: str | None = None


# A chip of v4 and of TPU7x is two devices.
DEVICES = {
    "v4-1": Target("tpu", "v4:1x1x1", (1, 1, 1)),
    "v4-4": Target("tpu", "v4:2x2x1"),
    "v5e-1": Target("tpu", "v5e:1x1", (1, 1, 1)),
    "v5e-4": Target("tpu", "v5e:2x2"),
    "v5e-8": Target("tpu", "v5e:2x4", (2, 4, 1)),  # one host; by default it would be two
    "v5e-16": Target("tpu", "v5e:4x4"),
    "v5e-64": Target("tpu", "v5e:8x8"),
    "v5e-256": Target("tpu", "v5e:16x16"),
    "v5p-1": Target("tpu", "v5p:1x1x1", (1, 1, 1)),
    "v5p-4": Target("tpu", "v5p:2x2x1"),
    "v6e-1": Target("tpu", "v6e:1x1", (1, 1, 1)),
    "v6e-4": Target("tpu", "v6e:2x2"),
    "tpu7x-1": Target("tpu", "tpu7x:1x1x1", (1, 1, 1)),
    "tpu7x-4": Target("tpu", "tpu7x:2x2x1"),
    **{f"{gpu}-{n}": Target("cuda", f"1x1x{n}", gpu=gpu) for gpu in ("h100", "a100", "b200") for n in (1, 8)},
}


@dataclasses.dataclass(frozen=True)
class Collective:
    """The operations of one kind in a program's text: their number, and the bytes of their results on one device.

    An operation in a loop is counted once.
    """

    count: int
    bytes: int


def for_no_device():
    """Set the environment in which a process compiles for devices that it does not have.

    JAX itself computes on the CPU, and keeps no programs from here on. libtpu asks no server about its machine, and
    several processes may load it.
    """
    os.environ |= {
        "JAX_PLATFORMS": "cpu",  # of child processes; JAX has read it when this module imported it
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_STDERR_LOG_LEVEL": "3",
    }
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    jax.config.update("jax_platforms", "cpu")
    # JAX would write programs for other devices, but cannot read them where the devices are not there.
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()


def missing(name: str) -> str | None:
    """Return what must be installed to compile for a device, in words; None if all of it is."""
    packages = {"libtpu": "libtpu"}
    if DEVICES[name].platform == "cuda":
        packages = {"jax_cuda13_plugin": "jax-cuda13-plugin", "nvidia.cu13": "nvidia-cuda-nvcc"}
    absent = [package for module, package in packages.items() if not _is_installed(module)]
    return f"compiling for {name} needs {' and '.join(absent)}: see requirements-accelerators.txt" if absent else None


def absent(names: Iterable[str]) -> list[str]:
    """Return a line for everything that must be installed to compile for some devices."""
    return sorted({reason for name in names if (reason := missing(name)) is not None})


def _is_installed(module: str) -> bool:
    parent, _, _ = module.rpartition(".")
    return (not parent or _is_installed(parent)) and importlib.util.find_spec(module) is not None


@functools.cache
def mesh_of(name: str) -> Mesh:
    """Make the mesh of data parallelism over devices that this machine need not have.

    Raises:
      KeyError: an unknown name.
      RuntimeError: the compiler for the devices is not installed.
    """
    target = DEVICES[name]
    if (reason := missing(name)) is not None:
        raise RuntimeError(reason)
    if target.platform == "tpu":
        bounds = {} if target.host is None else {"chips_per_host_bounds": target.host}
        topology = topologies.get_topology_desc(platform="tpu", topology_name=target.topology, **bounds)
    else:
        config = (_TARGETS / f"{target.gpu}.txtpb").read_text()
        topology = topologies.get_topology_desc(platform="cuda", target_config=config, topology=target.topology)
    return Mesh(np.array(topology.devices), (DATA,), axis_types=(AxisType.Auto,))


def collectives(text: str) -> dict[str, Collective]:
    """Count the communication between devices in the text of a compiled program (`Compiled.as_text()`), by kind."""
    found = {}
    for match in _COLLECTIVE.finditer(text):
        result, kind = match["result"], match["kind"]
        if match["start"] and kind in ("all-gather", "collective-permute"):
            result = _parts(result)[1]  # the first part is the operand, the second the result
        before = found.get(kind, Collective(0, 0))
        found[kind] = Collective(before.count + 1, before.bytes + _bytes(result))
    return found


def _parts(tuple_: str) -> list[str]:
    """Return the elements of a tuple of shapes, as HLO writes it; elements may be tuples."""
    parts, depth = [""], 0
    for character in tuple_.strip()[1:-1]:
        depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(character, 0)
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def _bytes(shapes: str) -> int:
    """Return the bytes of the arrays in a text of shapes."""
    arrays = [(int(bits or 8), map(int, filter(None, sizes.split(",")))) for bits, sizes in _ARRAY.findall(shapes)]
    return sum(bits * math.prod(sizes) for bits, sizes in arrays) // 8


def memory(program: Compiled) -> dict[str, int]:
    """Return the bytes that a program takes on one device: code, arguments, temporaries, and the most at a time.

    The GPU compiler does not report the size of the code.
    """
    analysis = program.memory_analysis()
    return {
        "code": analysis.generated_code_size_in_bytes,
        "arguments": analysis.argument_size_in_bytes,
        "temporaries": analysis.temp_size_in_bytes,
        "peak": analysis.peak_memory_in_bytes,
    }
