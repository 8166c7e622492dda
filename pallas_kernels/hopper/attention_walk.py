"""What attention's Hopper kernels share: a block keeps tiles of tokens, and walks over the tokens that these meet.

Queries meet keys, or keys queries. A block keeps those of one head in shared memory, 64 for each of its warpgroups or
for both, and passes the others through a ring that one more warpgroup fills. Which tokens a tile meets, `walks` (B,
tiles, 3) int32 says: from BEGIN to END; and PLAIN, on which side of which no pair is hidden but by the diagonal.

Arrays are (B, T, H, K) in bf16 or fp16, T a multiple of OWN_TOKENS, K of `HEAD_MULTIPLE`, and (B, H, T) in fp32.
"""

import abc
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import mosaic
from pallas_kernels.hopper.mosaic import TILE_ROWS

GROUPS = 2
"""Warpgroups of a block that compute."""
OWN_TOKENS, SHARED_TOKENS = GROUPS * TILE_ROWS, TILE_ROWS
"""That a block keeps: each warpgroup its tile, or all the same one."""
HEAD_MULTIPLE = 16
LOG2E = math.log2(math.e)
BEGIN, END, PLAIN = range(3)
REGISTERS, FETCHER_REGISTERS = 240, 24
"""Of each lane of a warpgroup that computes, and of the one that fetches."""
SHARED_MEMORY_BYTES = 220 * 1024
"""Of a multiprocessor, in bytes, less what barriers and single values take."""
MAX_SLOTS = 4


