"""A residual addition and the RMS norm or layer norm of its sum on Hopper, forward and backward (see `ops/norm.py`).

A block takes a part of the tokens and walks over it in tiles of a few rows (`stream.py`). A tile stays in registers
between the sums over its rows and what needs them: each array is passed over once. Where a tile has four rows or more,
warps have rows of their own; the columns of longer rows lie over all lanes. Rows that these do not divide lie in wider
ones: what is read beyond their end counts as zero, and what is written there stays in shared memory.
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
from pallas_kernels.hopper.mosaic import WARP_LANES, WARPS
from pallas_kernels.hopper.stream import WARPGROUP_LANES

TILE_ELEMENTS = 2048
"""Of a tile, where a row is not longer."""
RING_SLOTS = 4
FILLED_CHANNEL_MULTIPLE = 2 * WARPGROUP_LANES
"""Of a tile whose rows are wider than those of the arrays: lanes take pairs."""
MIN_BLOCK_TILES, MAX_FORWARD_TILES, MAX_BACKWARD_TILES = 4, 16, 32
"""Tiles of a block, at least and at most; the backward's are more since each block leaves sums of its own."""
RESIDENT_FORWARD_BLOCKS, RESIDENT_BACKWARD_BLOCKS = 4, 2
"""Of a multiprocessor at once, as far as its shared memory goes; a block takes fewer tiles to make as many."""


@functools.partial(jax.jit, static_argnames=("eps", "multiprocessors"))
def forward(r, y, scale, bias, *, eps: float, multiprocessors: int):
    """Return r + y (N, D) fp32, unless y is None, and its norm times `scale` (N, D) bf16.

    Args:
      r: (N, D) fp32.
      y: (N, D) bf16, or None.
      scale: (D,) fp32.
      bias: (D,) fp32, added to the norm, which is a layer norm then; None for RMS norm.
      multiprocessors: of the GPU.
    """
    plan, dtype = _Plan.of(r, MAX_FORWARD_TILES, RESIDENT_FORWARD_BLOCKS * multiprocessors), jnp.bfloat16
    adds, centered = y is not None, bias is not None

    def body(*refs):
        sources, weights, results, (r_tile, x_tile, filled) = split(refs, 1 + adds, 1 + centered, 1 + adds)
        ring = plan.ring(sources, (r_tile, x_tile), filled)
        scale, *shift = map(plan.columns, weights)

        def step(n, slot, carry):
            total = plan.load(r_tile.at[slot])
            if adds:
                total += plan.load(x_tile.at[slot])
                r_tile.at[slot][...] = total
            x, _ = plan.normal(total, eps, centered)
            x_tile.at[slot][...] = sum(shift, x * scale).astype(dtype)
            return carry

        ring.walk(step, plan.put(results, (r_tile, x_tile) if adds else (x_tile,)), ())

    arrays = [x for x in (r, y) if x is not None] + [plan.fill(x) for x in (scale, bias) if x is not None]
    out_type = [jax.ShapeDtypeStruct(r.shape, x) for x in ((r.dtype, dtype) if adds else (dtype,))]
    return plan.kernel(body, "residual_norm_forward", out_type, (r.dtype, dtype), 1 + adds)(*arrays)


@functools.partial(jax.jit, static_argnames=("eps", "adds", "centered", "multiprocessors"))
def backward(total, scale, dx, dtotal, *, eps: float, adds: bool, centered: bool, multiprocessors: int):
    """Return dr (N, D) fp32, dy (N, D) bf16 if there was a y, and sums of parts of dscale and, of a layer norm, dbias.

    Args:
      total: the sum r + y (N, D) fp32.
      scale: (D,) fp32.
      dx, dtotal: the gradients of the norm, bf16, and of the sum, fp32.
      adds: whether there was a y.
      centered: whether the norm was a layer norm.
      multiprocessors: of the GPU.
    """
    plan = _Plan.of(total, MAX_BACKWARD_TILES, RESIDENT_BACKWARD_BLOCKS * multiprocessors)

    def body(*refs):
        (total_ref, scale_ref, *given), results, sum_refs, scratch = split(refs, 4, 1 + adds, 1 + centered)
        total_tile, dx_tile, dtotal_tile, filled = scratch
        ring = plan.ring([total_ref, *given], scratch[:-1], filled)
        scale = plan.columns(scale_ref)

        def step(n, slot, sums):
            dx = plan.load(dx_tile.at[slot])
            normal, inverse = plan.normal(plan.load(total_tile.at[slot]), eps, centered)
            dnormal = dx * scale
            inner = dnormal - normal * plan.mean(dnormal * normal)
            if centered:
                inner -= plan.mean(dnormal)
            dr = plan.load(dtotal_tile.at[slot]) + inner * inverse
            dtotal_tile.at[slot][...] = dr
            if adds:
                dx_tile.at[slot][...] = dr.astype(dx_tile.dtype)
            return [before + x for before, x in zip(sums, (dx * normal, dx), strict=False)]

        put = plan.put(results, (dtotal_tile, dx_tile))
        sums = ring.walk(step, put, [jnp.zeros_like(scale) for _ in sum_refs])
        for ref, values in zip(sum_refs, sums, strict=True):
            ref.at[pl.ds(lax.axis_index("block") * plan.rows, plan.rows)][...] = values

    out_type = [jax.ShapeDtypeStruct(total.shape, x) for x in ((total.dtype, dx.dtype) if adds else (total.dtype,))]
    out_type += [jax.ShapeDtypeStruct((plan.blocks * plan.rows, plan.width), jnp.float32)] * (1 + centered)
    kernel = plan.kernel(body, "residual_norm_backward", out_type, (total.dtype, dx.dtype, dtotal.dtype), 3)
    results = kernel(total, plan.fill(scale), dx, dtotal)
    return [x[:, : plan.channels] for x in results]


