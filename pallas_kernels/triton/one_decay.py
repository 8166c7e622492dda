"""Matrix states with one decay a head, by chunks on tensor cores, in Triton kernels (see `ops/triton/one_decay.py`).

With the state S before a chunk of C tokens, c_t the sum of its log-decays up to token t, and w_ts = exp(c_t - c_s):

    O = scale (P U + diag(exp c) Q S)                 P_ts = (q_t . k_s) w_ts, s <= t
    S' = exp(c_C) S + (diag(exp(c_C - c)) K)^T U

where U are the values V of gated linear attention. Those of the delta rule are diag(beta) E, its errors E being what
is left of V when a key has read the state and the tokens before its own (arXiv 2406.06484, section 3.2; 2412.06464,
section 3.3):

    E = T (V - diag(exp c) K S)       T = (I + L diag(beta))^-1       L_ts = (k_t . k_s) w_ts, s < t

`Delta` has every chunk's T and P, `forward` walks over the chunks with S in registers, and `reverse` walks back with
the gradient of S:

    dU = P^T dO + diag(exp(c_C - c)) K dS'            dV = dU or, for the delta rule, T^T diag(beta) dU
    dS = exp(c_C) dS' + (diag(exp c) Q)^T dO          and, for the delta rule, - (diag(exp c) K)^T dV

`gradients` takes those of q, k, c and beta, again each chunk for itself, from dP = dO U^T and dL = -dV U^T, both times
w_ts where tokens see each other. In L and in what it reads of the state, k has the part of a query:

    dQ = diag(exp c) dO S^T + dP K                    dK = A + B
    A = dL K - diag(exp c) dV S^T                     B = diag(exp(c_C - c)) U dS'^T + dP^T Q + dL^T K
    dc = q . dQ + k . A - k . B, and at the last token sum_t k . diag(exp(c_C - c)) U dS'^T + exp(c_C) (S . dS')
    dbeta = dU . E + k . (dL of E for U)^T K

What arrays may be is said in `chunks.py`.
"""

from collections.abc import Sequence
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


class Delta(NamedTuple):
    """What the delta rule takes beside the rest: rates (B, T, H) in fp32; P and T, (B, T, H, CHUNK_TOKENS) like k."""

    beta: jax.Array
    p: jax.Array
    t: jax.Array

    @classmethod
    def of(cls, q, k, c, beta) -> "Delta":
        """Return that of every chunk."""
        p, lower = _pairs(q, k, c, beta)
        return cls(beta, p, _inverses(lower, k.dtype))


def _pairs(q, k, c, beta) -> list[jax.Array]:
    """Return P in k's dtype and L diag(beta) in fp32, their rows where their tokens are."""

    def body(q_ref, k_ref, c_ref, beta_ref, p_ref, lower_ref):
        k, c = k_ref[...], c_ref[...]
        p_ref[...] = (dot(q_ref[...], k, (1, 1)) * _decay(c, c, pairs(CHUNK_TOKENS, lax.ge))).astype(p_ref.dtype)
        lower_ref[...] = dot(k, k, (1, 1)) * _decay(c, c, pairs(CHUNK_TOKENS, lax.gt)) * beta_ref[...][None, :]

    shape = *k.shape[:3], CHUNK_TOKENS
    results = [Type(shape, k.dtype), Type(shape, jnp.float32)]
    return Cut.of(k, k).by_chunk(body, "one_decay_pairs", 4, [q, k, c, beta], results)


def _inverses(lower, dtype) -> jax.Array:
    """Return T of every chunk in that dtype."""
    at = [pl.ds(i * BLOCK_TOKENS, BLOCK_TOKENS) for i in range(BLOCKS_PER_CHUNK)]

    def body(lower_ref, t_ref):
        def write(i: int, j: int, block) -> None:
            t_ref[at[i], at[j]] = block.astype(t_ref.dtype)

        invert(lambda i, j: lower_ref[at[i], at[j]], write)

    [t] = Cut.of(lower, lower).by_chunk(body, "one_decay_inverses", 1, [lower], [Type(lower.shape, dtype)])
    return t


def forward(q, k, v, c, state, delta: Delta | tuple[()] = (), *, scale: float, with_starts: bool) -> list[jax.Array]:
    """Return o like v, the state after the last token and, where asked for, those before every chunk, and E like v.

    Args:
      q, k: (B, T, H, K).
      v: (B, T, H, V) in their dtype.
      c: (B, T, H) fp32, sums of log-decays since the beginning of the chunk.
      state: (B, H, K, V) fp32.
    """
    cut, saved = Cut.of(k, v), 1 if with_starts and delta else 0

    def body(q_ref, k_ref, c_ref, *refs):
        delta_refs, (v_ref, state_ref, o_ref), error_refs, [last_ref], starts_refs = split(
            refs, len(delta), 3, saved, 1
        )

        def step(n, S):
            here = pl.ds(n * CHUNK_TOKENS, CHUNK_TOKENS)
            q, k, c, u = q_ref[here], k_ref[here], c_ref[here], v_ref[here]
            for ref in starts_refs:
                ref[n] = S.astype(ref.dtype)
            before, (since, until, all_of_it) = S.astype(q.dtype), _decays(c)
            if delta_refs:
                beta_ref, p_ref, t_ref = delta_refs
                right = u.astype(jnp.float32) - since * dot(k, before)
                error = dot(t_ref[here], right.astype(q.dtype))
                for ref in error_refs:
                    ref[here] = error.astype(ref.dtype)
                p, u = p_ref[here], (beta_ref[here][:, None] * error).astype(q.dtype)
            else:
                p = (dot(q, k, (1, 1)) * _decay(c, c, pairs(CHUNK_TOKENS, lax.ge))).astype(q.dtype)
            o_ref[here] = (scale * (dot(p, u) + since * dot(q, before))).astype(o_ref.dtype)
            return all_of_it * S + dot(k, _times(until, u), (0, 0))

        last_ref[...] = lax.fori_loop(0, cut.chunks, step, state_ref[...])

    wide, starts = [Type(v.shape, v.dtype)] * (1 + saved), [cut.states(v.dtype)] * with_starts
    states = [Type(state.shape, jnp.float32), *starts]
    found = cut.by_strip(body, "one_decay_forward", [q, k, c, *delta], [v], [state], wide, states)
    [o], error, states = split(found, 1, saved)
    return [o, *states, *error]


