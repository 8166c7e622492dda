"""Mamba's selective scan on Hopper: the backward pass (see `selective_scan.py`).

Tiles are walked from the last to the first. The forward pass has saved the state before each: from it those of the tile
are computed again, and every second one waits in shared memory. Then the tokens are walked backwards, with g = dL/dh of
what has still to come in registers:

    dh_t = C_t dy_t + g_{t+1}        g_t = exp(dt_t A) dh_t        q_t = g_t h_{t-1}
    du_t = dt_t s_t                  s_t = sum_n dh_t B_t          ddt_t = u_t s_t + sum_n q_t A
    dB_t = sum_d dh_t dt_t u_t       dC_t = sum_d h_t dy_t         dA = sum_t q_t dt_t

Sums over d are taken over a lane's channels at once, over the lanes and warps a tile at a time, and over blocks by XLA.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import split
from pallas_kernels.hopper import stream, strips
from pallas_kernels.hopper.mosaic import WARPS, await_warp, like, load_global, load_shared, save
from pallas_kernels.hopper.selective_scan import (
    LANE_CHANNELS,
    STATE_LAYOUT,
    STEP_TOKENS,
    TILE_TOKENS,
    WARP_CHANNELS,
    WARP_LANE_GRID,
    Steps,
    Token,
    across,
    along,
    biases_of,
    save_channels,
    scaled,
    sources_of,
    states_first,
    states_last,
    step_tiles_of,
)

RING_SLOTS = 2
TILE_PAIRS = TILE_TOKENS // 2
"""Of tokens in a tile: the state between those of a pair stays in registers."""
PAIR_LAYOUT = plgpu.Layout.TILED(
    plgpu.Tiling(((4, 8, WARP_LANE_GRID[1]), (2,))), warp_dims=(-4,), lane_dims=(-3, -2), vector_dim=-1
)
"""The layout of a pair's dB and dC, (4, N, WARP_LANE_GRID[1])."""


