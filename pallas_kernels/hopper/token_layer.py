"""A half of a layer for one token on Hopper, in one kernel: a gated MLP, or a gated short convolution.

    t = r + sum_p y_p        [u, g] = norm(t) W_1 + b_1        h = f(u, g)        y' = h W_2 + b_2

    f = u silu(g)                                     the MLP
    f = silu(sum_w kernel_w u_w) g, u_W = u           the convolution, whose last inputs move on where they lie

A block has PART_COLUMNS columns of u and of g, for which it makes the norm itself, and then a strip of the second
matrix's columns and a piece of its rows. Both matrices come through one ring of chunks, so that the second's is on its
way while h is made and exchanged: the blocks that wrote a piece of it are counted in global memory, and those that read
it wait for them. All blocks are at work at once.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import stream
from pallas_kernels.hopper.mosaic import WARPS, keep_plain, load_global, save
from pallas_kernels.hopper.token_strips import (
    CHUNK_ROWS,
    COLUMNS,
    GROUPS,
    PART_COLUMNS,
    PARTS,
    STRIP_COLUMNS,
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

MARKS = 16
"""The most pieces; each has a mark."""


class Plan(NamedTuple):
    """How a half layer is cut: D, F, and the pieces of the rows of the second matrix."""

    width: int
    hidden: int
    pieces: int

    @classmethod
    def of(cls, width: int, hidden: int, multiprocessors: int) -> "Plan | None":
        """Return the plan of a half layer, or None where its blocks are not all at work at once."""
        chunks, strips = hidden // CHUNK_ROWS, width // STRIP_COLUMNS
        if width % CHUNK_ROWS or hidden % CHUNK_ROWS or not width * hidden:
            return None
        fitting = [n for n in range(1, MARKS + 1) if chunks % n == 0 and n * strips <= multiprocessors]
        plan = cls(width, hidden, max(fitting, default=1))
        return plan if plan.grid <= multiprocessors else None

    @property
    def writers(self) -> int:
        """The blocks that have columns of the first matrix."""
        return self.hidden // PART_COLUMNS

    @property
    def strips(self) -> int:
        """Of the columns of the second matrix."""
        return self.width // STRIP_COLUMNS

    @property
    def grid(self) -> int:
        """All blocks."""
        return max(self.writers, self.strips * self.pieces)

    @property
    def chunks(self) -> int:
        """Of the rows of the first matrix."""
        return self.width // CHUNK_ROWS

    @property
    def piece_chunks(self) -> int:
        """Of a piece of the rows of the second matrix."""
        return self.hidden // CHUNK_ROWS // self.pieces

    def scratch(self) -> list:
        """Return what a block keeps: x or h, the rings, sums by warp, and barriers."""
        return scratch(self.chunks, self.piece_chunks)


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
            return load_global(ref.at[(i, *place)], COLUMNS).astype(jnp.float32)

        def rounded(x, i):
            return (x + load(bias_ref, i)).astype(first.dtype).astype(jnp.float32)

        inputs = [load(state_ref, w) for w in range(1, taps)] + [rounded(value, 0)]
        plgpu.commit_smem()  # lanes of all warps have read what one of them writes
        for w, u in enumerate(inputs):
            save(state_ref.at[(w, *place)], u)
        y = sum(load(kernel_ref, w) * u for w, u in enumerate(inputs))
        return y * stream.sigmoid(y) * rounded(gate, 1)

    given = by_row(bias.reshape(2, -1)), by_row(kernel)
    arguments = r, y, scale, first, second, last_bias, marks, eps, multiprocessors
    *results, state = _half_layer("token_conv", convolve, given, (by_row(state),), *arguments)
    return *results, state.reshape(taps, -1)


def _half_layer(
    name, middle: Callable, given, states, r, y, scale, first, second, last_bias, marks, eps, multiprocessors
):
    """Return t, pieces, marks and the states; `middle(value, gate, place, *refs)` makes h of a block's columns."""
    hidden, width = second.shape
    plan = Plan.of(width, hidden, multiprocessors)
    assert plan is not None, f"no plan for matrices {first.shape} and {second.shape}"
    assert marks.shape == (MARKS,)
    biases = [] if last_bias is None else [last_bias.reshape(-1, PART_COLUMNS)]

    def body(r_ref, y_ref, scale_ref, first_ref, second_ref, *refs):
        bias_refs, refs = refs[: len(biases)], refs[len(biases) :]
        extras, refs = refs[: len(given)], refs[len(given) :]
        (marks_ref, *state_refs), refs = refs[: 1 + len(states)], refs[1 + len(states) :]
        total_ref, h_ref, sums_ref, next_marks_ref, x_tile, h_tile, tiles, parts, filled, ready, done = refs
        keep_plain(x_tile, h_tile, tiles, parts)
        leads, block = lax.axis_index("group") == 0, lax.axis_index("block")
        piece, strip = lax.div(block, plan.strips), lax.rem(block, plan.strips)
        reads, writes = piece < plan.pieces, block < plan.writers
        inputs = [block * PART_COLUMNS + i * plan.hidden for i in range(PARTS)]
        outputs = [(strip * PARTS + i) * PART_COLUMNS for i in range(PARTS)]
        first = Source(first_ref, 0, jnp.where(writes, plan.chunks, 0), inputs)
        second = Source(second_ref, piece * plan.piece_chunks, jnp.where(reads, plan.piece_chunks, 0), outputs)
        ring = Ring(tiles, filled, [first, second])

        @pl.when(leads)
        def _():
            total = normed(x_tile, r_ref, y_ref, scale_ref, eps)

            @pl.when(block == 0)
            def _():
                total_ref[...] = total
                for i in range(MARKS):
                    next_marks_ref[i] = jnp.int32(0)

            plgpu.barrier_arrive(ready)

        plgpu.barrier_wait(ready)
        leave_sums(parts, ring.walk(0, x_tile))
        plgpu.barrier_arrive(done)

        @pl.when(leads)
        def _():
            plgpu.barrier_wait(done)

            @pl.when(writes)
            def _():
                place = lax.div(block, WARPS), lax.rem(block, WARPS)
                save(h_ref.at[place], middle(*summed(parts), place, *extras, *state_refs))
                plgpu.commit_smem()
                _signal(marks_ref.at[lax.div(block, plan.piece_chunks * WARPS)])

            @pl.when(reads)
            def _():
                _await(marks_ref.at[piece], plan.piece_chunks * WARPS)
                chunks = pl.ds(piece * plan.piece_chunks, plan.piece_chunks)
                save(h_tile.at[0], load_vector(h_ref.at[chunks]))

            plgpu.commit_smem()
            plgpu.barrier_arrive(ready)

        plgpu.barrier_wait(ready)
        leave_sums(parts, ring.walk(1, h_tile))
        plgpu.barrier_arrive(done)

        @pl.when(leads)
        def _():
            plgpu.barrier_wait(done)

            @pl.when(reads)
            def _():
                for i, total in enumerate(summed(parts)):
                    for bias in bias_refs:
                        own = load_global(bias.at[strip * PARTS + i], COLUMNS)
                        total += own * (piece == 0).astype(jnp.float32)
                    save(sums_ref.at[piece, strip * PARTS + i], total)

    vector = jax.ShapeDtypeStruct((1, plan.width // CHUNK_ROWS, WARPS, WARP_ROWS), jnp.float32)
    kernel = plgpu.kernel(
        body,
        out_type=[
            vector,
            jax.ShapeDtypeStruct((plan.hidden // CHUNK_ROWS, WARPS, WARP_ROWS), first.dtype),
            jax.ShapeDtypeStruct((plan.pieces, plan.width // PART_COLUMNS, PART_COLUMNS), jnp.float32),
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
    vectors = by_row(r[None]), by_row(y), by_row(scale[None])
    total, _, sums, next_marks = kernel(*vectors, *matrices, *biases, *given, marks, *states)
    return total.reshape(-1), sums.reshape(len(sums), -1), next_marks, *(x[...] for x in states)


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
