"""Softmax attention on Hopper whose warpgroups take turns, for narrow heads: the forward pass (see `attention.py`).

There are as many blocks as multiprocessors. A block takes tiles of queries until none is left, a long walk and a short
one of a head in turn, and while it is still at one tile the next one's tokens arrive. Of its two warpgroups one makes
exponentials while the tensor cores make the other's scores of a step and its sum over the values of the step before.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import mosaic
from pallas_kernels.hopper.attention import HIDDEN_SCORE, LOWEST_TOP, PADDING_LOGARITHM, rows
from pallas_kernels.hopper.attention_walk import (
    BEGIN,
    END,
    FETCHER_REGISTERS,
    GROUPS,
    LOG2E,
    MAX_SLOTS,
    PLAIN,
    REGISTERS,
    SHARED_MEMORY_BYTES,
    QuerySight,
    Taker,
    Walk,
    shared_tile,
)
from pallas_kernels.hopper.mosaic import TILE_ROWS

MAX_HEAD_DIM = 80
"""Of which a warpgroup holds a tile in registers beside the sums and two tiles of scores."""
KEY_STEP = 128
OWN_SLOTS, LEAST_SLOTS = 2, 3
"""Tiles that a block keeps, and steps that are in flight at least: what is taken, what is free, and what comes."""
MULTIPROCESSORS = 132
"""Of a Hopper GPU: blocks, at most."""


class TurnWalk(Walk):
    """A walk of a block that takes several, whose warpgroups may take turns."""

    def fetch(self, sources) -> None:
        """Fill the ring."""

        def step(n, _):
            for part, freed in enumerate(self.freed):
                _await_slot(freed, self.before + n, self.slots)
                for source, tile in zip(sources[part], self.stream[part], strict=True):
                    filled = self.filled[part].at[self.slot(n)]
                    plgpu.copy_gmem_to_smem(self.part_of(source, n), tile.at[self.slot(n)], filled)

        lax.fori_loop(0, self.steps, step, None)

    def await_turn(self) -> None:
        """Wait for this warpgroup's turn."""
        plgpu.barrier_wait(self.turns.at[self.group])

    def pass_turn(self) -> None:
        """Let the next warpgroup have its turn."""
        plgpu.barrier_arrive(self.turns.at[lax.rem(self.group + 1, GROUPS)])


