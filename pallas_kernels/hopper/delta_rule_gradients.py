"""The gradients of the delta rule on Hopper that no walk makes, of all chunks at once.

In the notation of `delta_rule.py`, with G = dO E^T, N = -dV E^T and W_ts = w_ts beta_s, a chunk's pairs get

    dA = scale G W, s <= t (of q_t . k_s)              dB = N W, s < t (of k_t . k_s)
    dQ = scale diag(exp c) dO S^T + dA K               R = dB K - diag(exp c) dV S^T
    X = diag(exp(c_C - c) beta) E dS'^T                dK = R + X + dA^T Q + dB^T K
    dc = q . dQ + k . R - k . (dK - R), and at the last token sum k . X + exp(c_C) (S . dS')
    dbeta = k . diag(exp(c_C - c)) E dS'^T + sum_t w (scale G (q_t . k_s) + N (k_t . k_s))

How a block goes through the values is said in `chunk_tasks.py`. The first warpgroup makes G, the second N, both
transposed: a row for each token whose errors they are of.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import inverses, mosaic
from pallas_kernels.hopper.chunk_tasks import GROUP_KEYS, Inputs, Tasks, each_task, part_of, wide
from pallas_kernels.hopper.delta_rule_pairs import HIDDEN_EXPONENT
from pallas_kernels.hopper.delta_rule_walk import GROUPS
from pallas_kernels.hopper.mosaic import CHUNK_TOKENS, PAIRS_SHAPE

PART_KEYS = GROUPS * GROUP_KEYS
"""Channels of keys of a block."""
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
    batch, time, heads, keys = k.shape

    def task(tasks: Tasks, n, scratch, refs):
        dq_ref, dk_ref, dbeta_ref, dc_ref, whole_ref = refs
        group, key_tiles, (error_tiles, read_tiles) = tasks.group, tasks.keys, tasks.values
        (c_tile, later_tile, beta_tile), [pair_tiles] = tasks.numbers, scratch

        def add_step(slot, carry):
            *sums, kept = carry
            errors, (start, end) = error_tiles.at[slot], (tiles.at[slot, group] for tiles in tasks.states)

            def multiply(sums, kept):
                dq, asked, dk, pairs = sums
                mosaic.multiply(pairs, errors, read_tiles.at[slot, group].T)
                mosaic.multiply(dq, read_tiles.at[slot, 0], start)
                mosaic.multiply(asked, read_tiles.at[slot, 1], start)
                mosaic.multiply(dk, errors, end)
                both = (wide(x) for x in (start, end))
                return [kept + (next(both) * next(both)).sum(axis=1)]

            *sums, kept = mosaic.accumulate(multiply, tuple(sums), (kept,))
            return *sums, kept

        row, chunk, head, share = tasks.place(n)
        dq, asked, dk, pairs, kept = tasks.over_steps(n, add_step, (*(tasks.zeros,) * 4, _rows(0.0)))
        plgpu.barrier_wait(tasks.given)
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
        plgpu.barrier_arrive(tasks.met)
        since, until = jnp.exp(c), jnp.exp(c_tile[CHUNK_TOKENS - 1] - c)
        dk = dk * mosaic.across(until, PAIRS_SHAPE)
        dbeta = dbeta + _along(dk, own_keys)
        dk = dk * mosaic.across(beta, PAIRS_SHAPE)
        whole = _along(dk, own_keys) + kept * jnp.exp(c_tile[CHUNK_TOKENS - 1])
        since = mosaic.across(since, PAIRS_SHAPE)
        plgpu.barrier_wait(tasks.met)

        def multiply(sums):
            dq, asked, dk = sums
            queries, own_keys = (key_tiles.at[i, group] for i in range(2))  # not from outside: Mosaic fails
            mosaic.multiply(dq, pair_tiles.at[0].T, own_keys)
            mosaic.multiply(asked, pair_tiles.at[1].T, own_keys)
            mosaic.multiply(dk, pair_tiles.at[0], queries)
            mosaic.multiply(dk, pair_tiles.at[1], own_keys)

        dq, asked, dk = mosaic.accumulate(multiply, (scale * since * dq, -since * asked, dk))
        dc = _along(dq, queries) + _along(asked - dk, own_keys)
        tokens, half = part_of(chunk, CHUNK_TOKENS), share * GROUPS + group
        channels = part_of(half, GROUP_KEYS)
        for ref, x in ((dbeta_ref, dbeta), (dc_ref, dc), (whole_ref, whole)):
            ref.at[row, head, half, tokens][...] = x
        plgpu.commit_smem()  # all have read what is overwritten
        mosaic.save(queries, dq)
        mosaic.save(own_keys, asked + dk)
        plgpu.commit_smem()
        for ref, tile in ((dq_ref, queries), (dk_ref, own_keys)):
            plgpu.copy_smem_to_gmem(tile, ref.at[row, tokens, head, channels])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.barrier_arrive(tasks.returned)

    sums = jax.ShapeDtypeStruct((batch, heads, keys // GROUP_KEYS, time), jnp.float32)
    inputs = Inputs([q, k], [(c, 2), (beta, 1)], [[errors], [do, dv]], [starts, ends], GROUPS, SLOTS, ahead=0)
    return each_task(
        task,
        "delta_rule_gradients",
        inputs,
        [mosaic.like(q), mosaic.like(k), sums, sums, sums],
        [mosaic.swizzled((2, *PAIRS_SHAPE), mosaic.WIDE_SWIZZLE)],
        blocks=blocks,
    )


def _rows(value: float) -> jax.Array:
    return plgpu.layout_cast(jnp.full((CHUNK_TOKENS,), value, jnp.float32), mosaic.ROW_LAYOUT)


def _along(x: jax.Array, tile) -> jax.Array:
    """Return each token's product of a gradient with what it is of."""
    return (x * wide(tile)).sum(axis=1)
