"""Matrix states with one decay a head, by chunks on tensor cores, in Triton kernels (see `ops/triton/one_decay.py`).

With the state S before a chunk of C tokens, c_t the sum of its log-decays up to token t, and w_ts = exp(c_t - c_s):

    O = scale (P U + diag(exp c) Q S)                 P_ts = (q_t . k_s) w_ts, s <= t
    S' = exp(c_C) S + (diag(exp(c_C - c)) K)^T U

where U are the values V of gated linear attention, or what the delta rule makes of them (`delta_rule.py`). `forward`
walks over the chunks with S in registers, and `reverse` walks back with its gradient:

    dV = P^T dO + diag(exp(c_C - c)) K dS'            dS = exp(c_C) dS' + (diag(exp c) Q)^T dO

`gradients` takes those of q, k, c and beta, again each chunk for itself, from dP = dO U^T and, for the delta rule,
dL = -dV U^T, both times w_ts where tokens see each other. In L and in what it reads of the state, k has the part of a
query:

    dQ = diag(exp c) dO S^T + dP K                    dK = A + B
    A = dL K - diag(exp c) dV S^T                     B = diag(exp(c_C - c)) U dS'^T + dP^T Q + dL^T K
    dc = q . dQ + k . A - k . B, and at the last token sum_t k . diag(exp(c_C - c)) U dS'^T + exp(c_C) (S . dS')
    dbeta = k . B with E for U = diag(beta) E

What arrays may be is said in `chunks.py`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import split
from pallas_kernels.triton.chunks import (
    CHUNK_TOKENS,
    HIDDEN_EXPONENT,
    STRIP_WIDTH,
    Cut,
    Type,
    dot,
    pairs,
)


def forward(q, k, v, c, state, *, scale: float, with_starts: bool) -> list[jax.Array]:
    """Return o like v, the state after the last token and, where asked for, those before every chunk.

    Args:
      q, k: (B, T, H, K).
      v: (B, T, H, V) in their dtype.
      c: (B, T, H) fp32, sums of log-decays since the beginning of the chunk.
      state: (B, H, K, V) fp32.
    """
    cut = Cut.of(k, v)

    def body(q_ref, k_ref, c_ref, v_ref, state_ref, o_ref, last_ref, *starts_refs):
        def step(n, S):
            here = pl.ds(n * CHUNK_TOKENS, CHUNK_TOKENS)
            q, k, c, v = q_ref[here], k_ref[here], c_ref[here], v_ref[here]
            before, (since, until, all_of_it) = S.astype(q.dtype), decays(c)
            for ref in starts_refs:
                ref[n] = before
            p = (dot(q, k, (1, 1)) * decays_between(c, lax.ge)).astype(q.dtype)
            o_ref[here] = (scale * (dot(p, v) + since * dot(q, before))).astype(o_ref.dtype)
            return all_of_it * S + dot(k, times(until, v), (0, 0))

        last_ref[...] = lax.fori_loop(0, cut.chunks, step, state_ref[...])

    states = [Type(state.shape, jnp.float32), *[cut.states(v.dtype)] * with_starts]
    return cut.by_strip(body, "one_decay_forward", [q, k, c], [v], [state], [Type(v.shape, v.dtype)], states)


def reverse(q, k, c, do, dlast, *, scale: float) -> list[jax.Array]:
    """Return dv, the gradients of the states after every chunk, and of that before the first; the first is like do."""
    cut = Cut.of(k, do)

    def body(q_ref, k_ref, c_ref, do_ref, dlast_ref, dv_ref, ends_ref, dstate_ref):
        def step(back, dS):
            n = cut.chunks - 1 - back
            here = pl.ds(n * CHUNK_TOKENS, CHUNK_TOKENS)
            q, k, c = q_ref[here], k_ref[here], c_ref[here]
            after, (since, until, all_of_it) = dS.astype(q.dtype), decays(c)
            ends_ref[n] = after
            do = times(scale, do_ref[here])
            p = (dot(k, q, (1, 1)) * decays_between(-c, lax.le)).astype(q.dtype)  # transposed
            dv_ref[here] = (dot(p, do) + until * dot(k, after)).astype(dv_ref.dtype)
            return all_of_it * dS + dot(q, times(since, do), (0, 0))

        dstate_ref[...] = lax.fori_loop(0, cut.chunks, step, dlast_ref[...])

    states = [cut.states(do.dtype), Type(dlast.shape, jnp.float32)]
    return cut.by_strip(body, "one_decay_reverse", [q, k, c], [do], [dlast], [Type(do.shape, do.dtype)], states)


class Corrections(NamedTuple):
    """What the delta rule's gradients take beside the rest: rates (B, T, H) fp32, dv like v, P of `delta_rule.py`."""

    beta: jax.Array
    dv: jax.Array
    p: jax.Array


