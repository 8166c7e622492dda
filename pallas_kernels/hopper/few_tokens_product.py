"""The product of a few tokens, up to two tiles of 64, and a matrix on Hopper, which is read once at the memory's speed.

A block takes a strip of the matrix's columns and a piece of its rows. One warpgroup fetches these through a ring of
tiles with those columns of the tokens that meet them, the other multiplies, and keeps the sums of all tokens in its
registers. A strip is half as large as 128 tokens, which all blocks of a piece need: those of a cluster share them, each
fetches a part of a tile for all. Products with several matrices are strips of one kernel, each as those of its own.
"""

import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import split
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
def products(x, matrices, *, most_sharers: int = MOST_SHARERS):
    """Return [x @ matrix (M, E) for each matrix] bf16.

    Args:
      x: (M, D) bf16, M 64 or 128; D is a multiple of 64.
      matrices: (D, E) bf16 each; E, which may differ, is a multiple of 64.
      most_sharers: blocks of a cluster, at most.
    """
    cuts = _cuts([matrix.shape[1] for matrix in matrices], most_sharers)
    return [y[0] for y in _strips(_first, "few_tokens_product", x, matrices, cuts, jnp.bfloat16)]


@functools.partial(jax.jit, static_argnames=("pieces", "most_sharers"))
def sums(x, matrix, *, pieces: int, most_sharers: int = MOST_SHARERS):
    """Return x @ matrix over each piece of the rows, (pieces, M, E) fp32.

    Args:
      x: (M, D) bf16, M 64 or 128; D is a multiple of 64 pieces.
      matrix: (D, E) bf16; E is a multiple of 64.
      pieces: of the rows.
      most_sharers: blocks of a cluster, at most.
    """
    [cut] = _cuts([matrix.shape[1]], most_sharers)
    [found] = _strips(_first, "few_tokens_product", x, [matrix], [cut._replace(pieces=pieces)], jnp.float32)
    return found


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
    [cut] = _cuts([width], most_sharers, GATED_COLUMNS)
    [y] = _strips(finish, "few_tokens_gated", x, [matrix], [cut._replace(firsts=(0, width))], jnp.bfloat16)
    return y[0]


