"""A residual addition and the RMS norm of its sum on Hopper, forward and backward (see `ops/norm.py`).

A block takes a part of the tokens and walks over it in tiles of a few rows (`stream.py`). A tile stays in registers,
its columns spread over the lanes, between the sums over its rows and what needs them: each array is passed over once.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import stream
from pallas_kernels.stream import LANES

ELEMENTS = 2048
"""Of a tile, where a row is not longer."""
SLOTS = 4
FORWARD_PART, BACKWARD_PART = 16, 32
"""Tiles of a block; the backward's are more since each block leaves sums of its own."""


@functools.partial(jax.jit, static_argnames="eps")
def forward(r, y, scale, *, eps: float):
    """Return r + y and its RMS norm times `scale`, of r (N, D) fp32, y (N, D) bf16 and scale (D,) fp32.

    The sum is fp32, the norm bf16; D is a multiple of 128.
    """
    plan = _Plan.of(r, FORWARD_PART)

    def body(r_ref, y_ref, scale_ref, sum_ref, x_ref, r_tile, y_tile, filled):
        ring = plan.ring(((r_ref, r_tile), (y_ref, y_tile)), filled)
        scale = plan.scale(scale_ref)

        def step(n, slot, carry):
            total = plan.load(r_tile.at[slot]) + plan.load(y_tile.at[slot])
            inverse = lax.rsqrt(plan.mean(total * total) + eps)
            r_tile.at[slot][...] = total
            y_tile.at[slot][...] = (total * plan.across(inverse) * scale).astype(y.dtype)
            return carry

        ring.walk(step, plan.put(((sum_ref, r_tile), (x_ref, y_tile))), ())

    out_type = [jax.ShapeDtypeStruct(z.shape, z.dtype) for z in (r, y)]
    return plan.kernel(body, "residual_rms_norm", out_type, (r.dtype, y.dtype))(r, y, scale)


@functools.partial(jax.jit, static_argnames="eps")
def backward(total, scale, dx, dtotal, *, eps: float):
    """Return the gradient of r and y as fp32 and as bf16 (N, D), and sums of parts of dscale (parts, D) fp32.

    Takes the sum r + y (N, D) fp32, `scale`, and the gradients of the norm, bf16, and of the sum, fp32.
    """
    plan = _Plan.of(total, BACKWARD_PART)

    def body(*refs):
        total_ref, scale_ref, dx_ref, dtotal_ref, dr_ref, dy_ref, dscale_ref, *tiles, filled = refs
        total_tile, dx_tile, dtotal_tile = tiles
        ring = plan.ring(zip((total_ref, dx_ref, dtotal_ref), tiles, strict=True), filled)
        scale = plan.scale(scale_ref)

        def step(n, slot, dscale):
            total, dx = plan.load(total_tile.at[slot]), plan.load(dx_tile.at[slot])
            dnorm = dx * scale
            inverse = lax.rsqrt(plan.mean(total * total) + eps)
            shared = plan.mean(dnorm * total) * inverse * inverse
            inverse, shared = plan.across(inverse), plan.across(shared)
            dr = plan.load(dtotal_tile.at[slot]) + (dnorm - total * shared) * inverse
            dtotal_tile.at[slot][...] = dr
            dx_tile.at[slot][...] = dr.astype(dx_ref.dtype)
            return dscale + dx * (total * inverse)

        put = plan.put(((dr_ref, dtotal_tile), (dy_ref, dx_tile)))
        dscale = ring.walk(step, put, jnp.zeros_like(scale))
        dscale_ref.at[pl.ds(lax.axis_index("block") * plan.rows, plan.rows)][...] = dscale

    out_type = [jax.ShapeDtypeStruct(z.shape, z.dtype) for z in (dtotal, dx)]
    out_type += [jax.ShapeDtypeStruct((plan.blocks * plan.rows, plan.channels), jnp.float32)]
    kernel = plan.kernel(body, "residual_rms_norm_backward", out_type, (total.dtype, dx.dtype, dtotal.dtype))
    return kernel(total, scale, dx, dtotal)


class _Plan(NamedTuple):
    """How the work is cut: tiles of (rows, D), all of them, and those of a block."""

    rows: int
    channels: int
    tiles: int
    part: int

    @classmethod
    def of(cls, x, part: int) -> "_Plan":
        tokens, channels = x.shape
        rows = math.gcd(tokens, max(1, ELEMENTS // channels))
        return cls(rows, channels, tokens // rows, part)

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.channels

    @property
    def blocks(self) -> int:
        return pl.cdiv(self.tiles, self.part)

    @property
    def layout(self):
        """The layout of a tile: columns over all lanes, in pieces of up to 16 bytes of fp32."""
        width = stream.rows_per_lane(self.channels, 4)
        tiling = plgpu.Tiling(((1, LANES * width), (LANES // 4 * width,), (width,)))
        return plgpu.Layout.TILED(tiling, warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)

    def load(self, ref) -> jax.Array:
        return plgpu.load(ref, layout=self.layout, optimized=False).astype(jnp.float32)

    def scale(self, ref) -> jax.Array:
        """Return one value per column, repeated over the rows."""
        columns = plgpu.load(ref, layout=self.layout.reduce(0), optimized=False)
        return lax.broadcast_in_dim(columns, self.shape, [1])

    def mean(self, x) -> jax.Array:
        return jnp.sum(x, axis=1) * (1.0 / self.channels)

    def across(self, rows) -> jax.Array:
        """Repeat one value per row over the columns."""
        return lax.broadcast_in_dim(rows, self.shape, [0])

    def tokens(self, n) -> pl.Slice:
        """Return the tokens of the block's tile n."""
        return pl.ds((lax.axis_index("block") * self.part + n) * self.rows, self.rows)

    def ring(self, sources, filled) -> stream.Ring:
        """Start copying the block's tiles; sources are pairs of an array and its slots."""
        pairs = tuple(sources)
        inside = plgpu.OOBFillMode.PROMISE_IN_BOUNDS  # lets rows of any length be copied

        def fetch(n, slot):
            for ref, tile in pairs:
                plgpu.copy_gmem_to_smem(ref.at[self.tokens(n)], tile.at[slot], filled.at[slot], oob_mode=inside)

        count = jnp.minimum(self.part, self.tiles - lax.axis_index("block") * self.part)
        return stream.Ring(count, SLOTS, filled, fetch)

    def put(self, targets):
        """Return what copies a tile out; targets are pairs of an array and its slots."""

        def copy(n, slot):
            for ref, tile in targets:
                plgpu.copy_smem_to_gmem(tile.at[slot], ref.at[self.tokens(n)], commit_group=False)

        return copy

    def kernel(self, body, name: str, out_type: list, dtypes: tuple):
        """Return a kernel with slots for a tile of each dtype, and their barriers."""
        slots = [plgpu.SMEM((SLOTS, *self.shape), dtype) for dtype in dtypes]
        barriers = plgpu.Barrier(num_arrivals=len(dtypes), num_barriers=SLOTS)
        return stream.kernel(body, name, self.blocks, out_type, [*slots, barriers])
