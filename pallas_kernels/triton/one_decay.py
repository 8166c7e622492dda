"""Matrix states with one decay a head, by chunks on tensor cores, in Triton kernels (see `ops/triton/one_decay.py`).

With the state S before a chunk of C tokens, c_t the sum of its log-decays up to token t, and w_ts = exp(c_t - c_s):

    O = scale (P U + diag(exp c) Q S)                 P_ts = (q_t . k_s) w_ts, s <= t
    S' = exp(c_C) S + (diag(exp(c_C - c)) K)^T U

where U are the values V of gated linear attention, or what the delta rule makes of them (arXiv 2406.06484, section
3.2; 2412.06464, section 3.3):

    U = T diag(beta) (V - diag(exp c) K S)            T = (I + L)^-1       L_ts = beta_t (k_t . k_s) w_ts, s < t

`inverses` solves every chunk's T, `forward` walks over the chunks with S in registers, `reverse` walks back with the
gradient of S, and `gradients` takes those of all tokens, again each chunk for itself:

    dU = P^T dO + diag(exp(c_C - c)) K dS'            dP = dO U^T
    dS = exp(c_C) dS' + (diag(exp c) Q)^T dO          and, for the delta rule, - (diag(exp c) K)^T dV
    Y = T^T dU       dV = diag(beta) Y       dL = -Y U^T

What arrays may be is said in `chunks.py`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.triton.chunks import (
    BLOCK_TOKENS,
    BLOCKS_PER_CHUNK,
    CHUNK_TOKENS,
    HIDDEN_EXPONENT,
    STRIP_WIDTH,
    Cut,
    Type,
    dot,
    invert,
    pairs,
)


def inverses(k, c, beta) -> jax.Array:
    """Return T of every chunk, (B, T, H, CHUNK_TOKENS) in k's dtype, its rows where their tokens are."""

    def body(k_ref, c_ref, beta_ref, t_ref):
        at = [pl.ds(i * BLOCK_TOKENS, BLOCK_TOKENS) for i in range(BLOCKS_PER_CHUNK)]
        ks, cs, betas = ([ref[rows] for rows in at] for ref in (k_ref, c_ref, beta_ref))

        def lower(i: int, j: int) -> jax.Array:
            decay = _decay(cs[i], cs[j], pairs(BLOCK_TOKENS, lax.gt) if i == j else None)
            return betas[i][:, None] * dot(ks[i], ks[j], (1, 1)) * decay

        def write(i: int, j: int, block) -> None:
            t_ref[at[i], at[j]] = block.astype(t_ref.dtype)

        invert(lower, write)

    [t] = Cut.of(k, k).by_chunk(
        body, "one_decay_inverses", 1, [k, c, beta], [Type((*k.shape[:3], CHUNK_TOKENS), k.dtype)]
    )
    return t


class Delta(NamedTuple):
    """What the delta rule takes beside the rest: rates (B, T, H) in fp32, and `inverses`."""

    beta: jax.Array
    t: jax.Array


def forward(q, k, v, c, state, delta: Delta | tuple[()] = (), *, scale: float, with_starts: bool) -> list[jax.Array]:
    """Return o like v, the state after the last token and, where asked for, those before every chunk.

    Args:
      q, k: (B, T, H, K).
      v: (B, T, H, V) in their dtype.
      c: (B, T, H) fp32, sums of log-decays since the beginning of the chunk.
      state: (B, H, K, V) fp32.
    """
    cut = Cut.of(k, v)

    def body(q_ref, k_ref, c_ref, *refs):
        delta_refs, (v_ref, state_ref, o_ref, last_ref, *starts_refs) = refs[: len(delta)], refs[len(delta) :]

        def step(n, S):
            here = pl.ds(n * CHUNK_TOKENS, CHUNK_TOKENS)
            q, k, c, u = q_ref[here], k_ref[here], c_ref[here], v_ref[here]
            for ref in starts_refs:
                ref[n] = S.astype(ref.dtype)
            before, (since, until, all_of_it) = S.astype(q.dtype), _decays(c)
            if delta_refs:
                beta_ref, t_ref = delta_refs
                right = beta_ref[here][:, None] * (u.astype(jnp.float32) - since * dot(k, before))
                u = dot(t_ref[here], right.astype(q.dtype)).astype(q.dtype)
            p = (dot(q, k, (1, 1)) * _decay(c, c, pairs(CHUNK_TOKENS, lax.ge))).astype(q.dtype)
            o_ref[here] = (scale * (dot(p, u) + since * dot(q, before))).astype(o_ref.dtype)
            return all_of_it * S + dot(k, _times(until, u), (0, 0))

        last_ref[...] = lax.fori_loop(0, cut.chunks, step, state_ref[...])

    states = [Type(state.shape, jnp.float32), *[cut.states(v.dtype)] * with_starts]
    return cut.by_strip(body, "one_decay_forward", [q, k, c, *delta], [v], [state], [Type(v.shape, v.dtype)], states)


