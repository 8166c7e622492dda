"""What is known of each kind of device: the vendor's numbers, and what was measured on it.

A kind is what JAX calls `device_kind`; it belongs to the entry of `DEVICES` with the longest name that it starts with.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Crossovers:
    """Where one form of an operation overtakes another, as `slower` asks in the tables of `based_jax.ops`.

    Attributes:
      linear_attention_one_chunk_tokens: up to so many, one chunk of linear attention is faster in XLA than several;
        with Taylor's map.
      toeplitz_tokens: up to so many, a long convolution is faster as a Toeplitz product than by FFT or by chunks; its
        matrices take D T^2 elements.
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
    chunk_tokens: int
    one_decay_one_chunk_tokens: int
    one_decay_one_chunk_tokens_beside_chunks: int
    one_decay_steps_tokens: int
    large_state_elements: int
    dplr_steps_heads: int


@dataclasses.dataclass(frozen=True)
class Device:
    """One kind of device; None is what is not known of it.

    Attributes:
      name: what its kind starts with.
      architecture: what kernels are written for.
      peak_bf16_flops: the vendor's dense FLOP/s.
      copy_bytes_per_second: measured rate of a large copy, read and written bytes together.
      memory_bytes: of its HBM.
      cores: its streaming multiprocessors.
      l2_bytes: of its L2 cache.
      crossovers: those measured on it.
    """

    name: str
    architecture: str
    peak_bf16_flops: float | None = None
    copy_bytes_per_second: float | None = None
    memory_bytes: int | None = None
    cores: int | None = None
    l2_bytes: int | None = None
    crossovers: Crossovers | None = None


H100_CROSSOVERS = Crossovers(
    linear_attention_one_chunk_tokens=512,
    toeplitz_tokens=1024,
    chunk_tokens=64,
    one_decay_one_chunk_tokens=256,
    one_decay_one_chunk_tokens_beside_chunks=128,
    one_decay_steps_tokens=1024,
    large_state_elements=128 * 256,
    dplr_steps_heads=256,
)
"""Measured on one H100 80GB HBM3 in experiments/kernels; the Toeplitz product in experiments/mqar_pareto, at 256 tokens
(longer ones are not measured)."""
H100_CORES, H100_L2_BYTES = 132, 50 << 20

DEVICES = (
    Device(
        "NVIDIA H100 80GB HBM3",
        "hopper",
        peak_bf16_flops=989e12,
        copy_bytes_per_second=2.95e12,
        memory_bytes=85_017_493_504,
        cores=H100_CORES,
        l2_bytes=52_428_800,
        crossovers=H100_CROSSOVERS,
    ),
    Device("NVIDIA H100 PCIe", "hopper", peak_bf16_flops=756e12, cores=114, l2_bytes=52_428_800),
    Device("NVIDIA H100", "hopper"),
    Device(
        "NVIDIA H200",
        "hopper",
        peak_bf16_flops=989e12,
        copy_bytes_per_second=4.3e12,
        memory_bytes=141_000_000_000,
        cores=132,
        l2_bytes=52_428_800,
    ),
    Device("NVIDIA GH200", "hopper", cores=132),
    Device("NVIDIA H800", "hopper", cores=132),
    Device("NVIDIA H20", "hopper", cores=78),
    Device("NVIDIA A100", "ampere", peak_bf16_flops=312e12, cores=108, l2_bytes=41_943_040),
    Device("TPU v4", "tpu", peak_bf16_flops=275e12, memory_bytes=32 << 30),
    Device("TPU v5 lite", "tpu", peak_bf16_flops=197e12, memory_bytes=16 << 30),
    Device("TPU v5e", "tpu", peak_bf16_flops=197e12, memory_bytes=16 << 30),
    Device("TPU v5", "tpu", peak_bf16_flops=459e12, memory_bytes=95 << 30),
    Device("TPU v6 lite", "tpu", peak_bf16_flops=918e12, memory_bytes=32 << 30),
    Device("TPU v6e", "tpu", peak_bf16_flops=918e12, memory_bytes=32 << 30),
    Device("TPU7x", "tpu", peak_bf16_flops=1153e12),
)


def find(device_kind: str) -> Device | None:
    """Return what is known of a kind of device, or None."""
    found = [device for device in DEVICES if device_kind.startswith(device.name)]
    return max(found, key=lambda device: len(device.name), default=None)


def crossovers(device_kind: str) -> Crossovers:
    """Return the crossovers of a kind of device: those of the H100 where none were measured on it."""
    device = find(device_kind)
    return device.crossovers if device and device.crossovers else H100_CROSSOVERS


def cores(device_kind: str) -> int:
    """Return the multiprocessors that work is cut for: those of the H100 where they are not known."""
    device = find(device_kind)
    return device.cores if device and device.cores else H100_CORES


def l2_bytes(device_kind: str) -> int:
    """Return the bytes of the L2 cache: those of the H100's where they are not known."""
    device = find(device_kind)
    return device.l2_bytes if device and device.l2_bytes else H100_L2_BYTES
