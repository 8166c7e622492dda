"""What the tokens of a chunk are to each other under a diagonal plus low rank transition, on Hopper.

In the notation of `dplr.py`: P, R, M and T, and the queries and keys that carry their decays. Each warpgroup takes
chunk after chunk, and has the next one copied while it makes the inverse of one.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import channel_decays, inverses, mosaic
from pallas_kernels.hopper.channel_decays import LEVELS, PART_CHANNELS, SINCE, UNTIL
from pallas_kernels.hopper.chunk_turns import Turn, each_chunk
from pallas_kernels.hopper.mosaic import CHUNK_TOKENS, PAIRS_SHAPE

GROUPS = 2
"""Warpgroups of a block."""


def pairs(q, a, k, b, high, low, *, scale: float, blocks: int) -> list[jax.Array]:
    """Return P, R, M, T - I of every chunk, and Q, A, K and B, all like k, and exp(c_C), (B, H, chunks 64) fp32.

    Args:
      q, a, k, b: (B, T, H, 64), T a multiple of 64, a those of decayed states.
      high, low: parts of the log-decays to the base 2, like k, whose sum they are.
      blocks: that run at the same time. Each warpgroup of theirs takes chunk after chunk.
    """
    batch, time, heads, keys = k.shape

    def make(turn: Turn, tiles, scratch, targets):
        q_tile, a_tile, k_tile, b_tile, high_tile, low_tile = tiles
        made_tiles, x_strip, y_strip, level_tiles = scratch
        x_tile, y_tile, own_tile, other_tile = (made_tiles.at[i] for i in range(4))
        *squares, kept_ref = targets

        def write(tile, target) -> None:
            plgpu.copy_smem_to_gmem(tile, target.at[turn.row, turn.tokens, turn.head])

        def weigh(tile, weight):
            return mosaic.load(tile).astype(jnp.float32) * weight

        def decays_of(border: int):
            rows, columns = channel_decays.numbers()
            M = channel_decays.between(rows, columns, jnp.int32(border))
            return channel_decays.weights(M, (high_tile, low_tile))

        def carry_decays():
            """Write what carries decays from the chunk's beginning and to its end."""
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            since = decays_of(SINCE)
            mosaic.save(x_tile, weigh(q_tile, scale * since))
            mosaic.save(y_tile, weigh(a_tile, since))
            until = decays_of(UNTIL)
            mosaic.save(own_tile, weigh(k_tile, until))
            mosaic.save(other_tile, weigh(b_tile, until))
            plgpu.commit_smem()
            for tile, target in zip((x_tile, y_tile, own_tile, other_tile), squares[4:], strict=True):
                write(tile, target)
            whole = sum(mosaic.load(x.T).astype(jnp.float32).sum(axis=1) for x in (high_tile, low_tile))
            channels = pl.ds(turn.chunk * keys, keys)
            kept_ref.at[turn.row, turn.head, channels][...] = jnp.exp2(whole)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        def same():
            rows, columns = channel_decays.numbers()
            return mosaic.across(rows, PAIRS_SHAPE) == mosaic.down(columns, PAIRS_SHAPE)

        def same_token():
            def multiply(of_own, of_other):
                mosaic.multiply(of_own, q_tile, k_tile.T)
                mosaic.multiply(of_other, q_tile, b_tile.T)
                return of_own[...], of_other[...]

            found, zeros = mosaic.products(multiply, PAIRS_SHAPE, PAIRS_SHAPE), mosaic.zeros(PAIRS_SHAPE)
            found = (jnp.where(same(), scale * x, 0.0) for x in found)
            return (*(x.astype(k.dtype) for x in (*found, zeros)), zeros)

        def add_level(level, found):
            weight = channel_decays.weights(level_tiles.at[level], (high_tile, low_tile))
            plgpu.commit_smem()  # all have read what is overwritten
            mosaic.save(own_tile, weigh(k_tile, weight))
            mosaic.save(other_tile, weigh(b_tile, weight))
            readers = [weigh(*x).astype(k.dtype) for x in ((q_tile, scale * weight), (a_tile, weight))]
            plgpu.commit_smem()

            def read(reader, of_own, of_other):
                mosaic.multiply(of_own, reader, own_tile.T)
                mosaic.multiply(of_other, reader, other_tile.T)
                return of_own[...], of_other[...]

            both = []
            for i, reader in enumerate(readers):
                made = mosaic.products(functools.partial(read, reader), PAIRS_SHAPE, PAIRS_SHAPE)
                rows, columns = channel_decays.numbers()
                met = channel_decays.meet_later(rows, columns, level)
                pairs = zip(made, found[2 * i : 2 * i + 2], strict=True)
                both += [jnp.where(met, x.astype(y.dtype), y) for x, y in pairs]
            return tuple(both)

        carry_decays()
        asked, asked_other, seen, seen_other = lax.fori_loop(0, LEVELS, add_level, same_token())
        plgpu.commit_smem()  # all have read what is overwritten
        for tile, x in ((x_tile, asked), (y_tile, asked_other), (own_tile, seen)):
            mosaic.save(tile, x)
        plgpu.commit_smem()
        for tile, target in zip((x_tile, y_tile, own_tile), squares[:3], strict=True):
            write(tile, target)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        turn.fetch_next()
        t = inverses.inverse_by_strips(-seen_other, x_tile, y_tile, x_strip, y_strip)
        mosaic.save(x_tile, jnp.where(same(), t - 1.0, t))
        plgpu.commit_smem()
        write(x_tile, squares[3])

    assert keys == PART_CHANNELS, keys
    kept = jax.ShapeDtypeStruct((batch, heads, time // CHUNK_TOKENS * keys), jnp.float32)
    scratch = [
        mosaic.swizzled((GROUPS, 4, *PAIRS_SHAPE), mosaic.WIDE_SWIZZLE),
        inverses.strips(GROUPS),
        inverses.strips(GROUPS),
    ]
    results = [*(mosaic.like(k) for _ in range(8)), kept]
    arrays = [q, a, k, b, high, low]
    return each_chunk(
        make,
        "dplr_pairs",
        arrays,
        [],
        results,
        scratch,
        groups=GROUPS,
        blocks=blocks,
        shared=[channel_decays.level_tiles()],
        prepare=channel_decays.write_levels,
    )
