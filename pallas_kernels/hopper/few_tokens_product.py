"""The product of few tokens and a matrix on Hopper's tensor cores, as sums over pieces of the rows.

A block takes a strip of the columns and a piece of the rows, so that there is about one for each multiprocessor, and
all tokens: the matrix is read once, by copies that run several steps ahead.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper.mosaic import WIDE_SWIZZLE, multiply, products

STEP_ROWS = WIDE_SWIZZLE // 2
"""Rows of the matrix that are multiplied at once."""
WIDTHS = (128, 64)
"""Columns of a strip."""
MIN_STEPS, MAX_STEPS_AHEAD = 2, 6


@functools.partial(jax.jit, static_argnames="multiprocessors")
def sums(x, matrix, *, multiprocessors: int):
    """Return x @ matrix over each of some pieces of the rows, (pieces, T, E) fp32.

    Args:
      x: (T, D) bf16; T is 64 or 128.
      matrix: (D, E) bf16; D is a multiple of 64, and there is a `Plan.of` them.
      multiprocessors: of the GPU.
    """
    tokens, (rows, columns) = x.shape[0], matrix.shape
    plan = Plan.of(rows, columns, multiprocessors)
    assert plan is not None, f"no plan for a matrix {matrix.shape}"
    strips = columns // plan.width

    def body(x_ref, matrix_ref, sums_ref):
        block = lax.axis_index("block")
        strip, piece = lax.rem(block, strips), lax.div(block, strips)

        def run(total):
            def step(_, x_tile, matrix_tile):
                multiply(total, x_tile, matrix_tile)
                plgpu.wgmma_wait(1)

            tiles = [
                _tile((tokens, STEP_ROWS), lambda k: (0, piece * plan.steps + k)),
                _tile((STEP_ROWS, plan.width), lambda k: (piece * plan.steps + k, strip)),
            ]
            ahead = min(MAX_STEPS_AHEAD, plan.steps)
            plgpu.emit_pipeline(step, in_specs=tiles, grid=(plan.steps,), max_concurrent_steps=ahead)(x_ref, matrix_ref)
            return total[...]

        sums_ref[piece, :, pl.ds(strip * plan.width, plan.width)] = products(run, (tokens, plan.width))

    kernel = plgpu.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct((plan.pieces, tokens, columns), jnp.float32)],
        grid=(strips * plan.pieces,),
        grid_names=("block",),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="few_tokens_product",
    )
    [found] = kernel(x, matrix)
    return found


def _tile(shape: tuple[int, int], place) -> plgpu.BlockSpec:
    """Return tiles in shared memory that the tensor cores read, released a step after they are."""
    tiling = plgpu.TilingTransform((8, STEP_ROWS))  # type: ignore[abstract]
    transforms = tiling, plgpu.SwizzleTransform(WIDE_SWIZZLE)  # type: ignore[abstract]
    return plgpu.BlockSpec(shape, place, transforms=transforms, delay_release=1)


class Plan(NamedTuple):
    """How the work is cut: columns of a strip, pieces of the rows, and steps of each."""

    width: int
    pieces: int
    steps: int

    @classmethod
    def of(cls, rows: int, columns: int, multiprocessors: int) -> "Plan | None":
        """Return the plan with the most blocks of those that run at once, and of these the one with fewest pieces."""
        parts = rows // STEP_ROWS
        plans = [
            cls(width, pieces, parts // pieces)
            for width in WIDTHS
            for pieces in range(1, parts // MIN_STEPS + 1)
            if columns % width == 0 and parts % pieces == 0 and columns // width * pieces <= multiprocessors
        ]
        return max(plans, key=lambda plan: (columns // plan.width * plan.pieces, -plan.pieces), default=None)
