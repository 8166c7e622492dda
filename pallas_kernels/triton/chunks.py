"""What the Triton kernels share that take a matrix state through a sequence by chunks of tokens.

JAX 0.11 calls Pallas' Triton backend deprecated; where it is gone, `ops/` refuses.

Arrays are (B, T, H, .), T a multiple of `CHUNK_TOKENS`, K a power of two from 16 to 256, V a multiple of `STRIP_WIDTH`:
a program that walks over the chunks takes so many columns of a state. Products are of bf16 with fp32 sums.

Triton has multiplied wrongly on Hopper GPUs what is transposed in a product but was not loaded so
(triton-lang/triton#6124): where there is a choice, factors go to the other operand. The checks have found none so far.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

Type = jax.ShapeDtypeStruct

CHUNK_TOKENS, BLOCK_TOKENS, STRIP_WIDTH = 64, 16, 64
BLOCKS_PER_CHUNK = CHUNK_TOKENS // BLOCK_TOKENS
PIECE_WIDTH = 64
"""Most channels of keys of a program for a chunk that holds sums for each of them."""
PART_WARPS = 4
MULTIPROCESSORS, SHARED_BYTES = 132, 227 << 10
"""Of a Hopper GPU, and what the programs of a multiprocessor share."""
STAGES_BY_BYTES = (40 << 10, 3), (96 << 10, 2)
"""By the most bytes that a chunk's loads take: how many chunks a walk has in flight. With more bytes it is one.

