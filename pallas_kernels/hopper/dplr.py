"""A diagonal plus low rank transition (RWKV-7) by chunks of 64 tokens on Hopper (`ops/hopper/dplr.py`).

In a chunk with the state S before it and c_t the sums of its log-decays up to token t, for each channel, a token reads
U_t = a_t S_{t-1} of the state before it decays, which is a'_t = a_t exp(-g_t) of the decayed one:

    U = T (A S + M V)                   T = (I - N)^-1        M = [a', k]      N = [a', b], s < t
    O = P V + R U + Q S                 P = scale [q, k]      R = scale [q, b], s <= t
    S' = diag(exp c_C) S + K^T V + B^T U

    [x, y]_ts = sum_i x_ti y_si exp(c_ti - c_si)
    Q_t = scale q_t exp(c_t)      A_t = a'_t exp(c_t)      K_t = k_t exp(c_C - c_t)      B_t = b_t exp(c_C - c_t)

(the WY form, arXiv 2406.06484, section 3.2). `dplr_pairs.py` makes all but U, O and S'. The walk back, with the
gradient of S, and Z what T is of:

    dU = R^T dO + B dS'                 dZ = T^T dU
    dV = P^T dO + K dS' + M^T dZ        dS = diag(exp c_C) dS' + Q^T dO + A^T dZ

How a block walks is said in `delta_rule_walk.py`.
"""

import jax

from pallas_kernels.hopper import mosaic
from pallas_kernels.hopper.delta_rule_walk import Walk, by_channel, rounded_parts, states_of_chunks, walk_over_chunks
from pallas_kernels.hopper.mosaic import PAIRS_SHAPE


def forward(q, a, k, b, p, r, m, t, v, kept, state, *, with_starts: bool) -> list[jax.Array]:
    """Return o like v and the state after the last token; with starts also U like v, and S^T before every chunk.

    Args:
      q, a, k, b: Q, A, K and B, (B, T, H, 64), T a multiple of 64.
      p, r, m, t: P, R, M and T - I of every chunk, (B, T, H, 64), rows where their tokens are. T less what is 1 of it
        multiplies what has been rounded; the rest of U is not.
      v: (B, T, H, V), V a multiple of 64.
      kept: exp(c_C), (B, H, chunks 64) fp32.
      state: (B, H, V, 64) fp32, transposed as what is returned.
    """

    def step(walk: Walk, S, o_ref, *kept_refs):
        q_tile, a_tile, k_tile, b_tile, p_tile, r_tile, m_tile, t_tile, v_tile, kept_tile = walk.take()
        tokens, put = walk.tokens, walk.puts_of(3 if with_starts else 1)
        [(part, before)], values = rounded_parts(S, v.dtype), mosaic.load(walk.mine(v_tile).T)

        def read(seen, asked):
            mosaic.multiply(seen, before, a_tile.T)
            mosaic.multiply(seen, values, m_tile.T)
            mosaic.multiply(asked, before, q_tile.T)
            mosaic.multiply(asked, values, p_tile.T)
            if with_starts:
                put(before, kept_refs[1].at[walk.row, walk.head, walk.chunk, walk.values, part])
            return S * by_channel(kept_tile), seen[...], asked[...]

        kept, seen, asked = mosaic.products(read, PAIRS_SHAPE, PAIRS_SHAPE)
        u = mosaic.multiply_add(seen, seen.astype(v.dtype), t_tile.T).astype(v.dtype)

        def add(sums):
            mosaic.multiply(sums[0], u, r_tile.T)
            mosaic.multiply(sums[1], u, b_tile)
            mosaic.multiply(sums[1], values, k_tile)
            if with_starts:
                put(u, kept_refs[0].at[walk.row, tokens, walk.head, walk.values], transposed=True)

        o, S = mosaic.accumulate(add, (asked, kept))
        walk.free()
        put(o, o_ref.at[walk.row, tokens, walk.head, walk.values], transposed=True)
        return S

    results = [mosaic.like(v), mosaic.like(state)]
    if with_starts:
        results += [mosaic.like(v), states_of_chunks(v, k.shape[3])]
    shared = [q, a, k, b, p, r, m, t]
    return walk_over_chunks(step, "dplr_forward", shared, [v], [kept], state, results, final=1)


def reverse(q, a, k, b, p, r, m, t, do, kept, dlast) -> list[jax.Array]:
    """Return dv and dZ like do, the transposed gradients of the states after every chunk, and of that before the first.

    Args:
      do: (B, T, H, V).
      dlast: (B, H, V, 64) fp32, of the state after the last token, transposed.
      q, a, k, b, p, r, m, t, kept: as of `forward`.
    """

    def step(walk: Walk, dS, dv_ref, dz_ref, ends_ref):
        q_tile, a_tile, k_tile, b_tile, p_tile, r_tile, m_tile, t_tile, do_tile, kept_tile = walk.take()
        tokens, put = walk.tokens, walk.puts_of(3)
        [(part, after)], do_ = rounded_parts(dS, do.dtype), mosaic.load(walk.mine(do_tile).T)

        def read(du):
            mosaic.multiply(du, after, b_tile.T)
            mosaic.multiply(du, do_, r_tile)
            put(after, ends_ref.at[walk.row, walk.head, walk.chunk, walk.values, part])
            return dS * by_channel(kept_tile), du[...]

        kept, du = mosaic.products(read, PAIRS_SHAPE)
        dz = mosaic.multiply_add(du, du.astype(do.dtype), t_tile).astype(do.dtype)

        def add(sums):
            mosaic.multiply(sums[0], dz, m_tile)
            mosaic.multiply(sums[0], do_, p_tile)
            mosaic.multiply(sums[0], after, k_tile.T)
            mosaic.multiply(sums[1], dz, a_tile)
            mosaic.multiply(sums[1], do_, q_tile)
            put(dz, dz_ref.at[walk.row, tokens, walk.head, walk.values], transposed=True)

        dv, dS = mosaic.accumulate(add, (mosaic.zeros(PAIRS_SHAPE), kept))
        walk.free()
        put(dv, dv_ref.at[walk.row, tokens, walk.head, walk.values], transposed=True)
        return dS

    results = [mosaic.like(do), mosaic.like(do), states_of_chunks(do, k.shape[3]), mosaic.like(dlast)]
    shared = [q, a, k, b, p, r, m, t]
    return walk_over_chunks(step, "dplr_reverse", shared, [do], [kept], dlast, results, final=3, back=True)
