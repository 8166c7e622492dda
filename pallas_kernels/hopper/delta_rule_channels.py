"""The delta rule whose channels decay each by itself, by chunks of 64 tokens, on Hopper (`ops/hopper/delta_rule.py`).

In a chunk with the state S before it, c_t the sums of its log-decays up to token t, for each channel:

    E = T (V - K S)          T = (I + L diag(beta))^-1      L_ts = sum_i k_ti k_si exp(c_ti - c_si), s < t
    O = P E + Q S            P_ts = scale beta_s sum_i q_ti k_si exp(c_ti - c_si), s <= t
    S' = diag(exp c_C) S + R^T E

    Q_t = scale q_t exp(c_t)         K_t = k_t exp(c_t)          R_t = beta_t k_t exp(c_C - c_t)

(arXiv 2510.26692, section 3). `delta_rule_channels_pairs.py` makes all but E, O and S'. The walk back, with the
gradient of S:

    dE = P^T dO + R dS'              dV = T^T dE            dS = diag(exp c_C) dS' + Q^T dO - K^T dV

How a block walks is said in `delta_rule_walk.py`.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.hopper import mosaic
from pallas_kernels.hopper.delta_rule_walk import (
    PART_KEYS,
    Walk,
    by_channel,
    rounded_parts,
    states_of_chunks,
    walk_over_chunks,
)
from pallas_kernels.hopper.mosaic import PAIRS_SHAPE


def forward(q, k, r, v, p, t, kept, state, *, with_starts: bool) -> list[jax.Array]:
    """Return o like v and the state after the last token; with starts also E like v, and S^T before every chunk.

    Args:
      q, k, r: Q, K and R, (B, T, H, K), K 64 or 128, T a multiple of 64.
      v: (B, T, H, V), V a multiple of 128.
      p, t: P and T of every chunk, (B, T, H, 64), rows where their tokens are.
      kept: exp(c_C), (B, H, chunks K) fp32.
      state: (B, H, V, K) fp32, transposed as what is returned.
    """
    keys = k.shape[3]

    def step(walk: Walk, S, o_ref, *kept_refs):
        q_tile, k_tile, r_tile, p_tile, t_tile, v_tile, kept_tile = walk.take()
        tokens, put = walk.tokens, walk.puts_of(keys // PART_KEYS + 2 if with_starts else 1)
        before = rounded_parts(S, k.dtype)

        def read(seen, asked):
            for part, x in before:
                mosaic.multiply(seen, x, k_tile.at[:, part].T)
                mosaic.multiply(asked, x, q_tile.at[:, part].T)
                if with_starts:
                    put(x, kept_refs[1].at[walk.row, walk.head, walk.chunk, walk.values, part])
            return mosaic.load(walk.mine(v_tile).T).astype(jnp.float32), seen[...], asked[...]

        values, seen, asked = mosaic.products(read, PAIRS_SHAPE, PAIRS_SHAPE)
        right = (values - seen).astype(k.dtype)

        def solve(errors):
            mosaic.multiply(errors, right, t_tile.T)
            return S * by_channel(kept_tile), errors[...]

        kept, errors = mosaic.products(solve, PAIRS_SHAPE)
        errors = errors.astype(k.dtype)

        def add(sums):
            mosaic.multiply(sums[0], errors, p_tile.T)
            mosaic.multiply(sums[1], errors, r_tile)
            if with_starts:
                put(errors, kept_refs[0].at[walk.row, tokens, walk.head, walk.values], transposed=True)

        o, S = mosaic.accumulate(add, (asked, kept))
        walk.free()
        put(o, o_ref.at[walk.row, tokens, walk.head, walk.values], transposed=True)
        return S

    results = [mosaic.like(v), mosaic.like(state)]
    if with_starts:
        results += [mosaic.like(v), states_of_chunks(v, keys)]
    return walk_over_chunks(step, "delta_rule_channels_forward", [q, k, r, p, t], [v], [kept], state, results, final=1)


def reverse(q, k, r, do, p, t, kept, dlast) -> list[jax.Array]:
    """Return dv like do, the transposed gradients of the states after every chunk, and of that before the first.

    Args:
      do: (B, T, H, V).
      dlast: (B, H, V, K) fp32, of the state after the last token, transposed.
      q, k, r, p, t, kept: as of `forward`.
    """
    keys = k.shape[3]

    def step(walk: Walk, dS, dv_ref, ends_ref):
        q_tile, k_tile, r_tile, p_tile, t_tile, do_tile, kept_tile = walk.take()
        put, after = walk.puts_of(keys // PART_KEYS + 1), rounded_parts(dS, k.dtype)

        def read(later):
            for part, x in after:
                mosaic.multiply(later, x, r_tile.at[:, part].T)
                put(x, ends_ref.at[walk.row, walk.head, walk.chunk, walk.values, part])
            return mosaic.load(walk.mine(do_tile).T), later[...]

        do, later = mosaic.products(read, PAIRS_SHAPE)
        errors = mosaic.multiply_add(later, do, p_tile).astype(k.dtype)

        def solve(dv):
            mosaic.multiply(dv, errors, t_tile)
            return dS * by_channel(kept_tile), dv[...]

        kept, dv = mosaic.products(solve, PAIRS_SHAPE)
        seen = (-dv).astype(k.dtype)

        def add(sums):
            mosaic.multiply(sums[0], do, q_tile)
            mosaic.multiply(sums[0], seen, k_tile)
            put(dv, dv_ref.at[walk.row, walk.tokens, walk.head, walk.values], transposed=True)

        [dS] = mosaic.accumulate(add, (kept,))
        walk.free()
        return dS

    results = [mosaic.like(do), states_of_chunks(do, keys), mosaic.like(dlast)]
    return walk_over_chunks(
        step, "delta_rule_channels_reverse", [q, k, r, p, t], [do], [kept], dlast, results, final=2, back=True
    )
