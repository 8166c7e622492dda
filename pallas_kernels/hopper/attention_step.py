"""Softmax attention of one token over a short cache or a ring on Hopper, for many rows (see `ops/softmax_step.py`).

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
    plan = _Plan.of(k)

    def body(q_ref, k_ref, v_ref, length_ref, o_ref, *scratch):
        row, heads, lines = plan.here()
        walk = _Walk(plan, (k_ref.at[row, :, lines], v_ref.at[row, :, lines]), scratch, length_ref[row])
        q = load_global(q_ref.at[row, heads], OUTPUT).astype(jnp.float32) * (scale * LOG2E)
        nothing = jnp.full(BLOCK_HEADS, LOWEST), jnp.zeros(BLOCK_HEADS), jnp.zeros((BLOCK_HEADS, plan.channel_count))
        save(o_ref.at[row, heads], walk.read(q, nothing))

    kernel = stream.kernel(body, "attention_step", plan.blocks, [like(q)], plan.scratch(k.dtype))
    return kernel(q, *map(plan.by_lines, (k, v)), length)


@functools.partial(jax.jit, static_argnames="scale")
def ring_step(heads, k, v, length, turns, *, scale: float):
    """Return o (B, H, K) of a token that takes its place in a ring, and the ring's keys and values, where they lie.

    Its queries and keys turn with their place: x C + swap(x) S, where swap exchanges the halves of the channels. It
    meets its own key in registers, and what its slot held is not looked at.

    Args:
      heads: (B, 3 H, K) bf16, queries, keys and values of the token; H and K are multiples of 16.
      k, v: (B, S, H, K) bf16.
      length: of the tokens before, of which the last S are there, (B,) int32.
      turns: C and S (B, 2, K) fp32.
      scale: of scores.
    """
    plan, (batch, slots, head_count, channels) = _Plan.of(k), k.shape

    def body(heads_ref, length_ref, turns_ref, k_ref, v_ref, o_ref, twice, k_own, v_own, *scratch):
        row, own, lines = plan.here()
        length = length_ref[row]
        slot = lax.rem(length, slots)
        ring = k_ref.at[row, :, lines], v_ref.at[row, :, lines]
        walk = _Walk(plan, ring, scratch, jnp.minimum(length, slots), slot)
        keep_plain(twice, k_own, v_own)
        C, S = (
            lax.broadcast_in_dim(load_global(turns_ref.at[row, i], OUTPUT.reduce(0)), plan.shape[1:], [1])
            for i in range(2)
        )

        def part(i: int):
            x = load_global(heads_ref.at[row, pl.ds(i * head_count + own.start, BLOCK_HEADS)], OUTPUT)
            return x.astype(jnp.float32)

        def turned(x):
            for begin in (0, channels):
                save(twice.at[:, pl.ds(begin, channels)], x)
            plgpu.commit_smem()
            swapped = plgpu.load(twice.at[:, pl.ds(channels // 2, channels)], layout=OUTPUT, optimized=False)
            plgpu.commit_smem()  # all have read what is written over next
            return x * C + swapped * S

        q, key, value = turned(part(0)) * (scale * LOG2E), turned(part(1)), part(2)
        key = key.astype(k.dtype).astype(jnp.float32)
        for tile, x in ((k_own, key), (v_own, value)):
            save_lines(tile, x)
        plgpu.commit_smem()
        for tile, target in zip((k_own, v_own), ring, strict=True):
            plgpu.copy_smem_to_gmem(tile, target.at[slot])
        score = jnp.sum(q * key, axis=1)
        save(o_ref.at[row, own], walk.read(q, (score, jnp.ones(BLOCK_HEADS), value)))
        plgpu.wait_smem_to_gmem(0)

    refs = [jax.new_ref(plan.by_lines(x)) for x in (k, v)]
    twice = plgpu.SMEM((BLOCK_HEADS, 2 * channels), jnp.float32)
    lines = plgpu.SMEM(plan.lines_shape[1:], k.dtype)
    out_type = [jax.ShapeDtypeStruct((batch, head_count, channels), v.dtype)]
    kernel = stream.kernel(body, "ring_step", plan.blocks, out_type, [twice, lines, lines, *plan.scratch(k.dtype)])
    [o] = kernel(heads, length, turns, *refs)
    return o, *(ref[...].reshape(k.shape) for ref in refs)


class _Walk:
    """A block's way over its row's keys and values, (S, lines) each, which come through a ring of tiles."""

    def __init__(self, plan: "_Plan", sources, scratch, length, unseen=None):
        """Start the copies of the first tiles; of `length` slots one may not be looked at."""
        self.plan, self.sources, self.length, self.unseen = plan, sources, length, unseen
        *self.tiles, self.filled = scratch
        self.count = lax.div(length + (TILE_KEYS - 1), TILE_KEYS)
        pl.loop(0, jnp.minimum(self.count, RING_SLOTS))(lambda n: self._fetch(n))
        keep_plain(*self.tiles)

    def read(self, q, sums) -> jax.Array:
        """Return what a query reads, given the largest score, the sum of weights and that of values so far."""
        _, total, o = lax.fori_loop(0, self.count, functools.partial(self._meet, q), sums)
        return o * across(1.0 / jnp.where(total > 0, total, 1.0), o.shape)

    def _fetch(self, n) -> None:
        slot, keys = lax.rem(n, RING_SLOTS), pl.ds(n * TILE_KEYS, TILE_KEYS)
        for source, target in zip(self.sources, self.tiles, strict=True):
            plgpu.copy_gmem_to_smem(source.at[keys], target.at[slot], self.filled.at[slot])

    def _meet(self, q, n, sums):
        plan, (top, total, o), slot = self.plan, sums, lax.rem(n, RING_SLOTS)
        k_tiles, v_tiles = self.tiles
        plgpu.barrier_wait(self.filled.at[slot])
        s = jnp.sum(load_tile(k_tiles.at[slot], plan.shape) * plan.down(q), axis=2)
        place = n * TILE_KEYS + plgpu.broadcasted_iota(jnp.int32, s.shape, 0, layout=SCORES)
        there = place < self.length
        there = there if self.unseen is None else there & (place != self.unseen)
        s = jnp.where(there, s, LOWEST)
        higher = jnp.maximum(top, jnp.max(s, axis=0))
        p, factor = jnp.exp2(s - lax.broadcast_in_dim(higher, s.shape, [1])), jnp.exp2(top - higher)
        v = jnp.where(plan.channels(there), load_tile(v_tiles.at[slot], plan.shape), 0.0)
        o = across(factor, o.shape) * o + jnp.sum(plan.channels(p) * v, axis=0)
        plgpu.commit_smem()  # all have read the tiles
        pl.when(n + RING_SLOTS < self.count)(lambda: self._fetch(n + RING_SLOTS))
        return higher, factor * total + jnp.sum(p, axis=0), o


def load_tile(lines, shape: tuple[int, int, int]) -> jax.Array:
    """Load a tile of what was copied by lines."""
    return load_shared(lines.reshape(*shape), LAYOUT)


def save_lines(tile, x) -> None:
    """Store (heads, channels) to what is copied by lines."""
    save(tile.reshape(*x.shape), x)


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

    def scratch(self, dtype) -> list:
        """Return the rings of keys and of values, and their barriers."""
        tiles = plgpu.SMEM((RING_SLOTS, *self.lines_shape), dtype)
        return [tiles, tiles, plgpu.Barrier(num_arrivals=2, num_barriers=RING_SLOTS)]

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
