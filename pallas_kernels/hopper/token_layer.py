"""draft"""
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import stream
from pallas_kernels.hopper.mosaic import WARP_LANES, WARPS, keep_plain, load_shared, save

GROUPS = 2
PARTS, PART_COLUMNS = 2, 32
STRIP_COLUMNS = PARTS * PART_COLUMNS
WARP_ROWS = 32
CHUNK_ROWS = WARPS * WARP_ROWS
LANE_VECTOR = 8
LANE_ROWS = WARP_LANES * LANE_VECTOR // PART_COLUMNS
SHAPE = (WARPS, WARP_ROWS, PART_COLUMNS)
LAYOUT = plgpu.Layout.TILED(
    plgpu.Tiling(((WARPS, LANE_ROWS, PART_COLUMNS), (LANE_VECTOR,))), warp_dims=(-4,), lane_dims=(-3, -2), vector_dim=-1
)
ROWS = LAYOUT.reduce(2)
COLUMNS = LAYOUT.reduce(0).reduce(0)
SLOTS = 6
SLOT_BYTES = CHUNK_ROWS * STRIP_COLUMNS * 2


def vector_layout(rank, chunks):
    """Layout of (chunks, WARPS, WARP_ROWS) of a vector, or (1, chunks, ...)."""
    vector = math.gcd(chunks, 4)
    tiling = plgpu.Tiling(((1,) * (rank - 3) + (vector, WARPS, WARP_ROWS), (vector,)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-3,), lane_dims=(-4, -2) if vector > 1 else (-2,), vector_dim=-1)


def load_vector(ref):
    return plgpu.load(ref, layout=vector_layout(len(ref.shape), ref.shape[-3]), optimized=False).astype(jnp.float32)


class Ring:
    """A group's chunks on their way; sources: list of (ref (chunks,W,R,E), first chunk, count, columns (2))."""

    def __init__(self, tiles, filled, sources, slots, dtype):
        self.tiles, self.filled, self.sources, self.slots = tiles, filled, sources, slots
        self.group = lax.axis_index("group")
        self.counts = [self.count(chunks) for _, _, chunks, _ in sources]
        self.total = sum(self.counts)
        for n in range(slots):
            self.fetch(n)

    def count(self, chunks):
        return lax.div(chunks - self.group + GROUPS - 1, GROUPS)

    def fetch(self, n):
        before = 0
        for (ref, first, _, columns), count in zip(self.sources, self.counts):
            chunk = first + (n - before) * GROUPS + self.group

            @pl.when((n >= before) & (n < before + count))
            def _():
                slot = lax.rem(n, self.slots)
                for i, column in enumerate(columns):
                    plgpu.copy_gmem_to_smem(
                        ref.at[chunk, :, :, pl.ds(column, PART_COLUMNS)],
                        self.tiles.at[self.group, slot, i],
                        self.filled.at[self.group * self.slots + slot],
                    )

            before = before + count

    def walk(self, source, load_x, when_fetched=None):
        """Return PARTS sums (WARPS, 32...)."""
        begin = sum(self.counts[:source])
        count = self.counts[source]

        def step(n, totals):
            slot = lax.rem(begin + n, self.slots)
            x = load_x(n * GROUPS + self.group)
            plgpu.barrier_wait(self.filled.at[self.group * self.slots + slot])
            x = lax.broadcast_in_dim(x, SHAPE, [0, 1])
            tiles = [plgpu.load(self.tiles.at[self.group, slot, i], layout=LAYOUT, optimized=False) for i in range(PARTS)]
            totals = tuple(total + x * tile.astype(jnp.float32) for total, tile in zip(totals, tiles))
            plgpu.commit_smem()
            self.fetch(begin + n + self.slots)
            if when_fetched is not None:
                pl.when(begin + n == jnp.maximum(self.total - self.slots, 1) - 1)(when_fetched)
            return totals

        zeros = tuple(plgpu.layout_cast(jnp.zeros(SHAPE, jnp.float32), LAYOUT) for _ in range(PARTS))
        return lax.fori_loop(0, count, step, zeros)


def leave(parts, totals):
    group = lax.axis_index("group")
    for i, total in enumerate(totals):
        save(parts.at[group, :, i], total.sum(axis=1))
    plgpu.commit_smem()


