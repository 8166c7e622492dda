"""A token of a short convolution on Hopper, plain or gated: the last inputs move on by one where they lie.

    u_W = x        y = f(sum_w kernel_w u_w + b)                              plain, f SiLU or nothing
    [u_W, g] = x + b        y = silu(sum_w kernel_w u_w) g                    gated

A block takes a strip of the channels of one row, and each lane channels of its own, all inputs of which it reads before
it writes any.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.hopper import stream
from pallas_kernels.hopper.mosaic import save
from pallas_kernels.hopper.stream import WARPGROUP_LANES

MAX_LANE_CHANNELS = 8


@functools.partial(jax.jit, static_argnames=("silu", "gated"))
def step(x, kernel, state, bias, *, silu: bool, gated: bool):
    """Return y (B, D) like x, and the inputs after the token (B, W, D), in the place of those given.

    Args:
      x: (B, D), or gated (B, 2 D), bf16 or fp32; D is a multiple of 128.
      kernel: (W, D) fp32.
      state: the last W inputs, the oldest first, (B, W, D) bf16 or fp32.
      bias: (D,), or gated (2 D,), fp32, or None.
      silu, gated: the form.
    """
    batch, taps, channels = state.shape
    rows = stream.rows_per_lane(channels, MAX_LANE_CHANNELS)
    strips = channels // WARPGROUP_LANES // rows

    def body(*refs):
        x_ref, kernel_ref, *bias_refs, state_ref, y_ref = refs
        block = lax.axis_index("block")
        row, strip = lax.div(block, strips), pl.ds(lax.rem(block, strips) * rows, rows)

        def half(ref, i: int, *at):
            return stream.load(ref.at[(*at, pl.ds(i * strips * rows + strip.start, rows))])

        def biased(i: int):
            total = half(x_ref, i, row)
            for ref in bias_refs:
                total += half(ref, i)
            return total.astype(x.dtype).astype(jnp.float32)

        new = biased(0) if gated else half(x_ref, 0, row)
        inputs = [stream.load(state_ref.at[row, tap, strip]) for tap in range(1, taps)]
        inputs.append(new.astype(state.dtype).astype(jnp.float32))
        y = sum(stream.load(kernel_ref.at[tap, strip]) * u for tap, u in enumerate(inputs))
        for tap, u in enumerate(inputs):
            save(state_ref.at[row, tap, strip], u)
        for ref in [] if gated else bias_refs:
            y += stream.load(ref.at[strip])
        y = y * stream.sigmoid(y) if silu or gated else y
        save(y_ref.at[row, strip], y * biased(1) if gated else y)

    def by_lanes(y):
        return y.reshape(*y.shape[:-1], -1, WARPGROUP_LANES)

    ref, given = jax.new_ref(by_lanes(state)), [by_lanes(y) for y in (x, kernel, bias) if y is not None]
    out_type = [jax.ShapeDtypeStruct((batch, channels // WARPGROUP_LANES, WARPGROUP_LANES), x.dtype)]
    [y] = stream.kernel(body, "short_conv_step", batch * strips, out_type, [])(*given, ref)
    return y.reshape(batch, channels), ref[...].reshape(state.shape)
