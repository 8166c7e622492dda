"""What is known of each kind of device: the vendor's numbers, and what was measured on it.

A kind is what JAX calls `device_kind`. Its numbers are those of the entry of `DEVICES` with the longest name that it
starts with; a GPU's architecture is told by the model among its words ("NVIDIA DGX H100").
"""

import dataclasses

from pallas_kernels import gpus


@dataclasses.dataclass(frozen=True)
class Crossovers:
    """Where one form of an operation overtakes another, as `slower` asks in the tables of `based_jax.ops`.

    Attributes:
      linear_attention_one_chunk_tokens: up to so many, one chunk of linear attention is faster in XLA than several;
        with Taylor's map.
      toeplitz_tokens: up to so many, a long convolution is faster as a Toeplitz product than by FFT or by chunks; its
        matrices take D T^2 elements.
      toeplitz_tiles_taps: up to so many, kernels that multiply with tiles of a Toeplitz matrix are faster than FFT.
      quadratic_attention_tokens: up to so many, XLA makes every score of softmax attention at once, T^2 a head; with
        more it goes by chunks, whose memory is linear.
      chunk_tokens: with fewer, chunks in kernels take as long as with so many, and other forms are faster.
      one_decay_one_chunk_tokens: up to so many, one chunk is faster in XLA than several, and for large states faster
        than kernels token by token, where heads have one decay.
      one_decay_one_chunk_tokens_beside_chunks: the same beside kernels by chunks.
      one_decay_steps_tokens: up to so many, kernels token by token are faster than XLA's chunks where heads have one
        decay: they are at 256 tokens, and slower at 2,048.
      large_state_elements: K V of states that count as large above. Those of a quarter do not.
      dplr_steps_heads: from so many heads of all a device's sequences (lanes of `jax.vmap` not counted) on, kernels
        token by token are faster than by chunks where the state is corrected, channels decay each by itself, and
        states are not large: they take as long for 128 heads, where chunks are three times as fast, as for 512, where
        chunks are slower; between was not timed.
    """

    linear_attention_one_chunk_tokens: int
    toeplitz_tokens: int
    toeplitz_tiles_taps: int
    quadratic_attention_tokens: int
    chunk_tokens: int
    one_decay_one_chunk_tokens: int
    one_decay_one_chunk_tokens_beside_chunks: int
    one_decay_steps_tokens: int
    large_state_elements: int
    dplr_steps_heads: int
    one_decay_one_chunk_state_elements_per_token: int
    norm_tokens: int


@dataclasses.dataclass(frozen=True)
class Interconnect:
    """The links between devices of one slice, or of one host of GPUs.

    Attributes:
      link_bytes_per_second: of a link in one direction: a TPU's by its vendor are its rate in both directions together
        over twice its links. A later edition of `SCALING_BOOK` counts on nine tenths of that.
      links: of a device.
      wraps_at: devices of which a torus' dimension has a multiple where its ends are joined; None for a switch, over
        which every device reaches every other one by all of its links.
    """

    link_bytes_per_second: float
    links: int
    wraps_at: int | None = None


@dataclasses.dataclass(frozen=True)
class Device:
    """One kind of device; None is what is not known of it.

    Attributes:
      name: what its kind starts with.
      peak_bf16_flops: the vendor's dense FLOP/s.
      hbm_bytes: of its memory that a program can have: of a TPU what its compiler says, of a GPU the vendor's number.
      hbm_bytes_per_second: the vendor's rate of its memory.
      interconnect: of a slice.
      network_bytes_per_second: of a device to other slices or hosts, in one direction.
      source: where the vendor says so, and where else a number is from.
      copy_bytes_per_second: measured rate of a large copy, read and written bytes together; of all H100s that of the
        80GB HBM3.
      cores: its streaming multiprocessors, as its driver says.
      l2_bytes: of its L2 cache, as its driver says.
      crossovers: those measured on it.
    """

    name: str
    peak_bf16_flops: float | None = None
    hbm_bytes: float | None = None
    hbm_bytes_per_second: float | None = None
    interconnect: Interconnect | None = None
    network_bytes_per_second: float | None = None
    source: str | None = None
    copy_bytes_per_second: float | None = None
    cores: int | None = None
    l2_bytes: int | None = None
    crossovers: Crossovers | None = None


