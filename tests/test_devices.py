import pytest

from based_jax import devices


@pytest.mark.parametrize(
    ("kind", "name", "architecture"),
    [
        ("NVIDIA H100 80GB HBM3", "NVIDIA H100 80GB HBM3", "hopper"),
        ("NVIDIA H100 NVL", "NVIDIA H100", "hopper"),
        ("NVIDIA H200", "NVIDIA H200", "hopper"),
        ("NVIDIA H20", "NVIDIA H20", "hopper"),
        ("NVIDIA GH200 480GB", "NVIDIA GH200", "hopper"),
        ("NVIDIA H800", "NVIDIA H800", "hopper"),
        ("NVIDIA A100-SXM4-80GB", "NVIDIA A100", "ampere"),
        ("TPU v5 lite", "TPU v5 lite", "tpu"),
    ],
)
def test_a_kind_belongs_to_the_longest_name_it_starts_with(kind, name, architecture):
    found = devices.find(kind)
    assert (found.name, found.architecture) == (name, architecture)


@pytest.mark.parametrize("kind", ["cpu", "NVIDIA H10", "NVIDIA B200", "an NVIDIA H200"])
def test_of_other_kinds_nothing_is_known(kind):
    assert devices.find(kind) is None


def test_what_was_measured_on_the_h100_stands_for_devices_that_it_was_not_measured_on():
    for kind in ("NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB", "cpu"):
        assert devices.crossovers(kind) is devices.H100_CROSSOVERS
    counts = {kind: devices.cores(kind) for kind in ("NVIDIA H100 80GB HBM3", "NVIDIA H20", "NVIDIA H100 NVL", "cpu")}
    assert list(counts.values()) == [132, 78, 132, 132]


def test_no_two_devices_have_the_same_name():
    names = [device.name for device in devices.DEVICES]
    assert len(set(names)) == len(names)
