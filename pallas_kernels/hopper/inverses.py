"""(I + M)^-1 of a chunk of 64 tokens, M with nothing on its diagonal and above it, in registers on Hopper.

From blocks to blocks of twice their size, which has of both what the lower reads of the upper:

    [[A, 0], [B, C]]^-1 = [[A^-1, 0], [-C^-1 B A^-1, C^-1]]

All blocks of a size are in one product: X M X, of the inverses X so far, is C^-1 B A^-1 between the two of a pair. They
are products of bf16, whose errors a last step of Newton's takes away: X + X (I - (I + M) X), with M in two parts.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import mosaic
from pallas_kernels.hopper.mosaic import CHUNK_TOKENS, PAIRS_SHAPE

LEVELS = CHUNK_TOKENS.bit_length() - 1
"""Sizes of blocks, from single tokens on."""


def inverse(M: jax.Array, x_tile, y_tile) -> jax.Array:
    """Return (I + M)^-1 in fp32, given M likewise and two tiles of shared memory for 64 x 64 in bf16."""
    identity = jnp.where(_apart() == 0, 1.0, 0.0)
    high = M.astype(x_tile.dtype)
    low = (M - high.astype(jnp.float32)).astype(x_tile.dtype)
    X = identity - jnp.where(_apart() == 1, M, 0.0)
    for level in range(1, LEVELS):
        read = _sum_of_products([high], X, x_tile)
        between = _sum_of_products([X.astype(high.dtype)], read, y_tile)
        X = X - jnp.where((_apart() >> level) == 1, between, 0.0)
    X = X.astype(high.dtype)
    left = jnp.where(_apart() == 0, 1.0, 0.0) - X.astype(jnp.float32) - _sum_of_products([high, low], X, x_tile)
    return X.astype(jnp.float32) + _sum_of_products([X], left, y_tile)


def _sum_of_products(xs: list[jax.Array], y: jax.Array, tile) -> jax.Array:
    """Return the sum of x y for all x in registers; y goes through a tile of shared memory."""
    mosaic.save(tile, y)
    plgpu.commit_smem()

    def multiply(total):
        for x in xs:
            mosaic.multiply(total, x, tile)
        return total[...]

    return mosaic.products(multiply, PAIRS_SHAPE)


def _apart() -> jax.Array:
    """Return in which bits the places of two tokens differ: the first is the level at which their blocks meet."""
    row, column = places()
    return row ^ column


def places() -> tuple[jax.Array, jax.Array]:
    """Return the rows and the columns of a tile of pairs.

    Behind a barrier, or all that follows from them would be made before a loop over chunks, and held in registers.
    """
    row, column = (
        plgpu.broadcasted_iota(jnp.int32, (CHUNK_TOKENS,), 0, layout=layout)
        for layout in (mosaic.ROW_LAYOUT, mosaic.COLUMN_LAYOUT)
    )
    row, column = lax.optimization_barrier((row, column))
    return mosaic.across(row, PAIRS_SHAPE), mosaic.down(column, PAIRS_SHAPE)
