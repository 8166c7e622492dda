"""Softmax attention to a sliding window on Hopper: the forward pass (see `ops/softmax.py`).

One warpgroup walks the chunks of 64 tokens of a piece of one head. A ring of slots keeps the keys and values that the
window still reaches, so that each is read once; blocks on the same multiprocessor hide each other's products.

A window of 64 n keys lets query i of a tile see, of the nearest tile, the keys up to its own, and of the farthest those
after: one tile of scores holds both (`Band`). Hence neither scores nor exponentials are computed for what is masked
there, and all that a query sees is in registers at once: no running maximum.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import mosaic
from pallas_kernels.hopper.mosaic import CHUNK_TOKENS

NOBODY_ID = -(2**31)
"""The document that queries of padding look for."""
UNREADABLE_ID = -1
"""The document of tokens whose outputs must be NaN."""
HIDDEN_SCORE = -1e30
"""The score of a key that a query does not see."""


def reach(window: int) -> int:
    """Return how many tiles of earlier keys a tile of queries sees, at least one."""
    return max(1, -(-(window - 1) // CHUNK_TOKENS))


def resident(head_dim: int) -> int:
    """Return how many blocks share a multiprocessor."""
    return 2 if head_dim == 64 else 1


def ahead(window: int) -> int:
    """Return how many chunks are fetched before they are needed: as many as leave room for `resident` blocks."""
    return 2 if reach(window) == 1 else 1


class Band:
    """Tiles of scores between one tile of queries and those of keys that it sees, or the reverse.

    `tiles[d]` holds what lies d tiles away. `fold` puts the nearest and the farthest into one: where they are both
    visible, on the diagonal where the window is 64 n + 1, the farthest goes into `extra`, one value per row. What
    follows works on these parts; `unfold` undoes it.
    """

    def __init__(self, window: int, keys_first: bool = False):
        """Take rows of queries and columns of keys, or rows of keys where `keys_first`."""
        self.window, self.reach, self.keys_first = window, reach(window), keys_first
        self.rows = plgpu.broadcasted_iota(jnp.int32, (CHUNK_TOKENS,), 0, layout=mosaic.ROW_LAYOUT)
        self.column = mosaic.iota(mosaic.PAIRS_SHAPE, 1)
        self.step = CHUNK_TOKENS if keys_first else -CHUNK_TOKENS
        self.overlaps = window == self.reach * CHUNK_TOKENS + 1

    @property
    def row(self):
        """The row of every element, behind a barrier: to make masks of it anew is cheaper than to keep them."""
        return mosaic.across(lax.optimization_barrier(self.rows), mosaic.PAIRS_SHAPE)

    @property
    def near(self):
        """Where the nearest tile is visible, but for the window's other end."""
        return self.row <= self.column if self.keys_first else self.column <= self.row

    def fold(self, tiles) -> list[jax.Array]:
        """Return the parts of tiles."""
        return [jnp.where(self.near, tiles[0], tiles[-1]), *tiles[1:-1]]

    def extra(self, tiles):
        """Return the farthest tile's diagonal, or None where it is not visible."""
        return jnp.where(self.row == self.column, tiles[-1], 0).sum(axis=1) if self.overlaps else None

    def unfold(self, parts, extra, dtype) -> list[jax.Array]:
        """Return the tiles of parts, zero where nothing is visible."""
        far = jnp.where(self.near, 0.0, parts[0])
        if self.overlaps:
            far = jnp.where(self.row == self.column, mosaic.across(extra, far.shape), far)
        return [x.astype(dtype) for x in (jnp.where(self.near, parts[0], 0.0), *parts[1:], far)]

    def seen(self, limit, ids=None):
        """Return which elements of the parts, and of the extra, are visible.

        `limit` is the first place that exists, or the last where keys come first, counted from the rows' first. `ids`
        are the documents of the rows, of each tile's columns and of the farthest's columns as rows.
        """
        if self.keys_first:
            end = self.rows + (self.window - 1)
            bound = jnp.minimum(end, limit)
        else:
            end = self.rows - (self.window - 1)
            bound = jnp.maximum(end, limit)

        def within(place, bound):
            return place <= bound if self.keys_first else place >= bound

        def columns(distance, bound):
            return within(self.column, mosaic.across(bound - self.step * distance, mosaic.PAIRS_SHAPE))

        far = columns(self.reach, bound)
        nearest = self.near | far if self.window >= CHUNK_TOKENS else jnp.where(self.near, columns(0, end), far)
        parts = [nearest, *(columns(d, bound) for d in range(1, self.reach))]
        extra = within(self.rows + self.step * self.reach, bound) if self.overlaps else None
        if ids is None:
            return parts, extra
        own, others, opposite = ids
        own = jnp.where(own == 0, NOBODY_ID, own)
        others = self.fold([spread(mosaic.down(x, mosaic.PAIRS_SHAPE)) for x in others])
        same = spread(mosaic.across(own, mosaic.PAIRS_SHAPE))
        parts = [part & (x == same) for part, x in zip(parts, others, strict=True)]
        return parts, (extra & (own == opposite)) if self.overlaps else None


