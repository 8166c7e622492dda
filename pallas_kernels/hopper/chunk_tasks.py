"""The gradients of all chunks at once, each a task of one block, whose last warpgroup fetches: their frame on Hopper.

A block has some channels of keys, `GROUP_KEYS` in each of its parts, and goes through the values `STEP_VALUES` at a
time, which arrive a step ahead.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import mosaic
from pallas_kernels.hopper.delta_rule_walk import FETCHER_REGISTERS, GROUPS, REGISTERS
from pallas_kernels.hopper.mosaic import CHUNK_TOKENS, PAIRS_SHAPE

GROUP_KEYS = 64
"""Channels of keys of a part."""
STEP_VALUES = 64
REDUCTION_SCRATCH_BYTES = plgpu.CompilerParams().reduction_scratch_bytes
"""What sums over several warps have of shared memory where nothing else is said."""


class Inputs(NamedTuple):
    """What a task is given.

    Attributes:
      keys: arrays (B, T, H, K).
      numbers: arrays (B, H, T) fp32, and in how many tiles each comes: a load of one has one layout.
      values: arrays (B, T, H, V), in bundles that share a tile.
      states: arrays (B, H, chunks, V, K).
      parts: of keys in a block.
      slots: steps in flight.
      ahead: steps of a task that are fetched before the task before is done.
    """

    keys: Sequence[jax.Array]
    numbers: Sequence[tuple[jax.Array, int]]
    values: Sequence[Sequence[jax.Array]]
    states: Sequence[jax.Array]
    parts: int
    slots: int
    ahead: int

    @property
    def arrays(self) -> list[jax.Array]:
        """All of them."""
        return [*self.keys, *itertools.chain(*self.values), *(x for x, _ in self.numbers), *self.states]


class Place(NamedTuple):
    """Where a task is: of the arrays, and which of the blocks' shares of the keys."""

    row: jax.Array
    chunk: jax.Array
    head: jax.Array
    share: jax.Array


class Tasks(NamedTuple):
    """A block's tasks, as a warpgroup that computes sees them.

    Attributes:
      group: which warpgroup.
      steps: of a task.
      place: function of a task's number.
      zeros: a tile of them in registers.
      keys, numbers: tiles of a task.
      values, states: tiles of a step, by slot.
      given: passes when the tiles of keys and numbers are there.
      returned: at which both warpgroups say that they need these no more.
      met: where both meet within a task.
    """

    group: jax.Array
    steps: int
    place: Callable[[Any], Place]
    zeros: jax.Array
    keys: Any
    numbers: Sequence[Any]
    values: Sequence[Any]
    states: Sequence[Any]
    slots: int
    filled: Any
    freed: Any
    given: Any
    returned: Any
    met: Any

    def over_steps(self, n, add: Callable, begin: tuple) -> tuple:
        """Return what `add(slot, carry)` makes of the steps of the n-th task."""

        def step(i, carry):
            turn = n * self.steps + i
            slot = lax.rem(turn, self.slots)
            plgpu.barrier_wait(self.filled.at[slot])
            carry = add(slot, carry)
            plgpu.barrier_arrive(self.freed.at[slot])
            return carry

        return lax.fori_loop(0, self.steps, step, begin)


