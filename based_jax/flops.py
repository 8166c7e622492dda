"""FLOPs, and how much of a device's they use.

    MFU = tokens/s * training FLOPs per token / (devices * peak FLOP/s of one device)

Training FLOPs are three times the forward pass of `LM.flops_per_token` (backward does twice the forward's products;
recomputation by remat is not counted). A multiply-add is 2 FLOPs. The peak is the vendor's dense bf16 number of
`devices.py`. HFU takes the products that a step makes in their place, what is made again too (`matrix_products`).
"""

import math
from collections.abc import Iterator
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr

from based_jax import devices

KERNELS = "mpmd_map", "pallas_call", "core_map"
"""Primitives whose own program is that of one block of a kernel."""


def peak_flops(device_kind: str) -> float | None:
    """Return the peak of a kind of device; None where none is known."""
    device = devices.find(device_kind)
    return device.peak_bf16_flops if device else None


def train_flops_per_token(forward_flops: float) -> float:
    """Return forward and backward FLOPs of one token."""
    return 3 * forward_flops


def mfu(tokens_per_second: float, forward_flops: float, devices: int, device_kind: str) -> float | None:
    """Return model FLOP utilisation between 0 and 1; None on a device whose peak is unknown, such as a CPU."""
    peak = peak_flops(device_kind)
    return tokens_per_second * train_flops_per_token(forward_flops) / (devices * peak) if peak else None


def matrix_products(program: Jaxpr) -> float:
    """Return the FLOPs of a traced program's matrix products on all devices, but for those within kernels.

    A scan counts as often as it runs, a branch as all that could be taken, any other loop once.
    """
    return sum(map(_equation_flops, program.eqns))


def _equation_flops(equation: Any) -> float:
    name, params = equation.primitive.name, equation.params
    if name in KERNELS:
        return 0.0
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        sizes = equation.invars[0].aval.shape
        return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(sizes[i] for i in contracted)
    inner = sum(map(matrix_products, _inner_programs(params)))
    if name == "shard_map":
        return inner * params["mesh"].size
    return inner * (params["length"] if name == "scan" else 1)


def _inner_programs(params: dict[str, Any]) -> Iterator[Jaxpr]:
    for value in params.values():
        for x in value if isinstance(value, tuple | list) else (value,):
            if isinstance(x, ClosedJaxpr):
                yield x.jaxpr
            elif isinstance(x, Jaxpr):
                yield x
