"""What the Triton kernels share that take a matrix state through a sequence by chunks of tokens: who launches them.

Arrays are (B, T, H, .), T a multiple of `CHUNK_TOKENS`, K a power of two from 16 to 256, V a multiple of `STRIP_WIDTH`:
a program that walks over the chunks takes so many columns of a state. Products are of bf16 with fp32 sums. What bodies
of kernels share is in `tiles.py`.

Triton has multiplied wrongly on Hopper GPUs what is transposed in a product but was not loaded so
(triton-lang/triton#6124): where there is a choice, factors go to the other operand. The checks have found none so far.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.triton.launch import Type, launch, shared_bytes

CHUNK_TOKENS, BLOCK_TOKENS, STRIP_WIDTH = 64, 16, 64
BLOCKS_PER_CHUNK = CHUNK_TOKENS // BLOCK_TOKENS
PIECE_WIDTH = 64
"""Most channels of keys of a program for a chunk that holds sums for each of them."""
CHUNK_WARPS = 4
MULTIPROCESSORS = 132
"""Of a Hopper GPU."""
STAGES_BY_BYTES = (40 << 10, 3), (96 << 10, 2)
"""By the most bytes that a chunk's loads take: how many chunks a walk has in flight. With more bytes it is one.

Programs for a single chunk have one stage: with two, sums of products over strips came out wrong, and different each
time, on one H100 80GB (jax 0.11.2's Triton).
"""


class Cut(NamedTuple):
    """B, T, H, K and V of a call, and the groups of heads that share keys; kernels know them by it."""

    batch: int
    time: int
    heads: int
    keys: int
    values: int
    groups: int

    @classmethod
    def of(cls, k, v) -> "Cut":
        """Return that of (B, T, H, V) values and (B, T, H, K) keys, or (B, T, G, K) of G groups of heads."""
        batch, time, heads, values = v.shape
        return cls(batch, time, heads, k.shape[-1], values, k.shape[2])

    @property
    def chunks(self) -> int:
        """Of a sequence."""
        return self.time // CHUNK_TOKENS

    @property
    def strips(self) -> int:
        """Of a state."""
        return self.values // STRIP_WIDTH

    @property
    def piece(self) -> int:
        """Channels of keys of a program that takes a piece of them."""
        return min(self.keys, PIECE_WIDTH)

    @property
    def pieces(self) -> int:
        """Of the keys."""
        return self.keys // self.piece

    @property
    def walk_warps(self) -> int:
        """Of a program that holds a strip of a state in registers."""
        return max(4, self.keys // 32)

    def sums_of_pieces(self) -> Type:
        """Return the type of a sum over the channels of every piece, for every token."""
        return Type((self.batch, self.time, self.heads, self.pieces), jnp.float32)

    def squares(self, dtype) -> Type:
        """Return the type of what a chunk's tokens are to each other, for every chunk, rows where their tokens are."""
        return Type((self.batch, self.time, self.heads, CHUNK_TOKENS), dtype)

    def states(self, dtype) -> Type:
        """Return the type of a state for every chunk."""
        return Type((self.batch, self.heads, self.chunks, self.keys, self.values), dtype)

    def by_chunk(
        self,
        kernel: Any,
        arguments: Sequence,
        results: Sequence[Type | None],
        *,
        parts: int = 1,
        warps: int = CHUNK_WARPS,
        **constants,
    ) -> list[jax.Array]:
        """Run a program for each chunk of each head, or for each of so many parts of it (`tiles.program_of_chunk`)."""
        programs = self.heads * self.chunks * parts
        return launch(kernel, programs, arguments, results, warps=warps, cut=self, **constants)

    def by_strip(
        self,
        kernel: Any,
        whole: Sequence,
        wide: Sequence,
        states: Sequence,
        results: Sequence[Type | None],
        *,
        warps: int | None = None,
        most_stages: int = 3,
        **constants,
    ) -> list[jax.Array]:
        """Run a program for each strip of `STRIP_WIDTH` columns of each head's states (`tiles.program_of_strip`).

        Args:
          whole: (B, T, H, ...) or (B, chunks, H, ...), of which a program reads all of its head, of keys its group.
          wide: (B, T, H, V), of which it reads its columns.
          states: (B, H, K, V) or (B, H, chunks, K, V), likewise.
          most_stages: chunks in flight; fewer where their bytes are many.
        """
        by_token = [x for x in whole if x is not None and x.shape[1] == self.time]
        loaded = sum(math.prod(x.shape[3:]) * CHUNK_TOKENS * x.dtype.itemsize for x in by_token)
        loaded += sum(CHUNK_TOKENS * STRIP_WIDTH * x.dtype.itemsize for x in wide)
        programs, warps = self.heads * self.strips, warps or self.walk_warps
        stages = min(most_stages, self._stages(loaded, warps, self.batch * programs))
        arguments = [*whole, *wide, *states]
        return launch(kernel, programs, arguments, results, warps=warps, stages=stages, cut=self, **constants)

    def _stages(self, loaded: int, warps: int, programs: int) -> int:
        """Return how many chunks of so many bytes a walk has in flight; two walks share a multiprocessor if need be."""
        beside = 2 if warps == 4 and programs > MULTIPROCESSORS else 1
        state = self.keys * STRIP_WIDTH * 2
        most = next((n for most, n in STAGES_BY_BYTES if loaded <= most), 1)
        return max(1, min(most, (shared_bytes() // beside - state) // loaded))


def like(x) -> Type:
    """Return the type of an array."""
    return Type(x.shape, x.dtype)
