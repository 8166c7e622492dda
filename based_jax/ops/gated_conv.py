"""Gated causal depthwise convolution with a kernel of a few taps: what Based's BaseConv does between its projections.

    [u, g] = x + b          y_t = silu(sum_{w<W} kernel_w u_{t-(W-1-w)}) g_t

x is the input projection before its bias, so that one kernel can read it once: u and g are its halves. The state is
the last W inputs u of each channel, as in `ops/conv.py`.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from based_jax.dims import BD, BTD, BWD, WD, SegmentIds, Unbroken
from based_jax.ops import sequence
from based_jax.ops.arguments import checked
from based_jax.ops.calls import GatedConvCall, Joint, JointBias
from based_jax.ops.conv import last_inputs, short_conv, short_conv_step
from based_jax.ops.decode_calls import GatedConvStepCall
from based_jax.ops.dispatch import Implementation, dispatch
from based_jax.ops.hopper import gated_short_conv as hopper_gated_short_conv
from based_jax.ops.hopper import short_conv_step as hopper_short_conv_step
from based_jax.ops.tpu import gated_short_conv as tpu_gated_short_conv


@checked
def gated_short_conv(
    x: Joint,
    kernel: WD,
    *,
    bias: JointBias | None = None,
    state: BWD | None = None,
    segment_ids: SegmentIds | None = None,
    impl: str = "auto",
) -> tuple[BTD, BWD]:
    """Convolve the first half of x (B, T, 2 D) over time with kernel (W, D), and gate silu of it with the second half.

    Args:
      bias: added to x, (2 D).
      state: last W inputs before x, their bias included; they belong to each row's first document.
      segment_ids: ids of packed documents, 0 for padding, whose output is 0 (see `ops/segments.py`).
      impl: "oracle" (window by window), "xla_steps" (token by token), "xla_taps" (W shifted products), "hopper_taps"
        (Mosaic GPU kernels; bf16, 2 to 4 taps, D a multiple of 128), "tpu_taps" (Mosaic TPU kernels; bf16 or fp32, up
        to 8 taps, D a multiple of 128) or "auto".

    Returns:
      y (B, T, D) in x's dtype, and the last W inputs u of each row's last document.

    Raises:
      UserError: `impl` is unknown or cannot run this call.
    """
    call = GatedConvCall(x, kernel, bias, state, segment_ids)
    y = dispatch("gated_short_conv", IMPLEMENTATIONS, impl, call, CUT)
    width, channels = kernel.shape
    u = convolved_inputs(x[:, -width:] if segment_ids is None else x, channels, bias)
    return y, last_inputs(u, width, state, segment_ids)


def convolved_inputs(x: Joint, channels: int, bias: JointBias | None) -> BTD:
    """Return u, the half of x that is convolved, with its bias."""
    return _biased(x[..., :channels], None if bias is None else bias[:channels])


@checked
def gated_short_conv_step(
    x: Float[Array, "B joint"], kernel: WD, state: BWD, *, bias: JointBias | None = None, impl: str = "auto"
) -> tuple[BD, BWD]:
    """Return one token's output and the inputs that the next one needs; `impl` is one of `conv.short_conv_step`."""
    call = GatedConvStepCall(x, kernel, state, bias)
    return dispatch("gated_short_conv_step", STEP_IMPLEMENTATIONS, impl, call)


def _stepped(call: GatedConvStepCall) -> tuple[BD, BWD]:
    u, gate = jnp.split(_biased(call.x, call.bias), 2, axis=-1)
    y, state = short_conv_step(u, call.kernel, call.state, impl="xla_taps")
    return jax.nn.silu(y) * gate, state


def _biased(x: Array, bias: Float[Array, "_"] | None) -> Array:
    """Return x plus a bias, rounded once."""
    if bias is None:
        return x
    wide = bias.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))
    return (x.astype(jnp.float32) + wide).astype(x.dtype)


def _composed(call: GatedConvCall, *, impl: str) -> BTD:
    u, gate = jnp.split(_biased(call.x, call.bias), 2, axis=-1)
    unbroken = None if call.segment_ids is None else Unbroken(call.segment_ids)
    y, _ = short_conv(u, call.kernel, state=call.state, segment_ids=unbroken, impl=impl)
    return jax.nn.silu(y) * gate


def _wide(call: GatedConvCall, *, impl: str) -> BTD:
    """Compute in fp32 from the inputs to the output."""
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), call._replace(segment_ids=None))
    return _composed(wide._replace(segment_ids=call.segment_ids), impl=impl).astype(call.x.dtype)


def _convolved(call: GatedConvCall) -> BTD:
    """Return the half of x that is convolved, with its bias."""
    return convolved_inputs(call.x, call.kernel.shape[1], call.bias)


CUT = sequence.Tails(lambda call: call.kernel.shape[0], _convolved)

IMPLEMENTATIONS = {
    "hopper_taps": Implementation(
        functools.partial(hopper_gated_short_conv.compute, with_state=functools.partial(_wide, impl="xla_taps")),
        hopper_gated_short_conv.supports,
        platform="cuda",
    ),
    "tpu_taps": Implementation(
        functools.partial(tpu_gated_short_conv.compute, with_state=functools.partial(_wide, impl="xla_taps")),
        tpu_gated_short_conv.supports,
        platform="tpu",
        by_place=("x",),
    ),
    "xla_taps": Implementation(functools.partial(_composed, impl="xla_taps"), by_place=("x",)),
    "xla_steps": Implementation(functools.partial(_composed, impl="xla_steps"), by_place=("x",)),
    "oracle": Implementation(functools.partial(_wide, impl="oracle"), by_place=("x",)),
}

STEP_IMPLEMENTATIONS = {
    "hopper_taps": Implementation(
        hopper_short_conv_step.compute_gated,
        hopper_short_conv_step.supports,
        platform="cuda",
    ),
    "xla_taps": Implementation(_stepped),
    "oracle": Implementation(_stepped),
}
