"""NVIDIA's GPUs by their names: what code is compiled for, also for one that is not there, and its shared memory."""

import re
from typing import NamedTuple


class GpuModels(NamedTuple):
    """GPUs of one compute capability.

    Attributes:
      architecture: of which `auto` takes kernels in Triton, on tensor cores for bf16.
      capability: 10 times the compute capability.
      shared_bytes: what the programs of a multiprocessor share, and one may take.
      names: finds the model in what JAX calls a device's kind ("NVIDIA DGX H100").
    """

    architecture: str
    capability: int
    shared_bytes: int
    names: re.Pattern[str]


GPU_MODELS = (
    GpuModels("Ampere", 80, 163 << 10, re.compile(r"\bA(30|100|800)\b")),
    GpuModels("Ampere", 86, 99 << 10, re.compile(r"\bA(2|10G?|16|40)\b|\bRTX A\d{4}\b|\bGeForce RTX 30\d\d\b")),
    GpuModels("Ada", 89, 99 << 10, re.compile(r"\bL(4|20|40S?)\b|\bAda\b|\bGeForce RTX 40\d\d\b")),
    GpuModels("Hopper", 90, 227 << 10, re.compile(r"\bG?H(100|200|800|20)\b")),
)
"""Sources: https://developer.nvidia.com/cuda-gpus and the CUDA programming guide's table of compute capabilities."""


def models_of(device_kind: str) -> GpuModels | None:
    """Return the models that a kind of device is one of, or None."""
    return next((models for models in GPU_MODELS if models.names.search(device_kind)), None)
