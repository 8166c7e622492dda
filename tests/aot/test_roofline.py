"""Times by hand: bytes of a collective over the links that its devices have between them, and a device's peaks."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from based_jax import devices, parallel
from based_jax.aot import roofline
from based_jax.aot.collectives import Collective
from based_jax.aot.hlo import ArrayType
from based_jax.aot.topology import Topology
from based_jax.errors import UserError

GIVEN = 1 << 20
V5E, V5P = devices.find("TPU v5 lite"), devices.find("TPU v5")


def tpus(sizes, slices=1):
    places = [np.unravel_index(i, sizes) for i in range(int(np.prod(sizes)))]
    return [
        SimpleNamespace(platform="tpu", slice_index=s, coords=(*map(int, place), 0))
        for s in range(slices)
        for place in places
    ]


def cut(sizes, mesh_sizes, kind="TPU v5 lite", slices=1):
    """Return (mesh, topology) of a torus whose devices lie on a mesh in their order."""
    found = tpus(sizes, slices)
    mesh = SimpleNamespace(devices=np.array(found, dtype=object).reshape(mesh_sizes), axis_names=("data", "fsdp"))
    return mesh, Topology("test", slices, found, kind, sizes)


def collective(kind, groups, given=GIVEN):
    array = ArrayType("s8", (given,))
    return Collective(kind, (array,), (array,), 1, np.asarray(groups))


def over(mesh, axis):
    """Return the groups of a mesh's axis."""
    places = np.arange(mesh.devices.size).reshape(mesh.devices.shape)
    return np.moveaxis(places, axis, -1).reshape(-1, mesh.devices.shape[axis])


@pytest.mark.parametrize(
    ("kind", "sent"),
    [
        ("all-gather", GIVEN * 15),
        ("reduce-scatter", GIVEN * 15 / 16),
        ("all-reduce", 2 * GIVEN * 15 / 16),
        ("all-to-all", GIVEN * 15 / 16 * 16 / 4),
    ],
)
def test_a_joined_dimension_carries_both_ways(kind, sent):
    """16 devices of a v5e's dimension of 16; what all send to all passes by a quarter of them."""
    mesh, topology = cut((16, 16), (16, 16))
    seconds = roofline.link_seconds(collective(kind, over(mesh, 1)), mesh, topology, V5E)
    assert seconds == pytest.approx(sent / (2 * 50e9))


def test_an_axis_over_two_dimensions_has_the_links_of_both():
    mesh, topology = cut((16, 16), (1, 256))
    seconds = roofline.link_seconds(collective("all-gather", over(mesh, 1)), mesh, topology, V5E)
    assert seconds == pytest.approx(GIVEN * 255 / (4 * 50e9))


def test_a_dimension_that_is_not_joined_carries_one_way():
    mesh, topology = cut((4, 4), (4, 4))
    seconds = roofline.link_seconds(collective("all-gather", over(mesh, 1)), mesh, topology, V5E)
    assert seconds == pytest.approx(GIVEN * 3 / 50e9)


def test_a_permutation_sends_once_over_the_links_of_its_axis():
    mesh, topology = cut((8, 8, 8), (8, 64), "TPU v5")
    ring = [(i, (i + 1) % 64) for i in range(64)]
    seconds = roofline.link_seconds(collective("collective-permute", ring), mesh, topology, V5P)
    assert seconds == pytest.approx(GIVEN / (4 * 100e9))


def test_slices_exchange_the_share_of_each_device():
    """A sum over two slices of four: within a slice as if it were alone, and a quarter of it between them."""
    mesh, topology = cut((2, 2), (2, 4), "TPU v5", slices=2)
    everything = np.arange(8)[None]
    found = collective("all-reduce", everything)
    assert roofline.link_seconds(found, mesh, topology, V5P) == pytest.approx(2 * GIVEN * 3 / 4 / (2 * 100e9))
    assert roofline.network_seconds(found, mesh, V5P) == pytest.approx(2 * GIVEN / 4 / 2 / 6.25e9)
    gathered = collective("all-gather", everything)
    assert roofline.link_seconds(gathered, mesh, topology, V5P) == pytest.approx(2 * GIVEN * 3 / (2 * 100e9))
    assert roofline.network_seconds(gathered, mesh, V5P) == pytest.approx(GIVEN / 6.25e9)


