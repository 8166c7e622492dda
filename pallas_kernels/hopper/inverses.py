"""(I + M)^-1 of a chunk of 64 tokens, M with nothing on its diagonal and above it, in registers on Hopper.

From blocks to blocks of twice their size, which has of both what the lower reads of the upper:

    [[A, 0], [B, C]]^-1 = [[A^-1, 0], [-C^-1 B A^-1, C^-1]]

All blocks of a size are in one product: X M X, of the inverses X so far, is C^-1 B A^-1 between the two of a pair. They
are products of bf16, whose errors a last step of Newton's takes away: X + X (I - (I + M) X), with M in two parts.

By strips, only the blocks are kept while they have at most `STRIP` tokens, one below another in so many columns: a
quarter of the numbers.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import mosaic
from pallas_kernels.hopper.mosaic import CHUNK_TOKENS

LEVELS = CHUNK_TOKENS.bit_length() - 1
"""Sizes of blocks, from single tokens on."""
STRIP = 16
"""Columns of a strip of blocks."""
STRIP_LEVELS = STRIP.bit_length() - 1
STRIP_SHAPE = CHUNK_TOKENS, STRIP


def inverse(M: jax.Array, x_tile, y_tile) -> jax.Array:
    """Return (I + M)^-1 in fp32, given M likewise and two tiles of shared memory for 64 x 64 in bf16."""
    X = jnp.where(_apart() == 0, 1.0, 0.0) - jnp.where(_apart() == 1, M, 0.0)
    return _joined(M, X, 1, x_tile, y_tile)


def inverse_by_strips(M: jax.Array, x_tile, y_tile, x_strip, y_strip) -> jax.Array:
    """Return `inverse`, given two strips of shared memory as well."""
    return _joined(M, _inverses_of_blocks(M, x_strip, y_strip), STRIP_LEVELS, x_tile, y_tile)


def _joined(M: jax.Array, X: jax.Array, first_level: int, x_tile, y_tile) -> jax.Array:
    """Return the inverse of all, given those X of blocks of 2^first_level tokens."""
    high = M.astype(x_tile.dtype)
    low = (M - high.astype(jnp.float32)).astype(x_tile.dtype)
    for level in range(first_level, LEVELS):
        read = _sum_of_products([high], X, x_tile)
        between = _sum_of_products([X.astype(high.dtype)], read, y_tile)
        X = X - jnp.where((_apart() >> level) == 1, between, 0.0)
    X = X.astype(high.dtype)
    left = jnp.where(_apart() == 0, 1.0, 0.0) - X.astype(jnp.float32) - _sum_of_products([high, low], X, x_tile)
    return X.astype(jnp.float32) + _sum_of_products([X], left, y_tile)


def strips(*shape: int) -> plgpu.SMEM:
    """Return shared memory for so many strips."""
    return mosaic.swizzled((*shape, *STRIP_SHAPE), mosaic.NARROW_SWIZZLE)


def _inverses_of_blocks(M: jax.Array, x_strip, y_strip) -> jax.Array:
    """Return the inverses of the blocks of `STRIP` tokens, and nothing between these."""
    own = (_apart() >> STRIP_LEVELS) == 0
    M = jnp.where(own, M, 0.0)
    high, strip = M.astype(x_strip.dtype), sum(M[:, i : i + STRIP] for i in range(0, CHUNK_TOKENS, STRIP))
    X = jnp.where(_apart_in_strip() == 0, 1.0, 0.0) - jnp.where(_apart_in_strip() == 1, strip, 0.0)
    for level in range(1, STRIP_LEVELS):
        read = _sum_of_products([high], X, x_strip)
        between = _sum_of_products([_in_blocks(X).astype(high.dtype)], read, y_strip)
        X = X - jnp.where((_apart_in_strip() >> level) == 1, between, 0.0)
    return _in_blocks(X)


def _in_blocks(strip: jax.Array) -> jax.Array:
    """Return the blocks of a strip where they belong, and nothing between them."""
    repeated = jnp.concatenate([strip] * (CHUNK_TOKENS // STRIP), axis=1)
    return jnp.where((_apart() >> STRIP_LEVELS) == 0, repeated, 0.0)


def _sum_of_products(xs: list[jax.Array], y: jax.Array, tile) -> jax.Array:
    """Return the sum of x y for all x in registers; y goes through a tile of shared memory."""
    mosaic.save(tile, y)
    plgpu.commit_smem()

    def multiply(total):
        for x in xs:
            mosaic.multiply(total, x, tile)
        return total[...]

    return mosaic.products(multiply, (CHUNK_TOKENS, y.shape[1]))


def _apart() -> jax.Array:
    """Return in which bits the places of two tokens differ: the first is the level at which their blocks meet."""
    row, column = places()
    return row ^ column


def _apart_in_strip() -> jax.Array:
    """Return that of the tokens of the blocks of a strip."""
    row, column = places(STRIP)
    return (row & (STRIP - 1)) ^ column


def places(columns: int = CHUNK_TOKENS) -> tuple[jax.Array, jax.Array]:
    """Return the rows and the columns of a tile of pairs, or of a strip.

    Behind a barrier, or all that follows from them would be made before a loop over chunks, and held in registers.
    """
    row, column = (
        plgpu.broadcasted_iota(jnp.int32, (count,), 0, layout=layout)
        for count, layout in ((CHUNK_TOKENS, mosaic.ROW_LAYOUT), (columns, mosaic.COLUMN_LAYOUT))
    )
    row, column = lax.optimization_barrier((row, column))
    shape = CHUNK_TOKENS, columns
    return mosaic.across(row, shape), mosaic.down(column, shape)