def forward(q, k, v, first, keys, walks, *, scale: float):
    """Return o, zero at padding, and L (B, H, T) fp32, the logarithm in bits of each query's sum of exponentials.

    Args:
      first, keys: as of `attention_walk.Sight`.
      walks: of queries over keys; from PLAIN on all are seen up to the diagonal.
      scale: of scores.
    """
    time, factor, o_shape = q.shape[1], scale * LOG2E, (TILE_ROWS, q.shape[3])

    def attend(walk, tiles, first_ref, keys_ref, o_ref, logarithm_ref):
        [tile], sight = tiles, QuerySight(walk, first_ref, keys_ref)
        queries = mosaic.load(tile)
        nothing = mosaic.zeros(sight.shape)

        def soften(n, s, top, total):
            """Return exp2(s - top), top and the sum so far, and by how much what was before shrinks."""
            s = sight.show(n, s, HIDDEN_SCORE)
            higher = jnp.maximum(top, s.max(axis=1) * factor)
            p, shrunk = jnp.exp2(s * factor - mosaic.across(higher, s.shape)), jnp.exp2(top - higher)
            return p, higher, total * shrunk + p.sum(axis=1), shrunk

        def step(n, carry):
            o, p, top, total = carry
            [own_keys], [values_before] = walk.take(0, n), walk.take(1, n - 1)
            walk.await_turn()

            def multiply(sums, top, total, *_):
                mosaic.multiply(sums[0], queries, own_keys.T)
                mosaic.multiply(sums[1], p, values_before)
                walk.pass_turn()
                s = mosaic.finished(sums[0], later=1)
                walk.free(0, n)
                p_next, top, total, shrunk = soften(n, s, top, total)
                return top, total, p_next, shrunk

            _, o, top, total, p, shrunk = mosaic.accumulate(multiply, (nothing, o), (top, total, nothing, top))
            walk.free(1, n - 1)
            return o * mosaic.across(shrunk, o_shape), p.astype(q.dtype), top, total

        s = mosaic.multiply_add(nothing, queries, walk.take(0, 0)[0].T)
        walk.free(0, 0)
        p, top, total, _ = soften(0, s, rows(LOWEST_TOP), rows(0.0))
        start = mosaic.zeros(o_shape), p.astype(q.dtype), top, total
        o, p, top, total = lax.fori_loop(1, walk.steps, step, start)
        last = walk.steps - 1
        o = mosaic.multiply_add(o, p, walk.take(1, last)[0])
        walk.free(1, last)

        exists = mosaic.load_global(first_ref.at[walk.row, walk.mine], mosaic.ROW_LAYOUT) < time
        total = jnp.where(exists, total, 1.0)
        logarithm = jnp.where(exists, top + jnp.log2(total), PADDING_LOGARITHM)
        logarithm_ref.at[walk.row, walk.head, walk.mine][...] = logarithm
        walk.put((tile, o * mosaic.across(jnp.where(exists, 1.0 / total, 0.0), o_shape), o_ref))

    results = [mosaic.like(q), jax.ShapeDtypeStruct((q.shape[0], q.shape[2], time), jnp.float32)]
    arrays = [q], [[k], [v]], [first, keys], walks, results
    return run(attend, "attention_turns_forward", KEY_STEP, *arrays, last_first=True)


