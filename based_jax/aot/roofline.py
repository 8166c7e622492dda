"""An estimate of a program's time: what the chip's peak, its memory and its links would take, each at its full rate.

    compute = FLOPs / peak      memory = bytes / rate of HBM      exchange = bytes / rate of the links between the chips

The longest of the three is a bound that no overlap goes below; their sum is the time where nothing overlaps. Neither
knows of latencies, of units but the matrix units, or of products that fill those in part.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from based_jax import devices
from based_jax.aot.collectives import Collective
from based_jax.aot.topology import Topology
from based_jax.devices import Interconnect
from based_jax.errors import UserError
from based_jax.placement import parts_along


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds of one run of a program on each device.

    Attributes:
      compute, memory: of the matrix units and of HBM.
      links, network: of the interconnect of a slice, and of the network over slices or hosts.
    """

    compute: float
    memory: float
    links: float
    network: float

    @property
    def parts(self) -> dict[str, float]:
        """The three times by name."""
        return {"compute": self.compute, "memory": self.memory, "exchange": self.links + self.network}

    @property
    def bound(self) -> tuple[str, float]:
        """The longest time and its name."""
        return max(self.parts.items(), key=lambda part: part[1])

    @property
    def total(self) -> float:
        """The sum of the times."""
        return sum(self.parts.values())


class Facts(NamedTuple):
    """What an estimate needs to know of a device; see `devices.Device`."""

    name: str
    peak_bf16_flops: float
    hbm_bytes: float
    hbm_bytes_per_second: float
    interconnect: Interconnect
    network_bytes_per_second: float | None


def known_device(topology: Topology) -> Facts:
    """Return the facts of a topology's devices.

    Raises:
      UserError: there is too little known of them.
    """
    facts: list[Any] = [getattr(devices.find(topology.device_kind), name, None) for name in Facts._fields]
    if None in facts[:-1]:
        raise UserError(f"Of '{topology.device_kind}' too little is known for an estimate (based_jax/devices.py).")
    return Facts(*facts)


def roofline(
    flops: float, memory_bytes: float, exchanged: Sequence[Collective], mesh: Mesh, topology: Topology
) -> Roofline:
    """Return the times of a program whose devices compute, move and exchange that much.

    Raises:
      UserError: slices exchange something, and how fast is not known.
    """
    device = known_device(topology)
    links = network = 0.0
    for x in exchanged:
        near, far = link_seconds(x, mesh, topology, device), network_seconds(x, mesh, device)
        links, network = links + x.times * near, network + x.times * far
    return Roofline(flops / device.peak_bf16_flops, memory_bytes / device.hbm_bytes_per_second, links, network)


def link_seconds(x: Collective, mesh: Mesh, topology: Topology, device: Facts) -> float:
    """Return the time of one run of a collective on the links of a slice, or of a host."""
    group = _widest_group(x, mesh)
    near = [other for other in group if slice_of(other) == slice_of(group[0])]
    if len(near) == 1:
        return 0.0
    # Of what all slices are to have, each device brings in an equal part.
    given = x.given_bytes * len(group) / len(near) if x.kind == "all-gather" else x.given_bytes
    return x.sent_bytes(len(near), given) / _link_rate(x.kind, near, topology, device.interconnect)


def network_seconds(x: Collective, mesh: Mesh, device: Facts) -> float:
    """Return the time of one run of a collective on the network: each device has the share of its own slice's."""
    group = _widest_group(x, mesh)
    slices = len({slice_of(other) for other in group})
    if slices == 1:
        return 0.0
    if device.network_bytes_per_second is None:
        raise UserError(f"How fast slices of '{device.name}' exchange is not known (based_jax/devices.py).")
    share = x.given_bytes if x.kind == "all-gather" else x.given_bytes * slices / len(group)
    return x.sent_bytes(slices, share) / device.network_bytes_per_second


def slice_of(device: jax.Device) -> int:
    """Return the slice of a TPU, or the host of a GPU."""
    return (getattr(device, "slice_index", None) or 0) if device.platform == "tpu" else device.process_index


def _widest_group(x: Collective, mesh: Mesh) -> list[jax.Device]:
    """Return the devices of a group that is over the most slices; of a permutation all that lie along its axes."""
    groups = mesh.devices.reshape(-1)[x.groups]
    if x.kind == "collective-permute":
        axes = x.axes(mesh.devices.shape)
        sizes = [mesh.devices.shape[i] for i in axes]
        groups = np.moveaxis(mesh.devices, axes, range(-len(axes), 0)).reshape(-1, math.prod(sizes))
    return list(max(groups, key=lambda group: len({slice_of(device) for device in group})))


def _link_rate(kind: str, group: Sequence[jax.Device], topology: Topology, interconnect: Interconnect) -> float:
    """Return the bytes per second that a device sends the others: over a torus by the dimensions that they lie along.

    A dimension that is joined at its ends carries both ways at once, permutations too, which XLA makes in pairs of
    both; what all send to all passes by others on its way.
    """
    if interconnect.wraps_at is None:
        return interconnect.links * interconnect.link_bytes_per_second
    places = np.array([device.coords for device in group])
    along = [size for size, place in zip(topology.sizes, places.T, strict=False) if np.ptp(place)]
    ways = [2 if size % interconnect.wraps_at == 0 else 1 for size in along]
    hops = sum(size / (4 if way == 2 else 3) for size, way in zip(along, ways, strict=True))
    return interconnect.link_bytes_per_second * max(sum(ways), 1) / (max(hops, 1) if kind == "all-to-all" else 1)


def fsdp_bytes(params, mesh: Mesh, element_bytes: int, microbatches: int = 1) -> float:
    """Return the bytes that a device must send in a step where weights lie over "fsdp" and rows over "data" and "fsdp".

    For each microbatch weights are gathered for the forward and for the backward pass and gradients are scattered, and
    gradients are summed over "data" and "sequence": each in the dtype of the products.

    Args:
      params: a tree of `jax.ShapeDtypeStruct` with their shardings.
      element_bytes: of the dtype of the products.
    """
    shards = mesh.shape["fsdp"]
    copies = mesh.size // shards // mesh.shape["tensor"]
    total = 0.0
    for leaf in jax.tree.leaves(params):
        shard = math.prod(leaf.sharding.shard_shape(leaf.shape)) * element_bytes
        cut = parts_along(leaf.sharding, "fsdp")
        total += 3 * microbatches * shard * (cut - 1)
        reduced = copies * shards // cut
        total += 2 * shard * (reduced - 1) / reduced
    return total