def reverse(q, k, c, do, dlast, delta: Delta | tuple[()] = (), *, scale: float) -> list[jax.Array]:
    """Return dU, or Y for the delta rule, the gradients of the states after every chunk, and of that before the first.

    The first is like do.
    """
    cut = Cut.of(k, do)

    def body(q_ref, k_ref, c_ref, *refs):
        delta_refs, (do_ref, dlast_ref, y_ref, ends_ref, dstate_ref) = refs[: len(delta)], refs[len(delta) :]

        def step(back, dS):
            n = cut.chunks - 1 - back
            here = pl.ds(n * CHUNK_TOKENS, CHUNK_TOKENS)
            q, k, c = q_ref[here], k_ref[here], c_ref[here]
            after, (since, until, all_of_it) = dS.astype(q.dtype), _decays(c)
            ends_ref[n] = after
            do = _times(scale, do_ref[here])
            p = (dot(k, q, (1, 1)) * _decay(-c, -c, pairs(CHUNK_TOKENS, lax.le))).astype(q.dtype)  # transposed
            y = dot(p, do) + until * dot(k, after)
            dS = all_of_it * dS + dot(q, _times(since, do), (0, 0))
            if delta_refs:
                beta_ref, t_ref = delta_refs
                y = dot(t_ref[here], y.astype(q.dtype), (0, 0))
                dS = dS - dot(k, (since * beta_ref[here][:, None] * y).astype(q.dtype), (0, 0))
            y_ref[here] = y.astype(y_ref.dtype)
            return dS

        dstate_ref[...] = lax.fori_loop(0, cut.chunks, step, dlast_ref[...])

    states = [cut.states(do.dtype), Type(dlast.shape, jnp.float32)]
    return cut.by_strip(body, "one_decay_reverse", [q, k, c, *delta], [do], [dlast], [Type(do.shape, do.dtype)], states)


