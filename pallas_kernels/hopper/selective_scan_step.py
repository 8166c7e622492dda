"""A token of Mamba's selective scan on Hopper: each state is read once, and written where it lies.

    h' = exp(dt A) h + dt u B        y = sum_n C[n] h'[n]        dt, of raw steps softplus(dt + bias)
    or with a gate                   (y + skip u) silu(z)

A block takes a strip of the channels of one row. Of a warp four lanes lie over the states of a channel, beside each
other as in memory, and eight over channels.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import split
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
      BC: (B, . + 2 N) bf16 or fp32, whose last channels are B beside C; the others are a multiple of 8.
      state: (B, D, N) fp32.
      bias: of raw steps, (D,), or None.
    """
    return _step("selective_scan_step", (u, dt), (A, bias), BC, state, None, None)


@jax.jit
def gated_step(u, dt, A, BC, state, bias, skip, joint):
    """Return (y + skip u) silu(z) in place of y.

    Args:
      skip: (D,) fp32.
      joint: (B, . + D) bf16 or fp32, whose last channels are z; the others are a multiple of 128.
    """
    return _step("gated_scan_step", (u, dt), (A, bias), BC, state, skip, joint)


def _step(name: str, tokens, of_channels, BC, state, skip, joint):
    (u, dt), (A, bias) = tokens, of_channels
    batch, channels, states = state.shape
    width = _width(channels, states)
    strips, layout = channels // width, _layout(states)
    biases, gates = [] if bias is None else [bias], [] if joint is None else [skip, joint]

    def body(*refs):
        given, bias_refs, gate_refs, [state_ref, y_ref] = split(refs, 4, len(biases), len(gates))
        u_ref, dt_ref, A_ref, BC_ref = given
        block = lax.axis_index("block")
        row, strip = lax.div(block, strips), pl.ds(lax.rem(block, strips) * width, width)

        def channels_of(ref, *at, behind: int = 0):
            own = pl.ds(behind + strip.start, width)
            return load_global(ref.at[(*at, own)], layout.reduce(1)).astype(jnp.float32)

        def across(x):
            return lax.broadcast_in_dim(x, (width, states), [0])

        def along(i: int):
            own = pl.ds(BC.shape[1] - (2 - i) * states, states)
            x = load_global(BC_ref.at[row, own], layout.reduce(0)).astype(jnp.float32)
            return lax.broadcast_in_dim(x, (width, states), [1])

        h, dt = load_global(state_ref.at[row, strip], layout), channels_of(dt_ref, row)
        u = channels_of(u_ref, row)
        for ref in bias_refs:
            dt = softplus(dt + channels_of(ref))
        kept = jnp.exp2(across(dt) * (load_global(A_ref.at[strip], layout) * math.log2(math.e)))
        after = kept * h + across(dt * u) * along(0)
        save(state_ref.at[row, strip], after)
        y = (after * along(1)).sum(axis=1)
        if gate_refs:
            skip_ref, joint_ref = gate_refs
            z = channels_of(joint_ref, row, behind=joint.shape[1] - channels)
            y = (y + channels_of(skip_ref) * u) * z * stream.sigmoid(z)
        save(y_ref.at[row, strip], y)

    ref = jax.new_ref(state)
    out_type = [jax.ShapeDtypeStruct((batch, channels), u.dtype)]
    [y] = stream.kernel(body, name, batch * strips, out_type, [])(u, dt, A, BC, *biases, *gates, ref)
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
