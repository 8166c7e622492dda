"""Softmax attention of one token over a short cache on Hopper, for many rows (see `ops/softmax_step.py`).

A block takes 16 heads of one row and walks over its keys and values, which come through a ring of tiles, as they lie
beside each other in memory. A warp has four heads, of which eight lanes have the channels each.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import stream
from pallas_kernels.hopper.mosaic import across, keep_plain, like, load_global, load_shared, save

BLOCK_HEADS, CHANNEL_MULTIPLE = 16, 16
TILE_KEYS, RING_SLOTS = 8, 3
LINE_CHANNELS = 128
"""Of what a copy takes of a token: whole lines of memory, wherever a head begins."""
LOG2E = 1.4426950408889634
LOWEST = -1e30
"""What a score is beyond a row's keys."""

_TILING = plgpu.Tiling(((1, BLOCK_HEADS, CHANNEL_MULTIPLE), (4, 2)))
LAYOUT = plgpu.Layout.TILED(_TILING, warp_dims=(-4,), lane_dims=(-3, -2), vector_dim=-1)
"""Of a tile (keys, heads, channels)."""
SCORES, OUTPUT = LAYOUT.reduce(2), LAYOUT.reduce(0)


@functools.partial(jax.jit, static_argnames="scale")
def step(q, k, v, length, *, scale: float):
    """Return [o] (B, H, K) of one query over the first `length` of its keys, zero where that is 0.

    Args:
      q: (B, H, K) bf16; H and K are multiples of 16.
      k, v: (B, S, H, K) bf16.
      length: (B,) int32, at most S.
      scale: of scores.
    """
    plan, most_tiles = _Plan.of(k), pl.cdiv(k.shape[1], TILE_KEYS)

    def body(q_ref, k_ref, v_ref, length_ref, o_ref, k_tiles, v_tiles, filled):
        row, heads, lines = plan.here()
        length = length_ref[row]
        tiles = lax.div(length + (TILE_KEYS - 1), TILE_KEYS)

        def fetch(n):
            slot, keys = lax.rem(n, RING_SLOTS), pl.ds(n * TILE_KEYS, TILE_KEYS)
            for source, target in ((k_ref, k_tiles), (v_ref, v_tiles)):
                plgpu.copy_gmem_to_smem(source.at[row, keys, lines], target.at[slot], filled.at[slot])

        def meet(n, sums):
            top, total, o = sums
            slot = lax.rem(n, RING_SLOTS)
            plgpu.barrier_wait(filled.at[slot])
            s = jnp.sum(load_tile(k_tiles.at[slot], plan.shape) * plan.down(q), axis=2)
            there = n * TILE_KEYS + plgpu.broadcasted_iota(jnp.int32, s.shape, 0, layout=SCORES) < length
            s = jnp.where(there, s, LOWEST)
            higher = jnp.maximum(top, jnp.max(s, axis=0))
            p, factor = jnp.exp2(s - lax.broadcast_in_dim(higher, s.shape, [1])), jnp.exp2(top - higher)
            v = jnp.where(plan.channels(there), load_tile(v_tiles.at[slot], plan.shape), 0.0)
            o = across(factor, o.shape) * o + jnp.sum(plan.channels(p) * v, axis=0)
            plgpu.commit_smem()  # all have read the tiles
            pl.when(n + RING_SLOTS < tiles)(lambda: fetch(n + RING_SLOTS))
            return higher, factor * total + jnp.sum(p, axis=0), o

        for n in range(min(RING_SLOTS, most_tiles)):
            pl.when(n < tiles)(functools.partial(fetch, n))
        keep_plain(k_tiles, v_tiles)
        q = load_global(q_ref.at[row, heads], OUTPUT).astype(jnp.float32) * (scale * LOG2E)
        nothing = jnp.full(BLOCK_HEADS, LOWEST), jnp.zeros(BLOCK_HEADS), jnp.zeros((BLOCK_HEADS, plan.channel_count))
        _, total, o = lax.fori_loop(0, tiles, meet, nothing)
        save(o_ref.at[row, heads], o * across(1.0 / jnp.where(total > 0, total, 1.0), o.shape))

    tiles = plgpu.SMEM((RING_SLOTS, *plan.lines_shape), k.dtype)
    scratch = [tiles, tiles, plgpu.Barrier(num_arrivals=2, num_barriers=RING_SLOTS)]
    kernel = stream.kernel(body, "attention_step", plan.blocks, [like(q)], scratch)
    return kernel(q, *map(plan.by_lines, (k, v)), length)


def load_tile(lines, shape: tuple[int, int, int]) -> jax.Array:
    """Load a tile of what was copied by lines."""
    return load_shared(lines.reshape(*shape), LAYOUT)


class _Plan(NamedTuple):
    """How the work is cut: rows, blocks of a row, and K."""

    batch: int
    row_blocks: int
    channel_count: int

    @classmethod
    def of(cls, k) -> "_Plan":
        batch, _, heads, channels = k.shape
        return cls(batch, heads // BLOCK_HEADS, channels)

    @property
    def blocks(self) -> int:
        return self.batch * self.row_blocks

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of a tile."""
        return TILE_KEYS, BLOCK_HEADS, self.channel_count

    @property
    def lines_shape(self) -> tuple[int, int, int]:
        """Of a tile as it is copied."""
        return TILE_KEYS, BLOCK_HEADS * self.channel_count // LINE_CHANNELS, LINE_CHANNELS

    def by_lines(self, x) -> jax.Array:
        return x.reshape(*x.shape[:2], -1, LINE_CHANNELS)

    def here(self) -> tuple[jax.Array, pl.Slice, pl.Slice]:
        """Return this block's row, heads, and lines of its tokens."""
        block, count = lax.axis_index("block"), self.lines_shape[1]
        row, part = lax.div(block, self.row_blocks), lax.rem(block, self.row_blocks)
        return row, pl.ds(part * BLOCK_HEADS, BLOCK_HEADS), pl.ds(part * count, count)

    def down(self, q) -> jax.Array:
        """Repeat a query for all keys."""
        return lax.broadcast_in_dim(q, self.shape, [1, 2])

    def channels(self, x) -> jax.Array:
        """Repeat one value per key and head over the channels."""
        return lax.broadcast_in_dim(x, self.shape, [0, 1])
