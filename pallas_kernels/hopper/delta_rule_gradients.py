"""The gradients of the delta rule on Hopper that no walk makes, of all chunks at once.

In the notation of `delta_rule.py`, with G = dO E^T, N = -dV E^T and W_ts = w_ts beta_s, a chunk's pairs get

    dA = scale G W, s <= t (of q_t . k_s)              dB = N W, s < t (of k_t . k_s)
    dQ = scale diag(exp c) dO S^T + dA K               R = dB K - diag(exp c) dV S^T
    X = diag(exp(c_C - c) beta) E dS'^T                dK = R + X + dA^T Q + dB^T K
    dc = q . dQ + k . R - k . (dK - R), and at the last token sum k . X + exp(c_C) (S . dS')
    dbeta = k . diag(exp(c_C - c)) E dS'^T + sum_t w (scale G (q_t . k_s) + N (k_t . k_s))

A block has `PART_KEYS` channels of keys, half of them in each of two warpgroups, and goes through the values
`STEP_VALUES` at a time; the third warpgroup fetches, a step ahead. The first makes G, the second N, both transposed: a
row for each token whose errors they are of.
"""

import itertools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import inverses, mosaic
from pallas_kernels.hopper.delta_rule import FETCHER_REGISTERS, GROUPS, REGISTERS
from pallas_kernels.hopper.delta_rule_pairs import HIDDEN_EXPONENT
from pallas_kernels.hopper.mosaic import CHUNK_TOKENS, PAIRS_SHAPE

GROUP_KEYS = 64
PART_KEYS = GROUPS * GROUP_KEYS
"""Channels of keys of a warpgroup, and of a block."""
STEP_VALUES = 64
SLOTS = 3
"""Steps in flight."""


