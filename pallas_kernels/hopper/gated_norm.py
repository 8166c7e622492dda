"""A skip and a gate, and the RMS norm of what they make or none, on Hopper, forward and backward (`ops/gated_norm.py`).

    g = (y + skip u) silu(z)        x = g r scale        r = 1 / sqrt(mean(g^2) + eps)

A block walks over a part of the tokens row by row (`stream.py`), a row in pieces of its channels: a first pass over the
pieces makes the row's sums, a second one what needs them. The gradients are

    dg = r (dx scale - g r mean(dx scale g r))        dy = dg silu(z)        dz = dg (y + skip u) silu'(z)

with sums over the tokens of dy u and of dx g r for those of `skip` and `scale`; du = skip dy is left to the caller.
Without a norm x is g.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import split
from pallas_kernels.hopper import stream
from pallas_kernels.hopper.mosaic import WARP_LANES
from pallas_kernels.hopper.stream import WARPGROUP_LANES

PIECE_CHANNELS = 1024
"""Of a row, at most: so much of every array is in registers at once."""
RING_SLOTS = 3
RESIDENT_FORWARD_BLOCKS, RESIDENT_BACKWARD_BLOCKS = 3, 2
"""Of a multiprocessor at once."""
MIN_BLOCK_ROWS = 4


@functools.partial(jax.jit, static_argnames=("eps", "multiprocessors"))
def forward(y, u, z, skip, scale=None, *, eps: float, multiprocessors: int):
    """Return the norm, or g (N, D) bf16.

    Args:
      y, u, z: (N, D) bf16; D is a multiple of 128.
      skip, scale: (D,) fp32; without the second there is no norm.
      multiprocessors: of the GPU.
    """
    plan, norms = _Plan.of(y, RESIDENT_FORWARD_BLOCKS * multiprocessors), scale is not None

    def body(*refs):
        sources, weights, results, (*tiles, filled) = split(refs, 3, 1 + norms, 1)
        ring = plan.ring(sources, tiles, filled)
        skips, *scales = map(plan.columns, weights)

        def step(n, slot, carry):
            x = [_gated(skip, *plan.load(tiles, slot, i))[0] for i, skip in enumerate(skips)]
            if norms:
                inverse = lax.rsqrt(plan.mean([g * g for g in x]) + eps)
                x = [g * inverse * scale for g, scale in zip(x, *scales, strict=True)]
            for i, piece in enumerate(x):
                tiles[0].at[slot, :, plan.piece(i)][...] = piece.astype(y.dtype)
            return carry

        ring.walk(step, plan.put(results, tiles), ())

    kernel = plan.kernel(body, f"{_name(norms)}_forward", [plan.like(y)], 3)
    return kernel(y, u, z, skip, *([scale] if norms else []))


@functools.partial(jax.jit, static_argnames=("eps", "multiprocessors"))
def backward(y, u, z, skip, scale, dx, *, eps: float, multiprocessors: int):
    """Return dy and dz (N, D) bf16, and sums (blocks, D) fp32 of dskip and of any dscale; arguments as of `forward`."""
    plan, norms = _Plan.of(y, RESIDENT_BACKWARD_BLOCKS * multiprocessors), scale is not None

    def body(*refs):
        sources, weights, results, sums, (*tiles, filled) = split(refs, 4, 1 + norms, 2, 1 + norms)
        ring = plan.ring(sources, tiles, filled)
        skips, *scales = map(plan.columns, weights)

        def normal(slot):
            """Return the function from a piece of dx and of g to that of dg, and what it adds to dscale."""
            squares, products = [], []
            for i, (skip, scale) in enumerate(zip(skips, *scales, strict=True)):
                *given, dx = plan.load(tiles, slot, i)
                g, *_ = _gated(skip, *given)
                squares.append(g * g)
                products.append(dx * scale * g)
            inverse = lax.rsqrt(plan.mean(squares) + eps)
            inner = plan.mean(products) * inverse * inverse
            return lambda i, dx, g: (inverse * (dx * scales[0][i] - g * inner), [dx * g * inverse])

        def step(n, slot, totals):
            through = normal(slot) if norms else lambda i, dx, g: (dx, [])
            after = []
            for i, before in enumerate(totals):
                y, u, z, dx = plan.load(tiles, slot, i)
                g, total, opened, sigmoid = _gated(skips[i], y, u, z)
                dg, dscale = through(i, dx, g)
                dy, dz = dg * opened, dg * total * (sigmoid + opened * (1.0 - sigmoid))
                for tile, gradient in zip(tiles, (dy, dz), strict=False):
                    tile.at[slot, :, plan.piece(i)][...] = gradient.astype(tile.dtype)
                after.append([old + x for old, x in zip(before, [dy * u, *dscale], strict=True)])
            return after

        zeros = [[jnp.zeros_like(x) for _ in sums] for x in skips]
        totals = ring.walk(step, plan.put(results, tiles), zeros)
        for i, found in enumerate(totals):
            for ref, total in zip(sums, found, strict=True):
                ref.at[pl.ds(lax.axis_index("block"), 1), plan.piece(i)][...] = total

    parts = [jax.ShapeDtypeStruct((plan.blocks, plan.channels), jnp.float32)] * (1 + norms)
    kernel = plan.kernel(body, f"{_name(norms)}_backward", [plan.like(y), plan.like(y), *parts], 4)
    return kernel(y, u, z, dx, skip, *([scale] if norms else []))


def _name(norms: bool) -> str:
    return "gated_norm" if norms else "gated_skip"


def _gated(skip, y, u, z):
    """Return g, the sum that the gate multiplies, the gate silu(z), and sigmoid(z)."""
    sigmoid = stream.sigmoid(z)
    total, opened = y + skip * u, z * sigmoid
    return total * opened, total, opened, sigmoid


class _Plan(NamedTuple):
    """How the work is cut: N rows of D channels, a block's rows, and a row's pieces."""

    rows: int
    channels: int
    part: int
    pieces: int

    @classmethod
    def of(cls, x, blocks: int) -> "_Plan":
        rows, channels = x.shape
        part = max(MIN_BLOCK_ROWS, pl.cdiv(rows, blocks))
        pieces = next(
            n for n in range(1, channels) if channels % (n * WARPGROUP_LANES) == 0 and channels // n <= PIECE_CHANNELS
        )
        return cls(rows, channels, part, pieces)

    @property
    def blocks(self) -> int:
        return pl.cdiv(self.rows, self.part)

    @property
    def width(self) -> int:
        """Channels of a piece."""
        return self.channels // self.pieces

    @property
    def layout(self):
        """The layout of a piece (1, width): lanes over channels, in vectors of up to 16 bytes of fp32."""
        vector = stream.rows_per_lane(self.width, 4)
        tiling = plgpu.Tiling(((1, WARPGROUP_LANES * vector), (WARP_LANES * vector,), (vector,)))
        return plgpu.Layout.TILED(tiling, warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)

    def like(self, x) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype)

    def piece(self, i: int) -> pl.Slice:
        return pl.ds(i * self.width, self.width)

    def load(self, tiles, slot, i: int) -> list[jax.Array]:
        """Return a row's piece of each array, in fp32."""
        rows = (tile.at[slot, :, self.piece(i)] for tile in tiles)
        return [plgpu.load(x, layout=self.layout, optimized=False).astype(jnp.float32) for x in rows]

    def columns(self, ref) -> list[jax.Array]:
        """Return one value per channel, of each piece."""
        rows = (
            plgpu.load(ref.at[self.piece(i)], layout=self.layout.reduce(0), optimized=False) for i in range(self.pieces)
        )
        return [lax.broadcast_in_dim(x, (1, self.width), [1]) for x in rows]

    def mean(self, pieces: Sequence[jax.Array]) -> jax.Array:
        """Return the mean of a row, repeated over a piece."""
        total = functools.reduce(jnp.add, pieces)
        return lax.broadcast_in_dim(jnp.sum(total, axis=1) * (1.0 / self.channels), total.shape, [0])

    def row(self, n) -> pl.Slice:
        """Return the block's row n."""
        return pl.ds(lax.axis_index("block") * self.part + n, 1)

    def ring(self, sources, tiles, filled) -> stream.Ring:
        """Start copying the block's rows of some arrays into the slots of each."""
        inside = plgpu.OOBFillMode.PROMISE_IN_BOUNDS  # lets rows of any length be copied

        def fetch(n, slot):
            for ref, tile in zip(sources, tiles, strict=True):
                plgpu.copy_gmem_to_smem(ref.at[self.row(n)], tile.at[slot], filled.at[slot], oob_mode=inside)

        count = jnp.minimum(self.part, self.rows - lax.axis_index("block") * self.part)
        return stream.Ring(count, RING_SLOTS, filled, fetch)

    def put(self, results, tiles) -> Callable:
        """Return what copies a row of each result out of its slot."""

        def copy(n, slot):
            for ref, tile in zip(results, tiles, strict=False):
                plgpu.copy_smem_to_gmem(tile.at[slot], ref.at[self.row(n)], commit_group=False)

        return copy

    def kernel(self, body, name: str, out_type: list, arrays: int) -> Any:
        """Return a kernel with slots for a row of so many arrays."""
        slots = [plgpu.SMEM((RING_SLOTS, 1, self.channels), jnp.bfloat16) for _ in range(arrays)]
        barriers = plgpu.Barrier(num_arrivals=arrays, num_barriers=RING_SLOTS)
        return stream.kernel(body, name, self.blocks, out_type, [*slots, barriers])
