"""What every Triton kernel asks before it runs: packages beside JAX, and of `auto` a GPU that is known."""

import importlib.util

from based_jax import devices
from based_jax.errors import installs
from based_jax.ops.dispatch import target_device_kind

PACKAGES = "triton", "jax_triton"


def missing_packages() -> str | None:
    """Return which packages are not installed, in a reason why no kernel can run, or None."""
    names = " and ".join(name for name in PACKAGES if importlib.util.find_spec(name) is None)
    return f"{names} must be installed: {installs('triton')} brings them" if names else None


def unknown_gpu() -> str | None:
    """Return why `auto` leaves any call to others on the GPU that is being compiled for, or None."""
    kind = target_device_kind()
    if devices.architecture(kind) is None:
        return f"it is for {', '.join(devices.ARCHITECTURES)} GPUs unless it is asked for, and this is {kind}"
    return None
