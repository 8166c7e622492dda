"""The delta rule with one decay a head, by chunks of 64 tokens on Hopper (see `ops/hopper/delta_rule.py`).

In a chunk with the state S before it, c_t the sum of its log-decays up to token t, and w_ts = exp(c_t - c_s):

    E = T (V - diag(exp c) K S)                 T = (I + L diag(beta))^-1      L_ts = (k_t . k_s) w_ts, s < t
    O = P E + scale diag(exp c) Q S             P_ts = scale (q_t . k_s) w_ts beta_s, s <= t
    S' = exp(c_C) S + K^T diag(exp(c_C - c) beta) E

(arXiv 2406.06484, section 3.2; 2412.06464, section 3.3). `delta_rule_pairs.py` makes P and T. `forward` walks over the
chunks of a head, and `reverse` back with the gradient of S:

    dE = P^T dO + diag(exp(c_C - c) beta) K dS'            dV = T^T dE
    dS = exp(c_C) dS' + scale (diag(exp c) Q)^T dO - (diag(exp c) K)^T dV

A block has `BLOCK_VALUES` columns of one state. All of a walk is transposed: each of two warpgroups keeps S^T for 64
values in registers, which are its first operand as they lie, so that nothing that one chunk hands to the next goes
through shared memory. The third warpgroup fetches. `delta_rule_channels.py` walks the same way.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import mosaic
from pallas_kernels.hopper.mosaic import CHUNK_TOKENS, PAIRS_SHAPE, TILE_ROWS

GROUPS = 2
"""Warpgroups of a block that compute."""
GROUP_VALUES = TILE_ROWS
BLOCK_VALUES = GROUPS * GROUP_VALUES
"""Values of a warpgroup, and of a block."""
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
    """A warpgroup's way over the chunks.

    Attributes:
      row, head, strip: of the arrays; strips are of `BLOCK_VALUES`.
      group: which warpgroup of the block.
      tiles: what was fetched, by slot.
      puts: tiles of results.
    """

    row: jax.Array
    head: jax.Array
    strip: jax.Array
    group: jax.Array
    slots: int
    tiles: Sequence[Any]
    filled: Any
    freed: Any
    puts: Any

    @property
    def values(self):
        """Return where this warpgroup's columns stand among all values."""
        return pl.ds(self.strip * BLOCK_VALUES + self.group * GROUP_VALUES, GROUP_VALUES)

    def take(self, n) -> list:
        """Return the tiles of the n-th chunk, once they are there."""
        slot = lax.rem(n, self.slots)
        plgpu.barrier_wait(self.filled.at[slot])
        return [tile.at[slot] for tile in self.tiles]

    def free(self, n) -> None:
        """Say that this warpgroup needs those tiles no more."""
        plgpu.barrier_arrive(self.freed.at[lax.rem(n, self.slots)])

    def mine(self, tile):
        """Return this warpgroup's columns of a tile of values."""
        return tile.at[:, pl.ds(self.group * GROUP_VALUES, GROUP_VALUES)]

    @staticmethod
    def tokens(n):
        """Return where the tokens of the n-th chunk of a sequence stand."""
        return pl.ds(n * CHUNK_TOKENS, CHUNK_TOKENS)

    def puts_of(self, n, count: int):
        """Return the function that writes tiles of registers through shared memory, called `count` times in a step."""
        turns = iter(range(count))

        def put(x, target, *, transposed: bool = False) -> None:
            tile = self.puts.at[self.group, lax.rem(n * count + next(turns), PUT_SLOTS)]
            plgpu.wait_smem_to_gmem(PUT_SLOTS - 1, wait_read_only=True)
            mosaic.save(tile.T if transposed else tile, x)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(tile, target)

        return put


