"""FLOPs and model FLOP utilisation.

    MFU = tokens/s * training FLOPs per token / (devices * peak FLOP/s of one device)

Training FLOPs are three times the forward pass of `LM.flops_per_token` (backward does twice the forward's products;
recomputation by remat is not counted). A multiply-add is 2 FLOPs. The peak is the vendor's dense bf16 number.
"""

PEAK_BF16_FLOPS = {
    "NVIDIA H200": 989e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA A100": 312e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 1153e12,
}


def peak_flops(device_kind: str) -> float | None:
    """Return the peak of a device by the longest name that its kind starts with; None where none is known."""
    names = [name for name in PEAK_BF16_FLOPS if device_kind.startswith(name)]
    return PEAK_BF16_FLOPS[max(names, key=len)] if names else None


def train_flops_per_token(forward_flops: float) -> float:
    """Return forward and backward FLOPs of one token."""
    return 3 * forward_flops


def mfu(tokens_per_second: float, forward_flops: float, devices: int, device_kind: str) -> float | None:
    """Return model FLOP utilisation between 0 and 1; None on a device whose peak is unknown, such as a CPU."""
    peak = peak_flops(device_kind)
    return tokens_per_second * train_flops_per_token(forward_flops) / (devices * peak) if peak else None