def sum_pieces(rows: int, columns: int, multiprocessors: int) -> int:
    """Return into how many pieces the rows of a matrix are cut, that each multiprocessor has a block, if it can.

    Pieces have some rows: sums of fewer are more bytes than the matrix.
    """
    chunks, strips = rows // CHUNK_ROWS, columns // STRIP_COLUMNS
    most = max(1, min(multiprocessors // strips, chunks // MIN_PIECE_CHUNKS))
    return max(n for n in range(1, most + 1) if chunks % n == 0)


def _first(found):
    return found


class _Cut(NamedTuple):
    """How a matrix is cut: a block has a strip of `columns` from each of `firsts` on, a cluster has `sharers` of them.

    `begin` is the first block.
    """

    begin: int
    columns: int
    strips: int
    sharers: int
    firsts: tuple[int, ...] = (0,)
    pieces: int = 1

    @property
    def width(self) -> int:
        """Of the result."""
        return self.strips * self.columns

    @property
    def end(self) -> int:
        return self.begin + self.strips * self.pieces


def _cuts(widths: list[int], most_sharers: int, columns: int = STRIP_COLUMNS) -> list[_Cut]:
    """Return how matrices for results of some widths are cut; no cluster has strips of two."""
    strips = [width // columns for width in widths]
    sharers = max(n for n in range(1, most_sharers + 1) if not any(count % n for count in strips))
    begins = itertools.accumulate([0, *strips[:-1]])
    return [_Cut(begin, columns, count, sharers) for begin, count in zip(begins, strips, strict=True)]


def _strips(finish: Callable, name: str, x, matrices, cuts: list[_Cut], dtype) -> list[jax.Array]:
    """Return `finish(*sums)` of each block (pieces, M, width), for each matrix; its sums are one of each strip."""
    (tokens, rows), cut, count = x.shape, cuts[0], len(cuts)
    swizzle, sources = mosaic.widest_swizzle(cut.columns), 1 + len(cut.firsts)
    tile_bytes = 2 * CHUNK_ROWS * (tokens + len(cut.firsts) * cut.columns)
    slots = min(rows // CHUNK_ROWS // cut.pieces, RING_BYTES // tile_bytes)

    def body(x_ref, *refs):
        matrix_refs, results, scratch = split(refs, count, count)
        block = lax.axis_index("cluster") * cut.sharers + lax.axis_index("sharer")
        for matrix_ref, result, of in zip(matrix_refs, results, cuts, strict=True):
            strip = _Strip(of, block - of.begin, x_ref, matrix_ref, result, scratch)
            run = functools.partial(strip.run, finish)
            run() if count == 1 else pl.when((block >= of.begin) & (block < of.end))(run)

    kernel = plgpu.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct((of.pieces, tokens, of.width), dtype) for of in cuts],
        scratch_types=[
            mosaic.swizzled((slots, tokens, CHUNK_ROWS), swizzle),
            *[mosaic.swizzled((slots, CHUNK_ROWS, cut.columns), swizzle) for _ in cut.firsts],
            mosaic.swizzled((tokens, cut.columns), swizzle),
            plgpu.Barrier(num_arrivals=sources, num_barriers=slots),
            plgpu.ClusterBarrier(collective_axes=("sharer",), num_barriers=slots),
        ],
        grid=(cuts[-1].end // cut.sharers,),
        grid_names=("cluster",),
        cluster=(cut.sharers,),
        cluster_names=("sharer",),
        num_threads=2,
        thread_name="role",
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        kernel_name=name,
    )
    return kernel(x, *matrices)


class _Strip:
    """A block's work: the product of the tokens and a strip, or one from each of several columns on, of some rows."""

    def __init__(self, cut: _Cut, number, x_ref, matrix_ref, result, scratch):
        self.cut, self.x, self.matrix, self.result = cut, x_ref, matrix_ref, result
        self.piece, self.strip = lax.div(number, cut.strips), lax.rem(number, cut.strips)
        self.x_tiles, *self.tiles, self.out_tile, self.filled, self.emptied = scratch
        self.slots, self.tokens, _ = self.x_tiles.shape
        self.chunks = matrix_ref.shape[0] // CHUNK_ROWS // cut.pieces

    def run(self, finish: Callable) -> None:
        """Fetch what the other warpgroup multiplies, or multiply it and write what `finish` makes of the sums."""
        is_fetcher = lax.axis_index("role") == FETCHER

        @pl.when(is_fetcher)
        def fetch_all():
            lax.fori_loop(0, self.chunks, self.fetch, ())

        @pl.when(~is_fetcher)
        def multiply_all():
            self.put(finish(*mosaic.products(self.add_all, *[(self.tokens, self.cut.columns) for _ in self.tiles])))

    def fetch(self, n, carry: tuple) -> tuple:
        """Start the copies of chunk n, once all blocks that share its tokens have read what was in the slot."""
        slot, rows = lax.rem(n, self.slots), pl.ds((self.piece * self.chunks + n) * CHUNK_ROWS, CHUNK_ROWS)
        filled = self.filled.at[slot]
        pl.when(n >= self.slots)(lambda: plgpu.barrier_wait(self.emptied.at[slot]))
        for first, tile in zip(self.cut.firsts, self.tiles, strict=True):
            columns = pl.ds(first + self.strip * self.cut.columns, self.cut.columns)
            plgpu.copy_gmem_to_smem(self.matrix.at[rows, columns], tile.at[slot], filled)
        plgpu.copy_gmem_to_smem(self.x.at[:, rows], self.x_tiles.at[slot], filled, collective_axes="sharer")
        return carry

    def add_all(self, *totals) -> list[jax.Array]:
        """Return the sums of all chunks; a slot is given back once the products of the chunk after it have begun."""

        def add(n, carry):
            slot, last = lax.rem(n, self.slots), n - 1
            plgpu.barrier_wait(self.filled.at[slot])
            for total, tile in zip(totals, self.tiles, strict=True):
                mosaic.multiply(total, self.x_tiles.at[slot], tile.at[slot])
            plgpu.wgmma_wait(len(totals))
            is_filled_again = (last >= 0) & (last + self.slots < self.chunks)
            pl.when(is_filled_again)(lambda: plgpu.barrier_arrive(self.emptied.at[lax.rem(last, self.slots)]))
            return carry

        lax.fori_loop(0, self.chunks, add, ())
        return [total[...] for total in totals]

    def put(self, found) -> None:
        """Write the strip of the result: fp32 from the registers, where rows are whole sectors, bf16 by a copy."""
        target = self.result.at[self.piece, :, pl.ds(self.strip * self.cut.columns, self.cut.columns)]
        if target.dtype == jnp.float32:
            mosaic.save(target, found)
        else:
            mosaic.save(self.out_tile, found)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(self.out_tile, target)
            plgpu.wait_smem_to_gmem(0)