def each_task(
    compute: Callable,
    name: str,
    inputs: Inputs,
    results: Sequence[jax.ShapeDtypeStruct],
    scratch: Sequence[plgpu.SMEM],
    *,
    blocks: int,
    waits: bool = False,
    reduction_scratch_bytes: int = REDUCTION_SCRATCH_BYTES,
) -> list[jax.Array]:
    """Return the results of `compute(tasks, n, scratch, refs)`, a block's n-th task, refs being those of the results.

    Both warpgroups that compute call it, and share the scratch memory. With `waits` they wait for `tasks.returned` in
    every task but the first.
    """
    (batch, time, heads, values), keys = inputs.values[0][0].shape, inputs.keys[0].shape[3]
    shares, steps = keys // (inputs.parts * GROUP_KEYS), values // STEP_VALUES
    chunks, slots, ahead = time // CHUNK_TOKENS, inputs.slots, min(inputs.ahead, steps)
    total = batch * chunks * heads * shares
    blocks = min(blocks, total)
    count_of = [len(inputs.keys), *map(len, inputs.values), len(inputs.numbers), len(inputs.states)]
    counts = [count for _, count in inputs.numbers]

    def body(*refs):
        sources = iter(refs)
        key_refs, *value_refs, number_refs, state_refs = ([next(sources) for _ in range(n)] for n in count_of)
        others = list(sources)
        result_refs, scratch_refs = others[: len(results)], iter(others[len(results) :])
        key_tiles, number_tiles = next(scratch_refs), [next(scratch_refs) for _ in range(sum(counts))]
        value_tiles, state_tiles = (
            [next(scratch_refs) for _ in inputs.values],
            [next(scratch_refs) for _ in inputs.states],
        )
        own = [next(scratch_refs) for _ in scratch]
        given, returned, filled, freed, met, finished = scratch_refs
        group, block = lax.axis_index("warpgroup"), lax.axis_index("block")
        count = lax.div(total - 1 - block, blocks) + 1

        def place(n) -> Place:
            task = block + n * blocks
            share, chunk = lax.rem(task, shares), lax.div(task, shares)
            row, number = lax.div(chunk, heads * chunks), lax.rem(lax.div(chunk, heads), chunks)
            return Place(row, number, lax.rem(chunk, heads), share)

        @pl.when(group == GROUPS)
        def fetch():
            plgpu.set_max_registers(FETCHER_REGISTERS, action="decrease")

            def await_freed(turn):
                pl.when(turn >= 0)(lambda: plgpu.barrier_wait(freed.at[lax.rem(turn, slots)]))

            def fetch_step(n, i):
                row, chunk, head, share = place(n)
                tokens, some = part_of(chunk, CHUNK_TOKENS), part_of(i, STEP_VALUES)
                turn = n * steps + i
                slot = lax.rem(turn, slots)
                await_freed(turn - slots)
                for bundle, tile in zip(value_refs, value_tiles, strict=True):
                    for j, source in enumerate(bundle):
                        where = tile.at[slot, j] if len(bundle) > 1 else tile.at[slot]
                        plgpu.copy_gmem_to_smem(source.at[row, tokens, head, some], where, filled.at[slot])
                for g in range(inputs.parts):
                    of_state = row, head, chunk, some, part_of(share * inputs.parts + g, GROUP_KEYS)
                    for source, tile in zip(state_refs, state_tiles, strict=True):
                        plgpu.copy_gmem_to_smem(source.at[of_state], tile.at[slot, g], filled.at[slot])

            def fetch_keys(n):
                row, chunk, head, share = place(n)
                tokens = part_of(chunk, CHUNK_TOKENS)
                for (i, source), g in itertools.product(enumerate(key_refs), range(inputs.parts)):
                    some = source.at[row, tokens, head, part_of(share * inputs.parts + g, GROUP_KEYS)]
                    plgpu.copy_gmem_to_smem(some, key_tiles.at[i, g], given)
                targets = iter(number_tiles)
                for source, copies in zip(number_refs, counts, strict=True):
                    for _ in range(copies):
                        plgpu.copy_gmem_to_smem(source.at[row, head, tokens], next(targets), given)

            def fetch_rest(n):
                fetch_keys(n)
                lax.fori_loop(ahead, steps, lambda i, _: fetch_step(n, i), None)

            def step(n, _):
                if ahead:
                    pl.when(n < count)(lambda: lax.fori_loop(0, ahead, lambda i, _: fetch_step(n, i), None))
                pl.when(n > 0)(lambda: plgpu.barrier_wait(returned))
                pl.when(n < count)(lambda: fetch_rest(n))

            lax.fori_loop(0, count + 1, step, None)
            for back in range(slots, 0, -1):
                await_freed(count * steps - back)

        @pl.when(group < GROUPS)
        def use():
            plgpu.set_max_registers(REGISTERS, action="increase")
            arrived = key_tiles, number_tiles, value_tiles, state_tiles
            barriers = filled, freed, given, returned, met
            tasks = Tasks(group, steps, place, mosaic.zeros(PAIRS_SHAPE), *arrived, slots, *barriers)
            lax.fori_loop(0, count, lambda n, _: compute(tasks, n, own, result_refs), None)
            if waits:
                plgpu.barrier_wait(returned)  # a barrier is to be waited for as often as it is passed
            plgpu.wait_smem_to_gmem(0)

        plgpu.barrier_arrive(finished)
        plgpu.barrier_wait(finished)

    arrivals = sum(map(len, inputs.values)) + inputs.parts * len(inputs.states)
    return plgpu.kernel(
        body,
        out_type=results,
        scratch_types=[
            tiles(len(inputs.keys), inputs.parts, CHUNK_TOKENS, GROUP_KEYS),
            *(plgpu.SMEM((CHUNK_TOKENS,), jnp.float32) for _ in range(sum(counts))),
            *(
                mosaic.swizzled(
                    (slots, *([len(x)] if len(x) > 1 else []), CHUNK_TOKENS, STEP_VALUES), mosaic.WIDE_SWIZZLE
                )
                for x in inputs.values
            ),
            *(
                mosaic.swizzled((slots, inputs.parts, STEP_VALUES, GROUP_KEYS), mosaic.WIDE_SWIZZLE)
                for _ in inputs.states
            ),
            *scratch,
            plgpu.Barrier(num_arrivals=len(inputs.keys) * inputs.parts + sum(counts)),
            plgpu.Barrier(num_arrivals=GROUPS),
            plgpu.Barrier(num_arrivals=arrivals, num_barriers=slots),
            plgpu.Barrier(num_arrivals=GROUPS, num_barriers=slots),
            plgpu.Barrier(num_arrivals=GROUPS),
            plgpu.Barrier(num_arrivals=GROUPS + 1),
        ],
        grid=(blocks,),
        grid_names=("block",),
        num_threads=GROUPS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=reduction_scratch_bytes
        ),
        kernel_name=name,
    )(*inputs.arrays)


def tiles(*shape: int) -> plgpu.SMEM:
    """Return shared memory for tiles of bf16."""
    return mosaic.swizzled(shape, mosaic.WIDE_SWIZZLE)


def part_of(number, size: int):
    """Return where a part of so many elements stands."""
    return pl.ds(number * size, size)


def wide(tile) -> jax.Array:
    """Return a tile of shared memory in fp32."""
    return mosaic.load(tile).astype(jnp.float32)
