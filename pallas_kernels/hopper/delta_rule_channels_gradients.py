"""The gradients of the delta rule with a decay for each channel that no walk makes, of all chunks at once, on Hopper.

In the notation of `delta_rule_channels.py`, with a = scale dO E^T, s <= t, and b = -dV E^T, s < t, and with the weights
e of `channel_decays.py`, whose exponents are products M g, a chunk's tokens get

    since the chunk's beginning   dQ_t = scale e_t dO_t S^T       R_t = -e_t dV_t S^T        of what t reads
    until its end                 W_s = e_s E_s dS'^T                                        of what s writes, by beta
    at every level                dQ_t += e_t sum_s a_ts beta_s k_s e_s      R_t += e_t sum_s b_ts beta_s k_s e_s
                                  W_s += e_s sum_t (a_ts q_t + b_ts k_t) e_t
    of the same token             dQ_t += a_tt beta_t k_t         W_t += a_tt q_t

and dk = R + beta W, dbeta = k . W. Each weight's share of q dQ + k R + beta k W is the gradient of its exponents, and
M^T of it that of g: no gradient is a difference of larger ones. What is kept of S gives g of the whole chunk
exp(c_C) sum_v S dS'.

A block has `PART_KEYS` channels of keys, half of them in each of two warpgroups, and goes through the values
`STEP_VALUES` at a time; the third warpgroup fetches, a step ahead. The first makes a, the second b, both transposed.
"""

import itertools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import channel_decays, mosaic
from pallas_kernels.hopper.channel_decays import LEVELS, SINCE, UNTIL
from pallas_kernels.hopper.delta_rule import FETCHER_REGISTERS, GROUPS, REGISTERS
from pallas_kernels.hopper.mosaic import CHUNK_TOKENS, PAIRS_SHAPE

GROUP_KEYS = 64
PART_KEYS = GROUPS * GROUP_KEYS
"""Channels of keys of a warpgroup, and of a block."""
STEP_VALUES = 64
SLOTS = 2
"""Steps in flight."""
REDUCTION_SCRATCH_BYTES = 1024
"""No sum here goes over several warps, and shared memory is full."""


