"""What jax-triton asks of JAX's CUDA plugin to write a call down, for hosts that have none: nothing can run it."""

import json
from types import SimpleNamespace

from jaxlib import gpu_triton


class TritonKernel:
    def __init__(self, name, warps, blocks, shared_bytes, *_):
        self.name, self.shared_bytes = name, shared_bytes


class TritonKernelCall:
    def __init__(self, kernel, *grid_and_parameters):
        *self.grid, self.parameters = grid_and_parameters
        self.kernel = kernel

    def to_proto(self, name, metadata) -> bytes:
        written = {"name": name, "kernel": self.kernel.name, "grid": self.grid, "parameters": self.parameters}
        return json.dumps(written).encode()


def create_array_parameter(zeroed_bytes, alignment) -> dict:
    return {"zeroed_bytes": zeroed_bytes, "alignment": alignment}


def get_compute_capability(_device) -> int:
    raise RuntimeError("there is no GPU to ask")


def get_serialized_metadata(_call) -> bytes:
    return b""


STANDINS = TritonKernel, TritonKernelCall, create_array_parameter, get_compute_capability, get_serialized_metadata


def stand_in() -> None:
    """Give jaxlib what it lacks, before jax-triton is imported."""
    for standin in STANDINS:
        if not hasattr(gpu_triton, standin.__name__):
            setattr(gpu_triton, standin.__name__, standin)


def compiled_kernels(monkeypatch) -> list[TritonKernel]:
    """Return the kernels that are compiled from here on, which come one by one."""
    from jax_triton import triton_lib

    found: list[TritonKernel] = []

    def keep(*arguments):
        found.append(TritonKernel(*arguments))
        return found[-1]

    for standin in STANDINS:
        monkeypatch.setattr(gpu_triton, standin.__name__, standin)
    monkeypatch.setattr(gpu_triton, "TritonKernel", keep)
    monkeypatch.setattr(triton_lib, "_COMPILED_KERNEL_CACHE", {})
    return found


def without_code(monkeypatch) -> None:
    """Lower kernels to Triton's representation and make no code of it, which takes seven times as long."""
    from jax_triton import triton_lib

    result = SimpleNamespace(name="", shared_mem_bytes=0, binary="")
    monkeypatch.setattr(triton_lib, "compile_ttir_inplace", lambda *_: result)
    monkeypatch.setattr(triton_lib, "_COMPILED_KERNEL_CACHE", {})
