"""The product of a few tokens, up to two tiles of 64, and a matrix on Hopper, which is read once at the memory's speed.

A block takes a strip of the matrix's columns and a piece of its rows. One warpgroup fetches these through a ring of
tiles with those columns of the tokens that meet them, the other multiplies, and keeps the sums of all tokens in its
registers. A strip is half as large as 128 tokens, which all blocks of a piece need: those of a cluster share them, each
fetches a part of a tile for all.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

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
MIN_PIECE_CHUNKS = 4
RING_BYTES = 192 * 1024
"""Of shared memory, a block's alone on its multiprocessor: what is under way hides the memory's latency."""
MOST_SHARERS = 4
"""Blocks of a cluster."""
MULTIPLIER, FETCHER = 0, 1
"""A block's warpgroups."""


@functools.partial(jax.jit, static_argnames="most_sharers")
def product(x, matrix, *, most_sharers: int = MOST_SHARERS):
    """Return x @ matrix (M, E) bf16.

    Args:
      x: (M, D) bf16, M 64 or 128; D is a multiple of 64.
      matrix: (D, E) bf16; E is a multiple of 64.
      most_sharers: blocks of a cluster, at most.
    """
    cut = _Cut.of(matrix.shape[1], most_sharers)
    [y] = _strips(_first, "few_tokens_product", x, matrix, cut, jnp.bfloat16)
    return y


@functools.partial(jax.jit, static_argnames=("pieces", "most_sharers"))
def sums(x, matrix, *, pieces: int, most_sharers: int = MOST_SHARERS):
    """Return x @ matrix over each piece of the rows, (pieces, M, E) fp32.

    Args:
      x: (M, D) bf16, M 64 or 128; D is a multiple of 64 pieces.
      matrix: (D, E) bf16; E is a multiple of 64.
      pieces: of the rows.
      most_sharers: blocks of a cluster, at most.
    """
    cut = _Cut.of(matrix.shape[1], most_sharers)._replace(pieces=pieces)
    return _strips(_first, "few_tokens_product", x, matrix, cut, jnp.float32)


@functools.partial(jax.jit, static_argnames="most_sharers")
def gated(x, matrix, *, most_sharers: int = MOST_SHARERS):
    """Return value * silu(gate) (M, F) bf16 of (value, gate) = x @ matrix.

    Args:
      x: (M, D) bf16, M 64 or 128; D is a multiple of 64.
      matrix: (D, 2F) bf16; F is a multiple of 32.
      most_sharers: blocks of a cluster, at most.
    """

    def finish(value, gate):
        value, gate = (x.astype(jnp.bfloat16).astype(jnp.float32) for x in (value, gate))
        return value * gate * stream.sigmoid(gate)

    width = matrix.shape[1] // 2
    cut = _Cut.of(width, most_sharers, GATED_COLUMNS)._replace(firsts=(0, width))
    [y] = _strips(finish, "few_tokens_gated", x, matrix, cut, jnp.bfloat16)
    return y


def _first(found):
    return found


class _Cut(NamedTuple):
    """How a matrix is cut: a block has a strip of `columns` from each of `firsts` on; a cluster has some strips."""

    columns: int
    strips: int
    sharers: int
    firsts: tuple[int, ...] = (0,)
    pieces: int = 1

    @classmethod
    def of(cls, width: int, most_sharers: int, columns: int = STRIP_COLUMNS) -> "_Cut":
        strips = width // columns
        return cls(columns, strips, max(n for n in range(1, most_sharers + 1) if strips % n == 0))

    @property
    def width(self) -> int:
        """Of the result."""
        return self.strips * self.columns

    @property
    def clusters(self) -> int:
        return self.strips * self.pieces // self.sharers

    def here(self) -> tuple[jax.Array, jax.Array]:
        """Return this block's piece and strip."""
        block = lax.axis_index("cluster") * self.sharers + lax.axis_index("sharer")
        return lax.div(block, self.strips), lax.rem(block, self.strips)


