import pytest

from based_jax import devices
from pallas_kernels import gpus

H100 = "NVIDIA H100 80GB HBM3"


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (H100, H100),
        ("NVIDIA H100 NVL", "NVIDIA H100"),
        ("NVIDIA H100 PCIe", "NVIDIA H100 PCIe"),
        ("NVIDIA H200", "NVIDIA H200"),
        ("NVIDIA A100-SXM4-80GB", "NVIDIA A100"),
        ("TPU v5 lite", "TPU v5 lite"),
        ("TPU v5p", "TPU v5"),
    ],
)
def test_a_kind_has_the_numbers_of_the_longest_name_it_starts_with(kind, name):
    assert devices.find(kind).name == name


@pytest.mark.parametrize("kind", ["cpu", "NVIDIA H10", "NVIDIA H20", "NVIDIA B200", "an NVIDIA H200"])
def test_of_other_kinds_no_numbers_are_known(kind):
    assert devices.find(kind) is None


@pytest.mark.parametrize(
    "kind",
    [
        H100,
        "NVIDIA H100 NVL",
        "NVIDIA DGX H100",
        "NVIDIA H200 141GB HBM3e",
        "NVIDIA H800",
        "NVIDIA H20-3e",
        "NVIDIA GH200 480GB",
        "an NVIDIA H200",
        "H100",
    ],
)
def test_a_hopper_gpu_is_known_by_its_model_anywhere_in_its_name(kind):
    assert devices.is_hopper(kind)


@pytest.mark.parametrize(
    "kind", ["cpu", "NVIDIA A100-SXM4-80GB", "NVIDIA H10", "NVIDIA H2000", "NVIDIA GB200", "TPU v4"]
)
def test_other_kinds_are_no_hopper_gpus(kind):
    assert not devices.is_hopper(kind)


@pytest.mark.parametrize(
    ("kind", "architecture"),
    [
        ("NVIDIA A100-SXM4-80GB", "Ampere"),
        ("NVIDIA A10G", "Ampere"),
        ("NVIDIA RTX A6000", "Ampere"),
        ("NVIDIA GeForce RTX 3080 Ti", "Ampere"),
        ("NVIDIA GeForce RTX 4090", "Ada"),
        ("NVIDIA L40S", "Ada"),
        ("NVIDIA RTX 6000 Ada Generation", "Ada"),
        (H100, "Hopper"),
        ("Tesla V100-SXM2-16GB", None),
        ("Quadro RTX 4000", None),
        ("NVIDIA GeForce RTX 2080 Ti", None),
        ("NVIDIA GB200", None),
        ("gfx942", None),
        ("TPU v4", None),
    ],
)
def test_an_architecture_is_known_by_the_model(kind, architecture):
    assert devices.architecture(kind) == architecture


@pytest.mark.parametrize(
    ("capability", "names"),
    [
        (80, ["NVIDIA A100-SXM4-80GB", "NVIDIA A800-SXM4-80GB", "NVIDIA A30"]),
        (86, ["NVIDIA A2", "NVIDIA A10G", "NVIDIA A16", "NVIDIA A40", "NVIDIA RTX A6000", "NVIDIA GeForce RTX 3090"]),
        (89, ["NVIDIA L4", "NVIDIA L20", "NVIDIA L40S", "NVIDIA RTX 6000 Ada Generation", "NVIDIA GeForce RTX 4090"]),
        (90, ["NVIDIA H20", "NVIDIA H800 PCIe", "NVIDIA H200", "NVIDIA GH200 480GB", H100]),
    ],
)
def test_models_have_their_compute_capability(capability, names):
    assert {gpus.models_of(name).capability for name in names} == {capability}


def test_what_was_measured_on_the_h100_stands_for_devices_that_it_was_not_measured_on():
    for kind in (H100, "NVIDIA A100-SXM4-80GB", "cpu"):
        assert devices.crossovers(kind) is devices.H100_CROSSOVERS
        assert (devices.cores(kind), devices.l2_bytes(kind)) == (132, 52_428_800)


def test_the_h200_has_its_own_cache():
    assert (devices.cores("NVIDIA H200"), devices.l2_bytes("NVIDIA H200")) == (132, 62_914_560)


def test_no_two_devices_have_the_same_name():
    names = [device.name for device in devices.DEVICES]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("kind", "devices_of_a_chip", "links_gigabytes", "network_gigabits"),
    [
        ("TPU v4", 1, 1.1e6 / 4096 * 2, 50),
        ("TPU v5 lite", 1, 400, 6.4e3 / 256),
        ("TPU v5p", 1, 1200, 50),
        ("TPU v6 lite", 1, 800, 25.6e3 / 256),
        ("TPU7x", 2, 1200, 100),
        (H100, 1, 900, 400),
        ("NVIDIA H200", 1, 900, 400),
    ],
)
def test_rates_between_chips_are_the_vendor_s(kind, devices_of_a_chip, links_gigabytes, network_gigabits):
    found = devices.find(kind)
    both_ways = 2 * found.interconnect.link_bytes_per_second * found.interconnect.links * devices_of_a_chip
    assert both_ways / 1e9 == pytest.approx(links_gigabytes, rel=0.01)
    assert 8 * found.network_bytes_per_second * devices_of_a_chip / 1e9 == pytest.approx(network_gigabits)