@jax.jit
def backward(u, dt, A, BC, starts, dy, dlast, offsets=None, bias=None):
    """Return du, ddt, dA, dBC, the gradient of the state before the first token, and that of any bias.

    Args:
      starts: the states before every tile, as `forward` returns them.
      dy: (B, T, D), like u.
      dlast: the gradient of the state after the last token, (B, D, N) fp32.
      u, dt, A, BC, offsets, bias: as of `forward`.
    """
    plan = strips.Plan.of(u, TILE_TOKENS, WARP_CHANNELS)
    sources, biases = sources_of(u, dt, BC, offsets, dy), biases_of(bias)
    A, dlast = scaled(A), states_first(dlast)

    def body(*refs):
        source_refs, given, results, tiles, scratch = split(
            refs, len(sources), 3 + len(biases), 5 + len(biases), len(sources)
        )
        u_tile, raw_tile, BC_tile, dy_tile, *offset_tiles = tiles
        start_tile, filled, (h_tile, parts_tile), *step_tiles = scratch
        A_ref, starts_ref, dlast_ref, *bias_refs = given
        du_ref, ddt_ref, dBC_ref, dA_ref, dstate_ref, *dbias_refs = results
        at = plan.here()

        def fetch(n, slot):
            tile = plan.tiles - 1 - n
            strips.copy_tokens(at, source_refs, tiles, filled, tile, slot)
            plgpu.copy_gmem_to_smem(starts_ref.at[at.row, tile, at.strip], start_tile.at[slot], filled.at[slot])

        ring = stream.Ring(plan.tiles, RING_SLOTS, filled, fetch)
        A = load_global(A_ref.at[at.strip], STATE_LAYOUT)
        steps = Steps.of(bias_refs, step_tiles, raw_tile, at)

        def load_pair(slot, pair, *dy_tile):
            inputs = u_tile.at[slot], steps.tile(slot), *(tile.at[slot] for tile in (BC_tile, *offset_tiles))
            return [Token.load(inputs, 2 * pair + i, *(tile.at[slot] for tile in dy_tile)) for i in range(2)]

        def advance(token, h):
            """Return the state after a token, and how much is kept of the one before."""
            kept = token.kept(A)
            return kept * h + token.written(h), kept

        def retreat(slot, i, parts, token, before, kept, after, carry):
            """Return g before a token, and dA with it; du and ddt replace u and dt, dB and dC go to the two parts."""
            g, dA = carry
            u, dt, B, C, _, dy = token
            dh = g + across(dy, g) * along(C, g)
            save(parts[0], (dh * across(dt * u, g)).sum(axis=3))
            save(parts[1], (after * across(dy, g)).sum(axis=3))
            s = (dh * along(B, g)).sum(axis=1)
            g = dh * kept
            q = g * before
            save_channels(u_tile.at[slot, i], dt * s)
            save_channels(steps.tile(slot).at[i], u * s + (q * A).sum(axis=1) * math.log(2))
            return g, dA + q * across(dt, g)

        def step(n, slot, carry):
            carry, dbias = carry
            steps.make(slot)

            def again(pair, h):
                tokens = load_pair(slot, pair)
                save(h_tile.at[:, pair], h)
                for token in tokens:
                    h, _ = advance(token, h)
                return h

            def back(reverse, carry):
                pair = TILE_PAIRS - 1 - reverse
                tokens = load_pair(slot, pair, dy_tile)
                start = load_shared(h_tile.at[:, pair], STATE_LAYOUT)
                await_warp()
                middle, kept_first = advance(tokens[0], start)
                end, kept_second = advance(tokens[1], middle)
                parts = [parts_tile.at[:, pair, k] for k in range(4)]
                carry = retreat(slot, 2 * pair + 1, parts[2:], tokens[1], middle, kept_second, end, carry)
                return retreat(slot, 2 * pair, parts[:2], tokens[0], start, kept_first, middle, carry)

            h = load_states(start_tile.at[slot])
            save(h_tile.at[:, TILE_PAIRS - 1], lax.fori_loop(0, TILE_PAIRS - 1, again, h))
            carry = lax.fori_loop(0, TILE_PAIRS, back, carry)
            plgpu.commit_smem()
            for pair in range(TILE_PAIRS):
                total = functools.reduce(
                    jnp.add, (load_shared(parts_tile.at[warp, pair], PAIR_LAYOUT) for warp in range(WARPS))
                )
                save_pair(BC_tile.at[slot, pl.ds(2 * pair, 2)], total.sum(axis=2))
            return carry, steps.unmade(slot, dbias)

        def put(n, slot):
            tile = plan.tiles - 1 - n
            strips.copy_results(at, [u_tile, raw_tile], [du_ref, ddt_ref], tile, slot)
            part = dBC_ref.at[at.number, at.row, at.tokens(tile)]
            plgpu.copy_smem_to_gmem(BC_tile.at[slot], part, commit_group=False)

        g = load_global(dlast_ref.at[at.row, at.strip], STATE_LAYOUT)
        (g, dA), dbias = ring.walk(step, put, ((g, jnp.zeros_like(g)), [jnp.zeros_like(steps.bias) for _ in bias_refs]))
        save(dA_ref.at[at.row, at.strip], dA)
        save(dstate_ref.at[at.row, at.strip], g)
        for ref, total in zip(dbias_refs, dbias, strict=True):
            save(ref.at[at.row, :, at.strip], total)

    dBC_type = jax.ShapeDtypeStruct((plan.strips, *BC.shape), jnp.float32)
    out_type = [*map(like, sources[:2]), dBC_type, like(dlast), like(dlast)]
    out_type += [strips.per_strip(plan, STEP_TOKENS) for _ in biases]
    starts = starts.reshape(*starts.shape[:4], WARP_CHANNELS)
    start_shape = WARPS, *starts.shape[3:]
    scratch = [*plan.scratch(sources, RING_SLOTS, start_shape), _states_or_parts(A.shape[1])]
    scratch += step_tiles_of(plan, biases)
    kernel = stream.kernel(body, "selective_scan_backward", plan.blocks, out_type, scratch)
    du, ddt, dBC, dA, dstate, *dbias = kernel(*sources, A, starts, dlast, *biases)
    return [
        du.reshape(u.shape),
        ddt.reshape(u.shape),
        states_last(dA.sum(axis=0)),
        dBC.sum(axis=0),
        states_last(dstate),
        *(x.sum(axis=(0, 1)).reshape(-1) for x in dbias),
    ]


def _states_or_parts(states: int):
    """Return the memory of the states before every pair, which give way to the pair's dB and dC.

    What a warp writes of a pair replaces, of its own alone, states of that pair and of later ones, which it has read:
    both begin together, and states take no more than parts do.
    """
    parts = 4 * WARP_LANE_GRID[1]
    shapes = (
        (WARPS, TILE_PAIRS * parts // WARP_CHANNELS, states, WARP_LANE_GRID[1], LANE_CHANNELS),
        (WARPS, TILE_PAIRS, 4, states, WARP_LANE_GRID[1]),
    )
    return plgpu.RefUnion(*(plgpu.SMEM(shape, jnp.float32) for shape in shapes))


def load_states(ref) -> jax.Array:
    """Load (WARPS, N, W) of shared memory as states."""
    return load_shared(ref.reshape(*ref.shape[:2], WARP_LANE_GRID[1], LANE_CHANNELS), STATE_LAYOUT)


def save_pair(ref, x) -> None:
    """Store (4, N) to shared memory, (2, 2 N)."""
    save(ref.reshape(*x.shape), x)
