"""Matrix states with one decay a head, by chunks on tensor cores, in Triton kernels (see `ops/triton/one_decay.py`).

With the state S before a chunk of C tokens, c_t the sum of its log-decays up to token t, and w_ts = exp(c_t - c_s):

    O = scale (P U + diag(exp c) Q S)                 P_ts = (q_t . k_s) w_ts, s <= t
    S' = exp(c_C) S + (diag(exp(c_C - c)) K)^T U

where U are the values V of gated linear attention, or what the delta rule makes of them (arXiv 2406.06484, section
3.2; 2412.06464, section 3.3):

    U = T diag(beta) (V - diag(exp c) K S)            T = (I + L)^-1       L_ts = beta_t (k_t . k_s) w_ts, s < t

`inverses` solves every chunk's T, `forward` walks over the chunks with S in registers, and `reverse` walks back with
the gradient of S:

    dU = P^T dO + diag(exp(c_C - c)) K dS'            dV = dU or, for the delta rule, diag(beta) T^T dU
    dS = exp(c_C) dS' + (diag(exp c) Q)^T dO          and, for the delta rule, - (diag(exp c) K)^T dV

`gradients` takes those of q, k, c and beta, again each chunk for itself, from dP = dO U^T and dL' = -dV U^T, both times
w_ts where they are seen (L' is L without beta). In L and in what it reads of the state, k has the part of a query:

    dQ = diag(exp c) dO S^T + dP K                    dK = A + B
    A = dL' K - diag(exp c) dV S^T                    B = diag(exp(c_C - c)) U dS'^T + dP^T Q + dL'^T K
    dc = q . dQ + k . A - k . B, and at the last token sum_t k . diag(exp(c_C - c)) U dS'^T + exp(c_C) (S . dS')
    dbeta_t = dv_t . u_t / beta_t^2                   since U = diag(beta) E with E = V - what keys read until then

What arrays may be is said in `chunks.py`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import split
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

    width = min(k.shape[3], STRIP_WIDTH)
    channels = [pl.ds(n, width) for n in range(0, k.shape[3], width)]

    def body(k_ref, c_ref, beta_ref, t_ref):
        at = [pl.ds(i * BLOCK_TOKENS, BLOCK_TOKENS) for i in range(BLOCKS_PER_CHUNK)]
        cs, betas = ([ref[rows] for rows in at] for ref in (c_ref, beta_ref))

        def lower(i: int, j: int) -> jax.Array:
            decay = _decay(cs[i], cs[j], pairs(BLOCK_TOKENS, lax.gt) if i == j else None)
            like = sum(dot(k_ref[at[i], x], k_ref[at[j], x], (1, 1)) for x in channels)
            return betas[i][:, None] * like * decay

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
    """Return o like v, the state after the last token and, where asked for, those before every chunk, and U like v.

    Args:
      q, k: (B, T, H, K).
      v: (B, T, H, V) in their dtype.
      c: (B, T, H) fp32, sums of log-decays since the beginning of the chunk.
      state: (B, H, K, V) fp32.
    """
    cut, saved = Cut.of(k, v), 1 if with_starts and delta else 0

    def body(q_ref, k_ref, c_ref, *refs):
        delta_refs, (v_ref, state_ref, o_ref), u_refs, [last_ref], starts_refs = split(refs, len(delta), 3, saved, 1)

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
            for ref in u_refs:
                ref[here] = u
            p = (dot(q, k, (1, 1)) * _decay(c, c, pairs(CHUNK_TOKENS, lax.ge))).astype(q.dtype)
            o_ref[here] = (scale * (dot(p, u) + since * dot(q, before))).astype(o_ref.dtype)
            return all_of_it * S + dot(k, _times(until, u), (0, 0))

        last_ref[...] = lax.fori_loop(0, cut.chunks, step, state_ref[...])

    wide, states = [Type(v.shape, v.dtype)] * (1 + saved), [cut.states(v.dtype)] * with_starts
    states = [Type(state.shape, jnp.float32), *states]
    o, *u_and_states = cut.by_strip(body, "one_decay_forward", [q, k, c, *delta], [v], [state], wide, states)
    return [o, *u_and_states[saved:], *u_and_states[:saved]]


def reverse(q, k, c, do, dlast, delta: Delta | tuple[()] = (), *, scale: float) -> list[jax.Array]:
    """Return dv, the gradients of the states after every chunk, and of that before the first; the first is like do."""
    cut = Cut.of(k, do)

    def body(q_ref, k_ref, c_ref, *refs):
        delta_refs, (do_ref, dlast_ref, dv_ref, ends_ref, dstate_ref) = refs[: len(delta)], refs[len(delta) :]

        def step(back, dS):
            n = cut.chunks - 1 - back
            here = pl.ds(n * CHUNK_TOKENS, CHUNK_TOKENS)
            q, k, c = q_ref[here], k_ref[here], c_ref[here]
            after, (since, until, all_of_it) = dS.astype(q.dtype), _decays(c)
            ends_ref[n] = after
            do = _times(scale, do_ref[here])
            p = (dot(k, q, (1, 1)) * _decay(-c, -c, pairs(CHUNK_TOKENS, lax.le))).astype(q.dtype)  # transposed
            dv = dot(p, do) + until * dot(k, after)
            dS = all_of_it * dS + dot(q, _times(since, do), (0, 0))
            if delta_refs:
                beta_ref, t_ref = delta_refs
                dv = beta_ref[here][:, None] * dot(t_ref[here], dv.astype(q.dtype), (0, 0))
                dS = dS - dot(k, (since * dv).astype(q.dtype), (0, 0))
            dv_ref[here] = dv.astype(dv_ref.dtype)
            return dS

        dstate_ref[...] = lax.fori_loop(0, cut.chunks, step, dlast_ref[...])

    states = [cut.states(do.dtype), Type(dlast.shape, jnp.float32)]
    return cut.by_strip(body, "one_decay_reverse", [q, k, c, *delta], [do], [dlast], [Type(do.shape, do.dtype)], states)


def gradients(q, k, u, c, starts, do, ends, rates: tuple = (), *, scale: float) -> list[jax.Array]:
    """Return dq, dk, dc in fp32 and, for the delta rule, dbeta in fp32.

    Args:
      u, starts: of `forward`; without the delta rule u is v.
      ends: of `reverse`.
      rates: dv of `reverse` and beta, for the delta rule.
    """
    cut = Cut.of(k, u)

    def body(c_ref, u_ref, do_ref, *refs):
        rates_refs, (q_ref, k_ref, starts_ref, ends_ref), results = split(refs, len(rates), 4)
        dq_ref, dk_ref, dc_ref, *dbeta_refs = results

        def strip(n, sums):
            columns = pl.ds(n * STRIP_WIDTH, STRIP_WIDTH)
            S, dS, u, do = starts_ref[:, columns], ends_ref[:, columns], u_ref[:, columns], do_ref[:, columns]
            (dp, dq, dk, kept), corrections = sums
            kept = kept + jnp.sum(S.astype(jnp.float32) * dS.astype(jnp.float32))
            found = dp + dot(do, u, (1, 1)), dq + dot(do, S, (1, 1)), dk + dot(u, dS, (1, 1)), kept
            if corrections:
                dv, (dl, read) = rates_refs[0][:, columns], corrections
                corrections = dl - dot(dv, u, (1, 1)), read - dot(dv, S, (1, 1))
            return found, corrections

        square, keys = (jnp.zeros((CHUNK_TOKENS, size), jnp.float32) for size in (CHUNK_TOKENS, cut.piece))
        zeros = (square, keys, keys, jnp.float32(0)), (square, keys) if rates else ()
        (dp, dq, dk, kept), corrections = lax.fori_loop(0, cut.values // STRIP_WIDTH, strip, zeros)

        q, k, c = q_ref[...], k_ref[...], c_ref[...]  # loaded only here, for the registers
        since, until, all_of_it = _decays(c)
        dp = (scale * dp * _decay(c, c, pairs(CHUNK_TOKENS, lax.ge))).astype(q.dtype)
        dq = scale * since * dq + dot(dp, k)
        dk = until * dk
        leaving = _along(dk, k)
        dk = dk + dot(dp, q, (0, 0))
        dc = _along(dq, q) + jnp.where(_is_last(), jnp.sum(leaving) + all_of_it * kept, 0.0)
        if rates:
            dl, read = corrections
            beta = rates_refs[1][...]
            dbeta_refs[0][...] = -jnp.sum(jnp.where(pairs(CHUNK_TOKENS, lax.eq), dl, 0.0), axis=1) / beta / beta
            dl = (dl * _decay(c, c, pairs(CHUNK_TOKENS, lax.gt))).astype(q.dtype)
            asked = since * read + dot(dl, k)
            dk = dk + dot(dl, k, (0, 0))
            dc, dk = dc + _along(asked, k) - _along(dk, k), dk + asked
        else:
            dc = dc - _along(dk, k)
        dq_ref[...], dk_ref[...], dc_ref[...] = dq.astype(dq_ref.dtype), dk.astype(dk_ref.dtype), dc

    columns = [cut.columns()] * (2 if rates else 1)
    shared, keyed = [c, u, do, *rates], [q, k, starts, ends]
    results = [Type(x.shape, x.dtype) for x in (q, k)]
    dq, dk, dc, *dbeta = cut.by_piece(body, "one_decay_gradients", shared, keyed, results, columns)
    return [dq, dk, dc.sum(3), *(x[..., 0] for x in dbeta)]


def _along(x, channels) -> jax.Array:
    """Return each token's product of a gradient with what it is of."""
    return jnp.sum(x * channels.astype(jnp.float32), axis=1)


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
