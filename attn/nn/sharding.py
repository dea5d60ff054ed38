"""The division of a model among devices: one table from the names of axes to the axes of the mesh.

An array's axes have names: those of parameters are in `PARAMETERS`, those of activations are given where `constrain` is
called. `RULES` says along which axis of the mesh each is sharded. Everything else is replicated: other axes, parameters
with other names, and everything where the mesh lacks an axis or has one device along it. The compiler adds the
communication.

    data      examples
    model     heads and the hidden units of feed-forward layers: each device has some of them, and their parameters
    sequence  tokens: each device has some rows of a text; keys and values travel (see `on_mesh`)

Source: heads and hidden units: Shoeybi et al. 2019, section 3; rules by names of axes: Shazeer et al. 2018.
"""

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Shaped

DATA, MODEL, SEQUENCE = "data", "model", "sequence"  # the axes of the mesh

RULES = {
    "examples": DATA,
    "heads": MODEL,
    "groups": MODEL,  # heads of keys and values
    "feed_forward": MODEL,
    "tokens": SEQUENCE,
}

# By the last parts of a parameter's path. A model with parameters of its own may add them.
PARAMETERS = {
    "W_Q": ("width", "heads", "head_width"),
    "W_K": ("width", "groups", "head_width"),
    "W_V": ("width", "groups", "head_width"),
    "W_O": ("heads", "head_width", "width"),
    "b_Q": ("heads", "head_width"),
    "b_K": ("groups", "head_width"),
    "b_V": ("groups", "head_width"),
    "feed_forward.expand.kernel": ("width", "feed_forward"),
    "feed_forward.expand.bias": ("feed_forward",),
    "feed_forward.gate.kernel": ("width", "feed_forward"),
    "feed_forward.gate.bias": ("feed_forward",),
    "feed_forward.contract.kernel": ("feed_forward", "width"),
}


def divided_axes() -> dict[str, int]:
    """Return the numbers of devices along the mesh axes that divide the model here, where they are more than one.

    They are those of the mesh that the code is traced for, except axes that are manual, as under `jax.shard_map`: there
    the code is that of one device.
    """
    return {name: n for name, n in _automatic_axes().items() if name in (MODEL, SEQUENCE) and n > 1}


def axes_of_attention() -> set[str]:
    """Return the mesh axes to make manual around attention: those that divide the model, and those of one device.

    The latter divide nothing, but a kernel for TPUs compiles only where no axis is left to the compiler.
    """
    return {name for name, n in _automatic_axes().items() if n == 1 or name in (MODEL, SEQUENCE)}


def _automatic_axes() -> dict[str, int]:
    """Return the numbers of devices along the axes of the mesh that the compiler divides arrays along."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types)
    return {name: n for name, n, kind in kinds if kind == AxisType.Auto}


def axis_of(name: str) -> str | None:
    """Return the mesh axis that divides an axis of this name here; None if none does."""
    axis = RULES.get(name)
    return axis if axis in divided_axes() else None


def constrain(x: Shaped[Array, "..."], *names: str) -> Shaped[Array, "..."]:
    """Shard an activation with axes of these names as `RULES` says; where nothing divides the model, do nothing.

    An axis whose length is not a multiple of the number of devices is padded by the compiler.
    """
    spec = _spec(names, divided_axes())
    return jax.lax.with_sharding_constraint(x, spec) if spec else x


def constrain_parameters(params):
    """Shard a tree of parameters as `RULES` says, and their gradients with them."""
    sizes = divided_axes()
    if not sizes:
        return params

    def constrained(path, x):
        return jax.lax.with_sharding_constraint(x, _spec(_names_of(path, x), sizes))

    return jax.tree_util.tree_map_with_path(constrained, params)


def shardings(tree, mesh: Mesh):
    """Return the shardings, on a mesh, of a tree of parameters, or of anything that has trees of them inside."""
    sizes = {name: size for name, size in mesh.shape.items() if size > 1}

    def sharding(path, x):
        return NamedSharding(mesh, _spec(_names_of(path, x), sizes))

    return jax.tree_util.tree_map_with_path(sharding, tree)


def _names_of(path: tuple, x) -> tuple[str, ...]:
    """Return the names of the axes of a parameter; none if they are not known."""
    name = "." + jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")
    known = (names for end, names in PARAMETERS.items() if name.endswith(f".{end}"))
    return next((names for names in known if len(names) == x.ndim), ())


def _spec(names: tuple[str, ...], sizes: dict[str, int]) -> PartitionSpec:
    """Return the partition of axes of these names along mesh axes of these sizes."""
    axes = [RULES.get(name) for name in names]
    axes = [axis if axis in sizes else None for axis in axes]
    return PartitionSpec(*axes) if any(axes) else PartitionSpec()
