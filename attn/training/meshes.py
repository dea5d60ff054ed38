"""Devices: how many to use, the mesh over them, and starting JAX on several hosts."""

import contextlib
import math
import os
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from attn.functional.cpu import cores
from attn.nn.sharding import DATA, MODEL, SEQUENCE
from attn.startup import STUCK
from attn.training.groups import MeshShape

_MOST_CPU_DEVICES = 64  # that are made where a model is divided among more of them than there are cores
_PATIENCE, _BEFORE_NOTICE = 300, 1  # seconds to wait for other hosts: in all, and before a message says so
_ADDRESS = ("JAX_COORDINATOR_ADDRESS", "SLURM_STEP_NODELIST")
_COUNTS = ("JAX_NUM_PROCESSES", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")


class DistributedError(RuntimeError):
    """Training on several hosts is not possible as configured; the message is one line for the user."""


def largest_divisor(number: int, at_most: int) -> int:
    """Return the largest divisor of `number` that is at most `at_most`."""
    return max(n for n in range(1, min(number, at_most) + 1) if number % n == 0)


def use_cores(batch_size: int, per_model: int = 1):
    """Let JAX make one CPU device per core, or fewer, so that their number divides the batch size.

    With `per_model` devices for each copy of the model, the number of copies divides it; there is at least one copy, if
    the devices are not far more than the cores.

    On a CPU two devices with half of the batch each are faster than one device with two threads. Once JAX has computed
    something, as in a notebook, the number of its devices is fixed, and this does nothing.
    """
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        with contextlib.suppress(RuntimeError):
            copies = largest_divisor(batch_size, max(1, cores() // per_model))
            jax.config.update("jax_num_cpu_devices", min(copies * per_model, max(_MOST_CPU_DEVICES, cores())))


def is_started() -> bool:
    """Return whether JAX has computed something, so that the number of its devices is fixed."""
    before = jax.config.jax_num_cpu_devices
    try:
        jax.config.update("jax_num_cpu_devices", 2 if before == 1 else 1)  # raises an error if it is
        jax.config.update("jax_num_cpu_devices", before)
    except RuntimeError:
        return True
    return False


def start_hosts(mode: str):
    """Join the other hosts of a pod or a cluster, if there are any. Call before JAX's first computation.

    Args:
      mode: "off"; "on", which requires a cluster; or "auto", which continues on one host if there is no cluster. JAX
        detects TPU pods, Slurm and others; for the rest set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
        JAX_PROCESS_ID.

    Raises:
      DistributedError: "on" without a cluster, or a cluster that cannot be joined.
    """
    if mode == "off":
        return
    environment = {
        "coordinator_address": os.environ.get("JAX_COORDINATOR_ADDRESS"),
        "num_processes": _environment_integer("JAX_NUM_PROCESSES", least=1),
        "process_id": _environment_integer("JAX_PROCESS_ID"),
    }
    try:
        _join(environment, mode)
    except ValueError as error:  # JAX detects no cluster
        if mode == "on" or any(value is not None for value in environment.values()):
            message = " ".join(str(error).split())
            raise DistributedError(
                f"--distributed={mode}: no cluster to join ({message}); set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES "
                "and JAX_PROCESS_ID, or use --distributed=off"
            ) from None
    except DistributedError:
        raise
    except RuntimeError as error:
        raise DistributedError(f"--distributed={mode}: cannot join: {' '.join(str(error).split())}") from None


def _join(environment: dict, mode: str):
    """Call `jax.distributed.initialize` with working ^C, a message while it waits, and a timeout.

    JAX waits in C++, where ^C has no effect, and aborts the process after its own timeout. So it is called in a thread,
    with a timeout longer than the one here.

    Raises:
      DistributedError: the other processes have not joined in time.
      ValueError, RuntimeError: from JAX.
    """
    raised = []

    def initialize():
        try:
            jax.distributed.initialize(**environment, initialization_timeout=2 * _PATIENCE)
        except Exception as error:
            raised.append(error)

    thread = threading.Thread(target=initialize, name=STUCK, daemon=True)
    thread.start()
    thread.join(_BEFORE_NOTICE)
    if thread.is_alive():
        variables = ", ".join(f"{name}={os.environ[name]}" for name in (*_ADDRESS, *_COUNTS) if name in os.environ)
        others = "the other processes of the cluster" + (f" ({variables})" if variables else "")
        hint = "Ctrl-C stops, --distributed=off trains without them"
        print(f"waiting for {others}, up to {_PATIENCE} s; {hint}", file=sys.stderr, flush=True)
        thread.join(_PATIENCE - _BEFORE_NOTICE)
    if thread.is_alive():
        raise DistributedError(
            f"--distributed={mode}: not all processes of the cluster joined within {_PATIENCE} s; start them all, or "
            "use --distributed=off to train without them"
        )
    if raised:
        raise raised[0]


def _environment_integer(name: str, least: int = 0) -> int | None:
    text = os.environ.get(name)
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text) >= least):
        raise DistributedError(f"{name}: got {text!r}, must be a whole number at least {least}")
    return int(text)


def data_mesh(batch_size: int) -> Mesh:
    """Make a mesh for data parallelism alone: `model_mesh` with one device along the other axes."""
    return model_mesh(batch_size, MeshShape())


def model_mesh(batch_size: int, shape: MeshShape) -> Mesh:
    """Make a mesh of the axes data, model and sequence over all devices of all hosts.

    The data axis has the devices that the others leave to it; on one host, `num_devices` of them. Neighbouring devices
    share a model, so that they are on one host where possible.

    Raises:
      DistributedError: there are too few devices, or those of several hosts cannot be divided like this.
    """
    devices = jax.devices()
    copies = _num_copies(batch_size, len(devices), shape, devices[0].platform)
    devices = np.array(devices[: copies * shape.size]).reshape(copies, shape.model, shape.sequence)
    return Mesh(devices, (DATA, MODEL, SEQUENCE), axis_types=(AxisType.Auto,) * 3)


def _num_copies(batch_size: int, available: int, shape: MeshShape, platform: str) -> int:
    """Return the number of devices along the data axis: that of the copies of the model."""
    size, hosts = shape.size, jax.process_count()
    copies = available // size
    if copies == 0 or ((hosts > 1 or platform == "tpu") and available % size):
        must = "must divide" if copies else "must be at most"
        raise DistributedError(
            f"config.mesh: got model = {shape.model} and sequence = {shape.sequence}, whose product {size} {must} the "
            f"number of devices, {available}"
        )
    if hosts == 1:
        return num_devices(batch_size, copies, platform)
    if batch_size % copies:
        sharing = "" if size == 1 else f", of which {size} each share a model"
        raise DistributedError(
            f"config.training.batch_size: got {batch_size}, must be a multiple of {copies} for the {available} "
            f"devices of the {hosts} hosts{sharing} (such as {math.ceil(batch_size / copies) * copies})"
        )
    return copies


def is_divided(mesh: Mesh) -> bool:
    """Return whether several devices of the mesh share a model."""
    return mesh.size > mesh.shape[DATA]


def num_devices(batch_size: int, available: int, platform: str) -> int:
    """Return the number of one host's devices to use: as many as divide the batch size.

    On a TPU it also divides the number of the host's devices. Its compiler refuses an all-reduce over six of eight.
    """
    return largest_divisor(math.gcd(batch_size, available) if platform == "tpu" else batch_size, available)


def replicate(tree, mesh: Mesh):
    """Copy values to every device of the mesh; every host must pass the same."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def shard(tree, mesh: Mesh):
    """Shard values over all devices along their first axis; each host passes the whole arrays."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec(mesh.axis_names)))


def fetch(tree):
    """Return whole arrays in the memory of the host; every host must call it."""

    def whole(x):
        if isinstance(x, jax.Array) and not x.is_fully_addressable and not x.is_fully_replicated:
            return multihost_utils.process_allgather(x, tiled=True)
        return jax.device_get(x)

    return jax.tree.map(whole, tree)


def tokens_like(batch_size: int, width: int, mesh: Mesh) -> jax.ShapeDtypeStruct:
    """Return the shape and sharding of a batch of tokens, to compile for."""
    return jax.ShapeDtypeStruct(
        (batch_size, width), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    )