def test_slices_alone_exchange_all_on_the_network():
    mesh, topology = cut((2, 2), (2, 4), "TPU v5", slices=2)
    found = collective("all-reduce", over(mesh, 0))
    assert roofline.link_seconds(found, mesh, topology, V5P) == 0
    assert roofline.network_seconds(found, mesh, V5P) == pytest.approx(GIVEN / 6.25e9)


def test_a_network_of_unknown_speed_is_refused(monkeypatch):
    v4 = dataclasses.replace(devices.find("TPU v4"), network_bytes_per_second=None)
    monkeypatch.setattr(devices, "find", lambda kind: v4)
    mesh, topology = cut((2, 2), (2, 4), "TPU v4", slices=2)
    with pytest.raises(UserError, match=r"^How fast slices of 'TPU v4' exchange is not known"):
        roofline.roofline(1, 1, [collective("all-reduce", over(mesh, 0))], mesh, topology)


def test_gpus_of_a_host_have_a_switch_and_hosts_a_network():
    gpus = [SimpleNamespace(platform="gpu", process_index=i // 8, slice_index=0, coords=None) for i in range(16)]
    mesh = SimpleNamespace(devices=np.array(gpus, dtype=object).reshape(2, 8), axis_names=("data", "fsdp"))
    topology, h100 = Topology("h100:2x8", 1, gpus, "NVIDIA H100 80GB HBM3", (2, 8)), devices.DEVICES[0]
    gathered = collective("all-gather", over(mesh, 1))
    assert roofline.link_seconds(gathered, mesh, topology, h100) == pytest.approx(GIVEN * 7 / 450e9)
    assert roofline.network_seconds(gathered, mesh, h100) == 0
    assert roofline.network_seconds(collective("all-reduce", over(mesh, 0)), mesh, h100) == pytest.approx(GIVEN / 50e9)


def test_the_bound_is_the_longest_time_and_the_sum_all_of_them():
    mesh, topology = cut((16, 16), (16, 16))
    found = roofline.roofline(
        197e12, 2 * 819e9, [collective("all-gather", over(mesh, 1), int(1e9))] * 2, mesh, topology
    )
    assert found.parts == pytest.approx({"compute": 1, "memory": 2, "exchange": 2 * 15e9 / 100e9})
    assert found.bound == ("memory", 2) and found.total == pytest.approx(3.3)


def test_of_a_device_without_numbers_there_is_no_estimate():
    with pytest.raises(UserError, match=r"^Of 'NVIDIA A100' too little is known"):
        roofline.known_device(Topology("test", 1, [], "NVIDIA A100", (1, 1)))


@pytest.mark.parametrize("microbatches", [1, 3])
def test_weights_are_gathered_twice_and_gradients_scattered_and_summed(microbatches):
    """Of 64 x 32 weights over fsdp:4 and of 32 that are whole, in bf16; gradients over data:2 and over all."""
    mesh = parallel.make_mesh({"data": 2, "fsdp": 4})
    shape = lambda *sizes, spec: jax.ShapeDtypeStruct(sizes, jnp.float32, sharding=NamedSharding(mesh, spec))  # noqa: E731
    params = {"cut": shape(64, 32, spec=jax.P(None, "fsdp")), "whole": shape(32, spec=jax.P())}
    shard, whole = 2 * 64 * 8, 2 * 32
    expected = 3 * microbatches * shard * 3 + 2 * shard / 2 + 2 * whole * 7 / 8
    assert roofline.fsdp_bytes(params, mesh, 2, microbatches) == expected


@pytest.mark.parametrize("device", [d for d in devices.DEVICES if d.interconnect], ids=lambda d: d.name)
def test_a_device_with_links_has_all_that_an_estimate_needs(device):
    assert device.source.startswith("https://") and device.hbm_bytes > 1e10
    assert 100 < device.peak_bf16_flops / device.hbm_bytes_per_second < 700
    assert roofline.known_device(Topology("test", 1, [], device.name, (1, 1))).name == device.name
