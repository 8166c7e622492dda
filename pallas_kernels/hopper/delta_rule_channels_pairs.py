"""What the tokens of a chunk are to each other in the delta rule whose channels decay each by itself, on Hopper.

In the notation of `delta_rule_channels.py`: P and T, and the queries and keys that carry their decays. Each warpgroup
takes chunk after chunk, and has the next one copied while it makes the inverse of one.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import channel_decays, inverses, mosaic
from pallas_kernels.hopper.channel_decays import LEVELS, PART_CHANNELS, SINCE, UNTIL
from pallas_kernels.hopper.chunk_turns import Turn, each_chunk
from pallas_kernels.hopper.delta_rule_walk import numbers_of
from pallas_kernels.hopper.mosaic import CHUNK_TOKENS, PAIRS_SHAPE

GROUPS = 2
"""Warpgroups of a block."""


def pairs(q, k, high, low, beta, *, scale: float, blocks: int) -> list[jax.Array]:
    """Return P and T of every chunk, (B, T, H, 64), and Q, K and R like k, and exp(c_C), (B, H, chunks K) fp32.

    Args:
      q, k: (B, T, H, K), K 64 or 128, T a multiple of 64.
      high, low: parts of the log-decays to the base 2, like k, whose sum they are.
      beta: (B, H, T) fp32.
      blocks: that run at the same time. Each warpgroup of theirs takes chunk after chunk.
    """
    batch, time, heads, keys = k.shape
    chunks = time // CHUNK_TOKENS
    parts = [pl.ds(i, PART_CHANNELS) for i in range(0, keys, PART_CHANNELS)]

    def make(turn: Turn, tiles, scratch, targets):
        q_tile, k_tile, high_tile, low_tile, beta_tile, late_tile = tiles
        key_tile, x_tile, y_tile, x_strip, y_strip = scratch

        def weigh(tile, part, weight):
            return mosaic.load(tile.at[:, part]).astype(jnp.float32) * weight

        def decays_of(part, border):
            rows, columns = channel_decays.numbers()
            M = channel_decays.between(rows, columns, border)
            return channel_decays.weights(M, (high_tile.at[:, part], low_tile.at[:, part]))

        def carry_decays():
            """Write what carries decays from the chunk's beginning and to its end."""
            late = plgpu.load(late_tile, layout=mosaic.ROW_LAYOUT)
            for i, part in enumerate(parts):
                since = decays_of(part, jnp.int32(SINCE))
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                mosaic.save(x_tile, weigh(q_tile, part, scale * since))
                mosaic.save(y_tile, weigh(k_tile, part, since))
                until = decays_of(part, jnp.int32(UNTIL)) * mosaic.across(late, PAIRS_SHAPE)
                mosaic.save(key_tile.at[i], weigh(k_tile, part, until))
                plgpu.commit_smem()
                for tile, target in zip((x_tile, y_tile, key_tile.at[i]), targets[2:5], strict=True):
                    plgpu.copy_smem_to_gmem(tile, target.at[turn.row, turn.tokens, turn.head, part])
                whole = sum(mosaic.load(x.at[:, part].T).astype(jnp.float32).sum(axis=1) for x in (high_tile, low_tile))
                channels = pl.ds(turn.chunk * keys + i * PART_CHANNELS, PART_CHANNELS)
                targets[5].at[turn.row, turn.head, channels][...] = jnp.exp2(whole)

        def same_token():
            def multiply(asked):
                mosaic.multiply(asked, q_tile, k_tile.T)
                return asked[...]

            asked = mosaic.products(multiply, PAIRS_SHAPE)
            rows, columns = channel_decays.numbers()
            same = mosaic.across(rows, PAIRS_SHAPE) == mosaic.down(columns, PAIRS_SHAPE)
            return jnp.where(same, asked, 0.0)

        def add_level(level, found):
            rows, columns = channel_decays.numbers()
            M = channel_decays.between(rows, columns, channel_decays.border(rows, level))
            queries, own_keys = [], []
            plgpu.commit_smem()  # all have read what is overwritten
            for i, part in enumerate(parts):
                weight = channel_decays.weights(M, (high_tile.at[:, part], low_tile.at[:, part]))
                queries.append(weigh(q_tile, part, weight).astype(k.dtype))
                own_keys.append(weigh(k_tile, part, weight).astype(k.dtype))
                mosaic.save(key_tile.at[i], own_keys[-1])
            plgpu.commit_smem()

            def multiply(asked, seen):
                for i in range(len(parts)):
                    mosaic.multiply(asked, queries[i], key_tile.at[i].T)
                    mosaic.multiply(seen, own_keys[i], key_tile.at[i].T)
                return asked[...], seen[...]

            made = mosaic.products(multiply, PAIRS_SHAPE, PAIRS_SHAPE)
            rows, columns = channel_decays.numbers()
            met = channel_decays.meet_later(rows, columns, level)
            return tuple(x + jnp.where(met, y, 0.0) for x, y in zip(found, made, strict=True))

        carry_decays()
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        asked, seen = lax.fori_loop(0, LEVELS, add_level, (same_token(), mosaic.zeros(PAIRS_SHAPE)))
        beta = numbers_of(beta_tile)
        mosaic.save(y_tile, asked * (scale * beta))
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(y_tile, targets[0].at[turn.row, turn.tokens, turn.head])
        M = seen * beta
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        turn.fetch_next()
        t = inverses.inverse_by_strips(M, x_tile, y_tile, x_strip, y_strip)
        mosaic.save(x_tile, t)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(x_tile, targets[1].at[turn.row, turn.tokens, turn.head])

    square = jax.ShapeDtypeStruct((batch, time, heads, CHUNK_TOKENS), k.dtype)
    kept = jax.ShapeDtypeStruct((batch, heads, chunks * keys), jnp.float32)
    scratch = [
        mosaic.swizzled((GROUPS, len(parts), *PAIRS_SHAPE), mosaic.WIDE_SWIZZLE),
        *(mosaic.swizzled((GROUPS, *PAIRS_SHAPE), mosaic.WIDE_SWIZZLE) for _ in range(2)),
        inverses.strips(GROUPS),
        inverses.strips(GROUPS),
    ]
    return each_chunk(
        make,
        "delta_rule_channels_pairs",
        [q, k, high, low],
        [(beta, 2)],
        [square, square, mosaic.like(k), mosaic.like(k), mosaic.like(k), kept],
        scratch,
        groups=GROUPS,
        blocks=blocks,
    )
