"""Cross-entropy of a linear layer on Hopper: logits that never leave the chip (see `ops/cross_entropy.py`).

All three kernels are one walk. A block keeps rows of one matrix in shared memory, a tile of 64 for each of its
warpgroups, and passes tiles of rows of the other through a ring that one more warpgroup fills: scores S = x y^T are
made on the tensor cores and used up in registers. Tokens meet the vocabulary,

    top = max_v S ,  total = sum_v exp(S - top) ,  chosen = S[label] ,  lse = top + log(total)
    dhidden = g (exp(S - lse) - onehot) table

for gradients g of the losses, or for the table's gradient the vocabulary meets tokens, with the transpose of S:

    dtable = ((exp(S - lse) - onehot) g)^T hidden

What is walked over is cut into pieces, of which blocks leave results of their own, to be added up.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import mosaic
from pallas_kernels.hopper.mosaic import TILE_ROWS

MIN_ROWS = 256
"""Rows that hidden and table have at least, in multiples of 8: what copies can take."""
MASKED_LOGIT = -1e30
"""The logit of what the vocabulary lacks; finite, so that differences are."""
LOG2E = math.log2(math.e)
TOP, TOTAL, CHOSEN = range(3)
"""The rows of what `forward` returns."""
LOGARITHM, FACTOR, LABEL = range(3)
"""The rows of what `table_gradient` takes of each token."""
TILE_COLUMNS = 128
"""Rows of a streamed tile: columns of scores."""
SHARED_MEMORY_BYTES = 224 * 1024
"""Of a multiprocessor, in bytes, less what barriers and single values take."""
FETCHER_REGISTERS = 24


class Tiling(NamedTuple):
    """How a block is cut: warpgroups with 64 rows each, rows of a streamed tile, tiles in flight."""

    groups: int
    columns: int
    slots: int

    @property
    def rows(self) -> int:
        """Return how many a block keeps."""
        return self.groups * TILE_ROWS

    @property
    def registers(self) -> int:
        """Return how many each lane of a warpgroup that computes can have."""
        return {2: 240, 3: 160}[self.groups]


def forward_tiling(dim: int) -> Tiling:
    """Return the tiling of `forward`."""
    return _tiling(3 if dim <= 128 else 2, dim)


def backward_tiling(dim: int) -> Tiling:
    """Return the tiling of `hidden_gradient` and `table_gradient`, whose sums take registers too."""
    return _tiling(3 if dim == 64 else 2, dim)


def _tiling(groups: int, dim: int) -> Tiling:
    """Return the tiling with as many tiles in flight as shared memory holds, at most 4."""
    row = 2 * dim
    return Tiling(
        groups, TILE_COLUMNS, min(4, (SHARED_MEMORY_BYTES - groups * TILE_ROWS * row) // (TILE_COLUMNS * row))
    )


def forward(hidden, table, labels, *, vocab: int, pieces: int):
    """Return [statistics] (pieces, 3, N rounded up) fp32 of each piece of the vocabulary: TOP, TOTAL and CHOSEN.

    hidden is (N, D), table (V, D), both bf16; labels (N rounded up to a block's rows) int32. `vocab` of the V rows
    count.
    """
    tiling = forward_tiling(hidden.shape[1])

    def compute(walk, hidden_tile, labels_ref, statistics_ref):
        labels = mosaic.load_global(labels_ref.at[walk.mine], mosaic.ROW_LAYOUT)

        def step(first, tiles, freed, carry):
            top, total, chosen = carry
            [table_tile] = tiles
            s = _scores(hidden_tile, table_tile)
            freed()
            column = mosaic.iota(s.shape, 1)
            if vocab % tiling.columns:
                s = jnp.where(column < vocab - first, s, MASKED_LOGIT)
            before, top = top, jnp.maximum(top, s.max(axis=1))
            p = jnp.exp2(s * LOG2E - mosaic.across(top * LOG2E, s.shape))
            total = total * jnp.exp2((before - top) * LOG2E) + p.sum(axis=1)
            labelled = column == mosaic.across(labels - first, s.shape)
            return top, total, chosen + jnp.where(labelled, s, 0.0).sum(axis=1)

        for row, values in enumerate(walk.over(step, (_rows(MASKED_LOGIT), _rows(0.0), _rows(0.0)))):
            statistics_ref.at[walk.piece, row, walk.mine][...] = values

    rows = pl.cdiv(hidden.shape[0], tiling.rows) * tiling.rows
    out_type = jax.ShapeDtypeStruct((pieces, 3, rows), jnp.float32)
    return _kernel(compute, "cross_entropy_forward", tiling, pieces, hidden, [table], [labels], out_type, vocab)


def hidden_gradient(hidden, table, labels, logarithm, *, vocab: int, pieces: int):
    """Return [sums] (pieces, N rounded up, D) fp32: each loss's gradient of its row of hidden, from each piece.

    Arguments as of `forward`, and the logarithm to base 2 of each row's sum of exponentials, as long as labels.
    """
    tiling = backward_tiling(hidden.shape[1])

    def compute(walk, hidden_tile, labels_ref, logarithm_ref, sums_ref):
        labels, logarithm = (
            mosaic.load_global(x.at[walk.mine], mosaic.ROW_LAYOUT) for x in (labels_ref, logarithm_ref)
        )

        def step(first, tiles, freed, sums):
            [table_tile] = tiles
            # Behind a barrier, since comparisons that are made before there are scores take registers.
            s, label = lax.optimization_barrier((_scores(hidden_tile, table_tile), labels - first))
            p = jnp.exp2(s * LOG2E - mosaic.across(logarithm, s.shape))
            column = mosaic.iota(s.shape, 1)
            if vocab % tiling.columns:
                p = jnp.where(column < vocab - first, p, 0.0)
            p = jnp.where(column == mosaic.across(label, s.shape), p - 1.0, p)
            sums = _weigh(sums, p, table_tile)
            freed()
            return sums

        sums_ref.at[walk.piece, walk.mine][...] = walk.over(step, mosaic.zeros((TILE_ROWS, hidden.shape[1])))

    rows = pl.cdiv(hidden.shape[0], tiling.rows) * tiling.rows
    out_type = jax.ShapeDtypeStruct((pieces, rows, hidden.shape[1]), jnp.float32)
    whole = [labels, logarithm]
    return _kernel(compute, "cross_entropy_hidden", tiling, pieces, hidden, [table], whole, out_type, vocab)


def table_gradient(table, hidden, tokens, *, pieces: int):
    """Return [sums] (pieces, V rounded up, D) fp32: the table's gradient from each piece of the tokens.

    table and hidden as of `forward`. tokens (3, N rounded up to a tile) fp32 are the LOGARITHM to base 2 of a token's
    sum of exponentials, the gradient of its loss as FACTOR, 0 for one that does not exist, and its LABEL.
    """
    tiling = backward_tiling(hidden.shape[1])

    def compute(walk, table_tile, sums_ref):
        row = plgpu.broadcasted_iota(jnp.int32, (TILE_ROWS,), 0, layout=mosaic.ROW_LAYOUT) + walk.mine.start
        row = row.astype(jnp.float32)

        def step(first, tiles, freed, sums):
            hidden_tile, tokens_tile = tiles
            s = _scores(table_tile, hidden_tile)

            def token(kind):
                return mosaic.down(plgpu.load(tokens_tile.at[kind], layout=mosaic.COLUMN_LAYOUT), s.shape)

            p = jnp.exp2(s * LOG2E - token(LOGARITHM))
            p = jnp.where(mosaic.across(row, s.shape) == token(LABEL), p - 1.0, p) * token(FACTOR)
            sums = _weigh(sums, p, hidden_tile)
            freed()
            return sums

        sums_ref.at[walk.piece, walk.mine][...] = walk.over(step, mosaic.zeros((TILE_ROWS, table.shape[1])))

    rows = pl.cdiv(table.shape[0], tiling.rows) * tiling.rows
    out_type = jax.ShapeDtypeStruct((pieces, rows, table.shape[1]), jnp.float32)
    streamed, length = [hidden, tokens], hidden.shape[0]
    return _kernel(compute, "cross_entropy_table", tiling, pieces, table, streamed, [], out_type, length)


class _Walk(NamedTuple):
    """A warpgroup's way over the tiles: its piece, its rows, and what `over` needs."""

    piece: jax.Array
    mine: pl.Slice
    tiling: Tiling
    begin: jax.Array
    length: jax.Array
    tiles: Sequence
    filled: Any
    freed: Any

    def over(self, step: Callable, carry):
        """Return the carry after `step(first, tiles, freed, carry)` for each tile of the piece.

        `first` is the tile's first row, `tiles` what is streamed of it, and `freed()` says that nobody needs them.
        """

        def body(n, carry):
            slot = lax.rem(n, self.tiling.slots)
            plgpu.barrier_wait(self.filled.at[slot])
            tiles = [tile.at[slot] for tile in self.tiles]
            first = (self.begin + n) * self.tiling.columns
            return step(first, tiles, lambda: plgpu.barrier_arrive(self.freed.at[slot]), carry)

        return lax.fori_loop(0, self.length, body, carry)


def _kernel(compute, name: str, tiling: Tiling, pieces: int, x, streamed, whole, out_type, length: int):
    """Return the result of `compute(walk, tile, *refs)`, called in each warpgroup with its tile of x.

    `streamed` are the arrays that are walked over, up to `length`: the first by rows, others by columns. The refs are
    those of the arrays in `whole` and of the result.
    """
    groups, columns, slots = tiling
    dim, blocks, tiles = x.shape[1], pl.cdiv(x.shape[0], tiling.rows), pl.cdiv(length, columns)

    def body(*refs):
        x_ref, *sources = refs[: 1 + len(streamed)]
        x_tile, *stream, given, filled, freed, finished = refs[-5 - len(streamed) :]
        group, block = lax.axis_index("warpgroup"), lax.axis_index("block")
        piece, first_row = lax.div(block, blocks), lax.rem(block, blocks) * tiling.rows
        begin = lax.div(piece * tiles, pieces)
        count = lax.div((piece + 1) * tiles, pieces) - begin

        @pl.when(group == groups)
        def fetch():
            plgpu.set_max_registers(FETCHER_REGISTERS, action="decrease")
            plgpu.copy_gmem_to_smem(x_ref.at[pl.ds(first_row, tiling.rows)], x_tile, given)

            def step(n, _):
                slot = lax.rem(n, slots)
                pl.when(n >= slots)(lambda: plgpu.barrier_wait(freed.at[slot]))
                part = pl.ds((begin + n) * columns, columns)
                for i, (source, tile) in enumerate(zip(sources, stream, strict=True)):
                    source = source.at[:, part] if i else source.at[part]
                    plgpu.copy_gmem_to_smem(source, tile.at[slot], filled.at[slot])

            lax.fori_loop(0, count, step, None)

        @pl.when(group < groups)
        def use():
            plgpu.set_max_registers(tiling.registers, action="increase")
            mine = pl.ds(first_row + group * TILE_ROWS, TILE_ROWS)
            walk = _Walk(piece, mine, tiling, begin, count, stream, filled, freed)
            plgpu.barrier_wait(given)
            compute(walk, x_tile.at[pl.ds(group * TILE_ROWS, TILE_ROWS)], *refs[1 + len(streamed) : -5 - len(streamed)])

        plgpu.barrier_arrive(finished)
        plgpu.barrier_wait(finished)

    return plgpu.kernel(
        body,
        out_type=[out_type],
        scratch_types=[
            mosaic.swizzled((tiling.rows, dim), mosaic.WIDE_SWIZZLE),
            mosaic.swizzled((slots, columns, dim), mosaic.WIDE_SWIZZLE),
            *(plgpu.SMEM((slots, other.shape[0], columns), other.dtype) for other in streamed[1:]),
            plgpu.Barrier(),
            plgpu.Barrier(num_arrivals=len(streamed), num_barriers=slots),
            plgpu.Barrier(num_arrivals=groups, num_barriers=slots),
            plgpu.Barrier(num_arrivals=groups + 1),
        ],
        grid=(blocks * pieces,),
        grid_names=("block",),
        num_threads=groups + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        kernel_name=name,
    )(x, *streamed, *whole)


def _rows(value: float) -> jax.Array:
    """Return a value for each row of a tile."""
    return plgpu.layout_cast(jnp.full((TILE_ROWS,), value, jnp.float32), mosaic.ROW_LAYOUT)


def _scores(x, y) -> jax.Array:
    """Return x y^T of two shared tiles."""

    def multiply(s):
        mosaic.multiply(s, x, y.T)
        return s[...]

    return mosaic.products(multiply, (x.shape[0], y.shape[0]))


def _weigh(sums, weights, y) -> jax.Array:
    """Return sums + weights y of weights in registers and a shared tile."""

    def multiply(accumulators):
        mosaic.multiply(accumulators[0], weights.astype(y.dtype), y)

    [sums] = mosaic.accumulate(multiply, (sums,))
    return sums