Programs for a single chunk have one stage: with two, sums of products over strips came out wrong, and different each
time, on one H100 80GB (jax 0.11.2).
"""
HIDDEN_EXPONENT = -1e30
EXACT_PRODUCT: Any = lax.DotAlgorithmPreset.TF32_TF32_F32_X3


class Cut(NamedTuple):
    """B, T, H, K and V of a call, and the blocks of its arrays that a program is given."""

    batch: int
    time: int
    heads: int
    keys: int
    values: int

    @classmethod
    def of(cls, k, v) -> "Cut":
        """Return that of (B, T, H, V) values and (B, T, H, K) keys, or (B, T, G, K) of G groups of heads."""
        batch, time, heads, values = v.shape
        return cls(batch, time, heads, k.shape[-1], values)

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
        self, body: Callable, name: str, warps: int, arguments: Sequence, results: Sequence[Type], parts: int = 1
    ) -> list[jax.Array]:
        """Run a program for each chunk of each head, or for each part of it (`part`).

        It is given that chunk of (B, T, H, ...), (B, chunks, H, ...) or (B, H, chunks, K, V).
        """

        def head(i):
            return lax.div(i, jnp.int32(self.chunks * parts))

        def chunk(i):
            return lax.rem(lax.div(i, jnp.int32(parts)), jnp.int32(self.chunks))

        def block(x) -> pl.BlockSpec:
            if len(x.shape) == 5:
                return _block((None, None, None, *x.shape[3:]), lambda b, i: (b, head(i), chunk(i)))
            tokens = CHUNK_TOKENS if x.shape[1] == self.time else None
            return _block((None, tokens, None, *x.shape[3:]), lambda b, i: (b, chunk(i), head(i)))

        blocks = [*map(block, arguments)], [*map(block, results)]
        grid = self.batch, self.heads * self.chunks * parts
        return launch(body, name, warps, 1, grid, arguments, results, *blocks)

    def by_piece(
        self, body: Callable, name: str, shared: Sequence, keyed: Sequence, made: Sequence[Type], sums: Sequence[Type]
    ) -> list[jax.Array]:
        """Run a program for each chunk of each head and each piece of the channels of its keys.

        Args:
          shared: (B, T, H, ...), of which a program gets its chunk.
          keyed: (B, T, H, K) or (B, H, chunks, K, V), of which it gets its channels as well.
          made: types like keys.
          sums: types (B, T, H, pieces), of which it makes its column.
        """
        return self._by_part(body, name, shared, keyed, [*made, *sums], self.keys // self.piece, 3)

    def by_columns(
        self, body: Callable, name: str, shared: Sequence, wide: Sequence, made: Sequence[Type]
    ) -> list[jax.Array]:
        """Run a program for each chunk of each head and `STRIP_WIDTH` columns of its values.

        Args:
          shared: (B, T, H, ...), of which a program gets its chunk.
          wide: (B, T, H, V) or (B, H, chunks, K, V), of which it gets its columns as well.
          made: types like values.
        """
        return self._by_part(body, name, shared, wide, made, self.values // STRIP_WIDTH, 4)

    def _by_part(self, body, name, shared, cut, made, parts: int, dimension: int) -> list[jax.Array]:
        """Cut the last dimension of (B, T, H, .) arrays, and that `dimension` of states."""

        def place(i) -> tuple:
            chunk = lax.rem(lax.div(i, jnp.int32(parts)), jnp.int32(self.chunks))
            return lax.div(i, jnp.int32(self.chunks * parts)), chunk, lax.rem(i, jnp.int32(parts))

        def of_shared(x) -> pl.BlockSpec:
            def at(b, i):
                head, chunk, _ = place(i)
                return b, chunk, head

            return _block((None, CHUNK_TOKENS, None, *x.shape[3:]), at)

        def of_cut(x) -> pl.BlockSpec:
            states = len(x.shape) == 5

            def at(b, i):
                head, chunk, part = place(i)
                return (
                    (b, head, chunk, *((part, 0) if dimension == 3 else (0, part)))
                    if states
                    else (b, chunk, head, part)
                )

            sizes = (
                [x.shape[n] // (parts if n == dimension else 1) for n in (3, 4)] if states else [x.shape[3] // parts]
            )
            return pl.BlockSpec((None, None if states else CHUNK_TOKENS, None, *sizes), at)

        inputs = [*map(of_shared, shared), *map(of_cut, cut)]
        grid = self.batch, self.heads * self.chunks * parts
        return launch(body, name, PART_WARPS, 1, grid, [*shared, *cut], made, inputs, [*map(of_cut, made)])

    def by_strip(
        self,
        body: Callable,
        name: str,
        whole: Sequence,
        wide: Sequence,
        states: Sequence,
        *results: Sequence[Type],
        warps: int | None = None,
    ) -> list[jax.Array]:
        """Run a program for each strip of `STRIP_WIDTH` columns of each head's states.

        Args:
          whole: (B, T, H, ...) or (B, chunks, H, ...), of which a program gets all of its head, or of its head's group.
          wide: (B, T, H, V), of which it gets its columns of them.
          states: (B, H, K, V) or (B, H, chunks, K, V), likewise.
          results: types like the wide arrays, then types like states.
        """
        strips = self.values // STRIP_WIDTH

        def head(i):
            return lax.div(i, jnp.int32(strips))

        def strip(i):
            return lax.rem(i, jnp.int32(strips))

        def of_whole(x) -> pl.BlockSpec:
            together = self.heads // x.shape[2]

            def at(b, i):
                return b, 0, lax.div(head(i), jnp.int32(together))

            return _block((None, x.shape[1], None, *x.shape[3:]), at)

        def of_wide(x) -> pl.BlockSpec:
            return pl.BlockSpec((None, self.time, None, STRIP_WIDTH), lambda b, i: (b, 0, head(i), strip(i)))

        def of_states(x) -> pl.BlockSpec:
            kept = x.shape[2:-1]
            zeros = (0,) * len(kept)
            return pl.BlockSpec((None, None, *kept, STRIP_WIDTH), lambda b, i: (b, head(i), *zeros, strip(i)))

        made, made_states = results
        inputs = [*map(of_whole, whole), *map(of_wide, wide), *map(of_states, states)]
        outputs = [*map(of_wide, made), *map(of_states, made_states)]
        grid = self.batch, self.heads * strips
        loaded = sum(math.prod(x.shape[3:]) * CHUNK_TOKENS * x.dtype.itemsize for x in whole if x.shape[1] == self.time)
        loaded += sum(CHUNK_TOKENS * STRIP_WIDTH * x.dtype.itemsize for x in wide)
        warps = warps or self.walk_warps
        arrays, stages = ([*whole, *wide, *states], [*made, *made_states]), self._stages(loaded, warps, math.prod(grid))
        return launch(body, name, warps, stages, grid, *arrays, inputs, outputs)

    def _stages(self, loaded: int, warps: int, programs: int) -> int:
        """Return how many chunks of so many bytes a walk has in flight; two walks share a multiprocessor if need be."""
        beside = 2 if warps == 4 and programs > MULTIPROCESSORS else 1
        state = self.keys * STRIP_WIDTH * 2
        most = next((n for most, n in STAGES_BY_BYTES if loaded <= most), 1)
        return max(1, min(most, (SHARED_BYTES // beside - state) // loaded))


def _block(shape: tuple, place: Callable) -> pl.BlockSpec:
    """Return the block at a place of the first dimensions, and all of the others."""
    return pl.BlockSpec(shape, lambda *at: (*place(*at), *(0,) * (len(shape) - 3)))


def launch(body, name, warps, stages, grid, arguments, results, inputs, outputs) -> list[jax.Array]:
    """Run a program for each place of a grid, given blocks of arguments and of results of some types."""
    axes = jax.typeof(arguments[0]).manual_axis_type  # of `jax.shard_map`; all arguments vary alike
    results = [Type(x.shape, x.dtype, manual_axis_type=axes) for x in results]
    return pl.pallas_call(
        body,
        grid=grid,
        in_specs=inputs,
        out_specs=outputs,
        out_shape=results,
        compiler_params=triton.CompilerParams(num_warps=warps, num_stages=stages),
        name=name,
    )(*arguments)


def load_strip(n, width: int, *refs) -> list[jax.Array]:
    """Return the columns of strip n of that width of each."""
    return [ref[:, pl.ds(n * width, width)] for ref in refs]


def part(parts: int) -> jax.Array:
    """Return which of the parts of a chunk a program is for."""
    return lax.rem(pl.program_id(1), jnp.int32(parts))


def dot(a, b, contracted: tuple[int, int] = (1, 0), precision=None) -> jax.Array:
    """Return the fp32 product over one dimension of each."""
    a_dimension, b_dimension = contracted
    dimensions = ((a_dimension,), (b_dimension,)), ((), ())
    return lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


def exact(a, b) -> jax.Array:
    """Return the product of fp32 matrices, in TF32 x 3."""
    return dot(a, b, precision=EXACT_PRODUCT)


def places(size: int) -> list[jax.Array]:
    """Return the row and the column of every element of a square."""
    return [lax.broadcasted_iota(jnp.int32, (size, size), dimension) for dimension in range(2)]


def pairs(size: int, compare: Callable) -> jax.Array:
    """Return which pairs of a row and a column compare so."""
    return compare(*places(size))
