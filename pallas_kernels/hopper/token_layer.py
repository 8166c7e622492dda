"""A half of a layer for one token on Hopper, in one kernel: a gated MLP, or a gated short convolution.

    t = r + sum_p y_p        [u, g] = norm(t) W_1 + b_1        h = f(u, g)        y' = h W_2 + b_2

    f = u silu(g)                                     the MLP
    f = silu(sum_w kernel_w u_w) g, u_W = u           the convolution, whose last inputs move on where they lie

A block has GATED_COLUMNS columns of u and of g, for which it makes the norm itself, and then a strip of the second
matrix's columns and a piece of its rows. The first matrix comes straight to registers, since copies by TMA take as long
for a row of 64 bytes as for one of 128; the second's part is on its way to shared memory meanwhile. The blocks that
wrote a piece of h are counted in global memory, and those that read it wait for them: all are at work at once.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import stream
from pallas_kernels.hopper.mosaic import WARP_LANES, WARPS, keep_plain, load_global, load_shared, save

GROUPS = 4
"""Warpgroups of a block."""
GATED_COLUMNS, STRIP_COLUMNS = 32, 64
WARP_ROWS = 32
CHUNK_ROWS = WARPS * WARP_ROWS
STEP_ROWS = WARP_ROWS // 2
"""Of a warp, which a warpgroup multiplies at once."""
CHUNK_STEPS = WARP_ROWS // STEP_ROWS
STEPS_AHEAD = 2
"""Whose loads are under way while one's are multiplied."""
EARLY_CHUNKS = GROUPS
"""Of the second matrix that are on their way before the first is read."""
MARKS = 16
"""The most pieces; each has a mark."""
MOST_PIECE_BYTES = 192 * 1024
"""Of the second matrix in shared memory."""
LANE_VECTOR = 8
"""Columns that lie beside each other in a lane."""


def _layout(columns: int):
    """Return the layout of a step's rows with so many columns."""
    rows = WARP_LANES * LANE_VECTOR // columns
    tiling = plgpu.Tiling(((WARPS, rows, columns), (LANE_VECTOR,)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-4,), lane_dims=(-3, -2), vector_dim=-1)


GATED, STRIP = _layout(GATED_COLUMNS), _layout(STRIP_COLUMNS)


