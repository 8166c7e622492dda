"""The delta rule with one decay a head, by chunks on tensor cores, in Triton kernels (see `one_decay.py`).

What a token writes are its errors, what is left of its value when its key has read the state and the tokens before, as
far as its rate goes (arXiv 2406.06484, section 3.2; 2412.06464, section 3.3). In the notation of `one_decay.py`:

    U = diag(beta) E      E = T (V - diag(exp c) K S)      T = (I + L diag(beta))^-1      L_ts = (k_t . k_s) w_ts, s < t

`Pairs` solves every chunk's T, `forward` walks over the chunks with S in registers, `outputs` reads the states for all
chunks at once, and `reverse` walks back with the gradient of S:

    dU = P^T dO + diag(exp(c_C - c)) K dS'            dV = T^T diag(beta) dU
    dS = exp(c_C) dS' + (diag(exp c) Q)^T dO - (diag(exp c) K)^T dV

`gradients` takes the others, of all chunks at once, with dP = scale dO U^T w_ts and dL = -dV U^T w_ts. In L and in what
it reads of the state, k has the part of a query:

    dQ = diag(exp c) dO S^T + dP K                    dK = A + B
    A = dL K - diag(exp c) dV S^T                     B = diag(exp(c_C - c)) U dS'^T + dP^T Q + dL^T K
    dc = q . dQ + k . A - k . B, and at the last token sum_t k . diag(exp(c_C - c)) U dS'^T + exp(c_C) (S . dS')
    dbeta = k . B with E for U
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.triton.inverses import inverses
from pallas_kernels.triton.one_decay import along, at_last, both, decays, decays_between, times
from pallas_kernels.triton.pallas_chunks import CHUNK_TOKENS, STRIP_WIDTH, Cut, Type, dot, load_strip


class Pairs(NamedTuple):
    """What the tokens of every chunk are to each other, rows where their tokens are: P and T, (B, T, H, CHUNK_TOKENS).

    In the dtype of keys.
    """

    p: jax.Array
    t: jax.Array

    @classmethod
    def of(cls, q, k, c, beta) -> "Pairs":
        """Return those of queries and keys (B, T, H, K), sums of log-decays and rates (B, T, H) fp32."""
        p, lower = _products(q, k, c, beta)
        return cls(p, inverses(lower, k.dtype))


def _products(q, k, c, beta) -> list[jax.Array]:
    """Return P in k's dtype and L diag(beta) in fp32."""

    def body(q_ref, k_ref, c_ref, beta_ref, p_ref, lower_ref):
        k, c = k_ref[...], c_ref[...]
        p_ref[...] = (dot(q_ref[...], k, (1, 1)) * decays_between(c, lax.ge)).astype(p_ref.dtype)
        lower_ref[...] = dot(k, k, (1, 1)) * decays_between(c, lax.gt) * beta_ref[...][None, :]

    shape = *k.shape[:3], CHUNK_TOKENS
    results = [Type(shape, k.dtype), Type(shape, jnp.float32)]
    return Cut.of(k, k).by_chunk(body, "delta_rule_products", 4, [q, k, c, beta], results)


def forward(k, v, c, beta, t, state) -> list[jax.Array]:
    """Return E like v, the state after the last token, and those before every chunk.

    Args:
      k: (B, T, H, K).
      v: (B, T, H, V) in its dtype.
      c, beta: (B, T, H) fp32: sums of log-decays since the beginning of the chunk, and rates.
      t: of `Pairs`.
      state: (B, H, K, V) fp32.
    """
    cut = Cut.of(k, v)

    def body(k_ref, c_ref, beta_ref, t_ref, v_ref, state_ref, errors_ref, last_ref, starts_ref):
        def step(n, S):
            here = pl.ds(n * CHUNK_TOKENS, CHUNK_TOKENS)
            k, before, (since, until, all_of_it) = k_ref[here], S.astype(k_ref.dtype), decays(c_ref[here])
            starts_ref[n] = before
            right = v_ref[here].astype(jnp.float32) - since * dot(k, before)
            errors = dot(t_ref[here], right.astype(k.dtype))
            errors_ref[here] = errors.astype(errors_ref.dtype)
            left = (until * beta_ref[here][:, None] * errors).astype(k.dtype)
            return all_of_it * S + dot(k, left, (0, 0))

        last_ref[...] = lax.fori_loop(0, cut.chunks, step, state_ref[...])

    made, states = [Type(v.shape, v.dtype)], [Type(state.shape, jnp.float32), cut.states(v.dtype)]
    return cut.by_strip(body, "delta_rule_forward", [k, c, beta, t], [v], [state], made, states, warps=4)


def outputs(q, c, beta, p, errors, starts, *, scale: float) -> jax.Array:
    """Return o like the errors; these and starts are of `forward`."""

    def body(q_ref, c_ref, beta_ref, p_ref, errors_ref, starts_ref, o_ref):
        since, *_ = decays(c_ref[...])
        u = times(beta_ref[...][:, None], errors_ref[...])
        o_ref[...] = (scale * (dot(p_ref[...], u) + since * dot(q_ref[...], starts_ref[...]))).astype(o_ref.dtype)

    like, cut = Type(errors.shape, errors.dtype), Cut.of(q, errors)
    [o] = cut.by_columns(body, "delta_rule_outputs", [q, c, beta, p], [errors, starts], [like])
    return o


