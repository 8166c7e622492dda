"""How the delta rules walk over the chunks of a head on Hopper, forward and back: the frame of their kernels.

A block has 64 columns of one state for each of its warpgroups that compute. All of a walk is transposed: a warpgroup
keeps S^T for its values in registers, which are its first operand as they lie, so that nothing that one chunk hands to
the next goes through shared memory. The last warpgroup fetches.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import mosaic
from pallas_kernels.hopper.mosaic import CHUNK_TOKENS, PAIRS_SHAPE, TILE_ROWS

GROUPS = 2
"""Warpgroups of a block that compute, where there are values for so many."""
GROUP_VALUES = TILE_ROWS
"""Of a warpgroup."""
PART_KEYS = 64
"""Channels of keys that a product or a copy takes together."""
REGISTERS, FETCHER_REGISTERS = 240, 24
"""Of each lane of a warpgroup that computes, and of the one that fetches."""
PUT_SLOTS = 2
"""Tiles of results of a warpgroup that are on their way to memory."""
SHARED_MEMORY_BYTES = 224 * 1024
"""Of a multiprocessor, less what barriers and single values take."""
MAX_SLOTS = 3
"""Chunks in flight."""


class Walk(NamedTuple):
    """A warpgroup's way over the chunks, at one of them.

    Attributes:
      row, head, strip: of the arrays; strips have the values of a block.
      group: which warpgroup of the block, of so many `groups`.
      tiles: what was fetched, by slot.
      puts: tiles of results.
      turn, chunk: how many chunks there were before, and which one it is at.
    """

    row: jax.Array
    head: jax.Array
    strip: jax.Array
    group: jax.Array
    groups: int
    slots: int
    tiles: Sequence[Any]
    filled: Any
    freed: Any
    puts: Any
    turn: Any = 0
    chunk: Any = 0

    @property
    def values(self):
        """Return where this warpgroup's columns stand among all values."""
        return pl.ds(self.strip * (self.groups * GROUP_VALUES) + self.group * GROUP_VALUES, GROUP_VALUES)

    @property
    def tokens(self):
        """Return where the chunk's tokens stand in the sequence."""
        return pl.ds(self.chunk * CHUNK_TOKENS, CHUNK_TOKENS)

    def take(self) -> list:
        """Return the chunk's tiles, once they are there."""
        slot = lax.rem(self.turn, self.slots)
        plgpu.barrier_wait(self.filled.at[slot])
        return [tile.at[slot] for tile in self.tiles]

    def free(self) -> None:
        """Say that this warpgroup needs those tiles no more."""
        plgpu.barrier_arrive(self.freed.at[lax.rem(self.turn, self.slots)])

    def mine(self, tile):
        """Return this warpgroup's columns of a tile of values."""
        return tile.at[:, pl.ds(self.group * GROUP_VALUES, GROUP_VALUES)]

    def puts_of(self, count: int):
        """Return the function that writes tiles of registers through shared memory, called `count` times in a step."""
        turns = iter(range(count))

        def put(x, target, *, transposed: bool = False) -> None:
            tile = self.puts.at[self.group, lax.rem(self.turn * count + next(turns), PUT_SLOTS)]
            plgpu.wait_smem_to_gmem(PUT_SLOTS - 1, wait_read_only=True)
            mosaic.save(tile.T if transposed else tile, x)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(tile, target)

        return put


