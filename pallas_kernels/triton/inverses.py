"""(I + L)^-1 of every chunk of tokens, for L with nothing on its diagonal and above it, in Triton kernels.

From blocks to blocks of twice their size, which has of both what the lower reads of the upper:

    [[A, 0], [B, C]]^-1 = [[A^-1, 0], [-C^-1 B A^-1, C^-1]]

A warp goes from single tokens to half a chunk, and a program from there to a whole one. Products are of TF32 x 3.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.triton.pallas_chunks import BLOCK_TOKENS, CHUNK_TOKENS, Cut, Type, exact, part, places

HALF_TOKENS = CHUNK_TOKENS // 2


def inverses(lower, dtype, *, negated: bool = False) -> jax.Array:
    """Return (I + L)^-1 like L, or (I - L)^-1, in that dtype; L is (B, T, H, CHUNK_TOKENS), rows where tokens are."""
    halves, sign = _of_halves(lower, negated), -1 if negated else 1
    first, second = (pl.ds(n * HALF_TOKENS, HALF_TOKENS) for n in range(2))

    def body(halves_ref, lower_ref, t_ref):
        upper, own = halves_ref[first], halves_ref[second]
        below = sign * lower_ref[second, first].astype(jnp.float32)
        write(t_ref, (first, second), (first, second), upper, below, own)

    [t] = Cut.of(lower, lower).by_chunk(body, "inverses", 1, [halves, lower], [Type(lower.shape, dtype)])
    return t


def _of_halves(lower, negated: bool) -> jax.Array:
    """Return the inverses of both halves of every chunk, (B, T, H, HALF_TOKENS) fp32."""
    sign = -1 if negated else 1

    def body(lower_ref, halves_ref):
        row, column = places(BLOCK_TOKENS)
        at = [pl.ds(part(2) * HALF_TOKENS + n * BLOCK_TOKENS, BLOCK_TOKENS) for n in range(2)]

        def inverse_at(rows) -> jax.Array:
            near, inverse = sign * lower_ref[rows, rows].astype(jnp.float32), jnp.where(row == column, 1.0, 0.0)
            for half in (1, 2, 4, 8):
                below = jnp.where((row // half % 2 == 1) & (column // half == row // half - 1), near, 0.0)
                inverse = inverse - (below if half == 1 else exact(exact(inverse, below), inverse))
            return inverse

        below = sign * lower_ref[at[1], at[0]].astype(jnp.float32)
        columns = [pl.ds(n * BLOCK_TOKENS, BLOCK_TOKENS) for n in range(2)]
        write(halves_ref, at, columns, inverse_at(at[0]), below, inverse_at(at[1]))

    result = Type((*lower.shape[:3], HALF_TOKENS), jnp.float32)
    [halves] = Cut.of(lower, lower).by_chunk(body, "inverses_of_halves", 1, [lower], [result], parts=2)
    return halves


def write(ref, rows, columns, upper, below, own) -> None:
    """Write the inverse of two blocks, given those of each and what the second reads of the first."""
    ref[rows[0], columns[0]] = upper.astype(ref.dtype)
    ref[rows[0], columns[1]] = jnp.zeros_like(upper).astype(ref.dtype)
    ref[rows[1], columns[0]] = -exact(exact(own, below), upper).astype(ref.dtype)
    ref[rows[1], columns[1]] = own.astype(ref.dtype)