GIB = 1 << 30

ARCHITECTURES = tuple(dict.fromkeys(models.architecture for models in gpus.GPU_MODELS))
"""Of GPUs, in order of their age."""

H100_CROSSOVERS = Crossovers(
    linear_attention_one_chunk_tokens=512,
    toeplitz_tokens=1024,
    toeplitz_tiles_taps=3072,
    quadratic_attention_tokens=512,
    chunk_tokens=64,
    one_decay_one_chunk_tokens=256,
    one_decay_one_chunk_tokens_beside_chunks=128,
    one_decay_steps_tokens=1024,
    large_state_elements=128 * 256,
    dplr_steps_heads=256,
    one_decay_one_chunk_state_elements_per_token=16,
    norm_tokens=1024,
)
"""Measured on one H100 80GB HBM3 in experiments/kernels; the Toeplitz product in experiments/mqar_pareto, at 256 tokens
(longer ones are not measured). `toeplitz_tiles_taps` is between 2,048 taps, for which tiles were faster in both passes
over 1,024 channels on one H200, and 8,192, for which FFT was."""
H100_CORES, H100_L2_BYTES = 132, 50 << 20
H100_COPY_BYTES_PER_SECOND = 2.95e12

SCALING_BOOK = "https://jax-ml.github.io/scaling-book/tpus"
DGX_H100 = "https://docs.nvidia.com/dgx-basepod/reference-architecture-infrastructure-foundation-enterprise-ai"
NVLINK_4 = Interconnect(25e9, links=18)
"""NVLink of the fourth generation behind the switches of a host: 900 GB/s in both directions together."""
CONNECTX_7 = 50e9
"""A network card of 400 Gb/s for each GPU, as a DGX H100 or H200 has (`DGX_H100`); other hosts may have fewer."""

TPU_V5E = Device(
    "TPU v5e",
    peak_bf16_flops=197e12,
    hbm_bytes=15.75 * GIB,
    hbm_bytes_per_second=819e9,
    interconnect=Interconnect(50e9, links=4, wraps_at=16),
    network_bytes_per_second=3.125e9,
    source="https://docs.cloud.google.com/tpu/docs/v5e",
)
TPU_V6E = Device(
    "TPU v6e",
    peak_bf16_flops=918e12,
    hbm_bytes=31.24 * GIB,
    hbm_bytes_per_second=1638e9,
    interconnect=Interconnect(100e9, links=4, wraps_at=16),
    network_bytes_per_second=12.5e9,
    source="https://docs.cloud.google.com/tpu/docs/v6e, HBM: https://docs.cloud.google.com/tpu/docs/tpu7x",
)