def _strips(finish: Callable, name: str, x, matrix, cut: _Cut, dtype):
    """Return `finish(*sums)` of each block (pieces, M, width); its sums are one of each strip."""
    tokens, chunks = x.shape[0], matrix.shape[0] // CHUNK_ROWS // cut.pieces
    tile_bytes = 2 * CHUNK_ROWS * (tokens + len(cut.firsts) * cut.columns)
    slots = min(chunks, RING_BYTES // tile_bytes)
    swizzle = mosaic.widest_swizzle(cut.columns)

    def body(x_ref, matrix_ref, result, x_tiles, *rest):
        *tiles, out_tile, filled, emptied = rest
        piece, strip = cut.here()

        def fetch(n, carry):
            slot, rows = lax.rem(n, slots), pl.ds((piece * chunks + n) * CHUNK_ROWS, CHUNK_ROWS)
            pl.when(n >= slots)(lambda: plgpu.barrier_wait(emptied.at[slot]))
            for first, tile in zip(cut.firsts, tiles, strict=True):
                columns = pl.ds(first + strip * cut.columns, cut.columns)
                plgpu.copy_gmem_to_smem(matrix_ref.at[rows, columns], tile.at[slot], filled.at[slot])
            source, target = x_ref.at[:, rows], x_tiles.at[slot]
            plgpu.copy_gmem_to_smem(source, target, filled.at[slot], collective_axes="sharer")
            return carry

        def add(*totals):
            def step(n, carry):
                slot = lax.rem(n, slots)
                plgpu.barrier_wait(filled.at[slot])
                for total, tile in zip(totals, tiles, strict=True):
                    mosaic.multiply(total, x_tiles.at[slot], tile.at[slot])
                plgpu.wgmma_wait(len(totals))
                is_fetched_again = (n > 0) & (n - 1 + slots < chunks)
                pl.when(is_fetched_again)(lambda: plgpu.barrier_arrive(emptied.at[lax.rem(n - 1, slots)]))
                return carry

            lax.fori_loop(0, chunks, step, ())
            return [total[...] for total in totals]

        @pl.when(lax.axis_index("role") == FETCHER)
        def _():
            lax.fori_loop(0, chunks, fetch, ())

        @pl.when(lax.axis_index("role") == MULTIPLIER)
        def _():
            found = finish(*mosaic.products(add, *[(tokens, cut.columns) for _ in tiles]))
            target = result.at[piece, :, pl.ds(strip * cut.columns, cut.columns)]
            if dtype == jnp.float32:
                mosaic.save(target, found)
            else:
                mosaic.save(out_tile, found)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(out_tile, target)
                plgpu.wait_smem_to_gmem(0)

    out_shape = tokens, cut.columns
    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((cut.pieces, tokens, cut.width), dtype),
        scratch_types=[
            mosaic.swizzled((slots, tokens, CHUNK_ROWS), swizzle),
            *[mosaic.swizzled((slots, CHUNK_ROWS, cut.columns), swizzle) for _ in cut.firsts],
            mosaic.swizzled(out_shape, swizzle),
            plgpu.Barrier(num_arrivals=1 + len(cut.firsts), num_barriers=slots),
            plgpu.ClusterBarrier(collective_axes=("sharer",), num_barriers=slots),
        ],
        grid=(cut.clusters,),
        grid_names=("cluster",),
        cluster=(cut.sharers,),
        cluster_names=("sharer",),
        num_threads=2,
        thread_name="role",
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        kernel_name=name,
    )
    return kernel(x, matrix)


def sum_pieces(rows: int, columns: int, multiprocessors: int) -> int:
    """Return into how many pieces the rows of a matrix are cut, that each multiprocessor has a block, if it can.

    Pieces have some rows: sums of fewer are more bytes than the matrix.
    """
    chunks, strips = rows // CHUNK_ROWS, columns // STRIP_COLUMNS
    most = max(1, min(multiprocessors // strips, chunks // MIN_PIECE_CHUNKS))
    return max(n for n in range(1, most + 1) if chunks % n == 0)
