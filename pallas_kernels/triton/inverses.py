"""(I + L)^-1 of every chunk of tokens, for L with nothing on its diagonal and above it, in Triton kernels.

From blocks to blocks of twice their size, which has of both what the lower reads of the upper:

    [[A, 0], [B, C]]^-1 = [[A^-1, 0], [-C^-1 B A^-1, C^-1]]

A warp goes from single tokens to half a chunk, and a program from there to a whole one. Products are of TF32 x 3.
"""

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels.triton.chunks import CHUNK_TOKENS, Cut, Type
from pallas_kernels.triton.tiles import BLOCK, CHUNK, exact, places, program_of_chunk, store, tile, zeros

HALF_TOKENS = CHUNK_TOKENS // 2
HALF = tl.constexpr(HALF_TOKENS)


def inverses(lower, dtype, *, negated: bool = False) -> jax.Array:
    """Return (I + L)^-1 like L, or (I - L)^-1, in that dtype; L is (B, T, H, CHUNK_TOKENS), rows where tokens are."""
    cut, sign = Cut.of(lower, lower), -1 if negated else 1
    kept = Type((*lower.shape[:3], HALF_TOKENS), jnp.float32)
    [halves] = cut.by_chunk(inverses_of_halves, [lower], [kept], parts=2, warps=1, sign=sign)
    [t] = cut.by_chunk(inverses_of_chunks, [halves, lower], [Type(lower.shape, dtype)], warps=1, sign=sign)
    return t


@triton.jit
def inverses_of_halves(lower_ref, halves_ref, cut: tl.constexpr, sign: tl.constexpr):
    """Write the inverses of both halves of every chunk, (B, T, H, HALF) fp32."""
    _, at, half = program_of_chunk(cut, 2)
    at, column = at + half * HALF * cut.heads, half * HALF
    upper = inverse_of_block(square_at(lower_ref, at, column, BLOCK, CHUNK, cut), sign)
    below = sign * load(square_at(lower_ref, at + BLOCK * cut.heads, column, BLOCK, CHUNK, cut))
    own = inverse_of_block(square_at(lower_ref, at + BLOCK * cut.heads, column + BLOCK, BLOCK, CHUNK, cut), sign)
    store_joined(halves_ref, at, upper, below, own, BLOCK, HALF, cut)


@triton.jit
def inverses_of_chunks(halves_ref, lower_ref, t_ref, cut: tl.constexpr, sign: tl.constexpr):
    """Write the inverses of whole chunks."""
    _, at, _ = program_of_chunk(cut, 1)
    later = at + HALF * cut.heads
    upper = load(square_at(halves_ref, at, 0, HALF, HALF, cut))
    below = sign * load(square_at(lower_ref, later, 0, HALF, CHUNK, cut))
    own = load(square_at(halves_ref, later, 0, HALF, HALF, cut))
    store_joined(t_ref, at, upper, below, own, HALF, CHUNK, cut)


@triton.jit
def inverse_of_block(pointers, sign: tl.constexpr):
    """Return the inverse of a block, from single tokens on."""
    row, column = places(BLOCK)
    near, inverse = sign * load(pointers), tl.where(row == column, 1.0, 0.0)
    for level in tl.static_range(4):
        half_of_row, half_of_column = row >> level, column >> level
        below = tl.where((half_of_row % 2 == 1) & (half_of_column == half_of_row - 1), near, 0.0)
        inverse -= below if level == 0 else exact(exact(inverse, below), inverse)
    return inverse


@triton.jit
def store_joined(ref, at, upper, below, own, size: tl.constexpr, width: tl.constexpr, cut: tl.constexpr):
    """Store the inverse of two blocks, given those of each and what the second reads of the first."""
    later = at + size * cut.heads
    store(square_at(ref, at, 0, size, width, cut), upper)
    store(square_at(ref, at, size, size, width, cut), zeros(size, size))
    store(square_at(ref, later, 0, size, width, cut), -exact(exact(own, below), upper))
    store(square_at(ref, later, size, size, width, cut), own)


@triton.jit
def square_at(ref, at, column, size: tl.constexpr, width: tl.constexpr, cut: tl.constexpr):
    """Return pointers to rows of tokens from one on, and as many columns, of (B, T, H, width)."""
    return tile(ref + at * width + column, size, size, cut.heads * width)


@triton.jit
def load(pointers):
    """Return what they point to in fp32."""
    return tl.load(pointers).to(tl.float32)