def gathered(parts):
    return [
        sum(load_shared(parts.at[g, w, i], COLUMNS) for g in range(GROUPS) for w in range(WARPS)) for i in range(PARTS)
    ]


def normed(x_tile, total_ref, r_ref, y_ref, scale_ref, eps, pieces, part, parts_number):
    """Leave the norm in x_tile; the first block writes r + y."""
    total = load_vector(r_ref)
    for p in range(pieces):
        total = total + load_vector(y_ref.at[pl.ds(p, 1)])
    scale = load_vector(scale_ref)
    squares = (total * total).sum(axis=3).sum(axis=1).sum(axis=1) * (1.0 / math.prod(r_ref.shape))
    inverse = lax.broadcast_in_dim(lax.rsqrt(squares + eps), total.shape, [0])
    save(x_tile, total * inverse * scale)

    @pl.when(part == 0)
    def _():
        total_ref[...] = total

    plgpu.commit_smem()


def by_chunk(matrix):
    return matrix.reshape(-1, WARPS, WARP_ROWS, matrix.shape[1])


def vector(x):
    return x.reshape(*x.shape[:-1], -1, WARPS, WARP_ROWS)


def prefetcher(ref, grid, share=1.0):
    """Prefetch a block's share of a matrix (chunks, W, R, E)."""
    chunks, columns = ref.shape[0], ref.shape[-1]
    strips = columns // STRIP_COLUMNS
    boxes = int(chunks * strips * share)
    each = -(-boxes // (grid * GROUPS))

    def run():
        first = lax.axis_index("block") * GROUPS + lax.axis_index("group")
        for n in range(each):
            box = first + n * grid * GROUPS

            @pl.when(box < boxes)
            def _():
                chunk, strip = lax.div(box, strips), lax.rem(box, strips)
                plgpu.async_prefetch(ref.at[chunk, :, :, pl.ds(strip * STRIP_COLUMNS, STRIP_COLUMNS)])

    return run


def sum_pieces(rows, columns, multiprocessors=132):
    strips, chunks = columns // STRIP_COLUMNS, rows // CHUNK_ROWS
    return max(p for p in range(1, max(2, multiprocessors // strips + 1)) if chunks % p == 0)


def params():
    return plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True)


def _scratch(D, slots, dtype, x_dtype):
    return [
        plgpu.SMEM((1, D // CHUNK_ROWS, WARPS, WARP_ROWS), x_dtype),
        plgpu.SMEM((GROUPS, slots, PARTS, *SHAPE), dtype),
        plgpu.SMEM((GROUPS, WARPS, PARTS, PART_COLUMNS), jnp.float32),
        plgpu.Barrier(num_arrivals=PARTS, num_barriers=GROUPS * slots),
        plgpu.Barrier(num_arrivals=1),
        plgpu.Barrier(num_arrivals=GROUPS),
    ]


@functools.partial(jax.jit, static_argnames=("eps", "prefetch", "slots"))
def hidden(r, y, scale, matrix, ahead, *, eps, prefetch=1.0, slots=SLOTS):
    """r (1, D) fp32, y (P, D), scale (1, D), matrix (D, 2F) -> r + y (1, D), gated (F)."""
    D, width = r.shape[-1], matrix.shape[1] // 2
    grid, chunks, pieces = width // PART_COLUMNS, D // CHUNK_ROWS, y.shape[0]

    def body(r_ref, y_ref, scale_ref, matrix_ref, ahead_ref, total_ref, h_ref, x_tile, tiles, parts, filled, ready, done):
        keep_plain(x_tile, tiles, parts)
        group, block = lax.axis_index("group"), lax.axis_index("block")
        columns = (block * PART_COLUMNS, width + block * PART_COLUMNS)
        ring = Ring(tiles, filled, [(matrix_ref, 0, chunks, columns)], slots, matrix.dtype)

        @pl.when(group == 0)
        def _():
            normed(x_tile, total_ref, r_ref, y_ref, scale_ref, eps, pieces, block, grid)
            plgpu.barrier_arrive(ready)

        plgpu.barrier_wait(ready)
        load_x = lambda n: plgpu.load(x_tile.at[0, n], layout=ROWS, optimized=False)
        leave(parts, ring.walk(0, load_x, prefetcher(ahead_ref, grid, prefetch) if prefetch else None))
        plgpu.barrier_arrive(done)

        @pl.when(group == 0)
        def _():
            plgpu.barrier_wait(done)
            value, gate = gathered(parts)
            save(h_ref.at[lax.div(block, WARPS), lax.rem(block, WARPS)], value * gate * stream.sigmoid(gate))

    kernel = plgpu.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct((1, D // CHUNK_ROWS, WARPS, WARP_ROWS), jnp.float32), jax.ShapeDtypeStruct((width // CHUNK_ROWS, WARPS, WARP_ROWS), matrix.dtype)],
        scratch_types=_scratch(D, slots, matrix.dtype, jnp.float32),
        grid=(grid,), grid_names=("block",), num_threads=GROUPS, thread_name="group",
        compiler_params=params(), kernel_name="token_hidden",
    )
    total, h = kernel(vector(r[None]), vector(y), vector(scale[None]), by_chunk(matrix), by_chunk(ahead))
    return total.reshape(-1), h.reshape(-1)


@functools.partial(jax.jit, static_argnames=("pieces", "prefetch"))
def sums(x, matrix, ahead, *, pieces, prefetch=1.0):
    """x (F,) @ matrix (F, D) -> (pieces, D) fp32."""
    rows, D = matrix.shape
    strips, chunks = D // STRIP_COLUMNS, rows // CHUNK_ROWS // pieces
    slots = min(SLOTS, -(-chunks // GROUPS))
    grid = strips * pieces

    def body(x_ref, matrix_ref, ahead_ref, sums_ref, x_tile, tiles, parts, filled, ready, done):
        keep_plain(x_tile, tiles, parts)
        group, block = lax.axis_index("group"), lax.axis_index("block")
        piece, strip = lax.div(block, strips), lax.rem(block, strips)
        columns = [strip * STRIP_COLUMNS + i * PART_COLUMNS for i in range(PARTS)]

        ring = Ring(tiles, filled, [(matrix_ref, piece * chunks, chunks, columns)], slots, matrix.dtype)

        @pl.when(group == 0)
        def _():
            save(x_tile.at[0], load_vector(x_ref.at[pl.ds(piece * chunks, chunks)]))
            plgpu.commit_smem()
            plgpu.barrier_arrive(ready)

        plgpu.barrier_wait(ready)
        load_x = lambda n: plgpu.load(x_tile.at[0, n], layout=ROWS, optimized=False)
        leave(parts, ring.walk(0, load_x, prefetcher(ahead_ref, grid, prefetch) if prefetch else None))
        plgpu.barrier_arrive(done)

        @pl.when(group == 0)
        def _():
            plgpu.barrier_wait(done)
            for i, total in enumerate(gathered(parts)):
                save(sums_ref.at[piece, pl.ds(columns[i], PART_COLUMNS)], total)

    kernel = plgpu.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct((pieces, D), jnp.float32)],
        scratch_types=_scratch(rows // pieces, slots, matrix.dtype, jnp.float32),
        grid=(grid,), grid_names=("block",), num_threads=GROUPS, thread_name="group",
        compiler_params=params(), kernel_name="token_sums",
    )
    [found] = kernel(vector(x), by_chunk(matrix), by_chunk(ahead))
    return found


@functools.partial(jax.jit, static_argnames=("eps", "slots", "prefetch", "turn"))
def whole(r, y, scale, first, second, ahead, marks=None, *, eps, slots=SLOTS, prefetch=0.0, turn=0):
    """One kernel: r + y, (pieces, D) sums of the MLP."""
    D, width = r.shape[-1], first.shape[1] // 2
    grid, chunks, given = width // PART_COLUMNS, D // CHUNK_ROWS, y.shape[0]
    strips = D // STRIP_COLUMNS
    assert grid % strips == 0
    pieces = grid // strips
    assert (width // CHUNK_ROWS) % pieces == 0
    later = width // CHUNK_ROWS // pieces
    piece_rows = later * CHUNK_ROWS
    writers = piece_rows // PART_COLUMNS

    def body(r_ref, y_ref, scale_ref, first_ref, second_ref, ahead_ref, *rest):
        if marks is None:
            total_ref, h_ref, sums_ref, x_tile, tiles, parts, filled, ready, done = rest
            written = plgpu_get_semaphores(pieces)
        else:
            marks_ref, total_ref, h_ref, sums_ref, x_tile, tiles, parts, filled, ready, done = rest
        keep_plain(x_tile, tiles, parts)
        group, block = lax.axis_index("group"), lax.axis_index("block")
        piece, strip = lax.div(block, strips), lax.rem(block, strips)
        columns = (block * PART_COLUMNS, width + block * PART_COLUMNS)
        out = [strip * STRIP_COLUMNS + i * PART_COLUMNS for i in range(PARTS)]
        ring = Ring(tiles, filled, [(first_ref, 0, chunks, columns), (second_ref, piece * later, later, out)], slots, first.dtype)

        @pl.when(group == 0)
        def _():
            normed(x_tile, total_ref, r_ref, y_ref, scale_ref, eps, given, block, grid)
            plgpu.barrier_arrive(ready)

        plgpu.barrier_wait(ready)
        load_x = lambda n: plgpu.load(x_tile.at[0, n], layout=ROWS, optimized=False)
        ahead = prefetcher(ahead_ref, grid, prefetch) if prefetch else None
        leave(parts, ring.walk(0, load_x, ahead))
        plgpu.barrier_arrive(done)

        @pl.when(group == 0)
        def _():
            plgpu.barrier_wait(done)
            value, gate = gathered(parts)
            save(h_ref.at[lax.div(block, WARPS), lax.rem(block, WARPS)], value * gate * stream.sigmoid(gate))
            plgpu.commit_smem()
            if marks is None:
                plgpu.semaphore_signal(written.at[lax.div(block, writers)], memory_scope="gpu")
                plgpu.semaphore_wait(written.at[piece], writers, decrement=False, memory_scope="gpu")
            else:
                clear(marks_ref.at[1 - turn, piece])
                signal(marks_ref.at[turn, lax.div(block, writers)])
                await_count(marks_ref.at[turn, piece], writers)
            save(x_tile.at[0, pl.ds(0, later)], load_vector(h_ref.at[pl.ds(piece * later, later)]))
            plgpu.commit_smem()
            plgpu.barrier_arrive(ready)

        plgpu.barrier_wait(ready)
        leave(parts, ring.walk(1, load_x, ahead))
        plgpu.barrier_arrive(done)

        @pl.when(group == 0)
        def _():
            plgpu.barrier_wait(done)
            for i, total in enumerate(gathered(parts)):
                save(sums_ref.at[piece, pl.ds(out[i], PART_COLUMNS)], total)

    kernel = plgpu.kernel(
        body,
        out_type=[
            jax.ShapeDtypeStruct((1, D // CHUNK_ROWS, WARPS, WARP_ROWS), jnp.float32),
            jax.ShapeDtypeStruct((width // CHUNK_ROWS, WARPS, WARP_ROWS), first.dtype),
            jax.ShapeDtypeStruct((pieces, D), jnp.float32),
        ],
        scratch_types=_scratch(max(D, piece_rows), slots, first.dtype, jnp.float32),
        grid=(grid,), grid_names=("block",), num_threads=GROUPS, thread_name="group",
        compiler_params=params(), kernel_name="token_mlp",
    )
    extra = [] if marks is None else [jax.new_ref(marks)]
    total, _, found = kernel(vector(r[None]), vector(y), vector(scale[None]), by_chunk(first), by_chunk(second), by_chunk(ahead), *extra)
    total = total.reshape(-1)
    return (total, found) if marks is None else (total, found, extra[0][...])


def clear(ref):
    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def run(_, ref):
        ptr = utils.memref_ptr(ref)
        with utils.single_thread(scope=utils.ThreadSubset.WARPGROUP):
            utils.inline_ptx("st.relaxed.gpu.global.b32 [$0], $1;", ptr, zero(), has_side_effects=True)

    run(ref)


def zero():
    from jaxlib.mlir import ir

    return utils.c(0, ir.IntegerType.get_signless(32))


def signal(ref):
    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def run(_, ref):
        utils.SemaphoreRef(utils.memref_ptr(ref)).signal(1, memory_scope="gpu")

    run(ref)


def await_count(ref, value):
    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def run(_, ref):
        utils.SemaphoreRef(utils.memref_ptr(ref)).wait(value, decrement=False, memory_scope="gpu")

    run(ref)


def plgpu_get_semaphores(n):
    return pl.get_global(plgpu.SemaphoreType.REGULAR(n)) if False else pl.get_global(plgpu.SemaphoreType.REGULAR((n,)))
