"""The product of a few tokens, up to two tiles of 64, and a matrix on Hopper, which is read once at the memory's speed.

A block is one warpgroup. It takes a strip of the matrix's columns and a piece of its rows, which come through a ring of
tiles with those columns of the tokens that meet them; the sums of all tokens stay in its registers.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import mosaic, stream

MOST_TOKENS = 2 * mosaic.TILE_ROWS
STRIP_COLUMNS = 64
GATED_COLUMNS = STRIP_COLUMNS // 2
"""Of a strip of values, beside which is one of gates."""
CHUNK_ROWS = 64
RING_BYTES = 176 * 1024
"""Of shared memory, a block's alone on its multiprocessor: what is under way hides the memory's latency."""


@functools.partial(jax.jit, static_argnames="pieces")
def sums(x, matrix, *, pieces: int):
    """Return x @ matrix over each piece of the rows, (pieces, M, E) fp32.

    Args:
      x: (M, D) bf16, M 64 or 128; D is a multiple of 64 pieces.
      matrix: (D, E) bf16; E is a multiple of 64.
      pieces: of the rows.
    """
    strips = matrix.shape[1] // STRIP_COLUMNS

    def finish(found, piece, strip, result):
        result.at[piece, :, pl.ds(strip * STRIP_COLUMNS, STRIP_COLUMNS)][...] = found[0]

    out_type = jax.ShapeDtypeStruct((pieces, x.shape[0], matrix.shape[1]), jnp.float32)
    return _product(finish, "few_tokens_product", x, matrix, (0,), STRIP_COLUMNS, strips, pieces, out_type)


@jax.jit
def gated(x, matrix):
    """Return value * silu(gate) (M, F) bf16 of (value, gate) = x @ matrix.

    Args:
      x: (M, D) bf16, M 64 or 128; D is a multiple of 64.
      matrix: (D, 2F) bf16; F is a multiple of 32.
    """
    width = matrix.shape[1] // 2

    def finish(found, piece, strip, result):
        value, gate = (part.astype(jnp.bfloat16).astype(jnp.float32) for part in found)
        product = value * gate * stream.sigmoid(gate)
        mosaic.save(result.at[:, pl.ds(strip * GATED_COLUMNS, GATED_COLUMNS)], product)

    out_type = jax.ShapeDtypeStruct((x.shape[0], width), jnp.bfloat16)
    strips = width // GATED_COLUMNS
    return _product(finish, "few_tokens_gated", x, matrix, (0, width), GATED_COLUMNS, strips, 1, out_type)


def _product(finish, name: str, x, matrix, firsts, columns: int, strips: int, pieces: int, out_type):
    """Return the result of `finish(sums, piece, strip, result)` for each block.

    It has a strip of `columns` from each of `firsts` on.
    """
    tokens, chunks = x.shape[0], matrix.shape[0] // CHUNK_ROWS // pieces
    swizzle = mosaic.widest_swizzle(columns)
    slots = min(chunks, RING_BYTES // (2 * CHUNK_ROWS * (tokens + len(firsts) * columns)))

    def body(x_ref, matrix_ref, result, x_tile, *rest):
        *tiles, filled = rest
        block = lax.axis_index("block")
        piece, strip = lax.div(block, strips), lax.rem(block, strips)

        def fetch(n):
            slot, rows = lax.rem(n, slots), pl.ds((piece * chunks + n) * CHUNK_ROWS, CHUNK_ROWS)
            plgpu.copy_gmem_to_smem(x_ref.at[:, rows], x_tile.at[slot], filled.at[slot])
            for first, tile in zip(firsts, tiles, strict=True):
                part = pl.ds(first + strip * columns, columns)
                plgpu.copy_gmem_to_smem(matrix_ref.at[rows, part], tile.at[slot], filled.at[slot])

        def step(n, totals):
            slot = lax.rem(n, slots)
            plgpu.barrier_wait(filled.at[slot])

            def multiply(accumulators):
                for accumulator, tile in zip(accumulators, tiles, strict=True):
                    mosaic.multiply(accumulator, x_tile.at[slot], tile.at[slot])

            totals = mosaic.accumulate(multiply, totals)
            pl.when(n + slots < chunks)(lambda: fetch(n + slots))
            return totals

        for n in range(slots):
            fetch(n)
        zeros = tuple(mosaic.zeros((tokens, columns)) for _ in firsts)
        finish(lax.fori_loop(0, chunks, step, zeros), piece, strip, result)

    kernel = plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=[
            mosaic.swizzled((slots, tokens, CHUNK_ROWS), swizzle),
            *[mosaic.swizzled((slots, CHUNK_ROWS, columns), swizzle) for _ in firsts],
            plgpu.Barrier(num_arrivals=1 + len(firsts), num_barriers=slots),
        ],
        grid=(strips * pieces,),
        grid_names=("block",),
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        kernel_name=name,
    )
    return kernel(x, matrix)


def sum_pieces(rows: int, columns: int, multiprocessors: int) -> int:
    """Return into how many pieces the rows of a matrix are cut, that each multiprocessor has a block, if it can."""
    chunks, strips = rows // CHUNK_ROWS, columns // STRIP_COLUMNS
    return max(n for n in range(1, max(1, multiprocessors // strips) + 1) if math.gcd(chunks, n) == n)