def spread(tile: jax.Array) -> jax.Array:
    """Return a tile, said to be in the WGMMA layout: whole numbers leave layout inference too many choices."""
    return plgpu.layout_cast(tile, mosaic.WGMMA)


def load_ids(tiles, slots, overlaps: bool):
    """Return what `Band.seen` takes as `ids`, of slots in the order of tiles.

    The two `tiles` hold the same: layout inference finds no layouts for a tile that is loaded as rows and as columns.
    """
    as_rows, as_columns = tiles
    columns = [plgpu.load(as_columns.at[slot], layout=mosaic.COLUMN_LAYOUT) for slot in slots]
    rows = [plgpu.load(as_rows.at[slot], layout=mosaic.ROW_LAYOUT) for slot in (slots if overlaps else slots[:1])]
    return rows[0], columns, rows[-1]


def softmax(parts, extra, seen, factor: float):
    """Return exp2(s - top) of the parts and of the extra, s being `factor` times the scores, its sum per row, and top.

    Top is the largest visible s of each row. A row that sees nothing has zeros and the sum zero.
    """
    seen, extra_seen = seen
    parts = [jnp.where(mask, s, HIDDEN_SCORE) for mask, s in zip(seen, parts, strict=True)]
    tops = [s.max(axis=1) for s in parts]
    if extra is not None:
        extra = jnp.where(extra_seen, extra, HIDDEN_SCORE)
        tops.append(extra)
    top = functools.reduce(jnp.maximum, tops)
    # From zero where nothing is visible: there exp2 must give zero, not one.
    top = jnp.where(top > 0.5 * HIDDEN_SCORE, top, 0.0) * factor
    parts = [jnp.exp2(s * factor - mosaic.across(top, s.shape)) for s in parts]
    total = sum_rows(parts)
    if extra is not None:
        extra = jnp.exp2(extra * factor - top)
        total = total + extra
    return parts, extra, total, top


def sum_rows(parts) -> jax.Array:
    """Return the sum of each row over all parts."""
    return functools.reduce(jnp.add, (part.sum(axis=1) for part in parts))


def inverse(total: jax.Array) -> jax.Array:
    """Return 1 / total, and zero for a row that sees nothing."""
    return jnp.where(total > 0, 1.0 / jnp.where(total > 0, total, 1.0), 0.0)


def exponent(head_dim: int) -> float:
    """Return what turns q.k into an exponent of two."""
    return math.log2(math.e) / math.sqrt(head_dim)


def place(block, heads: int, chunks: int, pieces: int):
    """Return a block's batch row, head, first chunk and number of chunks.

    Heads come first: blocks that run at the same time read the same pages of memory.
    """
    piece = lax.rem(lax.div(block, heads), pieces)
    begin = lax.div(piece * chunks, pieces)
    count = lax.div((piece + 1) * chunks, pieces) - begin
    return lax.div(block, heads * pieces), lax.rem(block, heads), begin, count


