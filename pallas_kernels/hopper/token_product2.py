"""The product of one token and a matrix on Hopper (see `ops/projection.py`).

A block takes a strip of the columns, as wide as leaves one for each multiprocessor, and all rows: a warpgroup every
fourth part of them, straight from memory to its registers, where they are multiplied and added up in fp32.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper.mosaic import WARP_LANES, WARPS, load_global, load_shared, save

WIDTHS = (128, 64, 32, 16)
"""Columns of a strip, the widest first."""
WARPGROUPS = 4
LANE_VECTOR = 8
"""Columns that lie beside each other in a lane."""
MAX_LOADS = 8
"""Of a lane at once."""


@functools.partial(jax.jit, static_argnames="multiprocessors")
def product(x, matrix, *, multiprocessors: int):
    """Return x @ matrix (E,) in x's dtype.

    Args:
      x: (D,) bf16 or fp32.
      matrix: (D, E) bf16 or fp32; `Plan.of` says which D and E.
    """
    plan = Plan.of(*matrix.shape, multiprocessors)
    assert plan is not None, f"no plan for a matrix {matrix.shape}"

    def body(x_ref, matrix_ref, y_ref, parts, done):
        group, strip = lax.axis_index("group"), pl.ds(lax.axis_index("block") * plan.width, plan.width)

        def add(n, total):
            tiles = group * plan.steps + n
            tile = load_global(matrix_ref.at[tiles, :, :, :, strip], plan.layout).astype(jnp.float32)
            rows = load_global(x_ref.at[tiles], plan.layout.reduce(3)).astype(jnp.float32)
            return total + (lax.broadcast_in_dim(rows, plan.shape, [0, 1, 2]) * tile).sum(axis=0)

        zeros = plgpu.layout_cast(jnp.zeros(plan.shape[1:], jnp.float32), plan.layout.reduce(0))
        total = lax.fori_loop(0, plan.steps, add, zeros)
        save(parts.at[group], total.sum(axis=1))
        plgpu.barrier_arrive(done)

        @pl.when(group == 0)
        def _():
            plgpu.barrier_wait(done)
            columns = plan.layout.reduce(0).reduce(1).reduce(0)
            y = sum(load_shared(parts.at[g, warp], columns) for g in range(WARPGROUPS) for warp in range(WARPS))
            save(y_ref.at[strip], y)

    kernel = plgpu.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct(matrix.shape[1:], x.dtype)],
        scratch_types=[
            plgpu.SMEM((WARPGROUPS, WARPS, plan.width), jnp.float32),
            plgpu.Barrier(num_arrivals=WARPGROUPS),
        ],
        grid=(matrix.shape[1] // plan.width,),
        grid_names=("block",),
        num_threads=WARPGROUPS,
        thread_name="group",
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        kernel_name="token_product",
    )
    tiles = (WARPGROUPS * plan.steps, *plan.shape[:3])
    [y] = kernel(x.reshape(tiles), matrix.reshape(*tiles, -1))
    return y


class Plan(NamedTuple):
    """How the work is cut: columns of a strip, and a warpgroup's steps, each of so many loads of a lane."""

    width: int
    steps: int
    loads: int

    @classmethod
    def of(cls, rows: int, columns: int, multiprocessors: int) -> "Plan | None":
        """Return the plan whose blocks have the fewest columns one after the other, or None where no width fits."""
        fitting = [x for x in WIDTHS if columns % x == 0 and rows % (WARPGROUPS * cls.tile_rows(x)) == 0]
        if not fitting:
            return None
        width = min(fitting, key=lambda x: -(-columns // x // multiprocessors) * x)
        tiles = rows // (WARPGROUPS * cls.tile_rows(width))
        loads = next(n for n in range(MAX_LOADS, 0, -1) if tiles % n == 0)
        return cls(width, tiles // loads, loads)

    @staticmethod
    def tile_rows(width: int) -> int:
        """Return the rows of which each lane of a warpgroup has one vector."""
        return WARPS * WARP_LANES * LANE_VECTOR // width

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of what a warpgroup loads at once: loads, warps, rows of a warp, columns."""
        return self.loads, WARPS, self.tile_rows(self.width) // WARPS, self.width

    @property
    def layout(self):
        tiling = plgpu.Tiling(((1, *self.shape[1:]), (LANE_VECTOR,)))
        return plgpu.Layout.TILED(tiling, warp_dims=(-4,), lane_dims=(-3, -2), vector_dim=-1)
