"""The product of a few tokens and a matrix on Hopper, which is read once at the memory's speed.

A block takes a tile of 64 tokens, a strip of the matrix's columns and a piece of its rows. One warpgroup fetches the
matrix by chunks of rows, and the columns of the tokens that meet them, through a ring of tiles; the other multiplies,
and keeps the sums in its registers. The blocks of a strip are a cluster: each fetches a part of a chunk for all.
Products with several matrices are strips of one kernel, each as those of its own.
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

MOST_TOKENS = 8 * mosaic.TILE_ROWS
STRIP_COLUMNS, NARROW_COLUMNS = 128, 64
"""Of a strip, and of one where wide ones are few; a gated one has as many values as gates."""
CHUNK_ROWS = 64
MIN_PIECE_CHUNKS = 4
RING_BYTES = 192 * 1024
"""Of shared memory, a block's alone on its multiprocessor: what is under way hides the memory's latency."""
MULTIPLIER, FETCHER = 0, 1
"""A block's warpgroups."""


@functools.partial(jax.jit, static_argnames="multiprocessors")
def products(x, matrices, *, multiprocessors: int):
    """Return [x @ matrix (M, E) for each matrix] bf16.

    Args:
      x: (M, D) bf16, M 64, 128, 256 or 512; D is a multiple of 64.
      matrices: (D, E) bf16 each; E, which may differ, is a multiple of 64.
      multiprocessors: of the GPU.
    """
    widths = [matrix.shape[1] for matrix in matrices]
    narrow_blocks = sum(widths) // NARROW_COLUMNS * _tiles(x)
    is_wide = narrow_blocks > multiprocessors and not any(width % STRIP_COLUMNS for width in widths)
    cuts = _cuts(widths, STRIP_COLUMNS if is_wide else NARROW_COLUMNS)
    return [y[0] for y in _strips(_first, "few_tokens_product", x, matrices, cuts, jnp.bfloat16)]


@functools.partial(jax.jit, static_argnames="multiprocessors")
def sums(x, matrix, *, multiprocessors: int):
    """Return x @ matrix over each of some pieces of the rows, (pieces, M, E) fp32.

    Args:
      x: (M, D) bf16, M 64, 128, 256 or 512; D is a multiple of 64.
      matrix: (D, E) bf16; E is a multiple of 64.
      multiprocessors: of the GPU.
    """
    [cut] = _cuts([matrix.shape[1]], NARROW_COLUMNS if matrix.shape[1] % STRIP_COLUMNS else STRIP_COLUMNS)
    cut = cut._replace(pieces=sum_pieces(matrix.shape[0], cut.strips * _tiles(x), multiprocessors))
    [found] = _strips(_first, "few_tokens_product", x, [matrix], [cut], jnp.float32)
    return found


@jax.jit
def gated(x, matrix):
    """Return value * silu(gate) (M, F) bf16 of (value, gate) = x @ matrix.

    Args:
      x: (M, D) bf16, M 64, 128, 256 or 512; D is a multiple of 64.
      matrix: (D, 2F) bf16; F is a multiple of 64.
    """

    def finish(value, gate):
        value, gate = (x.astype(jnp.bfloat16).astype(jnp.float32) for x in (value, gate))
        return value * gate * stream.sigmoid(gate)

    width = matrix.shape[1] // 2
    [cut] = _cuts([width], NARROW_COLUMNS)
    [y] = _strips(finish, "few_tokens_gated", x, [matrix], [cut._replace(firsts=(0, width))], jnp.bfloat16)
    return y[0]


