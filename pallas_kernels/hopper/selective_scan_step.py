"""A token of Mamba's selective scan on Hopper: each state is read once, and written where it lies.

    h' = exp(dt A) h + dt u B        y = sum_n C[n] h'[n]        dt, of raw steps softplus(dt + bias)

A block takes a strip of the channels of one row. Of a warp four lanes lie over the states of a channel, beside each
other as in memory, and eight over channels.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import stream
from pallas_kernels.hopper.mosaic import WARP_LANES, WARPS, load_global, save
from pallas_kernels.hopper.selective_scan import softplus

LANE_STATES = 4
"""States that lie beside each other in a lane."""
MAX_STRIP_ELEMENTS = 4096
"""32 of a lane."""


@jax.jit
def step(u, dt, A, BC, state, bias):
    """Return y like u, and the state after the token (B, D, N) fp32, in the place of the one given.

    Args:
      u: (B, D) bf16 or fp32; D is a multiple of 128.
      dt: (B, D) bf16 or fp32.
      A: (D, N) fp32; N is 8, 16 or 32.
      BC: (B, 2 N) bf16 or fp32, B beside C.
      state: (B, D, N) fp32.
      bias: of raw steps, (D,), or None.
    """
    batch, channels, states = state.shape
    width = _width(channels, states)
    strips, layout = channels // width, _layout(states)

    def body(*refs):
        u_ref, dt_ref, A_ref, BC_ref, *bias_refs, state_ref, y_ref = refs
        block = lax.axis_index("block")
        row, strip = lax.div(block, strips), pl.ds(lax.rem(block, strips) * width, width)

        def channels_of(ref, *at):
            return load_global(ref.at[(*at, strip)], layout.reduce(1)).astype(jnp.float32)

        def across(x):
            return lax.broadcast_in_dim(x, (width, states), [0])

        def along(i: int):
            x = load_global(BC_ref.at[row, pl.ds(i * states, states)], layout.reduce(0)).astype(jnp.float32)
            return lax.broadcast_in_dim(x, (width, states), [1])

        h, dt = load_global(state_ref.at[row, strip], layout), channels_of(dt_ref, row)
        for ref in bias_refs:
            dt = softplus(dt + channels_of(ref))
        kept = jnp.exp2(across(dt) * (load_global(A_ref.at[strip], layout) * math.log2(math.e)))
        after = kept * h + across(dt * channels_of(u_ref, row)) * along(0)
        save(state_ref.at[row, strip], after)
        save(y_ref.at[row, strip], (after * along(1)).sum(axis=1))

    ref, more = jax.new_ref(state), [] if bias is None else [bias]
    out_type = [jax.ShapeDtypeStruct((batch, channels), u.dtype)]
    [y] = stream.kernel(body, "selective_scan_step", batch * strips, out_type, [])(u, dt, A, BC, *more, ref)
    return y, ref[...]


def _width(channels: int, states: int) -> int:
    """Return the channels of a strip, the most that divide all."""
    most = MAX_STRIP_ELEMENTS // states
    return math.gcd(channels, most)


def _layout(states: int):
    """Return the layout of a strip."""
    lanes = states // LANE_STATES
    tile = WARPS * WARP_LANES // lanes
    tiling = plgpu.Tiling(((tile, states), (tile // WARPS, states), (LANE_STATES,)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1)
