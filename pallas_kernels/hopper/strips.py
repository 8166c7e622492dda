"""What the Hopper kernels of channels that do not meet share: a warp takes W of them, of one sequence (`stream.py`).

Tokens come in tiles. (B, T, D) is read as (B, T, D / W, W), a strip of it for each block.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper.mosaic import WARPS

WARP_CHANNELS = 32
"""Channels of a warp, W, where a lane has one."""
ALIGNED_VALUES = 32
"""Single 4-byte values from one tile to the next: copies write to multiples of 128 bytes."""


class Place(NamedTuple):
    """A block's row of the batch, the number of its strip, its part of (D / W), and the tokens of a tile."""

    row: jax.Array
    number: jax.Array
    strip: pl.Slice
    tile_tokens: int

    def tokens(self, tile) -> pl.Slice:
        """Return the tokens of a tile."""
        return pl.ds(tile * self.tile_tokens, self.tile_tokens)


class Plan(NamedTuple):
    """How the work is cut: B, tokens of a tile, tiles of a sequence, strips of a block's channels, and W."""

    batch: int
    tile_tokens: int
    tiles: int
    strips: int
    warp_channels: int

    @classmethod
    def of(cls, x, tile_tokens: int, warp_channels: int = WARP_CHANNELS) -> "Plan":
        """Return the plan for (B, T, D)."""
        batch, time, channels = x.shape
        return cls(batch, tile_tokens, time // tile_tokens, channels // (WARPS * warp_channels), warp_channels)

    @property
    def blocks(self) -> int:
        """One for every strip of every row."""
        return self.batch * self.strips

    def here(self) -> Place:
        """Return this block's place; blocks of the same tokens follow each other."""
        block = lax.axis_index("block")
        number = lax.rem(block, self.strips)
        return Place(lax.div(block, self.strips), number, pl.ds(number * WARPS, WARPS), self.tile_tokens)

    def scratch(self, sources: list[jax.Array], slots: int, *others: tuple[int, ...]) -> list:
        """Return a ring of tiles of each source, those of other fp32 shapes, and the barriers of all."""
        rings = [plgpu.SMEM((slots, *self._tile_shape(x)), x.dtype) for x in sources]
        rings += [plgpu.SMEM((slots, *shape), jnp.float32) for shape in others]
        return [*rings, plgpu.Barrier(num_arrivals=len(rings), num_barriers=slots)]

    def _tile_shape(self, source) -> tuple[int, ...]:
        """Return the shape of a tile of a source, which is (B, T), (B, T, .) or (B, T, D / W, W)."""
        if len(source.shape) == 2:
            return (ALIGNED_VALUES,)
        return (self.tile_tokens, *((WARPS, self.warp_channels) if len(source.shape) == 4 else source.shape[2:]))


def by_warps(x, warp_channels: int = WARP_CHANNELS) -> jax.Array:
    """Return (..., D) as (..., D / W, W)."""
    return x.reshape(*x.shape[:-1], -1, warp_channels)


def copy_tokens(at: Place, sources, tiles, filled, n, slot) -> None:
    """Start the copies of tile n of each source into a slot; of (B, T, D / W, W) a block takes its strip."""
    for source, tile in zip(sources, tiles, strict=True):
        strip = [at.strip] if len(source.shape) == 4 else []
        target = tile.at[slot] if len(source.shape) > 2 else tile.at[slot, pl.ds(0, at.tile_tokens)]
        plgpu.copy_gmem_to_smem(source.at[(at.row, at.tokens(n), *strip)], target, filled.at[slot])


def copy_results(at: Place, tiles, targets, n, slot) -> None:
    """Start the copies of a slot to tile n of each (B, T, D / W, W)."""
    for tile, target in zip(tiles, targets, strict=True):
        plgpu.copy_smem_to_gmem(tile.at[slot], target.at[at.row, at.tokens(n), at.strip], commit_group=False)


def per_strip(plan: Plan, *shape: int) -> jax.ShapeDtypeStruct:
    """Return the type of fp32 values of all channels, (B, *shape, D / W, W)."""
    return jax.ShapeDtypeStruct((plan.batch, *shape, plan.strips * WARPS, plan.warp_channels), jnp.float32)
