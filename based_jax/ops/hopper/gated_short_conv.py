"""The gated short convolution in a Hopper kernel, which halves the projection, convolves and gates in one pass.

The kernels and the plain form are those of `short_conv.py`.
"""

from collections.abc import Callable

from based_jax.dims import BTD
from based_jax.ops.calls import GatedConvCall
from based_jax.ops.hopper.short_conv import convolve, kernels_support


def supports(call: GatedConvCall) -> str | None:
    """Return why the kernels cannot run this call, or None."""
    return kernels_support(call)


def compute(call: GatedConvCall, *, with_state: Callable[[GatedConvCall], BTD]) -> BTD:
    """Return y, each device for its rows; `with_state` as of `convolve`."""
    return convolve(call, gated=True, silu=True, with_state=with_state)