def gradients(q, k, high, low, errors, do, dv, beta, starts, ends, *, scale: float, blocks: int) -> list[jax.Array]:
    """Return dq and dk, dg like k in fp32, and dbeta by halves of the parts of keys, (B, H, halves, T) fp32.

    Args:
      q, k, high, low: (B, T, H, K), K a multiple of `PART_KEYS`, T one of 64, as of `delta_rule_channels_pairs.pairs`.
      errors, do, dv: (B, T, H, V), V a multiple of 64.
      beta: (B, H, T) fp32.
      starts, ends: (B, H, chunks, V, K), as of `forward` and `reverse`.
      blocks: that run at the same time.
    """
    (batch, time, heads, values), keys = errors.shape, k.shape[3]
    chunks, parts, steps = time // CHUNK_TOKENS, keys // PART_KEYS, values // STEP_VALUES
    tasks = batch * chunks * heads * parts
    blocks = min(blocks, tasks)

    def body(*refs):
        q_ref, k_ref, high_ref, low_ref, errors_ref, do_ref, dv_ref, beta_ref, starts_ref, ends_ref, *others = refs
        dq_ref, dk_ref, dg_ref, dbeta_ref, *scratch = others
        key_tiles, error_tiles, read_tiles, start_tiles, end_tiles, pair_tiles, x_tiles, y_tiles, beta_tile, *last = (
            scratch
        )
        given, returned, filled, freed, met, finished = last
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

            def fetch_keys(n):
                row, chunk, head, part = place(n)
                tokens = columns(chunk, CHUNK_TOKENS)
                for (i, source), g in itertools.product(enumerate((q_ref, k_ref, high_ref, low_ref)), range(GROUPS)):
                    some = source.at[row, tokens, head, columns(part * GROUPS + g, GROUP_KEYS)]
                    plgpu.copy_gmem_to_smem(some, key_tiles.at[i, g], given)
                plgpu.copy_gmem_to_smem(beta_ref.at[row, head, tokens], beta_tile, given)

            def fetch_steps(n, begin, end):
                lax.fori_loop(begin, end, lambda i, _: fetch_step(n, i), None)

            def step(n, _):
                first = min(SLOTS, steps)  # whose slots are free before the task before is done
                pl.when(n < count)(lambda: fetch_steps(n, 0, first))
                pl.when(n > 0)(lambda: plgpu.barrier_wait(returned))
                pl.when(n < count)(lambda: fetch_keys(n))
                pl.when(n < count)(lambda: fetch_steps(n, first, steps))

            lax.fori_loop(0, count + 1, step, None)
            for back in range(SLOTS, 0, -1):
                await_freed(count * steps - back)

        @pl.when(group < GROUPS)
        def compute():
            plgpu.set_max_registers(REGISTERS, action="increase")
            zeros = mosaic.zeros(PAIRS_SHAPE)
            q_tile, k_tile, high_tile, low_tile = (key_tiles.at[i, group] for i in range(4))
            x_tile, y_tile = x_tiles.at[group], y_tiles.at[group]

            def add_step(turn, carry):
                slot = lax.rem(turn, SLOTS)
                plgpu.barrier_wait(filled.at[slot])
                error, start, end = error_tiles.at[slot], start_tiles.at[slot, group], end_tiles.at[slot, group]

                def multiply(sums, kept):
                    asked, seen, written, pairs = sums
                    mosaic.multiply(pairs, error, read_tiles.at[slot, group].T)
                    mosaic.multiply(asked, read_tiles.at[slot, 0], start)
                    mosaic.multiply(seen, read_tiles.at[slot, 1], start)
                    mosaic.multiply(written, error, end)
                    return [kept + _wide(start) * _wide(end)]

                carry = mosaic.accumulate(multiply, tuple(carry[:4]), (carry[4],))
                plgpu.barrier_arrive(freed.at[slot])
                return carry

            def decays(M):
                return channel_decays.weights(M, (high_tile, low_tile))

            def add_decays(dg, M, y):
                """Return dg + M^T y, given M^T."""
                plgpu.commit_smem()  # all have read what is overwritten
                mosaic.save(y_tile, y)
                plgpu.commit_smem()
                return mosaic.multiply_add(dg, M, y_tile)

            def since_beginning(asked, seen):
                rows, columns = channel_decays.numbers()
                weight = decays(channel_decays.between(rows, columns, jnp.int32(SINCE)))
                dq, dk = scale * weight * asked, -weight * seen
                rows, columns = channel_decays.numbers()
                M = channel_decays.between_transposed(rows, columns, jnp.int32(SINCE))
                return dq, dk, add_decays(zeros, M, _wide(q_tile) * dq + _wide(k_tile) * dk)

            def until_end(written, dk, dg, beta):
                rows, columns = channel_decays.numbers()
                written = written * decays(channel_decays.between(rows, columns, jnp.int32(UNTIL)))
                dbeta = (_wide(k_tile) * written).sum(axis=1)
                written = written * mosaic.across(beta, PAIRS_SHAPE)
                rows, columns = channel_decays.numbers()
                M = channel_decays.between_transposed(rows, columns, jnp.int32(UNTIL))
                return dk + written, add_decays(dg, M, _wide(k_tile) * written), dbeta

            def over_chunk(kept, dg):
                ones = channel_decays.all_ones()
                return add_decays(dg, ones, kept * decays(channel_decays.all_ones()))

            def add_level(level, carry):
                dq, dk, dg, dbeta = carry
                rows, columns = channel_decays.numbers()
                weight = decays(channel_decays.between(rows, columns, channel_decays.border(rows, level)))
                second = channel_decays.is_second(rows, level)
                own = jnp.where(second, 1.0, plgpu.load(beta_tile, layout=mosaic.ROW_LAYOUT))
                plgpu.commit_smem()  # all have read what is overwritten
                mosaic.save(x_tile, _wide(k_tile) * weight * mosaic.across(own, PAIRS_SHAPE))
                mosaic.save(y_tile, _wide(q_tile) * weight)
                plgpu.commit_smem()
                met = channel_decays.meet(rows, columns, level)

                def multiply(asked, others):
                    own_pairs, own_pairs_back, both = (
                        met * pairs
                        for pairs in (
                            mosaic.load(pair_tiles.at[0].T),
                            mosaic.load(pair_tiles.at[0]),
                            mosaic.load(pair_tiles.at[1]) + mosaic.load(pair_tiles.at[1].T),
                        )
                    )
                    mosaic.multiply(asked, own_pairs, x_tile)
                    mosaic.multiply(others, both, x_tile)
                    mosaic.multiply(others, own_pairs_back, y_tile)
                    return asked[...], others[...]

                asked, others = (weight * x for x in mosaic.products(multiply, PAIRS_SHAPE, PAIRS_SHAPE))
                of_rates = (_wide(k_tile) * others).sum(axis=1)
                others = others * mosaic.across(own, PAIRS_SHAPE)
                rows, columns = channel_decays.numbers()
                M = channel_decays.between_transposed(rows, columns, channel_decays.border(columns, level))
                dg = add_decays(dg, M, _wide(q_tile) * asked + _wide(k_tile) * others)
                second = channel_decays.is_second(rows, level)
                return dq + asked, dk + others, dg, dbeta + jnp.where(second, 0.0, of_rates)

            def same_token(dq, dk, dbeta, beta):
                rows, columns = channel_decays.numbers()
                same = mosaic.across(rows, PAIRS_SHAPE) == mosaic.down(columns, PAIRS_SHAPE)
                own = jnp.where(same, _wide(pair_tiles.at[0]), 0.0).sum(axis=1)
                q, k = _wide(q_tile), _wide(k_tile)
                dbeta, own = dbeta + own * (q * k).sum(axis=1), mosaic.across(own * beta, PAIRS_SHAPE)
                return dq + own * k, dk + own * q, dbeta

            def task(n, _):
                row, chunk, head, part = place(n)
                begin = (zeros,) * 5
                asked, seen, written, pairs, kept = lax.fori_loop(
                    0, steps, lambda i, x: add_step(n * steps + i, x), begin
                )
                plgpu.barrier_wait(given)
                rows, columns_ = channel_decays.numbers()
                pl.when(n > 0)(lambda: plgpu.barrier_wait(returned))  # the other warpgroup reads these no more
                later = mosaic.down(columns_, PAIRS_SHAPE) - mosaic.across(rows, PAIRS_SHAPE) >= group
                mosaic.save(pair_tiles.at[group], jnp.where(later, pairs * jnp.where(group == 0, scale, -1.0), 0.0))
                plgpu.commit_smem()
                plgpu.barrier_arrive(met)
                beta = plgpu.load(beta_tile, layout=mosaic.ROW_LAYOUT)
                dq, dk, dg = since_beginning(asked, seen)
                dk, dg, dbeta = until_end(written, dk, dg, beta)
                dg = over_chunk(kept, dg)
                plgpu.barrier_wait(met)
                dq, dk, dg, dbeta = lax.fori_loop(0, LEVELS, add_level, (dq, dk, dg, dbeta))
                dq, dk, dbeta = same_token(dq, dk, dbeta, plgpu.load(beta_tile, layout=mosaic.ROW_LAYOUT))
                tokens, channels = columns(chunk, CHUNK_TOKENS), columns(part * GROUPS + group, GROUP_KEYS)
                dbeta_ref.at[row, head, part * GROUPS + group, tokens][...] = dbeta
                dg_ref.at[row, tokens, head, channels][...] = dg
                plgpu.commit_smem()  # all have read what is overwritten
                mosaic.save(x_tile, dq)
                mosaic.save(y_tile, dk)
                plgpu.commit_smem()
                for ref, tile in ((dq_ref, x_tile), (dk_ref, y_tile)):
                    plgpu.copy_smem_to_gmem(tile, ref.at[row, tokens, head, channels])
                plgpu.barrier_arrive(returned)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)

            lax.fori_loop(0, count, task, None)
            plgpu.barrier_wait(returned)  # a barrier is to be waited for as often as it is passed
            plgpu.wait_smem_to_gmem(0)

        plgpu.barrier_arrive(finished)
        plgpu.barrier_wait(finished)

    sums = jax.ShapeDtypeStruct((batch, heads, parts * GROUPS, time), jnp.float32)
    return plgpu.kernel(
        body,
        out_type=[mosaic.like(q), mosaic.like(k), jax.ShapeDtypeStruct(k.shape, jnp.float32), sums],
        scratch_types=[
            mosaic.swizzled((4, GROUPS, CHUNK_TOKENS, GROUP_KEYS), mosaic.WIDE_SWIZZLE),
            mosaic.swizzled((SLOTS, CHUNK_TOKENS, STEP_VALUES), mosaic.WIDE_SWIZZLE),
            mosaic.swizzled((SLOTS, 2, CHUNK_TOKENS, STEP_VALUES), mosaic.WIDE_SWIZZLE),
            *(mosaic.swizzled((SLOTS, GROUPS, STEP_VALUES, GROUP_KEYS), mosaic.WIDE_SWIZZLE) for _ in range(2)),
            mosaic.swizzled((2, *PAIRS_SHAPE), mosaic.WIDE_SWIZZLE),
            *(mosaic.swizzled((GROUPS, *PAIRS_SHAPE), mosaic.WIDE_SWIZZLE) for _ in range(2)),
            plgpu.SMEM((CHUNK_TOKENS,), jnp.float32),
            plgpu.Barrier(num_arrivals=4 * GROUPS + 1),
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
        compiler_params=plgpu.CompilerParams(
            approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=REDUCTION_SCRATCH_BYTES
        ),
        kernel_name="delta_rule_channels_gradients",
    )(q, k, high, low, errors, do, dv, beta, starts, ends)


def _wide(tile) -> jax.Array:
    return mosaic.load(tile).astype(jnp.float32)