def run(compute: Callable, name: str, step: int, own, streamed, whole, walks, results, *, last_first: bool):
    """Return the results of `compute(walk, own tiles, *refs)`, called for each tile in each warpgroup that computes.

    `streamed` are parts of arrays, `step` tokens of which are taken together. The refs are those of the arrays in
    `whole` and of the results. Of a pair of tiles the one with the longer walk runs first: a later one if `last_first`.
    """
    (batch, time, heads, head_dim), tiles = own[0].shape, walks.shape[1]
    parts, flat = [len(part) for part in streamed], [x for part in streamed for x in part]
    kept = time // tiles
    slots = _slots(step, head_dim, kept * len(own), sum(len(x.shape) == 4 for x in flat))
    in_turn = 1 if tiles % 2 else 2
    of_head = tiles // in_turn
    blocks = min(batch * heads * of_head, MULTIPROCESSORS)

    def body(*refs):
        take = Taker(refs)
        own_refs, sources, (walks_ref,) = take(len(own)), [take(n) for n in parts], take(1)
        others, own_tiles = take(len(whole) + len(results)), take(len(own))
        stream, [given, returned, met, turns, finished] = [take(n) for n in parts], take(5)
        filled, freed = take(len(parts)), take(len(parts))
        group, block = lax.axis_index("warpgroup"), lax.axis_index("block")
        offset = group * TILE_ROWS
        count = in_turn * lax.div(batch * heads * of_head - block + blocks - 1, jnp.int32(blocks))

        def walk_of(i, before):
            """Return a block's walk number i, and the number of its tile."""
            number, is_longer = block + lax.div(i, in_turn) * blocks, lax.rem(i, in_turn) == 0
            tile = lax.rem(number, of_head)
            tile = jnp.where(is_longer == last_first, tiles - 1 - tile, tile)
            row, head = lax.div(number, of_head * heads), lax.rem(lax.div(number, of_head), heads)
            begin, end = lax.div(walks_ref[row, tile, BEGIN], step), pl.cdiv(walks_ref[row, tile, END], jnp.int32(step))
            where = pl.ds(tile * kept + offset, TILE_ROWS), begin, end - begin, step, walks_ref[row, tile, PLAIN]
            ring = slots, stream, filled, freed, met
            return TurnWalk(group, row, head, *where, *ring, before, turns), tile

        def fetch_tile(i, before):
            walk, tile = walk_of(i, before)
            slot, mine = lax.rem(i, OWN_SLOTS), (walk.row, pl.ds(tile * kept, kept), walk.head)
            _await_slot(returned, i, OWN_SLOTS)
            for source, part in zip(own_refs, own_tiles, strict=True):
                plgpu.copy_gmem_to_smem(source.at[mine], part.at[slot], given.at[slot])
            walk.fetch(sources)
            return before + walk.steps

        def use_tile(i, before):
            walk, _ = walk_of(i, before)
            slot = lax.rem(i, OWN_SLOTS)
            plgpu.barrier_wait(given.at[slot])
            compute(walk, [x.at[slot, pl.ds(offset, TILE_ROWS)] for x in own_tiles], *others)
            plgpu.barrier_arrive(returned.at[slot])
            return before + walk.steps

        @pl.when(group == GROUPS)
        def fetch():
            plgpu.set_max_registers(FETCHER_REGISTERS, action="decrease")
            steps = lax.fori_loop(0, count, fetch_tile, jnp.int32(0))
            for part in freed:
                _await_all(part, steps, slots)
            _await_all(returned, count, OWN_SLOTS)

        @pl.when(group < GROUPS)
        def use():
            plgpu.set_max_registers(REGISTERS, action="increase")
            # Turns go on from tile to tile: begun anew, one could be given before the last of the tile before is taken.
            pl.when(group == GROUPS - 1)(functools.partial(plgpu.barrier_arrive, turns.at[0]))
            lax.fori_loop(0, count, use_tile, jnp.int32(0))
            pl.when(group == 0)(functools.partial(plgpu.barrier_wait, turns.at[0]))

        plgpu.barrier_arrive(finished)
        plgpu.barrier_wait(finished)

    return plgpu.kernel(
        body,
        out_type=results,
        scratch_types=[
            *(shared_tile(x, OWN_SLOTS, kept) for x in own),
            *(shared_tile(x, slots, step) for x in flat),
            plgpu.Barrier(num_arrivals=len(own), num_barriers=OWN_SLOTS),
            plgpu.Barrier(num_arrivals=GROUPS, num_barriers=OWN_SLOTS),
            plgpu.Barrier(num_arrivals=GROUPS),
            plgpu.Barrier(num_barriers=GROUPS),
            plgpu.Barrier(num_arrivals=GROUPS + 1),
            *(plgpu.Barrier(num_arrivals=n, num_barriers=slots) for n in parts),
            *(plgpu.Barrier(num_arrivals=GROUPS, num_barriers=slots) for _ in parts),
        ],
        grid=(blocks,),
        grid_names=("block",),
        num_threads=GROUPS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        kernel_name=name,
    )(*own, *flat, walks, *whole)


def _slots(step: int, head_dim: int, own_rows: int, streamed: int) -> int:
    """Return how many steps are in flight: as many as shared memory holds beside what a block keeps."""
    row = 2 * head_dim
    slots = min(MAX_SLOTS, (SHARED_MEMORY_BYTES - OWN_SLOTS * own_rows * row) // (streamed * step * row))
    assert slots >= LEAST_SLOTS, f"shared memory holds {slots} steps"
    return slots


def _await_slot(freed, count, slots: int) -> None:
    """Wait until the slot of what is number `count` is free."""
    pl.when(count >= slots)(functools.partial(plgpu.barrier_wait, freed.at[lax.rem(count, slots)]))


def _await_all(freed, count, slots: int) -> None:
    """Wait until nobody needs what is in any slot, after `count` were filled."""
    lax.fori_loop(count, count + slots, lambda n, _: _await_slot(freed, n, slots), None)