class _Plan(NamedTuple):
    """How the work is cut: tiles of (rows, width) for the rows' D channels, all of them, and those of a block."""

    rows: int
    channels: int
    width: int
    tiles: int
    part: int

    @classmethod
    def of(cls, x, most_tiles: int, blocks: int) -> "_Plan":
        tokens, channels = x.shape
        most_rows = max(1, TILE_ELEMENTS // channels)
        rows = math.gcd(tokens, 1 << most_rows.bit_length() - 1)
        lanes = WARP_LANES if rows % WARPS == 0 else WARPGROUP_LANES
        width = channels + (-channels % FILLED_CHANNEL_MULTIPLE if channels % lanes else 0)
        tiles = tokens // rows
        part = min(most_tiles, max(MIN_BLOCK_TILES, pl.cdiv(tiles, blocks)))
        return cls(rows, channels, width, tiles, part)

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.width

    @property
    def copies(self) -> int:
        """Return how many copies a tile takes: one, or one for each row that ends before its place in the tile."""
        return 1 if self.width == self.channels else self.rows

    @property
    def blocks(self) -> int:
        return pl.cdiv(self.tiles, self.part)

    @property
    def layout(self):
        """The layout of a tile: warps over rows or columns, lanes over columns, in pieces of up to 16 bytes of fp32."""
        if self.rows % WARPS == 0:
            vector = math.gcd(self.width // WARP_LANES, 4)
            tiling = plgpu.Tiling(((WARPS, WARP_LANES * vector), (vector,)))
        else:
            vector = stream.rows_per_lane(self.width, 4)
            tiling = plgpu.Tiling(((1, WARPGROUP_LANES * vector), (WARP_LANES * vector,), (vector,)))
        return plgpu.Layout.TILED(tiling, warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)

    def load(self, ref) -> jax.Array:
        return self.inside(plgpu.load(ref, layout=self.layout, optimized=False).astype(jnp.float32))

    def inside(self, x) -> jax.Array:
        """Return x with zeros beyond the rows' end."""
        if self.width == self.channels:
            return x
        column = plgpu.broadcasted_iota(jnp.int32, self.shape, 1, layout=self.layout)
        return jnp.where(column < self.channels, x, 0.0)

    def fill(self, columns) -> jax.Array:
        """Append zeros to one value per channel."""
        return jnp.pad(columns, (0, self.width - self.channels))

    def columns(self, ref) -> jax.Array:
        """Return one value per column, repeated over the rows."""
        columns = plgpu.load(ref, layout=self.layout.reduce(0), optimized=False)
        return lax.broadcast_in_dim(columns, self.shape, [1])

    def mean(self, x) -> jax.Array:
        """Return the mean of each row, repeated over the columns."""
        return self.across(jnp.sum(x, axis=1) * (1.0 / self.channels))

    def normal(self, total, eps: float, centered: bool) -> tuple[jax.Array, jax.Array]:
        """Return the rows, less their mean where `centered`, over the root of their mean square, and 1 / root."""
        if centered:
            total = self.inside(total - self.mean(total))
        squares = jnp.sum(total * total, axis=1) * (1.0 / self.channels)
        inverse = self.across(lax.rsqrt(squares + eps))
        return total * inverse, inverse

    def across(self, rows) -> jax.Array:
        """Repeat one value per row over the columns."""
        return lax.broadcast_in_dim(rows, self.shape, [0])

    def places(self, n, slot) -> list[tuple]:
        """Return where the parts of the block's tile n that are copied lie in the arrays, and where in its slot."""
        first = (lax.axis_index("block") * self.part + n) * self.rows
        if self.width == self.channels:
            return [((pl.ds(first, self.rows),), (slot,))]
        return [((first + i,), (slot, i, pl.ds(0, self.channels))) for i in range(self.rows)]

    def ring(self, sources, tiles, filled) -> stream.Ring:
        """Start copying the block's tiles of some arrays into the slots of each."""
        inside = plgpu.OOBFillMode.PROMISE_IN_BOUNDS  # lets rows of any length be copied

        def fetch(n, slot):
            for ref, tile in zip(sources, tiles, strict=False):
                for source, target in self.places(n, slot):
                    plgpu.copy_gmem_to_smem(ref.at[source], tile.at[target], filled.at[slot], oob_mode=inside)

        count = jnp.minimum(self.part, self.tiles - lax.axis_index("block") * self.part)
        return stream.Ring(count, RING_SLOTS, filled, fetch)

    def put(self, results, tiles):
        """Return what copies a tile of each result out of its slot."""

        def copy(n, slot):
            for ref, tile in zip(results, tiles, strict=False):
                for target, source in self.places(n, slot):
                    plgpu.copy_smem_to_gmem(tile.at[source], ref.at[target], commit_group=False)

        return copy

    def kernel(self, body, name: str, out_type: list, dtypes: tuple, sources: int):
        """Return a kernel with slots for a tile of each dtype, and the barriers of copies of so many into them."""
        slots = [plgpu.SMEM((RING_SLOTS, *self.shape), dtype) for dtype in dtypes]
        barriers = plgpu.Barrier(num_arrivals=sources * self.copies, num_barriers=RING_SLOTS)
        return stream.kernel(body, name, self.blocks, out_type, [*slots, barriers])
