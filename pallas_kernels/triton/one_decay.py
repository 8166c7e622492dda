"""Matrix states with one decay a head, by chunks on tensor cores, in Triton kernels (see `ops/triton/one_decay.py`).

With the state S before a chunk of C tokens, c_t the sum of its log-decays up to token t, and w_ts = exp(c_t - c_s):

    O = scale (P U + diag(exp c) Q S)                 P_ts = (q_t . k_s) w_ts, s <= t
    S' = exp(c_C) S + (diag(exp(c_C - c)) K)^T U

where U are the values V of gated linear attention, or what the delta rule makes of them (`delta_rule.py`). `forward`
walks over the chunks with S in registers, and `reverse` walks back with its gradient:

    dV = P^T dO + diag(exp(c_C - c)) K dS'            dS = exp(c_C) dS' + (diag(exp c) Q)^T dO

`gradients` takes the others, of all chunks at once, with dP = dO V^T w_ts:

    dQ = diag(exp c) dO S^T + dP K                    dK = diag(exp(c_C - c)) V dS'^T + dP^T Q
    dc = q . dQ - k . dK, and at the last token sum_t k . diag(exp(c_C - c)) V dS'^T + exp(c_C) (S . dS')

What arrays may be is said in `chunks.py`.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.triton.chunks import (
    CHUNK_TOKENS,
    HIDDEN_EXPONENT,
    STRIP_WIDTH,
    Cut,
    Type,
    dot,
    load_strip,
    pairs,
)


def forward(q, k, v, c, state, *, scale: float, with_starts: bool) -> list[jax.Array]:
    """Return o like v, the state after the last token and, where asked for, those before every chunk.

    Args:
      q, k: (B, T, H, K), or (B, T, G, K) of G groups of heads.
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


def gradients(q, k, v, c, starts, do, ends, *, scale: float) -> list[jax.Array]:
    """Return dq, dk, and dc in fp32, given the states before every chunk and the gradients of those after it."""
    cut = Cut.of(k, v)

    def body(c_ref, v_ref, do_ref, q_ref, k_ref, starts_ref, ends_ref, dq_ref, dk_ref, dc_ref):
        def strip(n, sums):
            (dp, dq, dk), kept = sums
            v, do, S, dS = load_strip(n, STRIP_WIDTH, v_ref, do_ref, starts_ref, ends_ref)
            found = dp + dot(do, v, (1, 1)), dq + dot(do, S, (1, 1)), dk + dot(v, dS, (1, 1))
            return found, kept + both(S, dS)

        square, piece = (jnp.zeros((CHUNK_TOKENS, size), jnp.float32) for size in (CHUNK_TOKENS, cut.piece))
        zeros = (square, piece, piece), jnp.float32(0)
        (dp, dq, dk), kept = lax.fori_loop(0, cut.values // STRIP_WIDTH, strip, zeros)
        q, k, c = q_ref[...], k_ref[...], c_ref[...]  # loaded only here, for the registers
        since, until, all_of_it = decays(c)
        dp = (scale * dp * decays_between(c, lax.ge)).astype(q.dtype)
        dq, dk = scale * since * dq + dot(dp, k), until * dk
        whole = jnp.sum(along(dk, k)) + all_of_it * kept
        dk = dk + dot(dp, q, (0, 0))
        dq_ref[...], dk_ref[...] = dq.astype(dq_ref.dtype), dk.astype(dk_ref.dtype)
        dc_ref[...] = (along(dq, q) - along(dk, k) + at_last(whole))[:, None]

    shared, keyed, made = [c, v, do], [q, k, starts, ends], [Type(x.shape, x.dtype) for x in (q, k)]
    dq, dk, dc = cut.by_piece(body, "one_decay_gradients", shared, keyed, made, [cut.sums_of_pieces()])
    return [dq, dk, dc.sum(3)]


def times(factor, x) -> jax.Array:
    """Return the product in x's dtype."""
    return (factor * x.astype(jnp.float32)).astype(x.dtype)


def decays_between(c, seen) -> jax.Array:
    """Return exp(c_t - c_s) of the pairs of tokens of which `seen(t, s)`, 0 of the others."""
    return jnp.exp(jnp.where(pairs(CHUNK_TOKENS, seen), c[:, None] - c[None, :], HIDDEN_EXPONENT))


def decays(c) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return what each token sees of the state before the chunk, what is left of each at its end, and of that state."""
    whole = jnp.sum(at_last(c))
    return jnp.exp(c)[:, None], jnp.exp(whole - c)[:, None], jnp.exp(whole)


def both(x, y) -> jax.Array:
    """Return the sum of their elements' products."""
    return jnp.sum(x.astype(jnp.float32) * y.astype(jnp.float32))


def along(x, channels) -> jax.Array:
    """Return each token's product of a gradient with what it is of."""
    return jnp.sum(x * channels.astype(jnp.float32), axis=1)


def at_last(x) -> jax.Array:
    """Return x at the last token of a chunk, 0 at the others."""
    return jnp.where(lax.iota(jnp.int32, CHUNK_TOKENS) == CHUNK_TOKENS - 1, x, 0.0)