def reverse(q, k, c, beta, made: Pairs, do, dlast, *, scale: float) -> list[jax.Array]:
    """Return dv, the gradients of the states after every chunk, and of that before the first; the first is like do."""
    cut = Cut.of(k, do)

    def body(q_ref, k_ref, c_ref, beta_ref, p_ref, t_ref, do_ref, dlast_ref, dv_ref, ends_ref, dstate_ref):
        def step(back, dS):
            n = cut.chunks - 1 - back
            here = pl.ds(n * CHUNK_TOKENS, CHUNK_TOKENS)
            k, after, (since, until, all_of_it) = k_ref[here], dS.astype(k_ref.dtype), decays(c_ref[here])
            ends_ref[n] = after
            do = times(scale, do_ref[here])
            du = dot(p_ref[here], do, (0, 0)) + until * dot(k, after)
            dv = dot(t_ref[here], (beta_ref[here][:, None] * du).astype(k.dtype), (0, 0))
            dv_ref[here] = dv.astype(dv_ref.dtype)
            dS = all_of_it * dS + dot(q_ref[here], times(since, do), (0, 0))
            return dS - dot(k, (since * dv).astype(k.dtype), (0, 0))

        dstate_ref[...] = lax.fori_loop(0, cut.chunks, step, dlast_ref[...])

    states = [cut.states(do.dtype), Type(dlast.shape, jnp.float32)]
    whole, wide = [q, k, c, beta, *made], [Type(do.shape, do.dtype)]
    return cut.by_strip(body, "delta_rule_reverse", whole, [do], [dlast], wide, states)


def gradients(q, k, errors, c, beta, made: Pairs, starts, do, dv, ends, *, scale: float) -> list[jax.Array]:
    """Return dq, dk, and dc and dbeta in fp32, given what `forward` and `reverse` return."""
    cut, width = Cut.of(k, errors), _strip_width(errors)
    dp, dl, pairs_dbeta = _pair_gradients(k, errors, c, beta, made.p, do, dv, scale=scale)

    def body(c_ref, beta_ref, errors_ref, do_ref, dv_ref, dp_ref, dl_ref, q_ref, k_ref, starts_ref, ends_ref, *results):
        dq_ref, dk_ref, dc_ref, dbeta_ref = results

        def strip(n, sums):
            (dq, dk, asked), kept = sums
            errors, do, dv, S, dS = load_strip(n, width, errors_ref, do_ref, dv_ref, starts_ref, ends_ref)
            dq, asked = dq + dot(do, S, (1, 1)), asked - dot(dv, S, (1, 1))
            return (dq, dk + dot(errors, dS, (1, 1)), asked), kept + both(S, dS)

        none = jnp.zeros((CHUNK_TOKENS, cut.piece), jnp.float32)
        zeros = (none, none, none), jnp.float32(0)
        (dq, dk, asked), kept = lax.fori_loop(0, cut.values // width, strip, zeros)
        q, k, dp, dl = q_ref[...], k_ref[...], dp_ref[...], dl_ref[...]
        since, until, all_of_it = decays(c_ref[...])
        dq, asked, dk = scale * since * dq + dot(dp, k), since * asked + dot(dl, k), until * dk
        dbeta_ref[...] = along(dk, k)[:, None]
        dk = beta_ref[...][:, None] * dk
        whole = jnp.sum(along(dk, k)) + all_of_it * kept
        dk = dk + dot(dp, q, (0, 0)) + dot(dl, k, (0, 0))
        dq_ref[...], dk_ref[...] = dq.astype(dq_ref.dtype), (asked + dk).astype(dk_ref.dtype)
        dc_ref[...] = (along(dq, q) + along(asked, k) - along(dk, k) + at_last(whole))[:, None]

    shared, keyed = [c, beta, errors, do, dv, dp, dl], [q, k, starts, ends]
    results = [Type(x.shape, x.dtype) for x in (q, k)], [cut.sums_of_pieces()] * 2
    dq, dk, dc, dbeta = cut.by_piece(body, "delta_rule_gradients", shared, keyed, *results)
    return [dq, dk, dc.sum(3), dbeta.sum(3) + pairs_dbeta]


def _pair_gradients(k, errors, c, beta, p, do, dv, *, scale: float) -> list[jax.Array]:
    """Return dP and dL of every chunk, (B, T, H, CHUNK_TOKENS) like k, and dbeta's share of pairs, fp32."""
    width = _strip_width(errors)

    def body(k_ref, c_ref, beta_ref, p_ref, errors_ref, do_ref, dv_ref, dp_ref, dl_ref, dbeta_ref):
        def strip(n, sums):
            (dp, dl), (errors, do, dv) = sums, load_strip(n, width, errors_ref, do_ref, dv_ref)
            return dp + dot(do, errors, (1, 1)), dl - dot(dv, errors, (1, 1))

        none = jnp.zeros((CHUNK_TOKENS, CHUNK_TOKENS), jnp.float32)
        dp, dl = lax.fori_loop(0, errors.shape[3] // width, strip, (none, none))
        k, c, beta = k_ref[...], c_ref[...], beta_ref[...][None, :]
        dp, dl = scale * dp, dl * decays_between(c, lax.gt)
        dbeta_ref[...] = jnp.sum(dp * p_ref[...].astype(jnp.float32) + dl * dot(k, k, (1, 1)), axis=0)
        dp_ref[...] = (dp * decays_between(c, lax.ge) * beta).astype(dp_ref.dtype)
        dl_ref[...] = (dl * beta).astype(dl_ref.dtype)

    square = Type((*k.shape[:3], CHUNK_TOKENS), k.dtype)
    arguments, results = [k, c, beta, p, errors, do, dv], [square, square, Type(c.shape, c.dtype)]
    return Cut.of(k, errors).by_chunk(body, "delta_rule_pair_gradients", 4, arguments, results)


def _strip_width(values) -> int:
    """Return the columns of values that a program for a chunk loads at a time: with two strips fewer loads wait."""
    return math.gcd(values.shape[3], 2 * STRIP_WIDTH)
