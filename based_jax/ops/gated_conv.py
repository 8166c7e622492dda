"""Gated causal depthwise convolution with a kernel of a few taps: what Based's BaseConv does between its projections.

    [u, g] = x + b          y_t = silu(sum_{w<W} kernel_w u_{t-(W-1-w)}) g_t

x is the input projection before its bias, so that one kernel can read it once: u and g are its halves. The state is
the last W inputs u of each channel, as in `ops/conv.py`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from based_jax.dims import BT, BTD, WD
from based_jax.ops import hopper
from based_jax.ops.conv import Past, last_inputs, short_conv
from based_jax.ops.dispatch import Implementation, dispatch

Joint = Float[Array, "B T joint"]
Bias = Float[Array, "joint"]

TAPS = range(2, 5)
LANES = 128
TILE = 8
"""What the kernels take: taps, a multiple of channels, and a multiple of tokens."""


def gated_short_conv(
    x: Joint,
    kernel: WD,
    *,
    bias: Bias | None = None,
    state: Past | None = None,
    segment_ids: BT | None = None,
    return_state: bool = False,
    impl: str = "auto",
) -> Any:
    """Convolve the first half of x (B, T, 2 D) over time with kernel (W, D), and gate silu of it with the second half.

    Args:
      bias: added to x, (2 D).
      state: last W inputs before x, their bias included; they belong to each row's first document.
      segment_ids: ids of packed documents, 0 for padding, whose output is 0 (see `ops/segments.py`).
      return_state: return (y, last inputs of the last document) instead of y.
      impl: "oracle" (window by window), "recurrent" (token by token), "xla" (W shifted products), "hopper" (Mosaic GPU
        kernels; bf16, 2 to 4 taps, D a multiple of 128) or "auto".

    Raises:
      UserError: `impl` is unknown or cannot run this call.
    """
    y = dispatch("gated_short_conv", IMPLEMENTATIONS, impl, x, kernel, bias, state, segment_ids)
    if not return_state:
        return y
    width, channels = kernel.shape
    u = _biased(x[:, -width:, :channels], None if bias is None else bias[:channels])
    return y, last_inputs(u, width, state, segment_ids)


def _biased(x: Array, bias: Float[Array, "_"] | None) -> Array:
    """Return x plus a bias, rounded once."""
    return x if bias is None else (x.astype(jnp.float32) + bias.astype(jnp.float32)[None, None]).astype(x.dtype)


def _composed(x: Joint, kernel: WD, bias: Bias | None, state: Past | None, segment_ids: BT | None, *, impl: str) -> BTD:
    u, gate = jnp.split(_biased(x, bias), 2, axis=-1)
    y = short_conv(u, kernel, state=state, segment_ids=segment_ids, impl=impl)
    return jax.nn.silu(y) * gate


def _wide(x: Joint, kernel: WD, bias: Bias | None, state: Past | None, segment_ids: BT | None, *, impl: str) -> BTD:
    """Compute in fp32 from the inputs to the output."""
    bias, state = (None if y is None else y.astype(jnp.float32) for y in (bias, state))
    wide, kernel = x.astype(jnp.float32), kernel.astype(jnp.float32)
    return _composed(wide, kernel, bias, state, segment_ids, impl=impl).astype(x.dtype)


def _supports(x: Joint, kernel: WD, bias: Bias | None, state: Past | None, segment_ids: BT | None) -> str | None:
    """Return why the kernels cannot run this call, or None."""
    taps, channels = kernel.shape
    if x.dtype != jnp.bfloat16:
        return f"x must be bfloat16, and is {x.dtype}"
    if taps not in TAPS:
        return f"the kernel must have {TAPS[0]} to {TAPS[-1]} taps, and has {taps}"
    if channels % LANES:
        return f"the channels must be a multiple of {LANES}, and are {channels}"
    if not 0 < x.size < hopper.OFFSETS:
        return f"there must be 1 to {hopper.OFFSETS - 1} elements, and are {x.size}"
    return hopper.refusal()


def _hopper(x: Joint, kernel: WD, bias: Bias | None, state: Past | None, segment_ids: BT | None) -> BTD:
    """Run the kernels on each device's rows, all channels together."""
    rows = ("batch",)
    arguments = x, kernel, bias, state, segment_ids
    return hopper.per_shard(_any_state, arguments, (rows, (), (), rows, rows), (rows,))


def _any_state(x: Joint, kernel: WD, bias: Bias | None, state: Past | None, segment_ids: BT | None) -> BTD:
    """Run the kernels; what an earlier state reaches, the first tokens, is computed again with it."""
    wide = jnp.zeros(x.shape[-1:]) if bias is None else bias.astype(jnp.float32)
    y = _fused(*hopper.vary_alike(x, kernel.astype(jnp.float32), wide, segment_ids))
    if state is None:
        return y
    head = slice(0, kernel.shape[0] - 1)
    ids = None if segment_ids is None else segment_ids[:, head]
    return y.at[:, head].set(_wide(x[:, head], kernel, bias, state, ids, impl="xla"))


@jax.custom_vjp
def _fused(x, kernel, bias, segment_ids):
    return _fused_fwd(x, kernel, bias, segment_ids)[0]


def _fused_fwd(x, kernel, bias, segment_ids):
    # Pallas' GPU modules take half a second to import and are needed only here.
    from pallas_kernels import short_conv_hopper as kernels

    [y] = hopper.call(kernels.forward, _pad(x), kernel, bias, _reach(segment_ids, kernel.shape[0]))
    return y[:, : x.shape[1]], (x, kernel, bias, segment_ids)


def _fused_bwd(saved, dy):
    from pallas_kernels import short_conv_hopper as kernels

    x, kernel, bias, segment_ids = saved
    reach = _reach(segment_ids, kernel.shape[0])
    dx, sums = hopper.call(kernels.backward, _pad(x), kernel, bias, _pad(dy), reach)
    sums = sums.sum(axis=0)
    return dx[:, : x.shape[1]], sums[: kernel.shape[0]], sums[kernel.shape[0] :].reshape(-1), None


_fused.defvjp(_fused_fwd, _fused_bwd)


def _pad(x: Array) -> Array:
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % TILE), (0, 0)))


def _reach(segment_ids: BT | None, taps: int) -> Int[Array, "B _"] | None:
    """Return how many of the W-1 tokens before each are of its document, -1 for padding, up to a whole tile."""
    if segment_ids is None:
        return None
    ids = jnp.pad(segment_ids, ((0, 0), (taps - 1, -segment_ids.shape[1] % TILE)))
    own = ids[:, taps - 1 :]
    reach, joined = jnp.zeros_like(own), jnp.ones_like(own)
    for distance in range(1, taps):
        joined = joined * (ids[:, taps - 1 - distance : ids.shape[1] - distance] == own)
        reach = reach + joined
    return jnp.where(own == 0, -1, reach).astype(jnp.int32)


IMPLEMENTATIONS = {
    "hopper": Implementation(_hopper, _supports, platform="cuda"),
    "xla": Implementation(functools.partial(_composed, impl="xla")),
    "recurrent": Implementation(functools.partial(_composed, impl="recurrent")),
    "oracle": Implementation(functools.partial(_wide, impl="oracle")),
}