def gradients(q, k, errors, do, dv, c, beta, starts, ends, *, scale: float, blocks: int) -> list[jax.Array]:
    """Return dq and dk, and by halves of the parts of keys (B, T, H, parts) fp32: dbeta, dc, and what c_C gets.

    Args:
      q, k: (B, T, H, K), K a multiple of `PART_KEYS`, T one of 64.
      errors, do, dv: (B, T, H, V), V a multiple of 64.
      c, beta: (B, H, T) fp32, as of `delta_rule_pairs.pairs`.
      starts, ends: (B, H, chunks, V, K), as of `forward` and `reverse`.
      blocks: that run at the same time.
    """
    (batch, time, heads, values), keys = errors.shape, k.shape[3]
    chunks, parts, steps = time // CHUNK_TOKENS, keys // PART_KEYS, values // STEP_VALUES
    tasks = batch * chunks * heads * parts
    blocks = min(blocks, tasks)

    def body(*refs):
        q_ref, k_ref, errors_ref, do_ref, dv_ref, c_ref, beta_ref, starts_ref, ends_ref, *others = refs
        dq_ref, dk_ref, dbeta_ref, dc_ref, whole_ref, *scratch = others
        key_tiles, c_tile, later_tile, beta_tile, error_tiles, read_tiles, start_tiles, end_tiles, *last = scratch
        pair_tiles, given, returned, filled, freed, met, finished = last
        group, block = lax.axis_index("warpgroup"), lax.axis_index("block")
        count = lax.div(tasks - 1 - block, blocks) + 1

        def place(n):
            """Return the row, the chunk, the head and the part of the block's n-th task."""
            task = block + n * blocks
            part, chunk = lax.rem(task, parts), lax.div(task, parts)
            return lax.div(chunk, heads * chunks), lax.rem(lax.div(chunk, heads), chunks), lax.rem(chunk, heads), part

        def columns(part, width):
            return pl.ds(part * width, width)

        @pl.when(group == GROUPS)
        def fetch():
            plgpu.set_max_registers(FETCHER_REGISTERS, action="decrease")

            def await_freed(turn):
                pl.when(turn >= 0)(lambda: plgpu.barrier_wait(freed.at[lax.rem(turn, SLOTS)]))

            def fetch_step(n, i):
                row, chunk, head, part = place(n)
                tokens, some = columns(chunk, CHUNK_TOKENS), columns(i, STEP_VALUES)
                turn = n * steps + i
                slot = lax.rem(turn, SLOTS)
                await_freed(turn - SLOTS)
                for source, tile in (
                    (errors_ref, error_tiles.at[slot]),
                    (do_ref, read_tiles.at[slot, 0]),
                    (dv_ref, read_tiles.at[slot, 1]),
                ):
                    plgpu.copy_gmem_to_smem(source.at[row, tokens, head, some], tile, filled.at[slot])
                for g in range(GROUPS):
                    of_state = row, head, chunk, some, columns(part * GROUPS + g, GROUP_KEYS)
                    for source, tiles in ((starts_ref, start_tiles), (ends_ref, end_tiles)):
                        plgpu.copy_gmem_to_smem(source.at[of_state], tiles.at[slot, g], filled.at[slot])

            def fetch_task(n):
                row, chunk, head, part = place(n)
                tokens = columns(chunk, CHUNK_TOKENS)
                for i, g in itertools.product(range(2), range(GROUPS)):
                    some = (q_ref, k_ref)[i].at[row, tokens, head, columns(part * GROUPS + g, GROUP_KEYS)]
                    plgpu.copy_gmem_to_smem(some, key_tiles.at[i, g], given)
                for source, tile in ((c_ref, c_tile), (c_ref, later_tile), (beta_ref, beta_tile)):
                    plgpu.copy_gmem_to_smem(source.at[row, head, tokens], tile, given)
                lax.fori_loop(0, steps, lambda i, _: fetch_step(n, i), None)

            def step(n, _):
                pl.when(n > 0)(lambda: plgpu.barrier_wait(returned))
                pl.when(n < count)(lambda: fetch_task(n))

            lax.fori_loop(0, count + 1, step, None)
            for back in range(SLOTS, 0, -1):
                await_freed(count * steps - back)

        @pl.when(group < GROUPS)
        def compute():
            plgpu.set_max_registers(REGISTERS, action="increase")
            zeros = mosaic.zeros(PAIRS_SHAPE)

            def add_step(turn, carry):
                *sums, kept = carry
                slot = lax.rem(turn, SLOTS)
                plgpu.barrier_wait(filled.at[slot])
                errors, start, end = error_tiles.at[slot], start_tiles.at[slot, group], end_tiles.at[slot, group]

                def multiply(sums, kept):
                    dq, asked, dk, pairs = sums
                    mosaic.multiply(pairs, errors, read_tiles.at[slot, group].T)
                    mosaic.multiply(dq, read_tiles.at[slot, 0], start)
                    mosaic.multiply(asked, read_tiles.at[slot, 1], start)
                    mosaic.multiply(dk, errors, end)
                    both = (mosaic.load(x).astype(jnp.float32) for x in (start, end))
                    return [kept + (next(both) * next(both)).sum(axis=1)]

                *sums, kept = mosaic.accumulate(multiply, tuple(sums), (kept,))
                plgpu.barrier_arrive(freed.at[slot])
                return *sums, kept

            def task(n, _):
                row, chunk, head, part = place(n)
                begin = (zeros, zeros, zeros, zeros, _rows(0.0))
                dq, asked, dk, pairs, kept = lax.fori_loop(0, steps, lambda i, x: add_step(n * steps + i, x), begin)
                plgpu.barrier_wait(given)
                queries, own_keys = key_tiles.at[0, group], key_tiles.at[1, group]
                c, beta = (plgpu.load(tile, layout=mosaic.ROW_LAYOUT) for tile in (c_tile, beta_tile))
                later = mosaic.down(plgpu.load(later_tile, layout=mosaic.COLUMN_LAYOUT), PAIRS_SHAPE)

                def score(scores):
                    for g in range(GROUPS):
                        mosaic.multiply(scores, key_tiles.at[1, g], key_tiles.at[group, g].T)
                    s, t = inverses.places()
                    passed = jnp.where(t - s >= group, later - mosaic.across(c, PAIRS_SHAPE), HIDDEN_EXPONENT)
                    return pairs * jnp.exp(passed) * jnp.where(group == 0, scale, -1.0), scores[...]

                pairs, scores = mosaic.products(score, PAIRS_SHAPE)
                dbeta = (pairs * scores).sum(axis=1)
                mosaic.save(pair_tiles.at[group], pairs * mosaic.across(beta, PAIRS_SHAPE))
                plgpu.commit_smem()
                plgpu.barrier_arrive(met)
                since, until = jnp.exp(c), jnp.exp(c_tile[CHUNK_TOKENS - 1] - c)
                dk = dk * mosaic.across(until, PAIRS_SHAPE)
                dbeta = dbeta + _along(dk, own_keys)
                dk = dk * mosaic.across(beta, PAIRS_SHAPE)
                whole = _along(dk, own_keys) + kept * jnp.exp(c_tile[CHUNK_TOKENS - 1])
                since = mosaic.across(since, PAIRS_SHAPE)
                plgpu.barrier_wait(met)

                def multiply(sums):
                    dq, asked, dk = sums
                    queries, own_keys = (key_tiles.at[i, group] for i in range(2))  # not from outside: Mosaic fails
                    mosaic.multiply(dq, pair_tiles.at[0].T, own_keys)
                    mosaic.multiply(asked, pair_tiles.at[1].T, own_keys)
                    mosaic.multiply(dk, pair_tiles.at[0], queries)
                    mosaic.multiply(dk, pair_tiles.at[1], own_keys)

                dq, asked, dk = mosaic.accumulate(multiply, (scale * since * dq, -since * asked, dk))
                dc = _along(dq, queries) + _along(asked - dk, own_keys)
                tokens, channels = columns(chunk, CHUNK_TOKENS), columns(part * GROUPS + group, GROUP_KEYS)
                for ref, x in ((dbeta_ref, dbeta), (dc_ref, dc), (whole_ref, whole)):
                    ref.at[row, head, part * GROUPS + group, tokens][...] = x
                plgpu.commit_smem()  # all have read what is overwritten
                mosaic.save(queries, dq)
                mosaic.save(own_keys, asked + dk)
                plgpu.commit_smem()
                for ref, tile in ((dq_ref, queries), (dk_ref, own_keys)):
                    plgpu.copy_smem_to_gmem(tile, ref.at[row, tokens, head, channels])
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                plgpu.barrier_arrive(returned)

            lax.fori_loop(0, count, task, None)
            plgpu.wait_smem_to_gmem(0)

        plgpu.barrier_arrive(finished)
        plgpu.barrier_wait(finished)

    sums = jax.ShapeDtypeStruct((batch, heads, parts * GROUPS, time), jnp.float32)
    return plgpu.kernel(
        body,
        out_type=[mosaic.like(q), mosaic.like(k), sums, sums, sums],
        scratch_types=[
            mosaic.swizzled((2, GROUPS, CHUNK_TOKENS, GROUP_KEYS), mosaic.WIDE_SWIZZLE),
            *(plgpu.SMEM((CHUNK_TOKENS,), jnp.float32) for _ in range(3)),  # a load has one layout
            mosaic.swizzled((SLOTS, CHUNK_TOKENS, STEP_VALUES), mosaic.WIDE_SWIZZLE),
            mosaic.swizzled((SLOTS, 2, CHUNK_TOKENS, STEP_VALUES), mosaic.WIDE_SWIZZLE),
            *(mosaic.swizzled((SLOTS, GROUPS, STEP_VALUES, GROUP_KEYS), mosaic.WIDE_SWIZZLE) for _ in range(2)),
            mosaic.swizzled((2, *PAIRS_SHAPE), mosaic.WIDE_SWIZZLE),
            plgpu.Barrier(num_arrivals=2 * GROUPS + 3),
            plgpu.Barrier(num_arrivals=GROUPS),
            plgpu.Barrier(num_arrivals=3 + 2 * GROUPS, num_barriers=SLOTS),
            plgpu.Barrier(num_arrivals=GROUPS, num_barriers=SLOTS),
            plgpu.Barrier(num_arrivals=GROUPS),
            plgpu.Barrier(num_arrivals=GROUPS + 1),
        ],
        grid=(blocks,),
        grid_names=("block",),
        num_threads=GROUPS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        kernel_name="delta_rule_gradients",
    )(q, k, errors, do, dv, c, beta, starts, ends)


def _rows(value: float) -> jax.Array:
    return plgpu.layout_cast(jnp.full((CHUNK_TOKENS,), value, jnp.float32), mosaic.ROW_LAYOUT)


def _along(x: jax.Array, tile) -> jax.Array:
    """Return each token's product of a gradient with what it is of."""
    return (x * mosaic.load(tile).astype(jnp.float32)).sum(axis=1)
