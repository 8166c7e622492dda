"""Decays of the tokens of a chunk, for each channel by itself, by levels of pairs, on tensor cores on Hopper.

At level n the halves of every 2^(n+1) tokens meet: a token t of a second half and s of a first one through the border
between them, the last token of the first half. With g the log-decays and x_t the sum of those between t and the border,

    exp(c_t - c_s) = exp(x_t) exp(x_s)        x_t = sum_u M_tu g_u        M_tu = min(t, border) < u <= max(t, border)

so that no exponent is above 0, none is a difference of long sums, and the pairs of a level are one product of weighed
queries and keys, whatever the decays are. M is made of 0 and 1: x is a product on tensor cores, of g in two parts of
bf16. These are of g / log 2, as exponentials are powers of 2. With `SINCE` for a border x_t reaches from the chunk's
beginning to t, with `UNTIL` from t to its end.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import mosaic
from pallas_kernels.hopper.mosaic import CHUNK_TOKENS, PAIRS_SHAPE

LEVELS = CHUNK_TOKENS.bit_length() - 1
PART_CHANNELS = 64
"""That products and tiles take together."""
SINCE, UNTIL = -1, CHUNK_TOKENS - 1
"""Borders before the first token and at the last one."""


def numbers() -> tuple[jax.Array, jax.Array]:
    """Return the numbers of the tokens along rows, and along columns.

    Behind a barrier, or all that follows from them would be made before a loop, and held in registers.
    """
    rows, columns = (
        plgpu.broadcasted_iota(jnp.int32, (CHUNK_TOKENS,), 0, layout=layout)
        for layout in (mosaic.ROW_LAYOUT, mosaic.COLUMN_LAYOUT)
    )
    return lax.optimization_barrier((rows, columns))


def border(token: jax.Array, level: jax.Array) -> jax.Array:
    """Return the border through which a token meets others at a level."""
    half = _half(level)
    return (token | (2 * half - 1)) - half


def is_second(token: jax.Array, level: jax.Array) -> jax.Array:
    """Return whether a token is in the second half of its 2^(level + 1)."""
    return (token & _half(level)) > 0


def _half(level: jax.Array) -> jax.Array:
    return lax.shift_left(jnp.int32(1), level)


def between(rows, columns, border) -> jax.Array:
    """Return M in bf16, given the border of each row, a number or a vector of them."""
    first, last = (mosaic.across(f(rows, border), PAIRS_SHAPE) for f in (jnp.minimum, jnp.maximum))
    others = mosaic.down(columns, PAIRS_SHAPE)
    return _ones_where((others > first) & (others <= last))


def between_transposed(rows, columns, border) -> jax.Array:
    """Return M^T in bf16, given the border of each column."""
    first, last = (mosaic.down(f(columns, border), PAIRS_SHAPE) for f in (jnp.minimum, jnp.maximum))
    others = mosaic.across(rows, PAIRS_SHAPE)
    return _ones_where((others > first) & (others <= last))


def meet(rows, columns, level) -> jax.Array:
    """Return 1 in bf16 for the pairs of tokens that meet at a level, each both ways, and 0 for the others."""
    rows, columns = (lax.shift_right_logical(x, jnp.broadcast_to(level, x.shape)) for x in (rows, columns))
    return _ones_where(mosaic.across(rows ^ 1, PAIRS_SHAPE) == mosaic.down(columns, PAIRS_SHAPE))


def meet_later(rows, columns, level) -> jax.Array:
    """Return which pairs of a token of a row and an earlier one of a column meet at a level."""
    rows, columns = (lax.shift_right_logical(x, jnp.broadcast_to(level, x.shape)) for x in (rows, columns))
    others = jnp.where((rows & 1) > 0, rows - 1, -1)  # the number of the half before, of a second half
    return mosaic.across(others, PAIRS_SHAPE) == mosaic.down(columns, PAIRS_SHAPE)


def level_tiles() -> plgpu.SMEM:
    """Return shared memory for M of every level."""
    return mosaic.swizzled((LEVELS, *PAIRS_SHAPE), mosaic.WIDE_SWIZZLE)


def write_levels(tiles) -> None:
    """Write M of every level: made once, and read by all products that make decays."""
    for level in range(LEVELS):
        rows, columns = numbers()
        mosaic.save(tiles.at[level], between(rows, columns, border(rows, jnp.int32(level))))


def weights(M, parts) -> jax.Array:
    """Return exp(M g) of 64 channels, given M in registers or a tile, and the tiles of the two parts of g / log 2."""

    def multiply(x):
        for part in parts:
            mosaic.multiply(x, M, part)
        return x[...]

    return jnp.exp2(mosaic.products(multiply, PAIRS_SHAPE))


def _ones_where(mask) -> jax.Array:
    return jnp.where(mask, 1.0, 0.0).astype(jnp.bfloat16)


def all_ones() -> jax.Array:
    """Return M of what reaches over the whole chunk."""
    return plgpu.layout_cast(jnp.ones(PAIRS_SHAPE, jnp.bfloat16), mosaic.WGMMA)