def reverse(
    q, k, c, do, dlast, delta: Delta | tuple[()] = (), error: Sequence = (), *, scale: float
) -> list[jax.Array]:
    """Return dv, the gradients of the states after every chunk, and of that before the first; the first is like do.

    For the delta rule, whose E of `forward` it takes, before them dU . E of every strip, (B, T, H, strips) fp32.
    """
    cut = Cut.of(k, do)

    def body(q_ref, k_ref, c_ref, *refs):
        delta_refs, [do_ref], error_refs, [dlast_ref, dv_ref], rate_refs, [ends_ref, dstate_ref] = split(
            refs, len(delta), 1, len(error), 2, len(error)
        )

        def step(back, dS):
            n = cut.chunks - 1 - back
            here = pl.ds(n * CHUNK_TOKENS, CHUNK_TOKENS)
            q, k, c = q_ref[here], k_ref[here], c_ref[here]
            after, (since, until, all_of_it) = dS.astype(q.dtype), _decays(c)
            ends_ref[n] = after
            do = _times(scale, do_ref[here])
            dS = all_of_it * dS + dot(q, _times(since, do), (0, 0))
            if delta_refs:
                beta_ref, p_ref, t_ref = delta_refs
                du = dot(p_ref[here], do, (0, 0)) + until * dot(k, after)
                rate_refs[0][here] = jnp.sum(du * error_refs[0][here].astype(jnp.float32), axis=1)[:, None]
                dv = dot(t_ref[here], (beta_ref[here][:, None] * du).astype(q.dtype), (0, 0))
                dS = dS - dot(k, (since * dv).astype(q.dtype), (0, 0))
            else:
                p = (dot(k, q, (1, 1)) * _decay(-c, -c, pairs(CHUNK_TOKENS, lax.le))).astype(q.dtype)  # transposed
                dv = dot(p, do) + until * dot(k, after)
            dv_ref[here] = dv.astype(dv_ref.dtype)
            return dS

        dstate_ref[...] = lax.fori_loop(0, cut.chunks, step, dlast_ref[...])

    wide = [Type(do.shape, do.dtype), *[cut.sums_of_strips()] * len(error)]
    states = [cut.states(do.dtype), Type(dlast.shape, jnp.float32)]
    dv, *found = cut.by_strip(body, "one_decay_reverse", [q, k, c, *delta], [do, *error], [dlast], wide, states)
    return [*found[: len(error)], dv, *found[len(error) :]]


def gradients(q, k, u, c, starts, do, ends, rates: Sequence = (), *, scale: float) -> list[jax.Array]:
    """Return dq, dk, dc in fp32 and, for the delta rule, what dbeta has beside dU . E, in fp32.

    Args:
      u: v or, for the delta rule, E of `forward`.
      starts: of `forward`.
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
        if rates:
            beta = rates_refs[1][...]
            dp, until = dp * beta[None, :], until * beta[:, None]
        dp = (scale * dp * _decay(c, c, pairs(CHUNK_TOKENS, lax.ge))).astype(q.dtype)
        dq = scale * since * dq + dot(dp, k)
        dk = until * dk
        whole = jnp.sum(_along(dk, k)) + all_of_it * kept
        dk = dk + dot(dp, q, (0, 0))
        dc = _along(dq, q) + jnp.where(_is_last(), whole, 0.0)
        if rates:
            dl, read = corrections
            dl = dl * _decay(c, c, pairs(CHUNK_TOKENS, lax.gt))
            dbeta_refs[0][...] = _along(dot(dl.astype(q.dtype), k, (0, 0)), k)[:, None]
            dl = (dl * beta[None, :]).astype(q.dtype)
            asked = since * read + dot(dl, k)
            dk = dk + dot(dl, k, (0, 0))
            dc, dk = dc + _along(asked, k) - _along(dk, k), dk + asked
        else:
            dc = dc - _along(dk, k)
        dq_ref[...], dk_ref[...], dc_ref[...] = dq.astype(dq_ref.dtype), dk.astype(dk_ref.dtype), dc[:, None]

    sums = [cut.sums_of_pieces()] * (2 if rates else 1)
    shared, keyed = [c, u, do, *rates], [q, k, starts, ends]
    results = [Type(x.shape, x.dtype) for x in (q, k)]
    dq, dk, *sums = cut.by_piece(body, "one_decay_gradients", shared, keyed, results, sums)
    return [dq, dk, *(x.sum(3) for x in sums)]


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
