"""The product of one token and a matrix on Hopper, as sums over pieces of the rows (see `ops/projection.py`).

A block takes 128 columns of a piece of the rows, and a warp every fourth group of rows, straight from memory to its
registers: the next rows are on their way while those before are added up in fp32.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import stream
from pallas_kernels.hopper.mosaic import WARPS, load_global

STRIP_COLUMNS = 128
WARP_ROWS = 16
"""Rows that a warp loads at once."""
CHUNK_ROWS = WARPS * WARP_ROWS
LANE_ROWS, LANE_VECTOR = 2, 8
"""Of a warp: lanes over rows, the others over columns; and columns that lie beside each other in one."""

SHAPE = (WARPS, WARP_ROWS, STRIP_COLUMNS)
LAYOUT = plgpu.Layout.TILED(
    plgpu.Tiling(((WARPS, LANE_ROWS, STRIP_COLUMNS), (LANE_VECTOR,))),
    warp_dims=(-4,),
    lane_dims=(-3, -2),
    vector_dim=-1,
)
"""Of a chunk of rows."""


@functools.partial(jax.jit, static_argnames="pieces")
def sums(x, matrix, *, pieces: int):
    """Return x @ matrix over each piece of the rows, (pieces, E) fp32.

    Args:
      x: (D,) bf16 or fp32; D is a multiple of 64 pieces.
      matrix: (D, E) bf16 or fp32; E is a multiple of 128.
      pieces: of the rows.
    """
    rows, columns = matrix.shape
    strips, chunks = columns // STRIP_COLUMNS, rows // CHUNK_ROWS // pieces

    def body(x_ref, matrix_ref, sums_ref, of_warps):
        block = lax.axis_index("block")
        piece, strip = lax.div(block, strips), pl.ds(lax.rem(block, strips) * STRIP_COLUMNS, STRIP_COLUMNS)
        first = piece * chunks

        def load(n):
            return load_global(matrix_ref.at[first + n, :, :, strip], LAYOUT)

        def add(n, carry):
            total, tile = carry
            following = load(jnp.minimum(n + 1, chunks - 1))
            x = load_global(x_ref.at[first + n], LAYOUT.reduce(2)).astype(jnp.float32)
            return total + lax.broadcast_in_dim(x, SHAPE, [0, 1]) * tile.astype(jnp.float32), following

        zeros = plgpu.layout_cast(jnp.zeros(SHAPE, jnp.float32), LAYOUT)
        total, _ = lax.fori_loop(0, chunks, add, (zeros, load(0)))
        of_warps[...] = total.sum(axis=1)
        plgpu.commit_smem()
        parts = [stream.load(of_warps.at[pl.ds(i, 1)]) for i in range(WARPS)]
        sums_ref[pl.ds(piece, 1), strip] = parts[0] + parts[1] + parts[2] + parts[3]

    kernel = plgpu.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct((pieces, columns), jnp.float32)],
        scratch_types=[plgpu.SMEM((WARPS, STRIP_COLUMNS), jnp.float32)],
        grid=(strips * pieces,),
        grid_names=("block",),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="token_product",
    )
    shape = (rows // CHUNK_ROWS, WARPS, WARP_ROWS)
    [found] = kernel(x.reshape(shape), matrix.reshape(*shape, columns))
    return found
