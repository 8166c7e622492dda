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

How a block goes through the values is said in `chunk_tasks.py`. The first warpgroup makes a, the second b, both
transposed.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import channel_decays, mosaic
from pallas_kernels.hopper.channel_decays import LEVELS, SINCE, UNTIL
from pallas_kernels.hopper.chunk_tasks import GROUP_KEYS, Inputs, Tasks, each_task, part_of, wide
from pallas_kernels.hopper.delta_rule_walk import GROUPS
from pallas_kernels.hopper.mosaic import CHUNK_TOKENS, PAIRS_SHAPE

PART_KEYS = GROUPS * GROUP_KEYS
"""Channels of keys of a block."""
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
    batch, time, heads, keys = k.shape

    def task(tasks: Tasks, n, scratch, refs):
        dq_ref, dk_ref, dg_ref, dbeta_ref = refs
        group, [beta_tile], (error_tiles, read_tiles) = tasks.group, tasks.numbers, tasks.values
        pair_tiles, x_tiles, y_tiles = scratch
        q_tile, k_tile, high_tile, low_tile = (tasks.keys.at[i, group] for i in range(4))
        x_tile, y_tile = x_tiles.at[group], y_tiles.at[group]

        def add_step(slot, carry):
            error, (start, end) = error_tiles.at[slot], (tiles.at[slot, group] for tiles in tasks.states)

            def multiply(sums, kept):
                asked, seen, written, pairs = sums
                mosaic.multiply(pairs, error, read_tiles.at[slot, group].T)
                mosaic.multiply(asked, read_tiles.at[slot, 0], start)
                mosaic.multiply(seen, read_tiles.at[slot, 1], start)
                mosaic.multiply(written, error, end)
                return [kept + wide(start) * wide(end)]

            return mosaic.accumulate(multiply, tuple(carry[:4]), (carry[4],))

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
            return dq, dk, add_decays(tasks.zeros, M, wide(q_tile) * dq + wide(k_tile) * dk)

        def until_end(written, dk, dg, beta):
            rows, columns = channel_decays.numbers()
            written = written * decays(channel_decays.between(rows, columns, jnp.int32(UNTIL)))
            dbeta = (wide(k_tile) * written).sum(axis=1)
            written = written * mosaic.across(beta, PAIRS_SHAPE)
            rows, columns = channel_decays.numbers()
            M = channel_decays.between_transposed(rows, columns, jnp.int32(UNTIL))
            return dk + written, add_decays(dg, M, wide(k_tile) * written), dbeta

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
            mosaic.save(x_tile, wide(k_tile) * weight * mosaic.across(own, PAIRS_SHAPE))
            mosaic.save(y_tile, wide(q_tile) * weight)
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
            of_rates = (wide(k_tile) * others).sum(axis=1)
            others = others * mosaic.across(own, PAIRS_SHAPE)
            rows, columns = channel_decays.numbers()
            M = channel_decays.between_transposed(rows, columns, channel_decays.border(columns, level))
            dg = add_decays(dg, M, wide(q_tile) * asked + wide(k_tile) * others)
            second = channel_decays.is_second(rows, level)
            return dq + asked, dk + others, dg, dbeta + jnp.where(second, 0.0, of_rates)

        def same_token(dq, dk, dbeta, beta):
            rows, columns = channel_decays.numbers()
            same = mosaic.across(rows, PAIRS_SHAPE) == mosaic.down(columns, PAIRS_SHAPE)
            own = jnp.where(same, wide(pair_tiles.at[0]), 0.0).sum(axis=1)
            q, k = wide(q_tile), wide(k_tile)
            dbeta, own = dbeta + own * (q * k).sum(axis=1), mosaic.across(own * beta, PAIRS_SHAPE)
            return dq + own * k, dk + own * q, dbeta

        row, chunk, head, share = tasks.place(n)
        asked, seen, written, pairs, kept = tasks.over_steps(n, add_step, (tasks.zeros,) * 5)
        plgpu.barrier_wait(tasks.given)
        rows, columns = channel_decays.numbers()
        pl.when(n > 0)(lambda: plgpu.barrier_wait(tasks.returned))  # the other warpgroup reads these no more
        later = mosaic.down(columns, PAIRS_SHAPE) - mosaic.across(rows, PAIRS_SHAPE) >= group
        mosaic.save(pair_tiles.at[group], jnp.where(later, pairs * jnp.where(group == 0, scale, -1.0), 0.0))
        plgpu.commit_smem()
        plgpu.barrier_arrive(tasks.met)
        beta = plgpu.load(beta_tile, layout=mosaic.ROW_LAYOUT)
        dq, dk, dg = since_beginning(asked, seen)
        dk, dg, dbeta = until_end(written, dk, dg, beta)
        dg = over_chunk(kept, dg)
        plgpu.barrier_wait(tasks.met)
        dq, dk, dg, dbeta = lax.fori_loop(0, LEVELS, add_level, (dq, dk, dg, dbeta))
        dq, dk, dbeta = same_token(dq, dk, dbeta, plgpu.load(beta_tile, layout=mosaic.ROW_LAYOUT))
        tokens, half = part_of(chunk, CHUNK_TOKENS), share * GROUPS + group
        channels = part_of(half, GROUP_KEYS)
        dbeta_ref.at[row, head, half, tokens][...] = dbeta
        dg_ref.at[row, tokens, head, channels][...] = dg
        plgpu.commit_smem()  # all have read what is overwritten
        mosaic.save(x_tile, dq)
        mosaic.save(y_tile, dk)
        plgpu.commit_smem()
        for ref, tile in ((dq_ref, x_tile), (dk_ref, y_tile)):
            plgpu.copy_smem_to_gmem(tile, ref.at[row, tokens, head, channels])
        plgpu.barrier_arrive(tasks.returned)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    sums = jax.ShapeDtypeStruct((batch, heads, keys // GROUP_KEYS, time), jnp.float32)
    inputs = Inputs([q, k, high, low], [(beta, 1)], [[errors], [do, dv]], [starts, ends], GROUPS, SLOTS, ahead=SLOTS)
    return each_task(
        task,
        "delta_rule_channels_gradients",
        inputs,
        [mosaic.like(q), mosaic.like(k), jax.ShapeDtypeStruct(k.shape, jnp.float32), sums],
        [mosaic.swizzled((2, *PAIRS_SHAPE), mosaic.WIDE_SWIZZLE) for _ in range(3)],
        blocks=blocks,
        waits=True,
        reduction_scratch_bytes=REDUCTION_SCRATCH_BYTES,
    )