class Plan(NamedTuple):
    """How a half layer is cut: D, F, and the pieces of the rows of the second matrix."""

    width: int
    hidden: int
    pieces: int

    @classmethod
    def of(cls, width: int, hidden: int, multiprocessors: int) -> "Plan | None":
        """Return the plan of a half layer, or None where its blocks are not all at work at once."""
        chunks, strips = hidden // CHUNK_ROWS, width // STRIP_COLUMNS
        if width % (CHUNK_ROWS * GROUPS // CHUNK_STEPS) or hidden % CHUNK_ROWS or not width * hidden:
            return None
        found = [
            cls(width, hidden, n)
            for n in range(1, chunks + 1)
            if chunks % n == 0 and n <= MARKS and n * strips <= multiprocessors
        ]
        plan = found[-1] if found and found[-1].writers <= multiprocessors else None
        return plan if plan and plan.piece_rows * STRIP_COLUMNS * 2 <= MOST_PIECE_BYTES else None

    @property
    def writers(self) -> int:
        """The blocks that have columns of the first matrix."""
        return self.hidden // GATED_COLUMNS

    @property
    def strips(self) -> int:
        return self.width // STRIP_COLUMNS

    @property
    def grid(self) -> int:
        return max(self.writers, self.strips * self.pieces)

    @property
    def piece_rows(self) -> int:
        return self.hidden // self.pieces

    @property
    def piece_chunks(self) -> int:
        return self.piece_rows // CHUNK_ROWS

    @property
    def steps(self) -> int:
        """Of a warpgroup over the first matrix."""
        return self.width // CHUNK_ROWS * CHUNK_STEPS // GROUPS

    def scratch(self) -> list:
        rows = max(self.width // CHUNK_ROWS, self.piece_chunks)
        return [
            plgpu.SMEM((1, rows, WARPS, WARP_ROWS), jnp.float32),
            plgpu.SMEM((self.piece_chunks, WARPS, WARP_ROWS, STRIP_COLUMNS), jnp.bfloat16),
            plgpu.SMEM((GROUPS, WARPS, STRIP_COLUMNS), jnp.float32),
            plgpu.Barrier(num_arrivals=1, num_barriers=self.piece_chunks),
            plgpu.Barrier(num_arrivals=1),
            plgpu.Barrier(num_arrivals=GROUPS),
        ]


@functools.partial(jax.jit, static_argnames=("eps", "multiprocessors"))
def gated_mlp(r, y, scale, first, second, marks, *, eps: float, multiprocessors: int):
    """Return r + sum(y) (D,) fp32, the MLP of its norm in pieces (P, D) fp32, and zeros for the next kernel.

    Args:
      r: (D,) fp32.
      y: pieces of what is to be added to it, (P, D) fp32 or bf16.
      scale: of the norm, (D,) fp32.
      first: (D, 2F) bf16, values before gates, and second, (F, D) bf16.
      marks: zeros, (MARKS,) int32, which are used up.
    """

    def gate(value, gate, place):
        return value * gate * stream.sigmoid(gate)

    arguments = r, y, scale, first, second, None, marks, eps, multiprocessors
    return _half_layer("token_mlp", gate, (), (), *arguments)


@functools.partial(jax.jit, static_argnames=("eps", "multiprocessors"))
def gated_conv(r, y, scale, first, bias, kernel, state, second, last_bias, marks, *, eps: float, multiprocessors: int):
    """Return the same of a gated short convolution, and its last inputs (W, F), in the place of those given.

    Args:
      bias, last_bias: of the products, (2F,) and (D,) fp32.
      kernel: (W, F) fp32.
      state: the last inputs, the oldest first, (W, F) bf16 or fp32.
    """
    taps = len(kernel)

    def convolve(value, gate, place, bias_ref, kernel_ref, state_ref):
        def load(ref, i):
            return load_global(ref.at[(i, *place)], _of_columns(GATED)).astype(jnp.float32)

        def rounded(x, i):
            return (x + load(bias_ref, i)).astype(first.dtype).astype(jnp.float32)

        inputs = [load(state_ref, w) for w in range(1, taps)] + [rounded(value, 0)]
        plgpu.commit_smem()  # lanes of all warps have read what one of them writes
        for w, u in enumerate(inputs):
            save(state_ref.at[(w, *place)], u)
        y = sum(load(kernel_ref, w) * u for w, u in enumerate(inputs))
        return y * stream.sigmoid(y) * rounded(gate, 1)

    given = _by_row(bias.reshape(2, -1)), _by_row(kernel)
    arguments = r, y, scale, first, second, last_bias, marks, eps, multiprocessors
    *results, state = _half_layer("token_conv", convolve, given, (_by_row(state),), *arguments)
    return *results, state.reshape(taps, -1)


def _half_layer(
    name, middle: Callable, given, states, r, y, scale, first, second, last_bias, marks, eps, multiprocessors
):
    """Return t, pieces, marks and the states; `middle(value, gate, place, *refs)` makes h of a block's columns."""
    plan = Plan.of(*second.shape[::-1], multiprocessors)
    assert plan is not None, f"no plan for matrices {first.shape} and {second.shape}"
    assert marks.shape == (MARKS,)
    biases = [] if last_bias is None else [last_bias.reshape(-1, STRIP_COLUMNS)]

    def body(r_ref, y_ref, scale_ref, first_ref, second_ref, *refs):
        bias_refs, refs = refs[: len(biases)], refs[len(biases) :]
        extras, refs = refs[: len(given)], refs[len(given) :]
        (marks_ref, *state_refs), refs = refs[: 1 + len(states)], refs[1 + len(states) :]
        total_ref, h_ref, sums_ref, next_marks_ref, x_tile, tiles, parts, filled, ready, done = refs
        keep_plain(x_tile, tiles, parts)
        leads, block = lax.axis_index("group") == 0, lax.axis_index("block")
        piece, strip = lax.div(block, plan.strips), lax.rem(block, plan.strips)
        reads, writes = piece < plan.pieces, block < plan.writers
        fetch = functools.partial(_fetch, second_ref, tiles, filled, piece, strip, reads, plan)

        fetch(0, EARLY_CHUNKS)

        def norm():
            @pl.when(leads)
            def _():
                total = _normed(x_tile, r_ref, y_ref, scale_ref, eps)

                @pl.when(block == 0)
                def _():
                    total_ref[...] = total
                    for p in range(MARKS):
                        next_marks_ref[p] = jnp.int32(0)

                plgpu.barrier_arrive(ready)

            plgpu.barrier_wait(ready)

        column = jnp.minimum(block, plan.writers - 1) * GATED_COLUMNS
        later = functools.partial(fetch, EARLY_CHUNKS, plan.piece_chunks)
        _leave(parts, _first_product(first_ref, x_tile, (column, plan.hidden + column), plan.steps, norm, later))
        plgpu.barrier_arrive(done)

        @pl.when(leads)
        def _():
            plgpu.barrier_wait(done)

            @pl.when(writes)
            def _():
                place = lax.div(block, WARPS), lax.rem(block, WARPS)
                value, gate = (_sum(parts, pl.ds(i * GATED_COLUMNS, GATED_COLUMNS), GATED) for i in range(2))
                save(h_ref.at[place], middle(value, gate, place, *extras, *state_refs))
                plgpu.commit_smem()
                _signal(marks_ref.at[lax.div(block, plan.piece_chunks * WARPS)])

            @pl.when(reads)
            def _():
                _await(marks_ref.at[piece], plan.piece_chunks * WARPS)
                chunks = pl.ds(piece * plan.piece_chunks, plan.piece_chunks)
                save(x_tile.at[0, pl.ds(0, plan.piece_chunks)], _load_vector(h_ref.at[chunks]))

            plgpu.commit_smem()
            plgpu.barrier_arrive(ready)

        plgpu.barrier_wait(ready)

        @pl.when(reads)
        def _():
            _leave(parts, [_second_product(tiles, x_tile, filled, plan.piece_chunks)])

        plgpu.barrier_arrive(done)

        @pl.when(leads)
        def _():
            plgpu.barrier_wait(done)

            @pl.when(reads)
            def _():
                total = _sum(parts, pl.ds(0, STRIP_COLUMNS), STRIP)
                for bias in bias_refs:
                    own = load_global(bias.at[strip], _of_columns(STRIP))
                    total += own * (piece == 0).astype(jnp.float32)
                save(sums_ref.at[piece, strip], total)

    vector = jax.ShapeDtypeStruct((1, plan.width // CHUNK_ROWS, WARPS, WARP_ROWS), jnp.float32)
    kernel = plgpu.kernel(
        body,
        out_type=[
            vector,
            jax.ShapeDtypeStruct((plan.hidden // CHUNK_ROWS, WARPS, WARP_ROWS), first.dtype),
            jax.ShapeDtypeStruct((plan.pieces, plan.strips, STRIP_COLUMNS), jnp.float32),
            jax.ShapeDtypeStruct(marks.shape, marks.dtype),
        ],
        scratch_types=plan.scratch(),
        grid=(plan.grid,),
        grid_names=("block",),
        num_threads=GROUPS,
        thread_name="group",
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        kernel_name=name,
    )
    matrices = (x.reshape(-1, WARPS, WARP_ROWS, x.shape[1]) for x in (first, second))
    marks, *states = (jax.new_ref(x) for x in (marks, *states))
    vectors = _by_row(r[None]), _by_row(y), _by_row(scale[None])
    total, _, sums, next_marks = kernel(*vectors, *matrices, *biases, *given, marks, *states)
    return total.reshape(-1), sums.reshape(len(sums), -1), next_marks, *(x[...] for x in states)


def _fetch(matrix, tiles, filled, piece, strip, reads, plan: Plan, first: int, end: int) -> None:
    """Start copying a piece's chunks from `first` on, each by a warpgroup."""
    for n in range(first, min(end, plan.piece_chunks)):

        @pl.when(reads & (lax.axis_index("group") == n % GROUPS))
        def _(n=n):
            part = matrix.at[piece * plan.piece_chunks + n, :, :, pl.ds(strip * STRIP_COLUMNS, STRIP_COLUMNS)]
            plgpu.copy_gmem_to_smem(part, tiles.at[n], filled.at[n])


def _place(n):
    """Return the chunk of a warpgroup's step n, and which rows of each of its warps."""
    step = n * GROUPS + lax.axis_index("group")
    return lax.div(step, CHUNK_STEPS), pl.ds(lax.rem(step, CHUNK_STEPS) * STEP_ROWS, STEP_ROWS)


def _first_product(matrix, x_tile, columns, steps: int, norm: Callable, later: Callable) -> list:
    """Return the sums of x times rows of the matrix, of some columns each, over the rows that a lane has."""

    def load(n):
        chunk, rows = _place(n)
        return [load_global(matrix.at[chunk, :, rows, pl.ds(c, GATED_COLUMNS)], GATED) for c in columns]

    ahead = [load(n) for n in range(min(STEPS_AHEAD, steps))]
    norm()
    totals = [_zeros(GATED_COLUMNS, GATED) for _ in columns]
    for n in range(steps):
        if n + STEPS_AHEAD < steps:
            ahead.append(load(n + STEPS_AHEAD))
        if n == max(0, steps - STEPS_AHEAD - 1):
            later()
        totals = _added(totals, x_tile, n, ahead.pop(0), GATED)
    return totals


def _second_product(tiles, x_tile, filled, chunks: int):
    """Return the sums of h times a piece's rows, over those that a lane has."""
    steps = chunks * CHUNK_STEPS

    def step(n, total):
        chunk, rows = _place(n)
        plgpu.barrier_wait(filled.at[chunk])
        [total] = _added([total], x_tile, n, [load_shared(tiles.at[chunk, :, rows], STRIP)], STRIP)
        return total

    count = lax.div(steps + GROUPS - 1 - lax.axis_index("group"), GROUPS)
    return lax.fori_loop(0, count, step, _zeros(STRIP_COLUMNS, STRIP))


def _zeros(columns: int, layout):
    return plgpu.layout_cast(jnp.zeros((WARPS, STEP_ROWS, columns), jnp.float32), layout)


def _added(totals, x_tile, n, parts, layout) -> list:
    """Return sums with those of a step's rows, which are parts of the same rows of x, added."""
    chunk, rows = _place(n)
    x = plgpu.load(x_tile.at[0, chunk, :, rows], layout=layout.reduce(2), optimized=False)
    return [
        t + lax.broadcast_in_dim(x, t.shape, [0, 1]) * part.astype(jnp.float32)
        for t, part in zip(totals, parts, strict=True)
    ]


def _normed(x_tile, r_ref, y_ref, scale_ref, eps: float):
    """Return r + sum(y), and leave its norm in shared memory."""
    total = _load_vector(r_ref)
    for p in range(y_ref.shape[0]):
        total += _load_vector(y_ref.at[pl.ds(p, 1)])
    squares = (total * total).sum(axis=3).sum(axis=1).sum(axis=1)
    inverse = lax.rsqrt(squares * (1.0 / math.prod(r_ref.shape)) + eps)
    x = total * lax.broadcast_in_dim(inverse, total.shape, [0]) * _load_vector(scale_ref)
    save(x_tile.at[:, pl.ds(0, r_ref.shape[1])], x)
    plgpu.commit_smem()
    return total


def _leave(parts, totals) -> None:
    """Leave a warpgroup's sums by warp, side by side in shared memory."""
    width = STRIP_COLUMNS // len(totals)
    for i, total in enumerate(totals):
        save(parts.at[lax.axis_index("group"), :, pl.ds(i * width, width)], total.sum(axis=1))
    plgpu.commit_smem()


def _sum(parts, columns, layout):
    """Return the sums of some columns over all warps."""
    warps = [(group, warp) for group in range(GROUPS) for warp in range(WARPS)]
    return sum(load_shared(parts.at[(*warp, columns)], _of_columns(layout)) for warp in warps)


def _of_columns(layout):
    return layout.reduce(0).reduce(0)


def _by_row(x):
    """Return (..., D) as (..., chunks, WARPS, WARP_ROWS)."""
    return x.reshape(*x.shape[:-1], -1, WARPS, WARP_ROWS)


def _load_vector(ref):
    """Load a vector by row, or one of one vector, in fp32."""
    *ones, chunks, _, _ = ref.shape
    vector = math.gcd(chunks, 4)
    tiling = plgpu.Tiling(((*(1 for _ in ones), vector, WARPS, WARP_ROWS), (vector,)))
    lanes = (-4, -2) if vector > 1 else (-2,)
    layout = plgpu.Layout.TILED(tiling, warp_dims=(-3,), lane_dims=lanes, vector_dim=-1)
    return plgpu.load(ref, layout=layout, optimized=False).astype(jnp.float32)


def _signal(ref) -> None:
    """Count one at a mark, once what the warpgroup has written is seen by who reads the mark."""
    plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))(
        lambda _, ref: utils.SemaphoreRef(utils.memref_ptr(ref)).signal(1, memory_scope="gpu")
    )(ref)


def _await(ref, count: int) -> None:
    """Wait until so many are counted at a mark."""
    plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))(
        lambda _, ref: utils.SemaphoreRef(utils.memref_ptr(ref)).wait(count, decrement=False, memory_scope="gpu")
    )(ref)
