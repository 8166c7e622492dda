"""The two ends of a mixer for one token on Hopper: its projections of the stream's norm, and that back into the stream.

    t = r + sum_p y_p        z_i = norm(t) W_i        y' = x W

Of the first a block has a strip of one matrix's columns, for which it makes the norm itself; of the second a strip and
a piece of the rows, whose sums whatever reads them adds up.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import split
from pallas_kernels.hopper.mosaic import WARPS, keep_plain, save
from pallas_kernels.hopper.token_strips import (
    CHUNK_ROWS,
    GROUPS,
    PART_COLUMNS,
    WARP_ROWS,
    Ring,
    Source,
    by_row,
    leave_sums,
    load_vector,
    normed,
    scratch,
    summed,
)


@functools.partial(jax.jit, static_argnames="eps")
def normed_products(r, y, scale, matrices, *, eps: float):
    """Return r + sum(y) (D,) fp32, and [norm of it @ matrix (E,) for each matrix] bf16.

    Args:
      r: (D,) fp32; D is a multiple of 128.
      y: pieces of what is to be added to it, (P, D) fp32 or bf16.
      scale: of the norm, (D,) fp32.
      matrices: (D, E) bf16 each; E, which may differ, is a multiple of 32.
    """
    count, chunks = len(matrices), r.shape[0] // CHUNK_ROWS
    strips = [matrix.shape[1] // PART_COLUMNS for matrix in matrices]
    begins = [sum(strips[:i]) for i in range(count)]

    def body(r_ref, y_ref, scale_ref, *refs):
        matrix_refs, results, [total_ref, x_tile, tiles, parts, filled, ready, done] = split(refs, count, count)
        keep_plain(x_tile, tiles, parts)
        leads, block = lax.axis_index("group") == 0, lax.axis_index("block")
        own = [(block >= begin) & (block < begin + n) for begin, n in zip(begins, strips, strict=True)]
        columns = [[(block - begin) * PART_COLUMNS] for begin in begins]
        sources = [
            Source(ref, 0, jnp.where(is_own, chunks, 0), of)
            for ref, is_own, of in zip(matrix_refs, own, columns, strict=True)
        ]
        ring = Ring(tiles, filled, sources)

        @pl.when(leads)
        def _():
            total = normed(x_tile, r_ref, y_ref, scale_ref, eps)

            @pl.when(block == 0)
            def _():
                total_ref[...] = total

            plgpu.barrier_arrive(ready)

        plgpu.barrier_wait(ready)
        found = [ring.walk(i, x_tile) for i in range(count)]
        leave_sums(parts, [sum(others, first) for first, *others in zip(*found, strict=True)])
        plgpu.barrier_arrive(done)

        @pl.when(leads)
        def _():
            plgpu.barrier_wait(done)
            for result, is_own, begin in zip(results, own, begins, strict=True):
                pl.when(is_own)(functools.partial(_write, result.at[block - begin], parts))

    out_type = [
        jax.ShapeDtypeStruct((matrix.shape[1] // PART_COLUMNS, PART_COLUMNS), jnp.bfloat16) for matrix in matrices
    ]
    out_type.append(jax.ShapeDtypeStruct((1, chunks, WARPS, WARP_ROWS), jnp.float32))
    given = by_row(r[None]), by_row(y), by_row(scale[None]), *map(_by_chunks, matrices)
    *found, total = _kernel(body, "token_products", sum(strips), out_type, chunks)(*given)
    return total.reshape(-1), [x.reshape(-1) for x in found]


@functools.partial(jax.jit, static_argnames="multiprocessors")
def sums(x, matrix, *, multiprocessors: int):
    """Return x @ matrix over each of some pieces of the rows, (P, E) fp32.

    Args:
      x: (D,) bf16 or fp32; D is a multiple of 128.
      matrix: (D, E) bf16; E is a multiple of 32.
      multiprocessors: of the GPU, each of which has one of the blocks at most.
    """
    strips = matrix.shape[1] // PART_COLUMNS
    pieces = piece_count(matrix.shape[0] // CHUNK_ROWS, strips, multiprocessors)
    chunks = matrix.shape[0] // CHUNK_ROWS // pieces

    def body(x_ref, matrix_ref, sums_ref, x_tile, tiles, parts, filled, ready, done):
        keep_plain(x_tile, tiles, parts)
        leads, block = lax.axis_index("group") == 0, lax.axis_index("block")
        piece, strip = lax.div(block, strips), lax.rem(block, strips)
        source = Source(matrix_ref, piece * chunks, jnp.int32(chunks), [strip * PART_COLUMNS])
        ring = Ring(tiles, filled, [source])

        @pl.when(leads)
        def _():
            save(x_tile, load_vector(x_ref.at[:, pl.ds(piece * chunks, chunks)]))
            plgpu.commit_smem()
            plgpu.barrier_arrive(ready)

        plgpu.barrier_wait(ready)
        leave_sums(parts, ring.walk(0, x_tile))
        plgpu.barrier_arrive(done)

        @pl.when(leads)
        def _():
            plgpu.barrier_wait(done)
            _write(sums_ref.at[piece, strip], parts)

    out_type = [jax.ShapeDtypeStruct((pieces, matrix.shape[1] // PART_COLUMNS, PART_COLUMNS), jnp.float32)]
    kernel = _kernel(body, "token_sums", strips * pieces, out_type, chunks)
    [found] = kernel(by_row(x[None]), _by_chunks(matrix))
    return found.reshape(pieces, -1)


def piece_count(chunks: int, strips: int, multiprocessors: int) -> int:
    """Return into how many pieces the rows of a matrix are cut: the most with a multiprocessor for each block."""
    return max(n for n in range(1, chunks + 1) if chunks % n == 0 and (n == 1 or n * strips <= multiprocessors))


def _kernel(body, name: str, blocks: int, out_type: list, chunks: int):
    return plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=scratch(chunks, part_count=1),
        grid=(blocks,),
        grid_names=("block",),
        num_threads=GROUPS,
        thread_name="group",
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        kernel_name=name,
    )


def _write(target, parts) -> None:
    """Write a block's sums (PART_COLUMNS,)."""
    [total] = summed(parts)
    save(target, total)


def _by_chunks(matrix):
    """Return (D, E) as (chunks, WARPS, WARP_ROWS, E)."""
    return matrix.reshape(-1, WARPS, WARP_ROWS, matrix.shape[1])
