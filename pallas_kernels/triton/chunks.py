"""What the Triton kernels share that take a matrix state through a sequence by chunks of tokens.

Arrays are (B, T, H, .), T a multiple of `CHUNK_TOKENS`, K a power of two from 16 to 256, V a multiple of `STRIP_WIDTH`:
a program that walks over the chunks takes so many columns of a state. Products are of bf16 with fp32 sums.

Triton has multiplied wrongly on Hopper GPUs what is transposed in a product but was not loaded so
(triton-lang/triton#6124): where there is a choice, factors go to the other operand. The checks have found none so far.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels.triton.launch import Type, launch, shared_bytes

CHUNK_TOKENS, BLOCK_TOKENS, STRIP_WIDTH = 64, 16, 64
BLOCKS_PER_CHUNK = CHUNK_TOKENS // BLOCK_TOKENS
CHUNK, BLOCK, STRIP = tl.constexpr(CHUNK_TOKENS), tl.constexpr(BLOCK_TOKENS), tl.constexpr(STRIP_WIDTH)
"""The same, as kernels read them."""
PIECE_WIDTH = 64
"""Most channels of keys of a program for a chunk that holds sums for each of them."""
PART_WARPS = 4
MULTIPROCESSORS = 132
"""Of a Hopper GPU."""
STAGES_BY_BYTES = (40 << 10, 3), (96 << 10, 2)
"""By the most bytes that a chunk's loads take: how many chunks a walk has in flight. With more bytes it is one.