def gradients(
    q, k, u, c, starts, do, ends, corrections: Corrections | tuple[()] = (), *, scale: float
) -> list[jax.Array]:
    """Return dq, dk, dc in fp32 and, for the delta rule, dbeta in fp32.

    Args:
      u: v or, for the delta rule, E.
      starts: of `forward`.
      ends: of `reverse`.
    """
    cut, rates = Cut.of(k, u), corrections[:2]
    *squares, pairs_dbeta = [*_pair_gradients(k, u, c, do, corrections, scale=scale), None][: 3 if corrections else 2]

    def body(c_ref, u_ref, do_ref, *refs):
        rates_refs, [dp_ref], dl_refs, keyed_refs, results = split(refs, len(rates), 1, len(squares) - 1, 4)
        q_ref, k_ref, starts_ref, ends_ref = keyed_refs
        dq_ref, dk_ref, dc_ref, *dbeta_refs = results

        def strip(n, sums):
            columns = pl.ds(n * STRIP_WIDTH, STRIP_WIDTH)
            S, dS = starts_ref[:, columns], ends_ref[:, columns]
            dq, dk, kept, *read = sums
            found = dq + dot(do_ref[:, columns], S, (1, 1)), dk + dot(u_ref[:, columns], dS, (1, 1))
            kept = kept + jnp.sum(S.astype(jnp.float32) * dS.astype(jnp.float32))
            return *found, kept, *(x - dot(rates_refs[1][:, columns], S, (1, 1)) for x in read)

        none = jnp.zeros((CHUNK_TOKENS, cut.piece), jnp.float32)
        zeros = none, none, jnp.float32(0), *[none] * len(dl_refs)
        dq, dk, kept, *read = lax.fori_loop(0, cut.values // STRIP_WIDTH, strip, zeros)

        q, k, dp = q_ref[...], k_ref[...], dp_ref[...]
        since, until, all_of_it = decays(c_ref[...])
        dq, dk = scale * since * dq + dot(dp, k), until * dk
        for ref in dbeta_refs:
            ref[...] = _along(dk, k)[:, None]
            dk = rates_refs[0][...][:, None] * dk
        whole = jnp.sum(_along(dk, k)) + all_of_it * kept
        dk = dk + dot(dp, q, (0, 0))
        dc = _along(dq, q) + jnp.where(_is_last(), whole, 0.0)
        asked = []
        for ref in dl_refs:
            asked = [since * read[0] + dot(ref[...], k)]
            dk, dc = dk + dot(ref[...], k, (0, 0)), dc + _along(asked[0], k)
        dq_ref[...], dc_ref[...] = dq.astype(dq_ref.dtype), (dc - _along(dk, k))[:, None]
        dk_ref[...] = sum(asked, start=dk).astype(dk_ref.dtype)

    sums = [cut.sums_of_pieces()] * len(squares)
    shared, keyed = [c, u, do, *rates, *squares], [q, k, starts, ends]
    results = [Type(x.shape, x.dtype) for x in (q, k)]
    dq, dk, *sums = cut.by_piece(body, "one_decay_gradients", shared, keyed, results, sums)
    dc, *dbeta = (x.sum(3) for x in sums)
    return [dq, dk, dc, *(x + pairs_dbeta for x in dbeta)]


def _pair_gradients(k, u, c, do, corrections, *, scale: float) -> list[jax.Array]:
    """Return dP and, for the delta rule, dL, (B, T, H, CHUNK_TOKENS) like k, and dbeta's share of pairs, fp32."""

    def body(c_ref, u_ref, do_ref, *refs):
        corrections_refs, k_refs, [dp_ref], corrected_refs = split(refs, len(corrections), len(corrected) // 2, 1)

        def strip(n, sums):
            columns = pl.ds(n * STRIP_WIDTH, STRIP_WIDTH)
            u, dp, *dl = u_ref[:, columns], *sums
            dp = dp + dot(do_ref[:, columns], u, (1, 1))
            return dp, *(x - dot(corrections_refs[1][:, columns], u, (1, 1)) for x in dl)

        zeros = [jnp.zeros((CHUNK_TOKENS, CHUNK_TOKENS), jnp.float32)] * (1 + len(k_refs))
        dp, *dl = lax.fori_loop(0, u_ref.shape[1] // STRIP_WIDTH, strip, tuple(zeros))
        dp, c, before = scale * dp, c_ref[...], [x * decays_between(c_ref[...], lax.gt) for x in dl]
        written = decays_between(c, lax.ge)
        if corrections:
            beta_ref, _, p_ref = corrections_refs
            dl_ref, dbeta_ref = corrected_refs
            k, [dl], beta = k_refs[0][...], before, beta_ref[...]
            dbeta_ref[...] = jnp.sum(dp * p_ref[...].astype(jnp.float32) + dl * dot(k, k, (1, 1)), axis=0)
            dl_ref[...], written = (dl * beta[None, :]).astype(dl_ref.dtype), written * beta[None, :]
        dp_ref[...] = (dp * written).astype(dp_ref.dtype)

    square = Type((*k.shape[:3], CHUNK_TOKENS), k.dtype)
    corrected = [square, Type(c.shape, c.dtype)] if corrections else []
    arguments = [c, u, do, *corrections, *[k] * (len(corrected) // 2)]
    return Cut.of(k, u).by_chunk(body, "one_decay_pair_gradients", 4, arguments, [square, *corrected])


def times(factor, x) -> jax.Array:
    """Return the product in x's dtype."""
    return (factor * x.astype(jnp.float32)).astype(x.dtype)


def decays_between(c, seen) -> jax.Array:
    """Return exp(c_t - c_s) of the pairs of tokens of which `seen(t, s)`, 0 of the others."""
    return jnp.exp(jnp.where(pairs(CHUNK_TOKENS, seen), c[:, None] - c[None, :], HIDDEN_EXPONENT))


def decays(c) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return what each token sees of the state before the chunk, what is left of each at its end, and of that state."""
    whole = jnp.sum(jnp.where(_is_last(), c, 0.0))
    return jnp.exp(c)[:, None], jnp.exp(whole - c)[:, None], jnp.exp(whole)


def _along(x, channels) -> jax.Array:
    """Return each token's product of a gradient with what it is of."""
    return jnp.sum(x * channels.astype(jnp.float32), axis=1)


def _is_last() -> jax.Array:
    return lax.iota(jnp.int32, CHUNK_TOKENS) == CHUNK_TOKENS - 1
