"""FLOPs and model FLOP utilisation.

    MFU = tokens/s * training FLOPs per token / (devices * peak FLOP/s of one device)

Training FLOPs are three times the forward pass of `LM.flops_per_token` (backward does twice the forward's products;
recomputation by remat is not counted). A multiply-add is 2 FLOPs. The peak is the vendor's dense bf16 number of
`devices.py`.
"""

from based_jax import devices


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
