"""Chunks of all sequences by turns, each by one warpgroup, which has the next one copied meanwhile, on Hopper."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import mosaic
from pallas_kernels.hopper.mosaic import CHUNK_TOKENS


class Turn(NamedTuple):
    """A chunk that a warpgroup is at.

    Attributes:
      row, chunk, head: of the arrays.
      tokens: where the chunk's stand in the sequence.
      fetch_next: has the tiles overwritten by those of the warpgroup's next chunk.
    """

    row: jax.Array
    chunk: jax.Array
    head: jax.Array
    tokens: Any
    fetch_next: Callable[[], None] = lambda: None


def each_chunk(
    make: Callable,
    name: str,
    arrays: Sequence[jax.Array],
    numbers: Sequence[tuple[jax.Array, int]],
    results: Sequence[jax.ShapeDtypeStruct],
    scratch: Sequence[plgpu.SMEM],
    *,
    groups: int,
    blocks: int,
    shared: Sequence[plgpu.SMEM] = (),
    prepare: Callable | None = None,
) -> list[jax.Array]:
    """Return the results of `make(turn, tiles, scratch, refs)` for every chunk, refs being those of the results.

    Args:
      arrays: (B, T, H, .) bf16, T a multiple of 64: a tile each.
      numbers: (B, H, T) fp32, and in how many tiles each comes: a load of one has one layout.
      scratch: shared memory, (groups, ...): a warpgroup gets its own.
      groups: warpgroups of a block.
      blocks: that run at the same time.
      shared: more shared memory, for all warpgroups of a block, behind what is theirs.
      prepare: function that one of them fills it with.
    """
    batch, time, heads, _ = arrays[0].shape
    chunks = time // CHUNK_TOKENS
    total = batch * chunks * heads
    blocks = min(blocks, pl.cdiv(total, groups))
    given = [*((x, 1) for x in arrays), *numbers]
    widths, copies = [x.shape[3] for x in arrays], sum(count for _, count in given)

    def body(*refs):
        sources, targets = refs[: len(given)], refs[len(given) : len(given) + len(results)]
        *own, filled, finished = refs[len(given) + len(results) :]
        own, common = own[: copies + len(scratch)], own[copies + len(scratch) :]
        group = lax.axis_index("warpgroup")
        own = [x.at[group] for x in own]
        tiles, own, arrival = own[:copies], [*own[copies:], *common], filled.at[group]
        if prepare is not None:
            pl.when(group == 0)(lambda: _prepared(prepare, common))
            plgpu.barrier_arrive(finished)
            plgpu.barrier_wait(finished)
        first = lax.axis_index("block") * groups + group

        def turn(n) -> Turn:
            number = first + n * (blocks * groups)
            chunk = lax.rem(lax.div(number, heads), chunks)
            tokens = pl.ds(chunk * CHUNK_TOKENS, CHUNK_TOKENS)
            return Turn(lax.div(number, heads * chunks), chunk, lax.rem(number, heads), tokens)

        def fetch(n):
            at, slots = turn(n), iter(tiles)
            for source, (_, count) in zip(sources, given, strict=True):
                for _ in range(count):
                    wide = len(source.shape) == 4
                    part = source.at[at.row, at.tokens, at.head] if wide else source.at[at.row, at.head, at.tokens]
                    plgpu.copy_gmem_to_smem(part, next(slots), arrival)

        def step(n, _):
            at = turn(n)._replace(fetch_next=lambda: pl.when(n + 1 < count)(lambda: fetch(n + 1)))
            plgpu.barrier_wait(arrival)
            make(at, tiles, own, targets)

        count = lax.div(total - first + (blocks * groups - 1), blocks * groups)
        pl.when(count > 0)(lambda: fetch(0))
        lax.fori_loop(0, count, step, None)
        plgpu.wait_smem_to_gmem(0)
        plgpu.barrier_arrive(finished)
        plgpu.barrier_wait(finished)

    return plgpu.kernel(
        body,
        out_type=results,
        scratch_types=[
            *(mosaic.swizzled((groups, CHUNK_TOKENS, width), mosaic.WIDE_SWIZZLE) for width in widths),
            *(plgpu.SMEM((groups, CHUNK_TOKENS), jnp.float32) for _ in range(copies - len(widths))),
            *scratch,
            *shared,
            plgpu.Barrier(num_arrivals=copies, num_barriers=groups),
            plgpu.Barrier(num_arrivals=groups),
        ],
        grid=(blocks,),
        grid_names=("block",),
        num_threads=groups,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        kernel_name=name,
    )(*(x for x, _ in given))


def _prepared(prepare: Callable, shared) -> None:
    prepare(*shared)
    plgpu.commit_smem()
