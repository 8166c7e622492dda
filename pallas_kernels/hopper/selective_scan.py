"""Mamba's selective scan on Hopper: the forward pass (see `ops/selective_scan.py`).

    h_t = exp(dt_t A + offset_t) h_{t-1} + dt_t u_t B_t        y_t = sum_n C_t[n] h_t[n]

A block takes 64 channels of one sequence, keeps their states in registers, and walks over the tokens in tiles
(`stream.py`): what has the size of all states, (B, T, D, N), never reaches memory. The offset of a document's first
token is so low that nothing is kept of the documents before. Steps may be given raw, in bf16: dt_t is then the softplus
of raw_t + bias, which a tile's lanes compute first, each for channels of its own.

Each of a block's four warps takes W channels (`strips.py`). Within a warp the states of a channel are spread over four
lanes, and the channels over eight: few shuffles sum over either.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import split
from pallas_kernels.hopper import stream, strips
from pallas_kernels.hopper.mosaic import WARP_LANES, WARPS, await_warp, like, load_global, load_shared, save

TILE_TOKENS, MAX_FORWARD_TOKENS = 8, 16
"""Of the backward pass's tiles, of which the states before are kept, and of the forward pass's at most.

T is a multiple of the first, and the forward pass takes the largest tiles that divide it.
"""
GROUP_TOKENS = 4
"""Tokens that are loaded together: what waits for no state is computed beside what does."""
PART_GROUPS = TILE_TOKENS // GROUP_TOKENS
RING_SLOTS = 4
WARP_CHANNELS = 16
"""Of a warp, W: with few a multiprocessor has many blocks, which wait for each other less."""
WARP_LANE_GRID = (4, 8)
"""Of a warp: over the states of a channel, and over the channels."""
LANE_CHANNELS = WARP_CHANNELS // WARP_LANE_GRID[1]
"""Channels that lie beside each other in a lane."""

STATE_LAYOUT = plgpu.Layout.TILED(
    plgpu.Tiling(((WARPS, *WARP_LANE_GRID, LANE_CHANNELS),)), warp_dims=(-4,), lane_dims=(-3, -2), vector_dim=-1
)
"""The layout of a block's states, (WARPS, N, WARP_LANE_GRID[1], LANE_CHANNELS)."""
CHANNEL_LAYOUT = STATE_LAYOUT.reduce(1)
"""Of one value per channel."""
COEFFICIENT_LAYOUT = STATE_LAYOUT.reduce((0, 2, 3))
"""Of one value per state of a channel, (N)."""


STEP_TOKENS = WARP_LANES // WARP_CHANNELS
STEP_LAYOUT = plgpu.Layout.TILED(
    plgpu.Tiling(((STEP_TOKENS, WARPS, WARP_CHANNELS), (1,))), warp_dims=(-3,), lane_dims=(-4, -2), vector_dim=-1
)
"""The layout of one value per lane, (STEP_TOKENS, WARPS, W)."""
SERIES_TERMS, SERIES_LIMIT = 7, 0.125
"""Of log(1 + t), and for which t: beyond, the approximate logarithm is exact to 2e-6."""


@functools.partial(jax.jit, static_argnames="with_starts")
def forward(u, dt, A, BC, state, offsets=None, bias=None, *, with_starts: bool):
    """Return y like u, the state after the last token (B, D, N) fp32 and, where asked for, those before every tile.

    Args:
      u: (B, T, D) bf16 or fp32; T is a multiple of 8, D of 128.
      dt: (B, T, D) fp32, or raw and like u, where there is a bias.
      A: (D, N) fp32; N is a multiple of 8.
      BC: (B, T, 2 N) fp32, B beside C.
      state: the state before the first token, (B, D, N) fp32.
      offsets: exponents to add, (B, T) fp32 or None.
      bias: of raw steps, (D,) fp32.
    """
    plan = strips.Plan.of(u, math.gcd(u.shape[1], MAX_FORWARD_TOKENS), WARP_CHANNELS)
    sources, biases = sources_of(u, dt, BC, offsets), biases_of(bias)
    A, state = scaled(A), states_first(state)
    parts = plan.tile_tokens // TILE_TOKENS
    starts = [(plan.batch, plan.tiles * parts, *A.shape)] if with_starts else []

    def body(*refs):
        source_refs, (A_ref, state_ref), bias_refs, (y_ref, last_ref), refs = split(
            refs, len(sources), 2, len(biases), 2
        )
        starts_refs, tiles, [filled, *step_tiles] = split(refs, len(starts), len(sources))
        u_tile, at = tiles[0], plan.here()

        def fetch(n, slot):
            strips.copy_tokens(at, source_refs, tiles, filled, n, slot)

        ring = stream.Ring(plan.tiles, RING_SLOTS, filled, fetch)
        A = load_global(A_ref.at[at.strip], STATE_LAYOUT)
        steps = Steps.of(bias_refs, step_tiles, tiles[1], at)

        def step(n, slot, h):
            steps.make(slot)
            of_slot = [tile.at[slot] for tile in tiles]
            of_slot[1] = steps.tile(slot)

            def part(i, h):
                for ref in starts_refs:
                    save(ref.at[at.row, n * parts + i, at.strip], h)
                return lax.fori_loop(i * PART_GROUPS, (i + 1) * PART_GROUPS, group, h)

            def group(i, h):
                places = [i * GROUP_TOKENS + j for j in range(GROUP_TOKENS)]
                tokens = [Token.load(of_slot, place) for place in places]
                await_warp()
                for place, token in zip(places, tokens, strict=True):
                    h = token.kept(A) * h + token.written(h)
                    save_channels(u_tile.at[slot, place], (h * along(token.C, h)).sum(axis=1))
                return h

            return lax.fori_loop(0, parts, part, h)

        def put(n, slot):
            strips.copy_results(at, [u_tile], [y_ref], n, slot)

        state = load_global(state_ref.at[at.row, at.strip], STATE_LAYOUT)
        save(last_ref.at[at.row, at.strip], ring.walk(step, put, state))

    out_type = [like(sources[0]), like(state), *(jax.ShapeDtypeStruct(x, jnp.float32) for x in starts)]
    scratch = [*plan.scratch(sources, RING_SLOTS), *step_tiles_of(plan, biases)]
    kernel = stream.kernel(body, "selective_scan_forward", plan.blocks, out_type, scratch)
    y, last, *starts = kernel(*sources, A, state, *biases)
    return [y.reshape(u.shape), states_last(last), *starts]


