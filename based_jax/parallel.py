"""The device mesh, and how arrays lie on it: by the logical names of their axes, parameters and activations alike."""

import dataclasses
import functools
import itertools
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding

from based_jax.errors import UserError
from based_jax.placement import Placement, Wish, is_large, is_small, place

log = logging.getLogger(__name__)

HostBatch = Mapping[str, np.ndarray]
GlobalBatch = Mapping[str, jax.Array]

AXES = ("data", "fsdp", "tensor", "sequence")
AXIS_TYPES = (AxisType.Auto,) * len(AXES)
BATCH_AXES = ("data", "fsdp")  # over which the rows of a batch lie
TIME_AXES = ("sequence",)  # over which their tokens lie
HEAD_AXES = ("tensor",)  # over which heads lie

PARAMETER_RULES = {"embed": "fsdp", "mlp": "tensor", "heads": "tensor", "vocab": "tensor"}
STACKED = "layers"  # the name of the axis along which layers are stacked
ROWS_OF_TABLES = "vocab"
"""The name of the axis that ids choose from. A table that the rule does not divide has its rows divided alone: for the
gradient of a part of both XLA would have activations whole on all devices.
"""

# Rows of activations lie over fsdp too: a layer gathers its weights there, which are smaller, and the head its table.
ACTIVATION_RULES = {"batch": BATCH_AXES, "time": TIME_AXES, "vocab": HEAD_AXES}


