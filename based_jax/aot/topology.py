"""Devices that are not here: a TPU slice or hosts of GPUs by name, for a compiler that runs on this host's CPU."""

import dataclasses
import importlib.resources
import importlib.util
import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.experimental import topologies

from based_jax.errors import UserError, installs, unknown

TPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_LOG_DIR": "disabled",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
"""Without it libtpu asks the network which TPU this host has, and lets one process load it."""
TPU_WARNINGS = {"TPU_STDERR_LOG_LEVEL": "1"}
"""With it libtpu warns, as XLA itself does, of arrays that it copies whole."""
GPU_ENVIRONMENT = {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}

GPU_TARGET = "h100_target_config.txtpb"
"""What XLA has to know of an H100, an SXM with 80 GB."""
H200_TARGET = {
    "memory_bandwidth": 4_800_000_000_000,
    "l2_cache_size": 62_914_560,
    "device_memory_size": 150_754_820_096,
}
"""What an H200 has in place of it, beside the same multiprocessors: with less memory XLA makes arrays again."""


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a topology is made of.

    Attributes:
      platform: "tpu" or "cuda".
      dimensions: of a topology of a slice.
      example: a topology.
      name: the compiler's for it.
      options: that its compiler needs.
      kind: what JAX calls its devices, where the compiler calls them otherwise.
      devices: of JAX in each.
      target: numbers of `GPU_TARGET` that it has otherwise.
    """

    platform: str
    dimensions: int
    example: str
    name: str = ""
    options: dict[str, str] = dataclasses.field(default_factory=dict)
    kind: str | None = None
    devices: int = 1
    target: Mapping[str, int] = dataclasses.field(default_factory=dict)


CHIPS = {
    "v4": Chip("tpu", 3, "v4:4x4x8", "v4", {"chip_config_name": "megacore"}),
    "v5e": Chip("tpu", 2, "v5e:16x16", "v5e"),
    "v5p": Chip("tpu", 3, "v5p:8x8x8", "v5p"),
    "v6e": Chip("tpu", 2, "v6e:16x16", "v6e"),
    "v7x": Chip("tpu", 3, "v7x:4x4x8", "tpu7x", devices=2),
    "h100": Chip("cuda", 2, "h100:4x8"),
    "h200": Chip("cuda", 2, "h200:4x8", kind="NVIDIA H200", target=H200_TARGET),
}
"""By the name in a topology: a TPU's is its slice, a GPU's is hosts x GPUs of each."""


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices that can be compiled for.

    Attributes:
      name, slices: what was asked for.
      devices: all of them.
      device_kind: of each, a name for `devices.find`.
      sizes: of a slice's torus, by dimension; of GPUs hosts and GPUs of each.
    """

    name: str
    slices: int
    devices: Sequence[jax.Device]
    device_kind: str
    sizes: tuple[int, ...]

    @property
    def on_tpu(self) -> bool:
        """Whether they are TPUs."""
        return self.devices[0].platform == "tpu"


def find(name: str, slices: int = 1) -> Topology:
    """Return the devices of a topology; JAX's own are those of the CPU from here on.

    Args:
      name: a chip of `CHIPS` and its slice, such as "v5p:8x8x8"; "h100:4x8" is four hosts of eight GPUs.
      slices: such slices, of TPUs.

    Raises:
      UserError: there is no such chip or slice, or its compiler is not installed.
    """
    chip, sizes = _parsed(name, slices)
    _check_compiler(chip.platform)
    found = _tpus(chip, "x".join(map(str, sizes)), slices) if chip.platform == "tpu" else _gpus(chip, *sizes)
    return Topology(name, slices, found, chip.kind or found[0].device_kind, sizes)


def device_count(name: str, slices: int = 1) -> int:
    """Return how many devices a topology has, by its name alone; UserError where there is no such chip or slice."""
    chip, sizes = _parsed(name, slices)
    return math.prod(sizes) * chip.devices * slices


def _parsed(name: str, slices: int) -> tuple[Chip, tuple[int, ...]]:
    """Return the chip that a topology names, and its sizes."""
    word, _, shape = name.partition(":")
    if word not in CHIPS:
        raise unknown("chip of a topology", word, CHIPS)
    chip = CHIPS[word]
    if not re.fullmatch(r"[1-9]\d{0,3}(x[1-9]\d{0,3})*", shape) or shape.count("x") + 1 != chip.dimensions:
        raise UserError(f"Topology '{name}' is none of {word}: it is like '{chip.example}'.")
    if slices < 1 or (slices > 1 and chip.platform != "tpu"):
        raise UserError(f"slices is {slices}; it is at least 1, and of GPUs 1: their hosts are in the topology.")
    return chip, tuple(map(int, shape.split("x")))


def _check_compiler(platform: str) -> None:
    """Set the environment of a platform's compiler, or raise UserError where it is not installed."""
    jax.config.update("jax_platforms", "cpu")
    for key, value in (TPU_ENVIRONMENT if platform == "tpu" else GPU_ENVIRONMENT).items():
        os.environ.setdefault(key, value)
    os.environ.update(TPU_WARNINGS)
    if platform == "tpu" and importlib.util.find_spec("libtpu") is None:
        raise UserError(f"The compiler for TPUs is not installed; {installs('tpu')} brings it.")
    if platform == "cuda" and importlib.util.find_spec("jax_plugins") is None:
        raise UserError(f"The compiler for GPUs is not installed; {installs('gpu')} brings it, to any host.")


def _tpus(chip: Chip, shape: str, slices: int) -> Sequence[jax.Device]:
    options: dict[str, Any] = chip.options | ({"num_slices": slices} if slices > 1 else {})
    try:
        return topologies.get_topology_desc(f"{chip.name}:{shape}", "tpu", **options).devices
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"Topology '{shape}' is no slice of {chip.name}: {_first_line(error)}.") from None


def gpu_target(chip: Chip) -> str:
    """Return what XLA has to know of a GPU to compile for it."""
    text = importlib.resources.files("based_jax.aot").joinpath(GPU_TARGET).read_text()
    for name, number in chip.target.items():
        text, count = re.subn(rf"\b{name}: \d+", f"{name}: {number}", text)
        assert count == 1, f"{name} stands {count} times in {GPU_TARGET}"
    return text


def _gpus(chip: Chip, hosts: int, gpus: int) -> Sequence[jax.Device]:
    target = gpu_target(chip)
    try:
        return topologies.get_topology_desc(platform="cuda", topology=f"{hosts}x1x{gpus}", target_config=target).devices
    except (NotImplementedError, jax.errors.JaxRuntimeError) as error:
        raise UserError(f"The compiler for GPUs does not start: {_first_line(error)}.") from None


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0].rstrip(".")