class Walk(NamedTuple):
    """A warpgroup's way over the tokens that its own meet.

    Attributes:
      group: which warpgroup of the block.
      row, head: of the arrays.
      mine: its own tokens.
      begin, steps, step: the first step, how many there are, and the tokens of each.
      plain: PLAIN of its tile.
      before: steps of the tiles that the block has taken before.
      turns: whose turn it is to multiply, where warpgroups take turns.
      stream: the tiles of each part of what is streamed, which come and go together.
    """

    group: jax.Array
    row: jax.Array
    head: jax.Array
    mine: pl.Slice
    begin: jax.Array
    steps: jax.Array
    step: int
    plain: jax.Array
    slots: int
    stream: Sequence[Sequence[Any]]
    filled: Sequence[Any]
    freed: Sequence[Any]
    met: Any
    before: Any = 0
    turns: Any = None

    def first(self, n) -> jax.Array:
        """Return where the first token of a step stands."""
        return (self.begin + n) * self.step

    def tokens(self, n) -> pl.Slice:
        """Return where the tokens of a step stand."""
        return pl.ds(self.first(n), self.step)

    def part_of(self, source, n):
        """Return the reference to a step's tokens of an array (B, T, H, K) or (B, H, T)."""
        heads_last = len(source.shape) == 4
        return (
            source.at[self.row, self.tokens(n), self.head]
            if heads_last
            else source.at[self.row, self.head, self.tokens(n)]
        )

    def slot(self, n) -> jax.Array:
        """Return which slot of the ring a step has."""
        return lax.rem(self.before + n, self.slots)

    def take(self, part: int, n) -> list:
        """Return the tiles of a step of one part of the streamed, once they are there."""
        plgpu.barrier_wait(self.filled[part].at[self.slot(n)])
        return self.taken(part, n)

    def taken(self, part: int, n) -> list:
        """Return the tiles of a step that were taken before."""
        return [tile.at[self.slot(n)] for tile in self.stream[part]]

    def free(self, part: int, n) -> None:
        """Say that this warpgroup needs those tiles no more."""
        plgpu.barrier_arrive(self.freed[part].at[self.slot(n)])

    def fetch(self, sources) -> None:
        """Fill the ring, and wait until nobody needs what is in it."""

        def copy(part, n):
            slot = lax.rem(n, self.slots)
            for source, tile in zip(sources[part], self.stream[part], strict=True):
                plgpu.copy_gmem_to_smem(self.part_of(source, n), tile.at[slot], self.filled[part].at[slot])

        def step(n, _):
            for part, freed in enumerate(self.freed):
                pl.when(n >= self.slots)(functools.partial(plgpu.barrier_wait, freed.at[lax.rem(n, self.slots)]))
                pl.when(n < self.steps)(functools.partial(copy, part, n))

        lax.fori_loop(0, self.steps + self.slots, step, None)

    def meet(self) -> None:
        """Wait for the others that compute."""
        plgpu.barrier_arrive(self.met)
        plgpu.barrier_wait(self.met)

    def put(self, *results) -> None:
        """Write (tile, values, array): own tokens of an array through a tile of shared memory."""
        for tile, values, _ in results:
            mosaic.save(tile, values)
        plgpu.commit_smem()
        for tile, _, array in results:
            plgpu.copy_smem_to_gmem(tile, array.at[self.row, self.mine, self.head])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def run(compute: Callable, name: str, step: int, own, streamed, whole, walks, results, *, last_first: bool):
    """Return the results of `compute(walk, own tiles, *refs)`, called in each warpgroup that computes.

    `streamed` are parts of arrays, `step` tokens of which are taken together. The refs are those of the arrays in
    `whole` and of the results. The tiles with the longest walks run first: a head's last tiles where `last_first`.
    """
    (batch, time, heads, head_dim), tiles = own[0].shape, walks.shape[1]
    parts, flat = [len(part) for part in streamed], [x for part in streamed for x in part]
    kept = time // tiles
    slots = _slots(step, head_dim, kept * len(own), sum(len(x.shape) == 4 for x in flat))

    def body(*refs):
        take = Taker(refs)
        own_refs, sources, (walks_ref,) = take(len(own)), [take(n) for n in parts], take(1)
        others, own_tiles = take(len(whole) + len(results)), take(len(own))
        stream, [given, met, finished] = [take(n) for n in parts], take(3)
        filled, freed = take(len(parts)), take(len(parts))
        group, block = lax.axis_index("warpgroup"), lax.axis_index("block")
        tile = lax.rem(block, tiles)
        tile = tiles - 1 - tile if last_first else tile
        row, head = lax.div(block, tiles * heads), lax.rem(lax.div(block, tiles), heads)
        begin, end = (lax.div(walks_ref[row, tile, BEGIN], step), pl.cdiv(walks_ref[row, tile, END], jnp.int32(step)))
        offset = 0 if kept == SHARED_TOKENS else group * TILE_ROWS
        mine, plain = pl.ds(tile * kept + offset, TILE_ROWS), walks_ref[row, tile, PLAIN]
        walk = Walk(group, row, head, mine, begin, end - begin, step, plain, slots, stream, filled, freed, met)

        @pl.when(group == GROUPS)
        def fetch():
            plgpu.set_max_registers(FETCHER_REGISTERS, action="decrease")
            for source, part in zip(own_refs, own_tiles, strict=True):
                plgpu.copy_gmem_to_smem(source.at[row, pl.ds(tile * kept, kept), head], part, given)
            walk.fetch(sources)

        @pl.when(group < GROUPS)
        def use():
            plgpu.set_max_registers(REGISTERS, action="increase")
            plgpu.barrier_wait(given)
            compute(walk, [x.at[pl.ds(offset, TILE_ROWS)] for x in own_tiles], *others)

        plgpu.barrier_arrive(finished)
        plgpu.barrier_wait(finished)

    return plgpu.kernel(
        body,
        out_type=results,
        scratch_types=[
            *(shared_tile(x, kept) for x in own),
            *(shared_tile(x, slots, step) for x in flat),
            plgpu.Barrier(num_arrivals=len(own)),
            plgpu.Barrier(num_arrivals=GROUPS),
            plgpu.Barrier(num_arrivals=GROUPS + 1),
            *(plgpu.Barrier(num_arrivals=n, num_barriers=slots) for n in parts),
            *(plgpu.Barrier(num_arrivals=GROUPS, num_barriers=slots) for _ in parts),
        ],
        grid=(batch * heads * tiles,),
        grid_names=("block",),
        num_threads=GROUPS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        kernel_name=name,
    )(*own, *flat, walks, *whole)