Programs for a single chunk have one stage: with two, sums of products over strips came out wrong, and different each
time, on one H100 80GB (jax 0.11.2).
"""
HIDDEN_EXPONENT = tl.constexpr(-1e30)
EXACT_PRODUCT = tl.constexpr("tf32x3")
"""Of fp32 matrices, for `tl.dot`."""


class Cut(NamedTuple):
    """B, T, H, K and V of a call: which programs run its kernels, each with its chunk or its strip.

    A kernel is given it as `cut`, and more constants where they are named.
    """

    batch: int
    time: int
    heads: int
    keys: int
    values: int

    @classmethod
    def of(cls, k, v) -> "Cut":
        """Return that of (B, T, H, K) keys and (B, T, H, V) values."""
        batch, time, heads, keys = k.shape
        return cls(batch, time, heads, keys, v.shape[-1])

    @property
    def chunks(self) -> int:
        """Of a sequence."""
        return self.time // CHUNK_TOKENS

    @property
    def walk_warps(self) -> int:
        """Of a program that holds a strip of a state in registers."""
        return max(4, self.keys // 32)

    @property
    def piece(self) -> int:
        """Channels of keys of a program of `by_piece`."""
        return min(self.keys, PIECE_WIDTH)

    def sums_of_pieces(self) -> Type:
        """Return the type of a sum over the channels of every piece, for every token."""
        return Type((self.batch, self.time, self.heads, self.keys // self.piece), jnp.float32)

    def states(self, dtype) -> Type:
        """Return the type of a state for every chunk."""
        return Type((self.batch, self.heads, self.chunks, self.keys, self.values), dtype)

    def by_chunk(
        self,
        kernel: Any,
        warps: int,
        arguments: Sequence,
        results: Sequence[Type],
        *,
        parts: int = 1,
        **constants,
    ) -> list[jax.Array]:
        """Run a program for each chunk of each head, or for each of so many parts of it: `chunk_program`."""
        programs = self.heads * self.chunks * parts
        return launch(kernel, programs, arguments, results, warps=warps, cut=self, **constants)

    def by_piece(self, kernel: Any, arguments: Sequence, results: Sequence[Type], **constants) -> list[jax.Array]:
        """Run a program for each chunk of each head and each piece of the channels of its keys, PIECE of them."""
        parts = self.keys // self.piece
        return self.by_chunk(kernel, PART_WARPS, arguments, results, parts=parts, PIECE=self.piece, **constants)

    def by_columns(self, kernel: Any, arguments: Sequence, results: Sequence[Type], **constants) -> list[jax.Array]:
        """Run a program for each chunk of each head and `STRIP_WIDTH` columns of its values."""
        return self.by_chunk(kernel, PART_WARPS, arguments, results, parts=self.values // STRIP_WIDTH, **constants)

    def by_strip(
        self,
        kernel: Any,
        whole: Sequence,
        wide: Sequence,
        states: Sequence,
        results: Sequence[Type],
        *,
        warps: int | None = None,
        **constants,
    ) -> list[jax.Array]:
        """Run a program for each strip of `STRIP_WIDTH` columns of each head's states: `strip_program`.

        Args:
          whole: (B, T, H, ...) or (B, chunks, H, ...), of which a program reads all of its head.
          wide: (B, T, H, V), of which it reads its columns of them.
          states: (B, H, K, V) or (B, H, chunks, K, V), likewise.
        """
        programs = self.heads * self.values // STRIP_WIDTH
        by_token = [x for x in whole if x is not None and x.shape[1] == self.time]
        loaded = sum(math.prod(x.shape[3:]) * CHUNK_TOKENS * x.dtype.itemsize for x in by_token)
        loaded += sum(CHUNK_TOKENS * STRIP_WIDTH * x.dtype.itemsize for x in wide)
        warps = warps or self.walk_warps
        stages = self._stages(loaded, warps, self.batch * programs)
        arguments = [*whole, *wide, *states]
        return launch(kernel, programs, arguments, results, warps=warps, stages=stages, cut=self, **constants)

    def _stages(self, loaded: int, warps: int, programs: int) -> int:
        """Return how many chunks of so many bytes a walk has in flight; two walks share a multiprocessor if need be."""
        beside = 2 if warps == 4 and programs > MULTIPROCESSORS else 1
        state = self.keys * STRIP_WIDTH * 2
        most = next((n for most, n in STAGES_BY_BYTES if loaded <= most), 1)
        return max(1, min(most, (shared_bytes() // beside - state) // loaded))


@triton.jit
def chunk_program(T: tl.constexpr, H: tl.constexpr, PARTS: tl.constexpr):
    """Return which row, head, chunk and part of it a program has."""
    n = tl.program_id(0)
    chunks: tl.constexpr = T // CHUNK
    head = n // (PARTS * chunks)
    return head // H, head % H, n // PARTS % chunks, n % PARTS


@triton.jit
def strip_program(H: tl.constexpr, V: tl.constexpr):
    """Return which row, head and strip of its states a program has."""
    n = tl.program_id(0)
    strips: tl.constexpr = V // STRIP
    head = n // strips
    return head // H, head % H, n % strips


@triton.jit
def head_tokens(x, row, head, T: tl.constexpr, H: tl.constexpr, WIDTH: tl.constexpr):
    """Return where the first token of a head is in (B, T, H, WIDTH)."""
    return x + (row.to(tl.int64) * (T * H) + head) * WIDTH


@triton.jit
def head_states(x, row, head, H: tl.constexpr, SIZE: tl.constexpr):
    """Return where a head's states begin in (B, H, SIZE)."""
    return x + (row.to(tl.int64) * H + head) * SIZE


@triton.jit
def block(x, ROWS: tl.constexpr, STRIDE: tl.constexpr, COLUMNS: tl.constexpr):
    """Return where the elements of a matrix are whose rows begin every STRIDE elements from x on."""
    return x + tl.arange(0, ROWS)[:, None] * STRIDE + tl.arange(0, COLUMNS)[None, :]


@triton.jit
def column(x, ROWS: tl.constexpr, STRIDE: tl.constexpr):
    """Return where the elements of a vector are, every STRIDE elements from x on."""
    return x + tl.arange(0, ROWS) * STRIDE
