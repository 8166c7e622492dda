"""A token of a short convolution in a Hopper kernel, which moves the last inputs on where they lie.

Kernel: `pallas_kernels/hopper/short_conv_step.py`. It has no gradient: a step decodes.
"""

import functools

import jax.numpy as jnp
from jaxtyping import Array

from based_jax.dims import BD, BWD
from based_jax.ops import sharded
from based_jax.ops.decode_calls import GatedConvStepCall, ShortConvStepCall
from based_jax.ops.hopper import limits

CHANNEL_MULTIPLE, MAX_TAPS = 128, 8


def supports(call: ShortConvStepCall | GatedConvStepCall) -> str | None:
    """Return why the kernel cannot run a call, or None."""
    taps, channels = call.kernel.shape
    for name, x in (("x", call.x), ("the state", call.state)):
        if x.dtype not in (jnp.bfloat16, jnp.float32):
            return f"{name} must be bfloat16 or float32, and is {x.dtype}"
    if isinstance(call, ShortConvStepCall) and call.dilation > 1:
        return f"dilation must be 1, and is {call.dilation}"
    if taps > MAX_TAPS or channels % CHANNEL_MULTIPLE or call.x.shape[1] % CHANNEL_MULTIPLE or not channels:
        return (
            f"there must be at most {MAX_TAPS} taps and a multiple of {CHANNEL_MULTIPLE} channels, and are {taps} and"
            f" {channels}"
        )
    if not 0 < call.state.size < limits.MAX_ELEMENTS:
        return f"states must have 1 to {limits.MAX_ELEMENTS - 1} elements together, and have {call.state.size}"
    return limits.refusal() or sharded.varying_refusal(call)


def compute(call: ShortConvStepCall) -> tuple[BD, BWD]:
    """Return y and the inputs after the token, each device for its rows."""
    return _step(call, silu=call.silu, gated=False)


def compute_gated(call: GatedConvStepCall) -> tuple[BD, BWD]:
    """Return the same of a gated convolution."""
    return _step(call, silu=True, gated=True)


def _step(call: ShortConvStepCall | GatedConvStepCall, **form: bool) -> tuple[BD, BWD]:
    rows = ("batch",)

    def shard(*arrays: Array | None) -> tuple[BD, BWD]:
        # Pallas' GPU modules take half a second to import and are needed only here.
        from pallas_kernels.hopper import short_conv_step as kernels

        y, state = sharded.launch(functools.partial(kernels.step, **form), *arrays)
        return y, state

    arguments = call.x, call.kernel, call.state, call.bias
    return sharded.per_shard(shard, arguments, (rows, (), rows, ()), (rows, rows), check_vma=False)