def sum_pieces(rows: int, blocks: int, multiprocessors: int) -> int:
    """Return into how many pieces the rows of a matrix are cut, that each multiprocessor has one of the blocks.

    Pieces have some rows: sums of fewer are more bytes than the matrix.
    """
    chunks = rows // CHUNK_ROWS
    most = max(1, min(multiprocessors // blocks, chunks // MIN_PIECE_CHUNKS))
    return max(n for n in range(1, most + 1) if chunks % n == 0)


def _tiles(x) -> int:
    """Return of how many tiles tokens are."""
    return x.shape[0] // mosaic.TILE_ROWS


def _first(found):
    return found


class _Cut(NamedTuple):
    """How a matrix is cut: the blocks of a cluster have a strip of `columns` from each of `firsts` on.

    `begin` is the first cluster.
    """

    begin: int
    columns: int
    strips: int
    firsts: tuple[int, ...] = (0,)
    pieces: int = 1

    @property
    def width(self) -> int:
        """Of the result."""
        return self.strips * self.columns

    @property
    def end(self) -> int:
        return self.begin + self.strips * self.pieces


def _cuts(widths: list[int], columns: int) -> list[_Cut]:
    """Return how matrices for results of some widths are cut."""
    strips = [width // columns for width in widths]
    begins = itertools.accumulate([0, *strips[:-1]])
    return [_Cut(begin, columns, count) for begin, count in zip(begins, strips, strict=True)]


def _strips(finish: Callable, name: str, x, matrices, cuts: list[_Cut], dtype) -> list[jax.Array]:
    """Return `finish(*sums)` of each block (pieces, M, width), for each matrix; its sums are one of each strip."""
    (tokens, rows), cut, count = x.shape, cuts[0], len(cuts)
    tile_bytes = 2 * CHUNK_ROWS * (mosaic.TILE_ROWS + len(cut.firsts) * cut.columns)
    slots = min(rows // CHUNK_ROWS // cut.pieces, RING_BYTES // tile_bytes)

    def body(x_ref, *refs):
        matrix_refs, results, scratch = split(refs, count, count)
        cluster = lax.axis_index("cluster")
        for matrix_ref, result, of in zip(matrix_refs, results, cuts, strict=True):
            run = functools.partial(_Strip(of, cluster - of.begin, x_ref, matrix_ref, result, scratch).run, finish)
            run() if count == 1 else pl.when((cluster >= of.begin) & (cluster < of.end))(run)

    def tiles(*shape: int) -> plgpu.SMEM:
        return mosaic.swizzled(shape, mosaic.WIDE_SWIZZLE)

    kernel = plgpu.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct((of.pieces, tokens, of.width), dtype) for of in cuts],
        scratch_types=[
            tiles(slots, mosaic.TILE_ROWS, CHUNK_ROWS),
            *[tiles(slots, CHUNK_ROWS, cut.columns) for _ in cut.firsts],
            tiles(mosaic.TILE_ROWS, cut.columns),
            plgpu.Barrier(num_arrivals=1 + len(cut.firsts), num_barriers=slots),
            plgpu.ClusterBarrier(collective_axes=("tile",), num_barriers=slots),
        ],
        grid=(cuts[-1].end,),
        grid_names=("cluster",),
        cluster=(_tiles(x),),
        cluster_names=("tile",),
        num_threads=2,
        thread_name="role",
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        kernel_name=name,
    )
    return kernel(x, *matrices)


class _Strip:
    """A block's work: the product of its tokens and a strip, or one from each of several columns on, of some rows."""

    def __init__(self, cut: _Cut, number, x_ref, matrix_ref, result, scratch):
        self.cut, self.x, self.matrix, self.result = cut, x_ref, matrix_ref, result
        self.piece, self.strip = lax.div(number, cut.strips), lax.rem(number, cut.strips)
        self.tokens = pl.ds(lax.axis_index("tile") * mosaic.TILE_ROWS, mosaic.TILE_ROWS)
        self.x_tiles, *self.tiles, self.out_tile, self.filled, self.emptied = scratch
        self.slots, self.chunks = self.x_tiles.shape[0], matrix_ref.shape[0] // CHUNK_ROWS // cut.pieces

    def run(self, finish: Callable) -> None:
        """Fetch what the other warpgroup multiplies, or multiply it and write what `finish` makes of the sums."""
        is_fetcher = lax.axis_index("role") == FETCHER

        @pl.when(is_fetcher)
        def fetch_all():
            pl.loop(0, self.slots)(lambda n: self.fetch_matrix(n))
            pl.loop(0, self.slots)(lambda n: self.fetch_tokens(n))
            pl.loop(self.slots, self.chunks)(lambda n: self.fetch_again(n))

        @pl.when(~is_fetcher)
        def multiply_all():
            self.put(finish(*mosaic.products(self.add_all, *[self.out_tile.shape] * len(self.tiles))))

    def fetch_again(self, n) -> None:
        """Start the copies of chunk n, once all blocks of the cluster have read what was in the slot."""
        plgpu.barrier_wait(self.emptied.at[lax.rem(n, self.slots)])
        self.fetch_matrix(n)
        self.fetch_tokens(n)

    def fetch_matrix(self, n) -> None:
        """Start the copies of a chunk of the matrix to all blocks of the cluster."""
        slot, rows = self.place(n)
        for first, tile in zip(self.cut.firsts, self.tiles, strict=True):
            source = self.matrix.at[rows, pl.ds(first + self.strip * self.cut.columns, self.cut.columns)]
            plgpu.copy_gmem_to_smem(source, tile.at[slot], self.filled.at[slot], collective_axes="tile")

    def fetch_tokens(self, n) -> None:
        """Start the copy of the tokens' columns that meet a chunk."""
        slot, rows = self.place(n)
        plgpu.copy_gmem_to_smem(self.x.at[self.tokens, rows], self.x_tiles.at[slot], self.filled.at[slot])

    def place(self, n) -> tuple[jax.Array, pl.Slice]:
        """Return the slot of a chunk, and its rows."""
        return lax.rem(n, self.slots), pl.ds((self.piece * self.chunks + n) * CHUNK_ROWS, CHUNK_ROWS)

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
        target = self.result.at[self.piece, self.tokens, pl.ds(self.strip * self.cut.columns, self.cut.columns)]
        if target.dtype == jnp.float32:
            mosaic.save(target, found)
        else:
            mosaic.save(self.out_tile, found)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(self.out_tile, target)
            plgpu.wait_smem_to_gmem(0)
