"""What the kernels of one token on Hopper share: strips of a matrix, which come by chunks of rows through rings.

A block has PARTS parts of PART_COLUMNS columns or one, of one matrix or of several; its warpgroups take chunks in
turn, each through a ring of its own, and add up what they meet. The token lies in shared memory in fp32.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper.mosaic import WARP_LANES, WARPS, load_shared, save

GROUPS = 2
"""Warpgroups of a block; each has every second chunk, and a ring of its own."""
SLOTS = 6
"""Of a ring."""
PARTS, PART_COLUMNS = 2, 32
"""Of a chunk: of the first matrix values and gates, of the second columns that lie beside each other."""
STRIP_COLUMNS = PARTS * PART_COLUMNS
WARP_ROWS = 32
CHUNK_ROWS = WARPS * WARP_ROWS
LANE_VECTOR = 8
"""Columns that lie beside each other in a lane."""

SHAPE = (WARPS, WARP_ROWS, PART_COLUMNS)
LAYOUT = plgpu.Layout.TILED(
    plgpu.Tiling(((WARPS, WARP_LANES * LANE_VECTOR // PART_COLUMNS, PART_COLUMNS), (LANE_VECTOR,))),
    warp_dims=(-4,),
    lane_dims=(-3, -2),
    vector_dim=-1,
)
"""Of a part of a chunk."""
ROWS, COLUMNS = LAYOUT.reduce(2), LAYOUT.reduce(0).reduce(0)


def scratch(*chunks: int, part_count: int = PARTS) -> list:
    """Return what a block keeps: tokens by so many chunks of rows, the rings, sums by warp, and barriers."""
    return [
        *(plgpu.SMEM((1, count, WARPS, WARP_ROWS), jnp.float32) for count in chunks),
        plgpu.SMEM((GROUPS, SLOTS, part_count, *SHAPE), jnp.bfloat16),
        plgpu.SMEM((GROUPS, WARPS, part_count, PART_COLUMNS), jnp.float32),
        plgpu.Barrier(num_arrivals=part_count, num_barriers=GROUPS * SLOTS),
        plgpu.Barrier(num_arrivals=1),
        plgpu.Barrier(num_arrivals=GROUPS),
    ]


class Source(NamedTuple):
    """Chunks of a matrix (chunks, WARPS, WARP_ROWS, E): the first, how many, and where each part's columns begin."""

    matrix: Any
    first: jax.Array | int
    chunks: jax.Array
    columns: list


class Ring:
    """A warpgroup's chunks of one matrix after another on their way to shared memory."""

    def __init__(self, tiles, filled, sources: list[Source]):
        """Start the copies of the first chunks."""
        self.tiles, self.filled, self.sources, self.group = tiles, filled, sources, lax.axis_index("group")
        self.counts = [lax.div(source.chunks + GROUPS - 1 - self.group, GROUPS) for source in sources]
        self.part_count = tiles.shape[2]
        for n in range(SLOTS):
            self._fetch(n)

    def walk(self, i: int, x_tile):
        """Return the sums of the chunks of source i, times those of x, over the rows that a lane has."""
        begin = sum(self.counts[:i])

        def step(n, totals):
            slot = lax.rem(begin + n, SLOTS)
            x = plgpu.load(x_tile.at[0, n * GROUPS + self.group], layout=ROWS, optimized=False)
            plgpu.barrier_wait(self._arrival(slot))
            x = lax.broadcast_in_dim(x, SHAPE, [0, 1])
            parts = [load_shared(self.tiles.at[self.group, slot, p], LAYOUT) for p in range(self.part_count)]
            plgpu.commit_smem()
            self._fetch(begin + n + SLOTS)
            return tuple(total + x * part for total, part in zip(totals, parts, strict=True))

        zeros = plgpu.layout_cast(jnp.zeros(SHAPE, jnp.float32), LAYOUT)
        return lax.fori_loop(0, self.counts[i], step, (zeros,) * self.part_count)

    def _arrival(self, slot):
        return self.filled.at[self.group * SLOTS + slot]

    def _fetch(self, n) -> None:
        before: jax.Array | int = 0
        for source, count in zip(self.sources, self.counts, strict=True):
            pl.when((n >= before) & (n < before + count))(functools.partial(self._copy, source, n - before, n))
            before += count

    def _copy(self, source: Source, i, n) -> None:
        chunk, slot = source.first + i * GROUPS + self.group, lax.rem(n, SLOTS)
        for p, column in enumerate(source.columns):
            part = source.matrix.at[chunk, :, :, pl.ds(column, PART_COLUMNS)]
            plgpu.copy_gmem_to_smem(part, self.tiles.at[self.group, slot, p], self._arrival(slot))


def normed(x_tile, r_ref, y_ref, scale_ref, eps: float):
    """Return r + sum(y), and leave its norm in shared memory."""
    scale, total = load_vector(scale_ref), load_vector(r_ref)
    for p in range(y_ref.shape[0]):
        total += load_vector(y_ref.at[pl.ds(p, 1)])
    squares = (total * total).sum(axis=3).sum(axis=1).sum(axis=1)
    inverse = lax.rsqrt(squares * (1.0 / math.prod(r_ref.shape)) + eps)
    x = total * lax.broadcast_in_dim(inverse, total.shape, [0]) * scale
    save(x_tile, x)
    plgpu.commit_smem()
    return total


def leave_sums(parts, totals) -> None:
    """Leave a warpgroup's sums by warp in shared memory."""
    for p, total in enumerate(totals):
        save(parts.at[lax.axis_index("group"), :, p], total.sum(axis=1))
    plgpu.commit_smem()


def summed(parts) -> list:
    """Return each part's sums over all warps."""
    warps = [(group, warp) for group in range(GROUPS) for warp in range(WARPS)]
    return [sum(load_shared(parts.at[(*warp, p)], COLUMNS) for warp in warps) for p in range(parts.shape[2])]


def by_row(x):
    """Return (..., D) as (..., chunks, WARPS, WARP_ROWS)."""
    return x.reshape(*x.shape[:-1], -1, WARPS, WARP_ROWS)


def load_vector(ref):
    """Load a vector by row, or one of one vector, in fp32."""
    *ones, chunks, _, _ = ref.shape
    vector = math.gcd(chunks, 4)
    tiling = plgpu.Tiling(((*(1 for _ in ones), vector, WARPS, WARP_ROWS), (vector,)))
    lanes = (-4, -2) if vector > 1 else (-2,)
    layout = plgpu.Layout.TILED(tiling, warp_dims=(-3,), lane_dims=lanes, vector_dim=-1)
    return plgpu.load(ref, layout=layout, optimized=False).astype(jnp.float32)
