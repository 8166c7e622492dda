"""What the Mosaic GPU kernels share: layouts, shared-memory tiles, products. The one place that meets Pallas' names.

A Pallas "thread" is a warpgroup of 128 lanes. A tile in the WGMMA layout lies in its registers as the tensor cores
leave it; `ROW_LAYOUT` and `COLUMN_LAYOUT` hold one value per row or column of such a tile. Both shared operands of a
product have the same swizzle; a tile is a multiple of it wide, `NARROW_SWIZZLE` (16 columns of bf16), `MEDIUM_SWIZZLE`
(32) or `WIDE_SWIZZLE` (64).
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu.utils import warp_barrier
from jax.experimental.pallas import mosaic_gpu as plgpu

WGMMA = plgpu.Layout.WGMMA
ROW_LAYOUT = WGMMA.reduce(1)
COLUMN_LAYOUT = WGMMA.reduce(0)

WARPS, WARP_LANES = 4, 32
"""Of a warpgroup, and the lanes of one."""
NARROW_SWIZZLE, MEDIUM_SWIZZLE, WIDE_SWIZZLE = 32, 64, 128
TILE_ROWS = 64
"""Rows of a product on the tensor cores."""
CHUNK_TOKENS = TILE_ROWS
"""Tokens that a kernel by chunks takes together."""
PAIRS_SHAPE = (CHUNK_TOKENS, CHUNK_TOKENS)


def swizzled(shape: tuple[int, ...], swizzle: int, dtype=jnp.bfloat16) -> plgpu.SMEM:
    """Return a 16-bit array in shared memory whose last two dimensions are tiles that copies and products can use."""
    tiling = plgpu.TilingTransform((8, swizzle // 2))  # type: ignore[abstract]
    return plgpu.SMEM(shape, dtype, transforms=(tiling, plgpu.SwizzleTransform(swizzle)))  # type: ignore[abstract]


def keep_plain(*refs) -> None:
    """Keep arrays of shared memory as they are written down: else Mosaic may swizzle them, whose rows begin anywhere.

    What it finds for a tile of eight rows is wrong for one that begins between two of these.
    """
    for ref in refs:
        plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))(lambda _, __: None)(ref)


def widest_swizzle(columns: int) -> int:
    """Return the widest swizzle of tiles with so many columns, a multiple of 16."""
    return next(x for x in (WIDE_SWIZZLE, MEDIUM_SWIZZLE, NARROW_SWIZZLE) if columns % (x // 2) == 0)


def load(tile) -> jax.Array:
    """Load a shared-memory tile into registers."""
    return plgpu.load(tile, layout=WGMMA)


def load_shared(ref, layout) -> jax.Array:
    """Load an array of shared memory in fp32, as it lies."""
    return plgpu.load(ref, layout=layout, optimized=False).astype(jnp.float32)


def save(ref, x) -> None:
    """Store to shared or global memory in its dtype."""
    ref[...] = x.astype(ref.dtype)


def await_warp() -> None:
    """Wait for the other lanes of the warp: what any of them has read before, all may overwrite from here on."""
    plgpu.inline_mgpu()(lambda _: warp_barrier())()


def like(x) -> jax.ShapeDtypeStruct:
    """Return the shape and the type of an array."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def load_global(ref, layout) -> jax.Array:
    """Load an array of global memory into registers."""
    return forget_mesh(plgpu.load(ref, layout=layout, optimized=False), layout)


def forget_mesh(x: jax.Array, layout) -> jax.Array:
    """Return x without the mesh axes that it varies over under `jax.shard_map`: a loop's values must keep their type.

    Constants and accumulators vary over none.
    """
    result = plgpu.ShapeDtypeStruct(x.shape, x.dtype, layout=layout)
    return plgpu.inline_mgpu(arg_types=(layout,), return_type=result)(lambda _, x: x)(x)


def zeros(shape: tuple[int, int]) -> jax.Array:
    """Return an fp32 tile of zeros in registers."""
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), WGMMA)


def iota(shape: tuple[int, ...], dimension: int) -> jax.Array:
    """Return the row (0) or column (1) number of every element of a tile."""
    return plgpu.broadcasted_iota(jnp.int32, shape, dimension, layout=WGMMA)


def across(rows: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Repeat one value per row over the columns."""
    return lax.broadcast_in_dim(rows, shape, [0])


def down(columns: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Repeat one value per column over the rows."""
    return lax.broadcast_in_dim(columns, shape, [1])


def multiply(accumulator, a, b) -> None:
    """Start adding a @ b to an accumulator; a is a shared tile or 16-bit registers, b a shared tile."""
    plgpu.wgmma(accumulator, a, b)


def finished(accumulator, later: int) -> jax.Array:
    """Return an accumulator's value once no more than so many products that were started later may still run."""
    return lax.optimization_barrier(plgpu.wgmma_accumulator_load(accumulator, wait_n=later))


def products(body, *shapes: tuple[int, int]):
    """Return what `body` returns, given fp32 accumulators of zeros, which it reads as `x[...]`.

    What else it computes before it reads runs beside the products.
    """
    accumulators = [plgpu.ACC(shape, jnp.float32) for shape in shapes]
    return _settled(pl.run_scoped(body, *accumulators))


def accumulate(body, initial: tuple, state: tuple = ()) -> tuple:
    """Return the values of accumulators that start from `initial` after `body(accumulators, *state)`, and a new state.

    The body returns that state, which is made beside its products. What they read of the old one stays in its registers
    until they are done: else they would wait for each other.
    """

    def run(refs):
        accumulators, carried = refs[: len(initial)], refs[len(initial) :]
        for ref, x in zip(carried, body(accumulators, *(ref[...] for ref in carried)) or (), strict=True):
            ref[...] = x

    results = pl.run_state(run)((*map(plgpu.ACC.init, initial), *state))
    return _settled((*results, *state))[: len(results)]


def multiply_add(total: jax.Array, a, b) -> jax.Array:
    """Return total + a @ b, with operands as of `multiply`."""
    [total] = accumulate(lambda sums: multiply(sums[0], a, b), (total,))
    return total


def _settled(values):
    """Return accumulators' values behind a barrier of the optimiser.

    LLVM sees no dependence of an accumulator on the wait for it, and may move arithmetic on it before the wait.
    """
    return lax.optimization_barrier(values)
