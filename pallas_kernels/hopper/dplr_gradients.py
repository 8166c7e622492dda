"""The gradients under a diagonal plus low rank transition that no walk makes, of all chunks at once, on Hopper.

In the notation of `dplr.py`, with a of decayed states, and with the weights e of `channel_decays.py`, whose exponents
are products M g, a chunk's tokens get of what they are to each other

    G = scale dO V^T,  H = scale dO U^T, s <= t         I = dZ V^T,  J = dZ U^T, s < t

    since the chunk's beginning   dq_t = scale e_t dO_t S^T             da_t = e_t dZ_t S^T
    until its end                 dk_s = e_s V_s dS'^T                  db_s = e_s U_s dS'^T
    at every level                dq_t += e_t sum_s (G_ts k_s + H_ts b_s) e_s      da_t likewise with I and J
                                  dk_s += e_s sum_t (G_ts q_t + I_ts a_t) e_t      db_s likewise with H and J
    of the same token             dq_t += G_tt k_t + H_tt b_t           dk_t += G_tt q_t        db_t += H_tt q_t

Each weight's share of q dq + a da + k dk + b db is the gradient of its exponents, and M^T of it that of g: no gradient
is a difference of larger ones. What a token reads through a has not decayed by its own g, which gets nothing of it.
What is kept of S gives g of the whole chunk exp(c_C) sum_v S dS'.

How a block goes through the values is said in `chunk_tasks.py`. The first warpgroup makes the gradients of q and k, the
second those of a and b; both need the weighed queries and keys of all, which lie in tiles by turns.
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

REDUCTION_SCRATCH_BYTES = 1024
"""No sum here goes over several warps, and shared memory is full."""


def gradients(q, k, a, b, high, low, v, u, do, dz, starts, ends, *, scale: float, blocks: int) -> list[jax.Array]:
    """Return dq, dk, da and db, and dg like k in fp32.

    Args:
      q, k, a, b, high, low: (B, T, H, 64), T a multiple of 64, as of `dplr_pairs.pairs`.
      v, u, do, dz: (B, T, H, V), V a multiple of 64.
      starts, ends: (B, H, chunks, V, 64), as of `dplr.forward` and `dplr.reverse`.
      blocks: that run at the same time.
    """

    def task(tasks: Tasks, n, scratch, refs):
        group, zeros = tasks.group, tasks.zeros
        (written_tiles, read_tiles), (pair_tiles, weighed_tiles, y_tiles) = tasks.values, scratch
        query_tile, key_tile, high_tile, low_tile = (tasks.keys.at[i, 0] for i in (2 * group, 2 * group + 1, 4, 5))
        y_tile = y_tiles.at[group]

        def add_step(slot, carry):
            def multiply(sums, kept):
                asked, ended, of_own, of_other = sums
                start, end = (tiles.at[slot, 0] for tiles in tasks.states)  # not from outside: Mosaic fails
                mosaic.multiply(of_own, written_tiles.at[slot, 0], read_tiles.at[slot, group].T)
                mosaic.multiply(of_other, written_tiles.at[slot, 1], read_tiles.at[slot, group].T)
                mosaic.multiply(asked, read_tiles.at[slot, group], start)
                mosaic.multiply(ended, written_tiles.at[slot, group], end)
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

        def since_beginning(asked):
            rows, columns = channel_decays.numbers()
            dx = jnp.where(group == 0, scale, 1.0) * decays(channel_decays.between(rows, columns, jnp.int32(SINCE)))
            dx = dx * asked
            rows, columns = channel_decays.numbers()
            M = channel_decays.between_transposed(rows, columns - group, jnp.int32(SINCE))
            return dx, add_decays(zeros, M, wide(query_tile) * dx)

        def until_end(ended, dg):
            rows, columns = channel_decays.numbers()
            dy = ended * decays(channel_decays.between(rows, columns, jnp.int32(UNTIL)))
            rows, columns = channel_decays.numbers()
            M = channel_decays.between_transposed(rows, columns, jnp.int32(UNTIL))
            return dy, add_decays(dg, M, wide(key_tile) * dy)

        def over_chunk(kept, dg):
            kept = jnp.where(group == 0, 1.0, 0.0) * kept
            return add_decays(dg, channel_decays.all_ones(), kept * decays(channel_decays.all_ones()))

        def add_level(level, carry):
            dx, dy, dg = carry
            rows, columns = channel_decays.numbers()
            weight = decays(channel_decays.between(rows, columns, channel_decays.border(rows, level)))
            turn = lax.rem(level, 2)
            mosaic.save(weighed_tiles.at[turn, group, 0], wide(query_tile) * weight)
            mosaic.save(weighed_tiles.at[turn, group, 1], wide(key_tile) * weight)
            plgpu.commit_smem()
            meet()
            met = channel_decays.meet(rows, columns, level)

            def multiply(asked, others):
                for i in range(2):
                    mosaic.multiply(asked, met * mosaic.load(pair_tiles.at[group, i].T), weighed_tiles.at[turn, i, 1])
                    mosaic.multiply(others, met * mosaic.load(pair_tiles.at[i, group]), weighed_tiles.at[turn, i, 0])
                return asked[...], others[...]

            asked, others = (weight * x for x in mosaic.products(multiply, PAIRS_SHAPE, PAIRS_SHAPE))
            rows, columns = channel_decays.numbers()
            border, second = channel_decays.border(columns, level), channel_decays.is_second(columns, level)
            M = channel_decays.between_transposed(rows, columns - jnp.where(second, group, 0), border)
            return dx + asked, dy + others, add_decays(dg, M, wide(query_tile) * asked + wide(key_tile) * others)

        def same_token(dx, dy):
            own, other, mine = (_diagonal(pair_tiles.at[i]) for i in ((group, 0), (group, 1), (0, group)))
            dx = dx + own * wide(tasks.keys.at[1, 0]) + other * wide(tasks.keys.at[3, 0])
            return dx, dy + mine * wide(tasks.keys.at[0, 0])

        def meet():
            plgpu.barrier_arrive(tasks.met)
            plgpu.barrier_wait(tasks.met)

        def gather(dg):
            """Return the sum of both warpgroups' dg to the first: the second's comes in two parts of bf16."""
            high, low = (weighed_tiles.at[0, 1, i] for i in range(2))

            @pl.when(group == 1)
            def hand_over():
                mosaic.save(high, dg)
                mosaic.save(low, dg - dg.astype(high.dtype).astype(jnp.float32))
                plgpu.commit_smem()

            meet()
            return dg + wide(high) + wide(low)

        row, chunk, head, _ = tasks.place(n)
        tokens = part_of(chunk, CHUNK_TOKENS)
        asked, ended, of_own, of_other, kept = tasks.over_steps(n, add_step, (zeros,) * 5)
        plgpu.barrier_wait(tasks.given)
        pl.when(n > 0)(lambda: plgpu.barrier_wait(tasks.returned))  # the other warpgroup reads these no more
        for i, x in enumerate((of_own, of_other)):
            rows, columns = channel_decays.numbers()
            later = mosaic.down(columns, PAIRS_SHAPE) - mosaic.across(rows, PAIRS_SHAPE) >= group
            mosaic.save(pair_tiles.at[group, i], jnp.where(later, x * jnp.where(group == 0, scale, 1.0), 0.0))
        dx, dg = since_beginning(asked)
        dy, dg = until_end(ended, dg)
        dg = over_chunk(kept, dg)
        dx, dy, dg = lax.fori_loop(0, LEVELS, add_level, (dx, dy, dg))
        dx, dy = same_token(dx, dy)
        dg = gather(dg)
        pl.when(group == 0)(lambda: mosaic.save(refs[4].at[row, tokens, head], dg))
        out_tiles = [weighed_tiles.at[1, group, i] for i in range(2)]
        for tile, x in zip(out_tiles, (dx, dy), strict=True):
            mosaic.save(tile, x)
        plgpu.commit_smem()
        for g in range(GROUPS):

            @pl.when(group == g)
            def put(g=g):
                for tile, ref in zip(out_tiles, refs[2 * g : 2 * g + 2], strict=True):
                    plgpu.copy_smem_to_gmem(tile, ref.at[row, tokens, head])

        plgpu.barrier_arrive(tasks.returned)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    assert k.shape[3] == GROUP_KEYS, k.shape
    inputs = Inputs([q, k, a, b, high, low], [], [[v, u], [do, dz]], [starts, ends], parts=1, slots=1, ahead=1)
    return each_task(
        task,
        "dplr_gradients",
        inputs,
        [*(mosaic.like(k) for _ in range(4)), jax.ShapeDtypeStruct(k.shape, jnp.float32)],
        [mosaic.swizzled((*shape, *PAIRS_SHAPE), mosaic.WIDE_SWIZZLE) for shape in ((2, 2), (2, GROUPS, 2), (GROUPS,))],
        blocks=blocks,
        waits=True,
        reduction_scratch_bytes=REDUCTION_SCRATCH_BYTES,
    )


def _diagonal(tile) -> jax.Array:
    """Return what stands on the diagonal, over the columns."""
    rows, columns = channel_decays.numbers()
    same = mosaic.across(rows, PAIRS_SHAPE) == mosaic.down(columns, PAIRS_SHAPE)
    return mosaic.across(jnp.where(same, wide(tile), 0.0).sum(axis=1), PAIRS_SHAPE)
