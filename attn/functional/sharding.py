"""Arrays on several devices: the device that is compiled for, rows on an explicit mesh, varying axes in `shard_map`."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Shaped

from attn.functional import dtypes


def platform() -> str:
    """Return the platform that is compiled for, "cpu", "gpu" or "tpu".

    It is that of the mesh, which `jax.shard_map` and `jax.set_mesh` set, also if this process has no such device; else
    that of `jax.default_device`; else the default backend. JAX's caches of traced functions depend on all three.
    """
    device = _device()
    return jax.default_backend() if device is None else device.platform


def device_kind() -> str:
    """Return the kind of device that is compiled for, such as "TPU v5 lite"; see `platform`."""
    return (_device() or jax.devices()[0]).device_kind


def device_count() -> int:
    """Return the number of devices of the mesh that is compiled for; without a mesh, of all devices."""
    mesh = jax.sharding.get_abstract_mesh()
    return jax.device_count() if mesh.empty else mesh.size


def _device() -> jax.Device | jax.sharding.AbstractDevice | None:
    """Return the device of the mesh, or else the default device; None if neither is set."""
    mesh = jax.sharding.get_abstract_mesh()
    device = None if mesh.empty else mesh.abstract_device
    device = jax.config.jax_default_device if device is None else device
    return jax.devices(device)[0] if isinstance(device, str) else device  # `jax.default_device` takes names as well


def gathered(x: Float[Array, "n *width"]) -> Float[Array, "n *width"]:
    """Gather the rows of all devices on each device of an explicit mesh; elsewhere do nothing."""
    return sharded_along(x, None)


def sharded_along(x: Shaped[Array | np.ndarray, "n *width"], axes) -> Shaped[Array | np.ndarray, "n *width"]:
    """Shard the rows over these axes of an explicit mesh; elsewhere do nothing."""
    first, *rest = jax.typeof(x).sharding.spec or (None,)
    return x if first == axes else jax.sharding.reshard(x, PartitionSpec(axes, *rest))


def is_sharded(tree) -> bool:
    """Return whether any of these arrays is sharded on an explicit mesh, where a kernel would have to shard itself."""
    arrays = [jax.typeof(x) for x in jax.tree.leaves(tree)]
    return any(axes is not None for x in arrays for axes in x.sharding.spec)


def vary_alike(tree):
    """Make every float vary over all mesh axes over which an array of the tree varies, under `shard_map`.

    The gradient of an array that devices share is a sum over devices. This way it is computed once, not in every tile.
    """
    axes = varying_axes(tree)

    def vary(x):
        missing = tuple(axes - varying_axes(x))
        is_float = dtypes.is_array(x) and jnp.issubdtype(x.dtype, jnp.floating)
        return lax.pcast(x, missing, to="varying") if missing and is_float else x

    return jax.tree.map(vary, tree) if axes else tree


def any_of_devices(needed: Bool[Array, "*blocks"], floats) -> Bool[Array, "*blocks"]:
    """Return the blocks needed by any device among those that share one of these floats.

    The gradient of such a float is summed over these devices in every tile. If one of them skipped a tile, the others
    would wait forever.
    """
    axes_of_floats = [varying_axes(x) for x in jax.tree.leaves(floats)]
    shared = varying_axes(needed) - axes_of_floats[0].intersection(*axes_of_floats)
    return lax.pmax(needed, tuple(shared)) if shared else needed


def shape_like(x: Array, shape: tuple[int, ...], dtype) -> jax.ShapeDtypeStruct:
    """Return the shape of a kernel's result that varies, under `shard_map`, over the axes over which `x` varies."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(x).mat)


def varying_axes(tree) -> frozenset[str]:
    """Return the mesh axes over which any of these arrays varies inside `shard_map`."""
    return frozenset().union(*(jax.typeof(x).mat.varying for x in jax.tree.leaves(tree) if dtypes.is_array(x)))
