"""Mamba's selective scan on Hopper: the forward pass (see `ops/selective_scan.py`).

    h_t = exp(dt_t A + offset_t) h_{t-1} + dt_t u_t B_t        y_t = sum_n C_t[n] h_t[n]

A block takes 128 channels of one sequence, keeps their states in registers, and walks over the tokens in tiles
(`stream.py`): what has the size of all states, (B, T, D, N), never reaches memory. The offset of a document's first
token is so low that nothing is kept of the documents before.

Each of a block's four warps takes W channels. Within a warp the states of a channel are spread over four lanes, and the
channels over eight: few shuffles sum over either.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import split
from pallas_kernels.hopper import stream
from pallas_kernels.hopper.mosaic import WARPS, await_warp, like, load_global, load_shared, save

TILE_TOKENS = 8
"""Of a tile; T is a multiple of them."""
ALIGNED_VALUES = 32
"""Single fp32 values from one tile to the next: copies write to multiples of 128 bytes."""
RING_SLOTS = 4
WARP_LANE_GRID = (4, 8)
"""Of a warp: over the states of a channel, and over the channels."""
LANE_CHANNELS = 4
"""Channels that lie beside each other in a lane."""
WARP_CHANNELS = WARP_LANE_GRID[1] * LANE_CHANNELS
"""Channels of a warp, W."""

STATE_LAYOUT = plgpu.Layout.TILED(
    plgpu.Tiling(((WARPS, *WARP_LANE_GRID, LANE_CHANNELS),)), warp_dims=(-4,), lane_dims=(-3, -2), vector_dim=-1
)
"""The layout of a block's states, (WARPS, N, WARP_LANE_GRID[1], LANE_CHANNELS)."""
CHANNEL_LAYOUT = STATE_LAYOUT.reduce(1)
"""Of one value per channel."""
COEFFICIENT_LAYOUT = STATE_LAYOUT.reduce((0, 2, 3))
"""Of one value per state of a channel, (N)."""


@functools.partial(jax.jit, static_argnames="with_starts")
def forward(u, dt, A, BC, state, offsets=None, *, with_starts: bool):
    """Return y like u, the state after the last token (B, D, N) fp32 and, where asked for, those before every tile.

    Args:
      u: (B, T, D) bf16 or fp32; T is a multiple of 8, D of 128.
      dt: (B, T, D) fp32.
      A: (D, N) fp32; N is a multiple of 8.
      BC: (B, T, 2 N) fp32, B beside C.
      state: the state before the first token, (B, D, N) fp32.
      offsets: exponents to add, (B, T) fp32 or None.
    """
    plan = Plan.of(u)
    sources = plan.sources(u, dt, BC, offsets)
    A, state = scaled(A), states_first(state)
    starts = [(plan.batch, plan.tiles, *A.shape)] if with_starts else []

    def body(*refs):
        source_refs, (A_ref, state_ref, y_ref, last_ref), refs = split(refs, len(sources), 4)
        starts_refs, tiles, [filled] = split(refs, len(starts), len(sources))
        u_tile, dt_tile, BC_tile, *offset_tiles = tiles
        at = plan.here()

        def fetch(n, slot):
            copy_tokens(at, source_refs, tiles, filled, n, slot)

        ring = stream.Ring(plan.tiles, RING_SLOTS, filled, fetch)
        A = load_global(A_ref.at[at.strip], STATE_LAYOUT)

        def step(n, slot, h):
            for ref in starts_refs:
                save(ref.at[at.row, n, at.strip], h)

            def token(i, h):
                u, dt = (load_channels(tile.at[slot, i]) for tile in (u_tile, dt_tile))
                B, C = (load_coefficients(BC_tile.at[slot, i], k) for k in range(2))
                h = decay(dt, A, offset(offset_tiles, slot, i)) * h + across(dt * u, h) * along(B, h)
                await_warp()
                save_channels(u_tile.at[slot, i], (h * along(C, h)).sum(axis=1))
                return h

            return lax.fori_loop(0, TILE_TOKENS, token, h)

        def put(n, slot):
            target = y_ref.at[at.row, at.tokens(n), at.strip]
            plgpu.copy_smem_to_gmem(u_tile.at[slot], target, commit_group=False)

        state = load_global(state_ref.at[at.row, at.strip], STATE_LAYOUT)
        save(last_ref.at[at.row, at.strip], ring.walk(step, put, state))

    out_type = [like(sources[0]), like(state), *(jax.ShapeDtypeStruct(x, jnp.float32) for x in starts)]
    kernel = stream.kernel(body, "selective_scan_forward", plan.blocks, out_type, plan.scratch(sources, RING_SLOTS))
    y, last, *starts = kernel(*sources, A, state)
    return [y.reshape(u.shape), states_last(last), *starts]