def shared_tile(x, *rows: int) -> Any:
    """Return shared memory for so many rows of an array: of heads (B, T, H, K), or of numbers (B, H, T)."""
    if len(x.shape) == 3:
        return plgpu.SMEM(rows, x.dtype)
    head_dim = x.shape[3]
    return mosaic.swizzled((*rows, head_dim), mosaic.widest_swizzle(head_dim), x.dtype)


def _slots(step: int, head_dim: int, own_rows: int, streamed: int) -> int:
    """Return how many steps are in flight: as many as shared memory holds beside what a block keeps."""
    row = 2 * head_dim
    return min(MAX_SLOTS, (SHARED_MEMORY_BYTES - own_rows * row) // (streamed * step * row))


class Taker:
    """Hands out a sequence from its begin."""

    def __init__(self, items):
        self.items = list(items)

    def __call__(self, count: int) -> list:
        """Return the next so many items."""
        taken, self.items = self.items[:count], self.items[count:]
        return taken


class Sight(abc.ABC):
    """Which pairs of a warpgroup's own tokens and those of a step are seen: a key by a query of its document, after it.

    `first_ref` (B, T) int32 are where the first key stands that each query sees, T at padding, which sees none, and
    `keys_ref` where each key stands, -1 at padding, which nobody sees.
    """

    def __init__(self, walk: Walk, first_ref, keys_ref):
        """Take a walk, and the references."""
        self.walk, self.shape = walk, (TILE_ROWS, walk.step)
        self.first_ref, self.keys_ref = first_ref.at[walk.row], keys_ref.at[walk.row]

    def show(self, n, tile, hidden: float):
        """Return a tile of a step's pairs with `hidden` for those that are not seen."""
        return lax.cond(self.is_partial(n), lambda: jnp.where(self._seen(n), tile, hidden), lambda: tile)

    @abc.abstractmethod
    def is_partial(self, n):
        """Return whether pairs of a step are hidden."""

    @abc.abstractmethod
    def places(self, n):
        """Return tiles of where the query stands, the first key that it sees, and the key."""

    def _seen(self, n):
        query, first, key = (plgpu.layout_cast(x, mosaic.WGMMA) for x in self.places(n))
        return (key >= first) & (key <= query)

    def rows(self, places):
        """Return a tile of one value for each own token, given for all tokens of a row."""
        return mosaic.across(mosaic.load_global(places.at[self.walk.mine], mosaic.ROW_LAYOUT), self.shape)

    def columns(self, places, n):
        """Return a tile of one value for each token of a step, given for all tokens of a row."""
        return mosaic.down(mosaic.load_global(places.at[self.walk.tokens(n)], mosaic.COLUMN_LAYOUT), self.shape)


class QuerySight(Sight):
    """Of queries, which walk over keys."""

    def is_partial(self, n):
        """Return whether a step is before where all are seen, or on the diagonal."""
        begin = self.walk.first(n)
        return (begin < self.walk.plain) | (begin + self.walk.step > self.walk.mine.start)

    def places(self, n):
        """See `Sight`."""
        query = mosaic.iota(self.shape, 0) + self.walk.mine.start
        return query, self.rows(self.first_ref), self.columns(self.keys_ref, n)


class KeySight(Sight):
    """Of keys, which walk over queries."""

    def is_partial(self, n):
        """Return whether a step reaches beyond where all are seen, or is on the diagonal."""
        begin = self.walk.first(n)
        return (begin + self.walk.step > self.walk.plain) | (begin < self.walk.mine.start + TILE_ROWS)

    def places(self, n):
        """See `Sight`."""
        query = mosaic.iota(self.shape, 1) + self.walk.first(n)
        return query, self.columns(self.first_ref, n), self.rows(self.keys_ref)