@functools.partial(jax.jit, static_argnames=("window", "pieces"))
def forward(q, k, v, ids=None, *, window: int, pieces: int):
    """Return [o], all arrays (B, T, H, K) in bf16, T >= 64.

    `ids` (B, T rounded up to 64) int32 are documents, 0 for padding, whose o is zero, and `UNREADABLE_ID` for what has
    no meaning here, whose o is NaN. Tokens past T are read as zeros and not written.
    """
    batch, time, heads, head_dim = q.shape
    chunks, far = pl.cdiv(time, CHUNK_TOKENS), reach(window)
    packed = () if ids is None else (ids, ids)
    query_slots = 1 + ahead(window)
    slots = far + query_slots

    def body(*refs):
        q_ref, *sources = refs[: 3 + len(packed)]
        o_ref, q_tile, *tiles, o_tile, asked, filled = refs[3 + len(packed) :]
        k_tile, v_tile, *id_tiles = tiles
        row, head, begin, count = place(lax.axis_index("block"), heads, chunks, pieces)

        def fetch(m):
            chunk = begin - far + m
            copy_chunk(sources, tiles, filled, lax.rem(m, slots), row, head, jnp.maximum(chunk, 0))

            @pl.when(m >= far)
            def fetch_queries():
                slot = lax.rem(m - far, query_slots)
                copy_chunk([q_ref], [q_tile], asked, slot, row, head, chunk)

        for m in range(slots):
            pl.when(m < count + far)(functools.partial(fetch, jnp.int32(m)))
        for m in range(far):
            plgpu.barrier_wait(filled.at[m])

        def step(n, _):
            band = Band(window)
            m, mine = n + far, lax.rem(n, query_slots)
            last = n - 1 + slots
            pl.when((n > 0) & (last < count + far))(lambda: fetch(last))
            near_to_far = [lax.rem(m - d, slots) for d in range(far + 1)]
            plgpu.barrier_wait(asked.at[mine])
            plgpu.barrier_wait(filled.at[near_to_far[0]])

            def score(*accumulators):
                for s, slot in zip(accumulators, near_to_far, strict=True):
                    mosaic.multiply(s, q_tile.at[mine], k_tile.at[slot].T)
                return tuple(s[...] for s in accumulators)

            tiles = mosaic.products(score, *(mosaic.PAIRS_SHAPE,) * (far + 1))
            documents = load_ids(id_tiles, near_to_far, band.overlaps) if packed else None
            seen = band.seen(-(begin + n) * CHUNK_TOKENS, documents)
            parts, extra, total, _ = softmax(band.fold(tiles), band.extra(tiles), seen, exponent(head_dim))
            weights = band.unfold(parts, extra, q.dtype)

            def weigh(o):
                for p, slot in zip(weights, near_to_far, strict=True):
                    mosaic.multiply(o, p, v_tile.at[slot])
                return o[...]

            o = mosaic.products(weigh, (CHUNK_TOKENS, head_dim))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            share = inverse(total)
            share = jnp.where(documents[0] == UNREADABLE_ID, jnp.nan, share) if documents else share
            o_tile[...] = (o * mosaic.across(share, o.shape)).astype(o_tile.dtype)
            # Also what lets the next step overwrite slots: every warp has read them.
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(o_tile, o_ref.at[row, pl.ds((begin + n) * CHUNK_TOKENS, CHUNK_TOKENS), head])

        lax.fori_loop(0, count, step, None)
        plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct(q.shape, q.dtype)],
        scratch_types=[
            mosaic.swizzled((query_slots, CHUNK_TOKENS, head_dim), mosaic.widest_swizzle(head_dim)),
            *(mosaic.swizzled((slots, CHUNK_TOKENS, head_dim), mosaic.widest_swizzle(head_dim)) for _ in ("k", "v")),
            *(plgpu.SMEM((slots, CHUNK_TOKENS), jnp.int32) for _ in packed),
            mosaic.swizzled((CHUNK_TOKENS, head_dim), mosaic.widest_swizzle(head_dim)),
            plgpu.Barrier(num_arrivals=1, num_barriers=query_slots),
            plgpu.Barrier(num_arrivals=2 + len(packed), num_barriers=slots),
        ],
        grid=(batch * heads * pieces,),
        grid_names=("block",),
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        kernel_name="window_forward",
    )(q, k, v, *packed)


def copy_chunk(sources, tiles, filled, slot, row, head, chunk) -> None:
    """Start the copies of a chunk of (B, T, H, .) and (B, T) arrays into a slot."""
    tokens = pl.ds(chunk * CHUNK_TOKENS, CHUNK_TOKENS)
    for source, tile in zip(sources, tiles, strict=True):
        part = source.at[row, tokens, head] if len(source.shape) == 4 else source.at[row, tokens]
        plgpu.copy_gmem_to_smem(part, tile.at[slot], filled.at[slot])
