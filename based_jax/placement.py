"""Where the axes of a mesh go among the dimensions of an array: arithmetic alone, no device is asked."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

LARGE_BYTES = 2**20
"""An array of fewer bytes in fp32 stays whole where the dimension that its names choose cannot be divided."""
SMALL_BYTES = 2**16
"""A parameter of fewer bytes in fp32, of one layer, stays whole over "fsdp": a link of 50 GB/s sends them in about the
microsecond that a hop takes, so what it takes to gather and to scatter a norm's scale is latency alone."""
PART = "_"
"""Between the name of an axis and the number of a part of it."""


@dataclasses.dataclass(frozen=True)
class Wish:
    """A mesh axis that is to divide an array.

    Attributes:
      axis: its name.
      first: the dimensions that it divides if it can.
      others: those that it divides where it cannot, in this order, or that share it, each with a part of it.
    """

    axis: str
    first: Sequence[int]
    others: Sequence[int] = ()


@dataclasses.dataclass(frozen=True)
class Placement:
    """How an array is divided over the devices of a mesh.

    Attributes:
      parts: for each dimension the mesh axes that divide it, each with the number of parts that it makes there.
      whole: for each axis that was wished for, the devices along it that hold the same.
    """

    parts: tuple[tuple[tuple[str, int], ...], ...]
    whole: Mapping[str, int]

    def sharding(self, mesh: Mesh) -> NamedSharding:
        """Return it on a mesh: on one with finer axes where an axis divides several dimensions."""
        cuts = dict(self._cuts(mesh))
        names = {axis: iter(_part_names(axis, sizes)) for axis, sizes in cuts.items()}

        def entry(parts: Sequence[tuple[str, int]]) -> str | tuple[str, ...] | None:
            found = tuple(next(names[axis]) if axis in names else axis for axis, _ in parts)
            return found if len(found) > 1 else found[0] if found else None

        spec = PartitionSpec(*map(entry, self.parts))
        return NamedSharding(_cut(mesh, tuple(cuts.items())) if cuts else mesh, spec)

    def _cuts(self, mesh: Mesh) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield each axis that does not divide one dimension as a whole, with its parts and what is left of it."""
        for axis in mesh.axis_names:
            sizes = [size for parts in self.parts for name, size in parts if name == axis]
            if sizes and sizes != [mesh.shape[axis]]:
                yield axis, (*sizes, mesh.shape[axis] // math.prod(sizes))


def place(shape: Sequence[int], sizes: Mapping[str, int], wishes: Sequence[Wish]) -> Placement:
    """Return how mesh axes of these sizes divide an array, each as its wish says.

    An axis divides one dimension if one of its wish's takes all of it. Else the `others` share it, each taking the
    largest part that it can be divided by; devices along what is left over hold the same.
    """
    parts: list[list[tuple[str, int]]] = [[] for _ in shape]
    left, whole = list(shape), {}

    def take(dimension: int, axis: str, size: int) -> None:
        parts[dimension].append((axis, size))
        left[dimension] //= size

    for wish in wishes:
        rest, dimensions = sizes[wish.axis], [*wish.first, *(wish.others if sizes[wish.axis] > 1 else ())]
        divided = next((dimension for dimension in dimensions if left[dimension] % rest == 0), None)
        for dimension in wish.others if divided is None else [divided]:
            size = math.gcd(left[dimension], rest)
            if size > 1 or dimension == divided:
                take(dimension, wish.axis, size)
                rest //= size
        whole[wish.axis] = rest
    return Placement(tuple(map(tuple, parts)), whole)


def is_large(shape: Sequence[int]) -> bool:
    """Return whether an array has `LARGE_BYTES` or more, as a parameter in fp32."""
    return 4 * math.prod(shape) >= LARGE_BYTES


def is_small(shape: Sequence[int]) -> bool:
    """Return whether an array, a layer's part of it, has fewer than `SMALL_BYTES`, as a parameter in fp32."""
    return 4 * math.prod(shape) < SMALL_BYTES


def _part_names(axis: str, sizes: Sequence[int]) -> list[str]:
    return [f"{axis}{PART}{i}" for i in range(len(sizes))]


@functools.cache
def _cut(mesh: Mesh, cuts: tuple[tuple[str, tuple[int, ...]], ...]) -> Mesh:
    """Return a mesh of the same devices in the same order with some axes cut into several."""
    by_axis = dict(cuts)
    sizes = {axis: by_axis.get(axis, (size,)) for axis, size in mesh.shape.items()}
    names = [name for axis, cut in sizes.items() for name in (_part_names(axis, cut) if axis in by_axis else [axis])]
    devices = np.asarray(mesh.devices).reshape([size for cut in sizes.values() for size in cut])
    return Mesh(devices, names, axis_types=(AxisType.Auto,) * len(names))


def parts_along(sharding: NamedSharding, axis: str) -> int:
    """Return into how many parts a mesh axis divides an array that lies as a `Placement` says."""
    names = [name for entry in sharding.spec if entry for name in (entry if isinstance(entry, tuple) else (entry,))]
    own = [name for name in names if name == axis or name.rpartition(PART)[0] == axis]
    return math.prod(sharding.mesh.shape[name] for name in own)


def by_rows(call: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """Return `call(x)`, which treats each row alone, computed with the rows over all devices of the mesh.

    The mesh is that of `jax.set_mesh`. Its axes move to the rows one by one, and back, which are exchanges that XLA
    has; all at once it would make the array whole on each device. Rows of zeros are added up to a multiple.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = tuple(name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Auto)
    if mesh.size == 1 or not axes:
        return call(x)
    free = [PartitionSpec.UNCONSTRAINED] * (x.ndim - 1)
    specs = [PartitionSpec(axes[:count] or None, *free) for count in range(len(axes))]
    count, missing = len(x), -len(x) % math.prod(mesh.shape[axis] for axis in axes)
    x = jnp.pad(x, [(0, missing), *[(0, 0)] * (x.ndim - 1)])
    for spec in [*specs[1:], PartitionSpec(axes)]:
        x = jax.lax.with_sharding_constraint(x, spec)
    x = call(x)
    for spec in [PartitionSpec(axes), *reversed(specs)]:
        x = jax.lax.with_sharding_constraint(x, spec)
    return x[:count]