def walk_over_chunks(
    step: Callable, name: str, shared, own, numbers, state, results, *, final: int, back: bool = False
) -> list[jax.Array]:
    """Return the results of steps `S = step(walk, S, *refs)` over the chunks, with the refs of all results but one.

    Args:
      shared, own, numbers: what is fetched by chunks, (B, T, H, .), of the last dimension all; (B, T, H, V), of values
        the block's; (B, H, .), as many of a chunk as of another.
      state: (B, H, V, K) fp32, transposed: S before the first step.
      results: their shapes and types.
      final: which of them is S after the last step.
      back: whether the last chunks come first.
    """
    (batch, time, heads, values), streamed = own[0].shape, [*shared, *own, *numbers]
    groups = GROUPS if values % (GROUPS * GROUP_VALUES) == 0 else 1
    block_values = groups * GROUP_VALUES
    strips, chunks = values // block_values, time // CHUNK_TOKENS
    widths = [*(x.shape[3] for x in shared), *(block_values for _ in own)]
    counts = [x.shape[2] // chunks for x in numbers]
    slots = _slots(sum(widths), groups)

    def body(*refs):
        sources, state_ref, others = refs[: len(streamed)], refs[len(streamed)], list(refs[len(streamed) + 1 :])
        others, (*tiles, puts, filled, freed, finished) = others[: len(results)], others[len(results) :]
        final_ref = others.pop(final)
        group, block = lax.axis_index("warpgroup"), lax.axis_index("block")
        strip, sequence = lax.rem(block, strips), lax.div(block, strips)
        row, head = lax.div(sequence, heads), lax.rem(sequence, heads)

        def fetch(n):
            slot, chunk = lax.rem(n, slots), chunks - 1 - n if back else n
            tokens, columns = (pl.ds(i * size, size) for i, size in ((chunk, CHUNK_TOKENS), (strip, block_values)))
            parts = [
                *(source.at[row, tokens, head] for source in sources[: len(shared)]),
                *(source.at[row, tokens, head, columns] for source in sources[len(shared) : len(widths)]),
                *(
                    source.at[row, head, pl.ds(chunk * count, count)]
                    for source, count in zip(sources[len(widths) :], counts, strict=True)
                ),
            ]
            for part, tile in zip(parts, tiles, strict=True):
                plgpu.copy_gmem_to_smem(part, tile.at[slot], filled.at[slot])

        @pl.when(group == groups)
        def fill():
            plgpu.set_max_registers(FETCHER_REGISTERS, action="decrease")

            def fill_slot(n, _):
                pl.when(n >= slots)(lambda: plgpu.barrier_wait(freed.at[lax.rem(n, slots)]))
                pl.when(n < chunks)(lambda: fetch(n))

            lax.fori_loop(0, chunks + slots, fill_slot, None)

        @pl.when(group < groups)
        def use():
            plgpu.set_max_registers(REGISTERS, action="increase")
            walk = Walk(row, head, strip, group, groups, slots, tiles, filled, freed, puts)
            mine = walk.row, walk.head, walk.values

            def take_turn(n, S):
                return step(walk._replace(turn=n, chunk=chunks - 1 - n if back else n), S, *others)

            initial = mosaic.load_global(state_ref.at[*mine], mosaic.WGMMA)
            final_ref.at[*mine][...] = lax.fori_loop(0, chunks, take_turn, initial)
            plgpu.wait_smem_to_gmem(0)

        plgpu.barrier_arrive(finished)
        plgpu.barrier_wait(finished)

    return plgpu.kernel(
        body,
        out_type=results,
        scratch_types=[
            *(mosaic.swizzled((slots, CHUNK_TOKENS, width), mosaic.WIDE_SWIZZLE) for width in widths),
            *(plgpu.SMEM((slots, count), jnp.float32) for count in counts),
            mosaic.swizzled((groups, PUT_SLOTS, *PAIRS_SHAPE), mosaic.WIDE_SWIZZLE),
            plgpu.Barrier(num_arrivals=len(streamed), num_barriers=slots),
            plgpu.Barrier(num_arrivals=groups, num_barriers=slots),
            plgpu.Barrier(num_arrivals=groups + 1),
        ],
        grid=(batch * heads * strips,),
        grid_names=("block",),
        num_threads=groups + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        kernel_name=name,
    )(*streamed, state)


def _slots(width: int, groups: int) -> int:
    """Return how many chunks of so many 16-bit columns are in flight beside what is put."""
    puts = groups * PUT_SLOTS * CHUNK_TOKENS * CHUNK_TOKENS * 2
    return min(MAX_SLOTS, (SHARED_MEMORY_BYTES - puts) // (width * CHUNK_TOKENS * 2))


def states_of_chunks(values: jax.Array, keys: int) -> jax.ShapeDtypeStruct:
    """Return the shape of a transposed state for every chunk, (B, H, chunks, V, K), given values (B, T, H, V)."""
    batch, time, heads, width = values.shape
    return jax.ShapeDtypeStruct((batch, heads, time // CHUNK_TOKENS, width, keys), values.dtype)


def rounded_parts(S, dtype):
    """Return where the parts of the channels of a state in registers stand, and each of them in that dtype.

    All are rounded before one is used, so that no product waits; of wide states, when they are: else registers lack.
    """
    parts = ((pl.ds(i, PART_KEYS), S[:, i : i + PART_KEYS].astype(dtype)) for i in range(0, S.shape[1], PART_KEYS))
    return list(parts) if S.shape[1] <= 2 * PART_KEYS else parts


def numbers_of(tile) -> jax.Array:
    """Return the number of each token of a chunk, down the columns of what is transposed."""
    return mosaic.down(plgpu.load(tile, layout=mosaic.COLUMN_LAYOUT), PAIRS_SHAPE)


def by_channel(tile) -> jax.Array:
    """Return the number of each channel of a state, down the columns of what is transposed."""
    return mosaic.down(plgpu.load(tile, layout=mosaic.COLUMN_LAYOUT), (GROUP_VALUES, tile.shape[0]))
