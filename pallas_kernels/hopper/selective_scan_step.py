"""A token of Mamba's selective scan on Hopper: each state is read once, and written where it lies.

    h' = exp(dt A) h + dt u B        y = sum_n C[n] h'[n]

A block takes a strip of the channels of one row. Of a warp four lanes lie over the states of a channel, beside each
other as in memory, and eight over channels.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import stream
from pallas_kernels.hopper.mosaic import WARP_LANES, WARPS, load_global, save

LANE_STATES = 4
"""States that lie beside each other in a lane."""
MAX_STRIP_ELEMENTS = 4096
"""32 of a lane."""


@functools.partial(jax.jit)
def step(u, dt, A, B, C, state):
    """Return y like u, and the state after the token (B, D, N) fp32, in the place of the one given.

    Args:
      u: (B, D) bf16 or fp32; D is a multiple of 128.
      dt: (B, D) fp32.
      A: (D, N) fp32; N is 8, 16 or 32.
      B, C: (B, N) bf16 or fp32.
      state: (B, D, N) fp32.
    """
    batch, channels, states = state.shape
    width = _width(channels, states)
    strips, layout = channels // width, _layout(states)

    def body(u_ref, dt_ref, A_ref, B_ref, C_ref, state_ref, y_ref):
        block = lax.axis_index("block")
        row, strip = lax.div(block, strips), pl.ds(lax.rem(block, strips) * width, width)

        def across(ref):
            x = load_global(ref.at[row, strip], layout.reduce(1)).astype(jnp.float32)
            return lax.broadcast_in_dim(x, (width, states), [0])

        def along(ref):
            x = load_global(ref.at[row], layout.reduce(0)).astype(jnp.float32)
            return lax.broadcast_in_dim(x, (width, states), [1])

        h = load_global(state_ref.at[row, strip], layout)
        dt = across(dt_ref)
        kept = jnp.exp2(dt * (load_global(A_ref.at[strip], layout) * math.log2(math.e)))
        after = kept * h + dt * across(u_ref) * along(B_ref)
        save(state_ref.at[row, strip], after)
        save(y_ref.at[row, strip], (after * along(C_ref)).sum(axis=1))

    ref = jax.new_ref(state)
    out_type = [jax.ShapeDtypeStruct((batch, channels), u.dtype)]
    [y] = stream.kernel(body, "selective_scan_step", batch * strips, out_type, [])(u, dt, A, B, C, ref)
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