class Place(NamedTuple):
    """A block's row of the batch, the number of its strip, and its part of (D / W)."""

    row: jax.Array
    number: jax.Array
    strip: pl.Slice

    def tokens(self, tile) -> pl.Slice:
        """Return the tokens of a tile."""
        return pl.ds(tile * TILE_TOKENS, TILE_TOKENS)


class Plan(NamedTuple):
    """How the work is cut: B, tiles of a sequence, and strips of 128 channels."""

    batch: int
    tiles: int
    strips: int

    @classmethod
    def of(cls, u) -> "Plan":
        """Return the plan for (B, T, D)."""
        batch, time, channels = u.shape
        return cls(batch, time // TILE_TOKENS, channels // (WARPS * WARP_CHANNELS))

    @property
    def blocks(self) -> int:
        """One for every strip of every row."""
        return self.batch * self.strips

    def here(self) -> Place:
        """Return this block's place; blocks of the same tokens follow each other."""
        block = lax.axis_index("block")
        number = lax.rem(block, self.strips)
        return Place(lax.div(block, self.strips), number, pl.ds(number * WARPS, WARPS))

    def sources(self, u, dt, BC, offsets, *others) -> list[jax.Array]:
        """Return what is copied by tiles, (B, T, D) as (B, T, D / W, W): u, dt, BC, the others, and any offsets."""
        u, dt, *rest = (x.reshape(*x.shape[:-1], -1, WARP_CHANNELS) for x in (u, dt, *others))
        return [u, dt, BC, *rest, *([] if offsets is None else [offsets])]

    def scratch(self, sources: list[jax.Array], slots: int) -> list:
        """Return a ring of tiles of each source, and its barriers."""
        rings = [plgpu.SMEM((slots, *tile_shape(x)), x.dtype) for x in sources]
        return [*rings, plgpu.Barrier(num_arrivals=len(sources), num_barriers=slots)]


def tile_shape(source) -> tuple[int, ...]:
    """Return the shape of a tile of a source, which is (B, T), (B, T, 2 N) or (B, T, D / W, W)."""
    if len(source.shape) == 2:
        return (ALIGNED_VALUES,)
    return (TILE_TOKENS, *((WARPS, WARP_CHANNELS) if len(source.shape) == 4 else source.shape[2:]))


def copy_tokens(at: Place, sources, tiles, filled, n, slot) -> None:
    """Start the copies of tile n of each source into a slot; of (B, T, D / W, W) a block takes its strip."""
    for source, tile in zip(sources, tiles, strict=True):
        strip = [at.strip] if len(source.shape) == 4 else []
        target = tile.at[slot] if len(source.shape) > 2 else tile.at[slot, pl.ds(0, TILE_TOKENS)]
        plgpu.copy_gmem_to_smem(source.at[(at.row, at.tokens(n), *strip)], target, filled.at[slot])


def scaled(A) -> jax.Array:
    """Return A times log2(e), its channels as those of a state."""
    return states_first(A * math.log2(math.e))


def states_first(x) -> jax.Array:
    """Return (..., D, N) as (..., D / W, N, WARP_LANE_GRID[1], LANE_CHANNELS)."""
    x = x.reshape(*x.shape[:-2], -1, WARP_CHANNELS, x.shape[-1]).swapaxes(-1, -2)
    return x.reshape(*x.shape[:-1], WARP_LANE_GRID[1], LANE_CHANNELS)


def states_last(x) -> jax.Array:
    """Undo `states_first`."""
    x = x.reshape(*x.shape[:-2], WARP_CHANNELS).swapaxes(-1, -2)
    return x.reshape(*x.shape[:-3], -1, x.shape[-1])


def load_coefficients(ref, k: int) -> jax.Array:
    """Load B (k = 0) or C (k = 1) of a token."""
    states = ref.shape[0] // 2
    return load_shared(ref.at[pl.ds(k * states, states)], COEFFICIENT_LAYOUT)


def load_channels(ref) -> jax.Array:
    """Load (WARPS, W) from shared memory as (WARPS, WARP_LANE_GRID[1], LANE_CHANNELS) in fp32."""
    return load_shared(ref.reshape(WARPS, WARP_LANE_GRID[1], LANE_CHANNELS), CHANNEL_LAYOUT)


def save_channels(ref, x) -> None:
    """Store what `load_channels` loads."""
    save(ref.reshape(WARPS, WARP_LANE_GRID[1], LANE_CHANNELS), x)


def across(channels, states) -> jax.Array:
    """Repeat one value per channel over its states."""
    return lax.broadcast_in_dim(channels, states.shape, [0, 2, 3])


def along(coefficients, states) -> jax.Array:
    """Repeat one value per state of a channel over the channels."""
    return lax.broadcast_in_dim(coefficients, states.shape, [1])


def offset(tiles, slot, i):
    """Return a token's offset, zero where there are none."""
    return tiles[0][slot, i] if tiles else 0.0


def decay(dt, A, offset) -> jax.Array:
    """Return how much of the state before a token is kept; A is `scaled`."""
    return jnp.exp2(across(dt, A) * A + offset)
