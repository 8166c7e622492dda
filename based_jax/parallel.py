"""The device mesh, and shardings derived from the logical axis names that parameters carry."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding

from based_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")  # over which the rows of a batch lie
HEAD_AXES = ("tensor",)  # over which heads lie

RULES = {"embed": "fsdp", "mlp": "tensor", "heads": "tensor", "vocab": "tensor"}


def make_mesh(sizes: Mapping[str, int] | None = None) -> Mesh:
    """Return a mesh over all devices with the axes `AXES`.

    Args:
      sizes: devices per axis; an axis left out has 1, and "data" takes what is left where it is not given.

    Raises:
      UserError: an axis is unknown or below 1, or the sizes do not multiply to the number of devices.
    """
    sizes, devices = dict(sizes or {}), jax.device_count()
    for axis in sizes:
        if axis not in AXES:
            raise UserError(f"Mesh axis '{axis}' does not exist; the axes are {', '.join(AXES)}.")
        if sizes[axis] < 1:
            raise UserError(f"Mesh axis '{axis}' has {sizes[axis]} devices; it is at least 1.")
    others = math.prod(size for axis, size in sizes.items() if axis != "data")
    sizes.setdefault("data", max(devices // others, 1))
    shape = tuple(sizes.get(axis, 1) for axis in AXES)
    if math.prod(shape) != devices:
        raise UserError(
            f"Mesh {dict(zip(AXES, shape, strict=True))} needs {math.prod(shape)} devices; there are {devices}."
        )
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def shardings(tree: Any, mesh: Mesh) -> Any:
    """Return a NamedSharding per leaf of a tree of arrays and nnx variables, by `RULES`.

    Parameters and the optimizer state made from them share their logical names, so one rule places both. An axis that
    the mesh does not divide evenly stays whole.
    """

    def axis(name: str | None, size: int) -> str | None:
        rule = RULES.get(name or "")
        return rule if rule and size % mesh.shape[rule] == 0 else None

    def place(leaf: Any) -> Any:
        if not isinstance(leaf, nnx.Variable):
            return NamedSharding(mesh, jax.P())
        if not hasattr(leaf.get_value(), "shape"):  # what a masked optimizer leaves in place of a parameter
            return leaf
        names = leaf.get_metadata().get("out_sharding") or ()
        return leaf.replace(NamedSharding(mesh, jax.P(*map(axis, names, leaf.get_value().shape))))

    return jax.tree.map(place, tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return how a batch lies on the mesh: its rows over `BATCH_AXES`."""
    return NamedSharding(mesh, jax.P(BATCH_AXES))


def check_batch_size(batch_size: int, mesh: Mesh) -> None:
    """Check that the rows of a global batch can be divided over the mesh.

    Raises:
      UserError: they cannot.
    """
    ways = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    if batch_size % ways:
        axes = " and ".join(BATCH_AXES)
        raise UserError(f"batch_size {batch_size} cannot be divided over {ways} devices of the mesh axes {axes}.")


def global_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Return this host's rows of a batch as its part of global arrays.

    Raises:
      UserError: the global batch cannot be divided over the mesh.
    """
    check_batch_size(len(next(iter(batch.values()))) * jax.process_count(), mesh)
    where = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(where, rows) for name, rows in batch.items()}