def sources_of(u, dt, BC, offsets, *others) -> list[jax.Array]:
    """Return what is copied by tiles, (B, T, D) by warps: u, dt, BC, the others, and any offsets."""
    u, dt, *rest = (strips.by_warps(x, WARP_CHANNELS) for x in (u, dt, *others))
    return [u, dt, BC, *rest, *([] if offsets is None else [offsets])]


def biases_of(bias) -> list[jax.Array]:
    """Return the bias of raw steps as (1, D / W, W), if there is one."""
    return [] if bias is None else [strips.by_warps(bias[None], WARP_CHANNELS)]


def step_tiles_of(plan: strips.Plan, biases: list) -> list:
    """Return the memory of a tile's steps, where they are made of raw ones."""
    return [plgpu.SMEM((plan.tile_tokens, WARPS, WARP_CHANNELS), jnp.float32) for _ in biases]


class Steps(NamedTuple):
    """A tile's steps: where raw ones arrive, and with a bias where they are made, `STEP_TOKENS` tokens at a time."""

    raw: Any
    made: Any
    bias: Any

    @classmethod
    def of(cls, bias_refs, step_tiles, raw_tile, at: strips.Place) -> "Steps":
        """Return those of a block."""
        if not bias_refs:
            return cls(raw_tile, None, None)
        bias = load_global(bias_refs[0].at[0, at.strip], STEP_LAYOUT.reduce(0))
        return cls(raw_tile, step_tiles[0], lax.broadcast_in_dim(bias, (STEP_TOKENS, *bias.shape), [1, 2]))

    def tile(self, slot):
        """Return the tile of a slot's steps."""
        return self.raw.at[slot] if self.bias is None else self.made

    def make(self, slot) -> None:
        """Make a slot's steps; what lanes of the warp have read of the tile before is past."""
        if self.bias is None:
            return
        await_warp()
        for tokens in self.tokens():
            save(self.made.at[tokens], softplus(self.biased(slot, tokens)))
        await_warp()

    def unmade(self, slot, totals: list) -> list:
        """Replace a slot's raw steps by their gradients, given those of the steps; return totals with them added."""
        if self.bias is None:
            return totals
        for tokens in self.tokens():
            gradient = load_shared(self.made.at[tokens], STEP_LAYOUT) * stream.sigmoid(self.biased(slot, tokens))
            save(self.raw.at[slot, tokens], gradient)
            totals = [total + gradient for total in totals]
        return totals

    def biased(self, slot, tokens: pl.Slice) -> jax.Array:
        """Return what the steps of some tokens are the softplus of."""
        return load_shared(self.raw.at[slot, tokens], STEP_LAYOUT) + self.bias

    def tokens(self) -> list[pl.Slice]:
        """Return a tile's tokens by lanes."""
        return [pl.ds(i, STEP_TOKENS) for i in range(0, self.made.shape[0], STEP_TOKENS)]


def softplus(x) -> jax.Array:
    """Return log(1 + exp(x)), by a series where what is added to 1 is small."""
    t = jnp.exp(-jnp.abs(x))
    series = jnp.full_like(t, 1.0 / SERIES_TERMS)
    for n in range(SERIES_TERMS - 1, 0, -1):
        series = 1.0 / n - t * series
    return jnp.maximum(x, 0.0) + jnp.where(t < SERIES_LIMIT, t * series, jnp.log(1.0 + t))


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


class Token(NamedTuple):
    """What a block has of a token: u and dt of its channels, B and C, the exponent to add, and where asked for dy."""

    u: jax.Array
    dt: jax.Array
    B: jax.Array
    C: jax.Array
    offset: jax.Array | None
    dy: jax.Array | None = None

    @classmethod
    def load(cls, tiles, i, dy_tile=None) -> "Token":
        """Load token i of tiles of u, dt, B beside C, and any offsets."""
        u_tile, dt_tile, BC_tile, *offset_tiles = tiles
        u, dt = (load_channels(tile.at[i]) for tile in (u_tile, dt_tile))
        states = BC_tile.shape[1] // 2
        B, C = (load_shared(BC_tile.at[i, pl.ds(k * states, states)], COEFFICIENT_LAYOUT) for k in range(2))
        offset = offset_tiles[0][i] if offset_tiles else None
        return cls(u, dt, B, C, offset, None if dy_tile is None else load_channels(dy_tile.at[i]))

    def kept(self, A) -> jax.Array:
        """Return how much of the state before the token is kept; A is `scaled`."""
        exponent = across(self.dt, A) * A
        return jnp.exp2(exponent if self.offset is None else exponent + self.offset)

    def written(self, states) -> jax.Array:
        """Return what the token adds to the states."""
        return across(self.dt * self.u, states) * along(self.B, states)


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