def gradients(q, k, v, c, starts, do, y, ends, delta: Delta | tuple[()] = (), *, scale: float) -> list[jax.Array]:
    """Return dq, dk, dc in fp32 and, for the delta rule, dv, and dbeta in fp32.

    Args:
      starts: of `forward`.
      y, ends: of `reverse`.
    """

    def body(q_ref, k_ref, v_ref, c_ref, starts_ref, do_ref, y_ref, ends_ref, *refs):
        delta_refs, (dq_ref, dk_ref, dc_ref, *delta_results) = refs[: len(delta)], refs[len(delta) :]
        k, c = k_ref[...], c_ref[...]
        since, until, all_of_it = _decays(c)

        def strip(n, sums):
            (dp, dq, dk, kept), corrections = sums
            columns = pl.ds(n * STRIP_WIDTH, STRIP_WIDTH)
            S, dS, u = starts_ref[:, columns], ends_ref[:, columns], v_ref[:, columns]
            if delta_refs:
                beta, y = delta_refs[0][...][:, None], y_ref[:, columns]
                dl, dbeta, lost = corrections
                read = since * dot(k, S)
                error = u.astype(jnp.float32) - read
                u = dot(delta_refs[1][...], (beta * error).astype(k.dtype)).astype(k.dtype)
                dv = beta * y.astype(jnp.float32)
                delta_results[0][:, columns] = dv.astype(v_ref.dtype)
                dk = dk - since * dot(dv.astype(k.dtype), S, (1, 1))
                dbeta = dbeta + jnp.sum(y.astype(jnp.float32) * error, axis=1)
                corrections = dl - dot(y, u, (1, 1)), dbeta, lost + jnp.sum(dv * read, axis=1)
            dk = dk + until * dot(u, dS, (1, 1))
            do = _times(scale, do_ref[:, columns])
            kept = kept + jnp.sum(S.astype(jnp.float32) * dS.astype(jnp.float32))
            return (dp + dot(do, u, (1, 1)), dq + dot(do, S, (1, 1)), dk, kept), corrections

        square, vector = jnp.zeros((CHUNK_TOKENS, CHUNK_TOKENS), jnp.float32), jnp.zeros(CHUNK_TOKENS, jnp.float32)
        none = square, jnp.zeros(k.shape, jnp.float32), jnp.zeros(k.shape, jnp.float32), jnp.float32(0)
        zeros = none, (square, vector, vector) if delta_refs else ()
        (dp, dq, dk, kept), corrections = lax.fori_loop(0, v_ref.shape[1] // STRIP_WIDTH, strip, zeros)

        q, dq = q_ref[...], since * dq  # loaded only here, for the registers
        leaving = jnp.sum(dk * k.astype(jnp.float32), axis=1)
        if delta_refs:
            dl, dbeta, lost = corrections
            leaving = leaving + lost
        dc = jnp.sum(dq * q.astype(jnp.float32), axis=1) - leaving
        dp = dp * _decay(c, c, pairs(CHUNK_TOKENS, lax.ge))
        moved = dp * dot(q, k, (1, 1))
        dp = dp.astype(q.dtype)
        dq_ref[...] = (dq + dot(dp, k)).astype(dq_ref.dtype)
        dk = dk + dot(dp, q, (0, 0))
        if delta_refs:
            dl, like = dl * _decay(c, c, pairs(CHUNK_TOKENS, lax.gt)), dot(k, k, (1, 1))
            delta_results[1][...] = dbeta + jnp.sum(dl * like, axis=1)
            dl = delta_refs[0][...][:, None] * dl
            moved, dc = moved + dl * like, dc - lost
            dl = dl.astype(q.dtype)
            dk = dk + dot(dl, k) + dot(dl, k, (0, 0))
        dk_ref[...] = dk.astype(dk_ref.dtype)
        whole = jnp.sum(leaving) + all_of_it * kept
        dc_ref[...] = dc + jnp.sum(moved, axis=1) - jnp.sum(moved, axis=0) + jnp.where(_is_last(), whole, 0.0)

    cut, arguments = Cut.of(k, v), [q, k, v, c, starts, do, y, ends, *delta]
    results = [Type(x.shape, x.dtype) for x in (q, k, c, *((v, c) if delta else ()))]
    warps = 8 if cut.keys > 64 else 4  # for the registers
    return cut.by_chunk(body, "one_decay_gradients", warps, arguments, results)


def _times(factor, x) -> jax.Array:
    """Return the product in x's dtype."""
    return (factor * x.astype(jnp.float32)).astype(x.dtype)


def _decay(seen, until, pairs=None) -> jax.Array:
    """Return exp(seen_t - until_s) of pairs of tokens, 0 of the others."""
    difference = seen[:, None] - until[None, :]
    return jnp.exp(difference if pairs is None else jnp.where(pairs, difference, HIDDEN_EXPONENT))


def _decays(c) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return what each token sees of the state before the chunk, what is left of each at its end, and of that state."""
    whole = jnp.sum(jnp.where(_is_last(), c, 0.0))
    return jnp.exp(c)[:, None], jnp.exp(whole - c)[:, None], jnp.exp(whole)


def _is_last() -> jax.Array:
    return lax.iota(jnp.int32, CHUNK_TOKENS) == CHUNK_TOKENS - 1