DEVICES = (
    Device(
        "NVIDIA H100 80GB HBM3",
        peak_bf16_flops=989e12,
        hbm_bytes=80e9,
        hbm_bytes_per_second=3.35e12,
        interconnect=NVLINK_4,
        network_bytes_per_second=CONNECTX_7,
        source=f"https://www.nvidia.com/en-us/data-center/h100, network: {DGX_H100}",
        copy_bytes_per_second=H100_COPY_BYTES_PER_SECOND,
        cores=H100_CORES,
        l2_bytes=H100_L2_BYTES,
        crossovers=H100_CROSSOVERS,
    ),
    Device("NVIDIA H100 PCIe", peak_bf16_flops=756e12, copy_bytes_per_second=H100_COPY_BYTES_PER_SECOND),
    Device("NVIDIA H100", copy_bytes_per_second=H100_COPY_BYTES_PER_SECOND),
    Device(
        "NVIDIA H200",
        peak_bf16_flops=989e12,
        hbm_bytes=141e9,
        hbm_bytes_per_second=4.8e12,
        interconnect=NVLINK_4,
        network_bytes_per_second=CONNECTX_7,
        source=f"https://www.nvidia.com/en-us/data-center/h200, network: {DGX_H100}",
        copy_bytes_per_second=4.3e12,
        cores=132,
        l2_bytes=62_914_560,
    ),
    Device("NVIDIA A100", peak_bf16_flops=312e12),
    Device(
        "TPU v4",
        peak_bf16_flops=275e12,
        hbm_bytes=30.75 * GIB,
        hbm_bytes_per_second=1200e9,
        interconnect=Interconnect(45e9, links=6, wraps_at=4),  # 1.1 PB/s of all-reduce over 4,096 chips of 6 links
        network_bytes_per_second=6.25e9,  # the vendor says nothing of it: what is typical of TPUs
        source=f"https://docs.cloud.google.com/tpu/docs/v4, links and network: {SCALING_BOOK}",
    ),
    dataclasses.replace(TPU_V5E, name="TPU v5 lite"),
    TPU_V5E,
    Device(
        "TPU v5",
        peak_bf16_flops=459e12,
        hbm_bytes=95.73 * GIB,
        hbm_bytes_per_second=2765e9,
        interconnect=Interconnect(100e9, links=6, wraps_at=4),
        network_bytes_per_second=6.25e9,
        source="https://docs.cloud.google.com/tpu/docs/v5p",
    ),
    dataclasses.replace(TPU_V6E, name="TPU v6 lite"),
    TPU_V6E,
    Device(  # JAX's devices are the two halves of a chip
        "TPU7x",
        peak_bf16_flops=1153e12,
        hbm_bytes=94.74 * GIB,
        hbm_bytes_per_second=7380e9 / 2,
        interconnect=Interconnect(100e9 / 2, links=6, wraps_at=4),
        network_bytes_per_second=12.5e9 / 2,
        source="https://docs.cloud.google.com/tpu/docs/tpu7x",
    ),
)


SHARED_MEMORY_FRACTION = 0.88
"""Of a GPU, for all processes that share it."""


def memory_share(processes: int) -> dict[str, str]:
    """Return the environment in which JAX takes its share of a GPU's memory beside other processes.

    By itself each takes three quarters of what is there, and the third one fails for want of memory.
    """
    return {"XLA_PYTHON_CLIENT_MEM_FRACTION": str(round(SHARED_MEMORY_FRACTION / processes, 3))}


def find(device_kind: str) -> Device | None:
    """Return the numbers of a kind of device, or None."""
    found = [device for device in DEVICES if device_kind.startswith(device.name)]
    return max(found, key=lambda device: len(device.name), default=None)


def architecture(device_kind: str) -> str | None:
    """Return that of a kind of GPU, one of `ARCHITECTURES`, or None."""
    models = gpus.models_of(device_kind)
    return models.architecture if models else None


def is_hopper(device_kind: str) -> bool:
    """Return whether a kind of device is a Hopper GPU, for which `pallas_kernels.hopper` is written."""
    return architecture(device_kind) == "Hopper"


def crossovers(device_kind: str) -> Crossovers:
    """Return the crossovers of a kind of device: those of the H100 where none were measured on it."""
    device = find(device_kind)
    return device.crossovers if device and device.crossovers else H100_CROSSOVERS


def logits_bytes(device_kind: str) -> float:
    """Return the most bytes that logits may take before they are made by tiles.

    To keep them is faster on a GPU, where they fit beside all else.
    """
    device = find(device_kind)
    if device is None or device.hbm_bytes is None or not device.name.startswith("NVIDIA"):
        return GIB
    return device.hbm_bytes / 12


def cores(device_kind: str) -> int:
    """Return the multiprocessors that work is cut for: those of the H100 where they are not known."""
    device = find(device_kind)
    return device.cores if device and device.cores else H100_CORES


def l2_bytes(device_kind: str) -> int:
    """Return the bytes of the L2 cache: those of the H100's where they are not known."""
    device = find(device_kind)
    return device.l2_bytes if device and device.l2_bytes else H100_L2_BYTES
