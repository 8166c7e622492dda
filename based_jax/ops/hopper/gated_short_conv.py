"""The gated short convolution in a Hopper kernel, which halves the projection, convolves and gates in one pass.

The kernels and the plain form are those of `short_conv.py`.
"""

from collections.abc import Callable

from based_jax.dims import BT, BTD, WD
from based_jax.ops.hopper.short_conv import Bias, Joint, convolve, kernels_support


def supports(x: Joint, kernel: WD, *_rest) -> str | None:
    """Return why the kernels cannot run this call, or None."""
    return kernels_support(x, kernel)


def compute(x: Joint, kernel: WD, bias: Bias | None, state, segment_ids: BT | None, *, with_state: Callable) -> BTD:
    """Return y, each device for its rows; `with_state` as of `convolve`."""
    return convolve(x, kernel, bias, state, segment_ids, gated=True, silu=True, with_state=with_state)