def make_mesh(sizes: Mapping[str, int] | None = None, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Return a mesh with the axes `AXES`.

    Args:
      sizes: devices per axis; an axis left out has 1, and "data" takes what is left where it is not given.
      devices: those of the mesh, of a topology without hardware too; None for all that there are.

    Raises:
      UserError: an axis is unknown or below 1, or the sizes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    shape = _shape(sizes or {}, len(devices), _slices(devices))
    return Mesh(_laid_out(shape, devices), AXES, axis_types=AXIS_TYPES)


def abstract_mesh(sizes: Mapping[str, int], devices: int, slices: int = 1) -> AbstractMesh:
    """Return the mesh that `make_mesh` makes of so many devices, which nobody needs to have; raises as it."""
    return AbstractMesh(_shape(sizes, devices, slices), AXES, axis_types=AXIS_TYPES)


def _shape(sizes: Mapping[str, int], devices: int, slices: int) -> tuple[int, ...]:
    """Return the devices along each of `AXES`; raises as `make_mesh`."""
    for axis, size in sizes.items():
        if axis not in AXES:
            raise UserError(f"Mesh axis '{axis}' does not exist; the axes are {', '.join(AXES)}.")
        if size < 1:
            raise UserError(f"Mesh axis '{axis}' has {size} devices; it is at least 1.")
    others = math.prod(size for axis, size in sizes.items() if axis != "data")
    whole = {"data": max(devices // others, 1)} | dict(sizes)
    shape = tuple(whole.get(axis, 1) for axis in AXES)
    if math.prod(shape) != devices:
        raise UserError(
            f"Mesh {dict(zip(AXES, shape, strict=True))} needs {math.prod(shape)} devices; there are {devices}."
        )
    if whole["data"] % slices:
        raise UserError(
            f"Mesh axis 'data' has {whole['data']} devices; it is a multiple of the {slices} slices, which it goes"
            " over."
        )
    return shape


def _slices(devices: Sequence[jax.Device]) -> int:
    """Return how many slices of TPUs the devices are of; hosts of GPUs, which JAX calls slices too, are none."""
    return len({getattr(device, "slice_index", 0) for device in devices}) if devices[0].platform == "tpu" else 1


def _laid_out(shape: tuple[int, ...], devices: Sequence[jax.Device]) -> np.ndarray:
    """Return the devices in the shape of a mesh, such that neighbours on an axis are near each other.

    Slices of TPUs are far from each other: "data" goes over them. Over hosts of GPUs any axis may go.
    """
    if (slices := _slices(devices)) == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    data, *others = shape
    return mesh_utils.create_hybrid_device_mesh(
        (data // slices, *others), (slices, *(1 for _ in others)), devices, allow_split_physical_axes=True
    )


def shardings(tree: Any, mesh: Mesh, spread: bool = False) -> Any:
    """Return a NamedSharding per leaf of a tree of arrays and nnx variables, by `PARAMETER_RULES`.

    Parameters and the optimizer state made from them share their logical names, so one rule places both. Where a mesh
    axis does not divide the dimension that the rule names, large arrays are divided over it along others; small ones
    are whole over "fsdp".

    Args:
      tree: arrays, or their shapes, with the names of their axes.
      mesh: where they lie.
      spread: whether large ones are divided over "data" too, as moments may be that nobody reads but their update.
    """

    def place(leaf: Any) -> Any:
        if not isinstance(leaf, nnx.Variable):
            return NamedSharding(mesh, jax.P())
        if not hasattr(leaf.get_value(), "shape"):  # what a masked optimizer leaves in place of a parameter
            return leaf
        return leaf.replace(placement_of(leaf, mesh, spread).sharding(mesh))

    return jax.tree.map(place, tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def placement_of(leaf: nnx.Variable, mesh: Mesh | AbstractMesh, spread: bool = False) -> Placement:
    """Return how a variable is divided over a mesh; see `shardings`."""
    shape, names = leaf.get_value().shape, leaf.get_metadata().get("out_sharding") or ()
    largest_first = sorted(range(len(names)), key=lambda i: (names[i] == STACKED, -shape[i]))
    rows = [i for i, name in enumerate(names) if name == ROWS_OF_TABLES]
    others = (rows or largest_first) if is_large(shape) else []

    def along(rule: str) -> list[int]:
        return [i for i, name in enumerate(names) if PARAMETER_RULES.get(name or "") == rule]

    first = [*_outermost(names, mesh), *along("fsdp")] if others and not rows else along("fsdp")
    wishes = [Wish("tensor", along("tensor")), Wish("fsdp", ()) if _is_small(leaf) else Wish("fsdp", first, others)]
    if spread and others:
        wishes.append(Wish("data", along("fsdp"), others))
    return place(shape[: len(names)], mesh.shape, wishes)


def _outermost(names: Sequence[str | None], mesh: Mesh | AbstractMesh) -> list[int]:
    """Return the dimension by which a weight's memory is ordered, if "tensor" could divide it and does not.

    Parts along it lie in one piece. XLA sums the parts of a gradient along another dimension in another order of
    memory; to update a weight it then copies it and both its moments into that order, and back.
    """
    outermost = next(i for i, name in enumerate(names) if name != STACKED)
    is_left = mesh.shape["tensor"] == 1 and PARAMETER_RULES.get(names[outermost] or "") == "tensor"
    return [outermost] if is_left and len(names) > 1 else []


def _is_small(leaf: nnx.Variable) -> bool:
    """Return whether a variable is small in each layer of a stack."""
    shape, names = leaf.get_value().shape, leaf.get_metadata().get("out_sharding") or ()
    return is_small([size for size, name in itertools.zip_longest(shape, names[: len(shape)]) if name != STACKED])


class WholeParameter(NamedTuple):
    """A large parameter that a mesh axis does not divide: `bytes` are those that each of `devices` along it holds."""

    path: str
    bytes: int
    axis: str
    devices: int


def whole_parameters(params: Any, mesh: Mesh) -> list[WholeParameter]:
    """Return what of a tree of nnx variables, all layers of a stack in one, is whole over axes that divide parameters.

    Those are of `PARAMETER_RULES`, with more than one device, and the parameters of 1 MiB and more in fp32.
    """
    found = []
    for keys, leaf in jax.tree_util.tree_leaves_with_path(params, is_leaf=lambda x: isinstance(x, nnx.Variable)):
        shape, placement = leaf.get_value().shape, placement_of(leaf, mesh)
        part = math.prod(placement.sharding(mesh).shard_shape(shape)) * leaf.get_value().dtype.itemsize
        for axis, devices in placement.whole.items() if is_large(shape) else ():
            if devices > 1:
                path = jax.tree_util.keystr(keys, simple=True, separator="/")
                found.append(WholeParameter(path, part, axis, devices))
    return found


def small_parameters(params: Any, mesh: Mesh) -> list[int]:
    """Return the bytes of each parameter that is too small to be divided over "fsdp", but those `whole_parameters`."""
    leaves = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, nnx.Variable))
    small = [leaf.get_value() for leaf in leaves if _is_small(leaf)] if mesh.shape["fsdp"] > 1 else []
    return [math.prod(x.shape) * x.dtype.itemsize for x in small if not is_large(x.shape)]


def placed(shapes: Any, mesh: Mesh) -> Any:
    """Return a tree of shapes, variables among them, with their `shardings`: the target of a restore, say."""
    return with_shardings(shapes, shardings(shapes, mesh))


def with_shardings(shapes: Any, where: Any) -> Any:
    """Return a tree of shapes with the shardings of another."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, where)


def free_axes(mesh: AbstractMesh) -> set[str]:
    """Return the axes over which XLA divides arrays."""
    return {name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Auto}


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Return an activation that lies on the mesh of `jax.set_mesh` by `ACTIVATION_RULES`; without a mesh, itself.

    Args:
      x: any array.
      names: of its first dimensions, a key of the rules or None; one that its mesh axes do not divide evenly, and one
        without a name, is whole on every device.
    """
    mesh = jax.sharding.get_abstract_mesh()
    free = free_axes(mesh)

    def axes(name: str | None, size: int) -> tuple[str, ...] | None:
        found = tuple(axis for axis in ACTIVATION_RULES.get(name or "", ()) if axis in free)
        return found if size % math.prod(mesh.shape[axis] for axis in found) == 0 else None

    return jax.lax.with_sharding_constraint(x, jax.P(*map(axes, names, x.shape))) if mesh.size > 1 and free else x


def constrain_tokens(x: jax.Array) -> jax.Array:
    """Return tokens (rows, T, D), or one of each row (rows, D), that lie on the mesh as `constrain` says."""
    return constrain(x, *("batch", "time")[: x.ndim - 1])


def constrain_rows(x: jax.Array) -> jax.Array:
    """Return an array whose rows, the first dimension, lie as those of a batch, and the others as XLA has them lie."""
    mesh = jax.sharding.get_abstract_mesh()
    axes = tuple(axis for axis in BATCH_AXES if axis in free_axes(mesh))
    if mesh.size == 1 or len(axes) < len(BATCH_AXES) or len(x) % math.prod(mesh.shape[axis] for axis in axes):
        return x
    return jax.lax.with_sharding_constraint(x, jax.P(axes, *[jax.P.UNCONSTRAINED] * (x.ndim - 1)))


def channel_pieces(*sizes: int) -> int:
    """Return over how many devices of `HEAD_AXES` XLA divides channels, 1 where not all of these sizes can be."""
    mesh = jax.sharding.get_abstract_mesh()
    pieces = math.prod(mesh.shape[axis] for axis in HEAD_AXES) if free_axes(mesh).issuperset(HEAD_AXES) else 1
    return pieces if all(size % pieces == 0 for size in sizes) else 1


def constrain_channels(kernel: jax.Array) -> jax.Array:
    """Return a kernel (D, channels) whose channels lie over `HEAD_AXES`, where these divide them, and D as it does."""
    if channel_pieces(kernel.shape[-1]) == 1:
        return kernel
    return jax.lax.with_sharding_constraint(kernel, jax.P(jax.P.UNCONSTRAINED, HEAD_AXES))


def batch_sharding(mesh: Mesh, shape: Sequence[int]) -> NamedSharding:
    """Return how an array (rows, tokens, ...) of a batch lies on the mesh: over `BATCH_AXES` and `TIME_AXES`.

    Tokens that the mesh does not divide evenly, as an evaluation may have, stay whole, and a warning says so.
    """
    if len(shape) < 2:
        return NamedSharding(mesh, jax.P(BATCH_AXES))
    if problem := _undivided(shape[1], mesh):
        _warn_once(f"{problem}; all hold them whole.")
        return NamedSharding(mesh, jax.P(BATCH_AXES))
    return NamedSharding(mesh, jax.P(BATCH_AXES, TIME_AXES))


def check_length(tokens: int, mesh: Mesh | AbstractMesh) -> None:
    """Check that sequences can be divided over the mesh.

    Raises:
      UserError: they cannot.
    """
    if problem := _undivided(tokens, mesh):
        raise UserError(f"{problem}.")


@functools.cache
def _warn_once(message: str) -> None:
    log.warning(message)


def _undivided(tokens: int, mesh: Mesh | AbstractMesh) -> str | None:
    """Return that sequences cannot be divided over the mesh, or None."""
    ways = math.prod(mesh.shape[axis] for axis in TIME_AXES)
    if tokens % ways == 0:
        return None
    return f"Sequences of {tokens} tokens cannot be divided over {ways} devices of the mesh axis 'sequence'"


def first_process_says(value: object) -> bool:
    """Return whether process 0 takes its value for true; all processes ask together."""
    return bool(value) if jax.process_count() == 1 else bool(multihost_utils.broadcast_one_to_all(bool(value)))


def row_devices(mesh: Mesh | AbstractMesh) -> int:
    """Return over how many devices the rows of a batch are divided; others hold the same rows as one of these."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def check_batch_size(batch_size: int, mesh: Mesh | AbstractMesh, microbatches: int = 1) -> None:
    """Check that the rows of a global batch, and of each of its microbatches, can be divided over the mesh.

    Raises:
      UserError: they cannot.
    """
    ways = row_devices(mesh)
    over = f"over {ways} devices of the mesh axes {' and '.join(BATCH_AXES)}"
    if batch_size % ways:
        raise UserError(f"batch_size {batch_size} cannot be divided {over}; it is a multiple of {ways}.")
    if batch_size // microbatches % ways:
        rows, most = batch_size // microbatches, math.gcd(batch_size // ways, microbatches)
        raise UserError(f"{rows} rows of a microbatch cannot be divided {over}: microbatches can be {most}.")


@dataclasses.dataclass(frozen=True)
class Feed:
    """What this process feeds of each global batch: the rows that its devices hold, and of them their tokens.

    Both follow from the mesh alone: where devices of several processes hold the same rows, as along "tensor" and
    "sequence", each of the processes reads them, and along "sequence" feeds the tokens of its own.

    Attributes:
      mesh: of all processes.
      batch_size: rows of a global batch.

    Raises:
      UserError: the rows cannot be divided over the mesh.
    """

    mesh: Mesh
    batch_size: int

    def __post_init__(self):
        check_batch_size(self.batch_size, self.mesh)

    @functools.cached_property
    def rows(self) -> np.ndarray:
        """The places of the rows in the global batch, ascending."""
        shape = (self.batch_size,)
        indices = batch_sharding(self.mesh, shape).addressable_devices_indices_map(shape).values()
        places = np.arange(self.batch_size)
        return np.unique(np.concatenate([places[index] for index in indices]))

    def arrays(self, batch: HostBatch) -> dict[str, jax.Array]:
        """Return the global arrays (batch_size, ...) of which `batch` holds these `rows`, whole."""

        def array(own: np.ndarray) -> jax.Array:
            shape = (self.batch_size, *own.shape[1:])

            def shard(index: Any) -> np.ndarray:
                first, last = np.searchsorted(self.rows, index[0].indices(self.batch_size)[:2])
                return own[first:last, *index[1:]]

            return jax.make_array_from_callback(shape, batch_sharding(self.mesh, shape), shard)

        return {name: array(own) for name, own in batch.items()}
