"""The delta rule with one decay a head, by chunks of 64 tokens on Hopper (see `ops/hopper/delta_rule.py`).

In a chunk with the state S before it, c_t the sum of its log-decays up to token t, and w_ts = exp(c_t - c_s):

    E = T (V - diag(exp c) K S)                 T = (I + L diag(beta))^-1      L_ts = (k_t . k_s) w_ts, s < t
    O = P E + scale diag(exp c) Q S             P_ts = scale (q_t . k_s) w_ts beta_s, s <= t
    S' = exp(c_C) S + K^T diag(exp(c_C - c) beta) E

(arXiv 2406.06484, section 3.2; 2412.06464, section 3.3). `delta_rule_pairs.py` makes P and T. `forward` walks over the
chunks of a head, and `reverse` back with the gradient of S:

    dE = P^T dO + diag(exp(c_C - c) beta) K dS'            dV = T^T dE
    dS = exp(c_C) dS' + scale (diag(exp c) Q)^T dO - (diag(exp c) K)^T dV

How a block walks is said in `delta_rule_walk.py`.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.hopper import mosaic
from pallas_kernels.hopper.delta_rule_walk import (
    PART_KEYS,
    Walk,
    numbers_of,
    rounded_parts,
    states_of_chunks,
    walk_over_chunks,
)
from pallas_kernels.hopper.mosaic import CHUNK_TOKENS, PAIRS_SHAPE


def forward(q, k, v, p, t, since, written, state, *, scale: float, with_starts: bool) -> list[jax.Array]:
    """Return o like v and the state after the last token; with starts also E like v, and S^T before every chunk.

    Args:
      q, k: (B, T, H, K), K a multiple of 64 up to 256, T one of 64.
      v: (B, T, H, V), V a multiple of 128.
      p, t: P and T of every chunk, (B, T, H, 64), rows where their tokens are.
      since, written: exp(c) and exp(c_C - c) beta, (B, H, T) fp32.
      state: (B, H, V, K) fp32, transposed as what is returned.
    """
    keys = k.shape[3]

    def step(walk: Walk, S, o_ref, *kept_refs):
        q_tile, k_tile, p_tile, t_tile, v_tile, since_tile, written_tile = walk.take()
        tokens, put = walk.tokens, walk.puts_of(keys // PART_KEYS + 2 if with_starts else 1)
        since = numbers_of(since_tile)
        before = rounded_parts(S, k.dtype)

        def read(seen, asked):
            for part, x in before:
                mosaic.multiply(seen, x, k_tile.at[:, part].T)
                mosaic.multiply(asked, x, q_tile.at[:, part].T)
                if with_starts:
                    put(x, kept_refs[1].at[walk.row, walk.head, walk.chunk, walk.values, part])
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
        walk.free()
        put(o, o_ref.at[walk.row, tokens, walk.head, walk.values], transposed=True)
        return S

    results = [mosaic.like(v), mosaic.like(state)]
    if with_starts:
        results += [mosaic.like(v), states_of_chunks(v, keys)]
    return walk_over_chunks(step, "delta_rule_forward", [q, k, p, t], [v], [since, written], state, results, final=1)


def reverse(q, k, do, p, t, since, written, dlast, *, scale: float) -> list[jax.Array]:
    """Return dv like do, the transposed gradients of the states after every chunk, and of that before the first.

    Args:
      do: (B, T, H, V).
      dlast: (B, H, V, K) fp32, of the state after the last token, transposed.
      q, k, p, t, since, written: as of `forward`.
    """
    keys = k.shape[3]

    def step(walk: Walk, dS, dv_ref, ends_ref):
        q_tile, k_tile, p_tile, t_tile, do_tile, since_tile, written_tile = walk.take()
        put, since = walk.puts_of(keys // PART_KEYS + 1), numbers_of(since_tile)
        after = rounded_parts(dS, k.dtype)

        def read(later):
            for part, x in after:
                mosaic.multiply(later, x, k_tile.at[:, part].T)
                put(x, ends_ref.at[walk.row, walk.head, walk.chunk, walk.values, part])
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
            put(dv, dv_ref.at[walk.row, walk.tokens, walk.head, walk.values], transposed=True)

        [dS] = mosaic.accumulate(add, (kept,))
        walk.free()
        return dS

    results = [mosaic.like(do), states_of_chunks(do, keys), mosaic.like(dlast)]
    return walk_over_chunks(
        step, "delta_rule_reverse", [q, k, p, t], [do], [since, written], dlast, results, final=2, back=True
    )
