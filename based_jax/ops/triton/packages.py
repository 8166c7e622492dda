"""What the Triton kernels need beside JAX."""

import importlib.util

PACKAGES = "triton", "jax_triton"


def missing() -> str | None:
    """Return which packages are not installed, in a reason why no kernel can run, or None."""
    names = " and ".join(name for name in PACKAGES if importlib.util.find_spec(name) is None)
    return f"{names} must be installed: pip install 'based-jax[triton]' brings them" if names else None