def forward(q, k, v, p, t, since, written, state, *, scale: float, with_starts: bool) -> list[jax.Array]:
    """Return o like v and the state after the last token; with starts also E like v, and S^T before every chunk.

    Args:
      q, k: (B, T, H, K), K a multiple of 64 up to 256, T one of 64.
      v: (B, T, H, V), V a multiple of `BLOCK_VALUES`.
      p, t: P and T of every chunk, (B, T, H, 64), rows where their tokens are.
      since, written: exp(c) and exp(c_C - c) beta, (B, H, T) fp32.
      state: (B, H, V, K) fp32, transposed as what is returned.
    """
    batch, time, heads, keys = k.shape
    chunks = time // CHUNK_TOKENS

    def compute(walk: Walk, state_ref, o_ref, last_ref, *kept_refs):
        mine = walk.row, walk.head, walk.values

        def step(n, S):
            q_tile, k_tile, p_tile, t_tile, v_tile, since_tile, written_tile = walk.take(n)
            tokens, put = walk.tokens(n), walk.puts_of(n, keys // PART_KEYS + 2 if with_starts else 1)
            since = numbers_of(since_tile)
            before = rounded_parts(S, k.dtype)

            def read(seen, asked):
                for part, x in before:
                    mosaic.multiply(seen, x, k_tile.at[:, part].T)
                    mosaic.multiply(asked, x, q_tile.at[:, part].T)
                    if with_starts:
                        put(x, kept_refs[1].at[walk.row, walk.head, n, walk.values, part])
                return mosaic.load(walk.mine(v_tile).T).astype(jnp.float32), seen[...], asked[...]

            values, seen, asked = mosaic.products(read, PAIRS_SHAPE, PAIRS_SHAPE)
            right = (values - since * seen).astype(k.dtype)

            def solve(errors):
                mosaic.multiply(errors, right, t_tile.T)
                return scale * since * asked, S * since_tile[CHUNK_TOKENS - 1], errors[...]

            asked, kept, errors = mosaic.products(solve, PAIRS_SHAPE)
            rounded, left = errors.astype(k.dtype), (errors * numbers_of(written_tile)).astype(k.dtype)

            def add(sums):
                mosaic.multiply(sums[0], rounded, p_tile.T)
                mosaic.multiply(sums[1], left, k_tile)
                if with_starts:
                    put(rounded, kept_refs[0].at[walk.row, tokens, walk.head, walk.values], transposed=True)

            o, S = mosaic.accumulate(add, (asked, kept))
            walk.free(n)
            put(o, o_ref.at[walk.row, tokens, walk.head, walk.values], transposed=True)
            return S

        initial = mosaic.load_global(state_ref.at[*mine], mosaic.WGMMA)
        last_ref.at[*mine][...] = lax.fori_loop(0, chunks, step, initial)
        plgpu.wait_smem_to_gmem(0)

    results = [mosaic.like(v), mosaic.like(state)]
    if with_starts:
        results += [mosaic.like(v), jax.ShapeDtypeStruct((batch, heads, chunks, v.shape[3], keys), v.dtype)]
    return walk_over_chunks(compute, "delta_rule_forward", [q, k, p, t], [v], [since, written], [state], results)


def reverse(q, k, do, p, t, since, written, dlast, *, scale: float) -> list[jax.Array]:
    """Return dv like do, the transposed gradients of the states after every chunk, and of that before the first.

    Args:
      do: (B, T, H, V).
      dlast: (B, H, V, K) fp32, of the state after the last token, transposed.
      q, k, p, t, since, written: as of `forward`.
    """
    batch, time, heads, keys = k.shape
    chunks = time // CHUNK_TOKENS

    def compute(walk: Walk, dlast_ref, dv_ref, ends_ref, dstate_ref):
        mine = walk.row, walk.head, walk.values

        def step(back, dS):
            n = chunks - 1 - back
            q_tile, k_tile, p_tile, t_tile, do_tile, since_tile, written_tile = walk.take(back)
            put, since = walk.puts_of(back, keys // PART_KEYS + 1), numbers_of(since_tile)
            after = rounded_parts(dS, k.dtype)

            def read(later):
                for part, x in after:
                    mosaic.multiply(later, x, k_tile.at[:, part].T)
                    put(x, ends_ref.at[walk.row, walk.head, n, walk.values, part])
                return mosaic.load(walk.mine(do_tile).T), later[...]

            do, later = mosaic.products(read, PAIRS_SHAPE)
            errors = mosaic.multiply_add(later * numbers_of(written_tile), do, p_tile).astype(k.dtype)

            def solve(dv):
                mosaic.multiply(dv, errors, t_tile)
                do = mosaic.load(walk.mine(do_tile).T).astype(jnp.float32)
                return (do * (scale * since)).astype(k.dtype), dS * since_tile[CHUNK_TOKENS - 1], dv[...]

            asked, kept, dv = mosaic.products(solve, PAIRS_SHAPE)
            seen = (-since * dv).astype(k.dtype)

            def add(sums):
                mosaic.multiply(sums[0], asked, q_tile)
                mosaic.multiply(sums[0], seen, k_tile)
                put(dv, dv_ref.at[walk.row, walk.tokens(n), walk.head, walk.values], transposed=True)

            [dS] = mosaic.accumulate(add, (kept,))
            walk.free(back)
            return dS

        initial = mosaic.load_global(dlast_ref.at[*mine], mosaic.WGMMA)
        dstate_ref.at[*mine][...] = lax.fori_loop(0, chunks, step, initial)
        plgpu.wait_smem_to_gmem(0)

    ends = jax.ShapeDtypeStruct((batch, heads, chunks, do.shape[3], keys), do.dtype)
    results = [mosaic.like(do), ends, mosaic.like(dlast)]
    return walk_over_chunks(
        compute, "delta_rule_reverse", [q, k, p, t], [do], [since, written], [dlast], results, back=True
    )


def walk_over_chunks(
    compute, name: str, shared, own, numbers, whole, results, *, back: bool = False
) -> list[jax.Array]:
    """Return the results of `compute(walk, *refs)` of each warpgroup that computes; refs of `whole` and results.

    Args:
      shared, own, numbers: what is fetched by chunks, (B, T, H, .), of the last dimension all; (B, T, H, V), of values
        the block's; (B, H, .), as many of a chunk as of another.
      back: whether the last chunks come first.
    """
    (batch, time, heads, values), streamed = own[0].shape, [*shared, *own, *numbers]
    strips, chunks = values // BLOCK_VALUES, time // CHUNK_TOKENS
    widths = [*(x.shape[3] for x in shared), *(BLOCK_VALUES for _ in own)]
    counts = [x.shape[2] // chunks for x in numbers]
    slots = _slots(sum(widths))

    def body(*refs):
        sources, others = refs[: len(streamed)], refs[len(streamed) : len(streamed) + len(whole) + len(results)]
        *tiles, puts, filled, freed, finished = refs[len(streamed) + len(others) :]
        group, block = lax.axis_index("warpgroup"), lax.axis_index("block")
        strip, sequence = lax.rem(block, strips), lax.div(block, strips)
        row, head = lax.div(sequence, heads), lax.rem(sequence, heads)

        def fetch(n):
            slot, chunk = lax.rem(n, slots), chunks - 1 - n if back else n
            tokens, columns = (pl.ds(i * size, size) for i, size in ((chunk, CHUNK_TOKENS), (strip, BLOCK_VALUES)))
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

        @pl.when(group == GROUPS)
        def fill():
            plgpu.set_max_registers(FETCHER_REGISTERS, action="decrease")

            def step(n, _):
                pl.when(n >= slots)(lambda: plgpu.barrier_wait(freed.at[lax.rem(n, slots)]))
                pl.when(n < chunks)(lambda: fetch(n))

            lax.fori_loop(0, chunks + slots, step, None)

        @pl.when(group < GROUPS)
        def use():
            plgpu.set_max_registers(REGISTERS, action="increase")
            compute(Walk(row, head, strip, group, slots, tiles, filled, freed, puts), *others)

        plgpu.barrier_arrive(finished)
        plgpu.barrier_wait(finished)

    return plgpu.kernel(
        body,
        out_type=results,
        scratch_types=[
            *(mosaic.swizzled((slots, CHUNK_TOKENS, width), mosaic.WIDE_SWIZZLE) for width in widths),
            *(plgpu.SMEM((slots, count), jnp.float32) for count in counts),
            mosaic.swizzled((GROUPS, PUT_SLOTS, *PAIRS_SHAPE), mosaic.WIDE_SWIZZLE),
            plgpu.Barrier(num_arrivals=len(streamed), num_barriers=slots),
            plgpu.Barrier(num_arrivals=GROUPS, num_barriers=slots),
            plgpu.Barrier(num_arrivals=GROUPS + 1),
        ],
        grid=(batch * heads * strips,),
        grid_names=("block",),
        num_threads=GROUPS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        kernel_name=name,
    )(*streamed, *whole)


def _slots(width: int) -> int:
    """Return how many chunks of so many 16-bit columns are in flight beside what is put."""
    puts = GROUPS * PUT_SLOTS * CHUNK_TOKENS * CHUNK_TOKENS * 2
    return min(MAX_SLOTS, (SHARED_MEMORY_BYTES - puts) // (width * CHUNK_TOKENS * 2))


def rounded_parts(S, dtype):
    """Return where the parts of the channels of a state in registers stand, and each of them in that dtype.

    All are rounded before one is used, so that no product waits; of wide states, when they are: else registers lack.
    """
    parts = ((pl.ds(i, PART_KEYS), S[:, i : i + PART_KEYS].astype(dtype)) for i in range(0, S.shape[1], PART_KEYS))
    return list(parts) if S.shape[1] <= 2 * PART_KEYS else parts


def numbers_of(tile) -> jax.Array:
    """Return the number of each token of a chunk, down the columns of what is transposed."""
    return mosaic.down(plgpu.load(tile, layout=mosaic.COLUMN_LAYOUT), PAIRS_SHAPE)
