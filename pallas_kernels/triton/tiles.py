"""What bodies of Triton kernels by chunks share: which program is for what, and where tiles of arrays stand in memory.

A body gets pointers to whole arrays, and `cut`, their sizes. Elements of (B, T, H, D) are counted from `at`, the place
of a chunk's first token of a head in (B, T, H): that token's begin at `at * D`, the next one's H * D further on. States
(B, H, K, V) and (B, H, chunks, K, V) have a `number`, their place among all.
"""

import triton
import triton.language as tl

from pallas_kernels.triton.chunks import BLOCK_TOKENS, CHUNK_TOKENS, STRIP_WIDTH

CHUNK, BLOCK, STRIP = map(tl.constexpr, (CHUNK_TOKENS, BLOCK_TOKENS, STRIP_WIDTH))
"""Tokens of a chunk and of a block, and columns of a strip of values."""
HIDDEN_EXPONENT = tl.constexpr(-1e30)


@triton.jit
def program_of_strip(cut: tl.constexpr):
    """Return the number of a program's state among all of (B, H), and the first of its columns."""
    i = tl.program_id(0)
    return (i // cut.strips).to(tl.int64), i % cut.strips * STRIP


@triton.jit
def program_of_chunk(cut: tl.constexpr, parts: tl.constexpr):
    """Return the number of a program's chunk among all of (B, H, chunks), its `at`, and which part of it is meant."""
    i = tl.program_id(0)
    number = (i // parts).to(tl.int64)
    return number, at_chunk(number // cut.chunks, number % cut.chunks, cut), i % parts


@triton.jit
def at_chunk(sequence, n, cut: tl.constexpr):
    """Return `at` of chunk n of one of (B, H)."""
    return (sequence // cut.heads * cut.time + n * CHUNK) * cut.heads + sequence % cut.heads


@triton.jit
def numbers_at(ref, at, cut: tl.constexpr):
    """Return pointers to a chunk of (B, T, H)."""
    return ref + at + tl.arange(0, CHUNK) * cut.heads


@triton.jit
def at_group(at, cut: tl.constexpr):
    """Return the place in (B, T, G) of a head's group."""
    if cut.groups == cut.heads:
        return at
    return at // cut.heads * cut.groups + at % cut.heads // (cut.heads // cut.groups)


@triton.jit
def keys_at(ref, at, cut: tl.constexpr):
    """Return pointers to a chunk of (B, T, G, K), of the head's group."""
    return tile(ref + at_group(at, cut) * cut.keys, CHUNK, cut.keys, cut.groups * cut.keys)


@triton.jit
def key_piece_at(ref, at, piece, cut: tl.constexpr):
    """Return pointers to a chunk's piece of channels in (B, T, G, K), of the head's group."""
    return tile(ref + at_group(at, cut) * cut.keys + piece * cut.piece, CHUNK, cut.piece, cut.groups * cut.keys)


@triton.jit
def piece_sums_at(ref, at, piece, cut: tl.constexpr):
    """Return pointers to a chunk's sums over a piece of channels in (B, T, H, pieces)."""
    return ref + at * cut.pieces + piece + tl.arange(0, CHUNK) * cut.heads * cut.pieces


@triton.jit
def values_at(ref, at, column, cut: tl.constexpr, width: tl.constexpr = STRIP):
    """Return pointers to columns from one on of a chunk of (B, T, H, V)."""
    return tile(ref + at * cut.values + column, CHUNK, width, cut.heads * cut.values)


@triton.jit
def squares_at(ref, at, cut: tl.constexpr):
    """Return pointers to a chunk of (B, T, H, CHUNK_TOKENS)."""
    return tile(ref + at * CHUNK, CHUNK, CHUNK, cut.heads * CHUNK)


@triton.jit
def state_at(ref, number, column, cut: tl.constexpr):
    """Return pointers to a strip of a state."""
    return tile(ref + number * cut.keys * cut.values + column, cut.keys, STRIP, cut.values)


@triton.jit
def state_piece_at(ref, number, piece, column, cut: tl.constexpr, width: tl.constexpr = STRIP):
    """Return pointers to columns from one on of a state's piece of channels."""
    return tile(ref + (number * cut.keys + piece * cut.piece) * cut.values + column, cut.piece, width, cut.values)


@triton.jit
def tile(start, rows: tl.constexpr, columns: tl.constexpr, stride: tl.constexpr):
    """Return pointers to rows, a stride apart from a start on, of columns each."""
    return start + tl.arange(0, rows)[:, None] * stride + tl.arange(0, columns)[None, :]


@triton.jit
def store(pointers, x):
    """Store x in their dtype."""
    tl.store(pointers, x.to(pointers.dtype.element_ty))


@triton.jit
def zeros(rows: tl.constexpr, columns: tl.constexpr):
    """Return zeros in fp32."""
    return tl.full((rows, columns), 0.0, tl.float32)


@triton.jit
def places(size: tl.constexpr):
    """Return the rows and the columns of a square, to be compared."""
    return tl.arange(0, size)[:, None], tl.arange(0, size)[None, :]


@triton.jit
def exact(a, b):
    """Return the product of fp32 matrices, in TF32 x 3."""
    return tl.dot(a, b, input_precision="tf32x3")
