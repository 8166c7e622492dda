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
import triton
import triton.language as tl

from pallas_kernels.triton.chunks import Cut, like
from pallas_kernels.triton.tiles import (
    CHUNK,
    HIDDEN_EXPONENT,
    STRIP,
    at_chunk,
    key_piece_at,
    keys_at,
    numbers_at,
    piece_sums_at,
    places,
    program_of_chunk,
    program_of_strip,
    state_at,
    state_piece_at,
    store,
    values_at,
    zeros,
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
    results = [like(v), like(state), cut.states(v.dtype) if with_starts else None]
    return cut.by_strip(
        one_decay_forward, [q, k, c], [v], [state], results, warps=4, scale=scale, with_starts=with_starts
    )


@triton.jit
def one_decay_forward(
    q_ref,
    k_ref,
    c_ref,
    v_ref,
    state_ref,
    o_ref,
    last_ref,
    starts_ref,
    cut: tl.constexpr,
    scale: tl.constexpr,
    with_starts: tl.constexpr,
):
    """Walk over the chunks with a strip of a state."""
    sequence, column = program_of_strip(cut)
    S = tl.load(state_at(state_ref, sequence, column, cut))
    for n in range(cut.chunks):
        at = at_chunk(sequence, n, cut)
        q, k = tl.load(keys_at(q_ref, at, cut)), tl.load(keys_at(k_ref, at, cut))
        c, v = tl.load(numbers_at(c_ref, at, cut)), tl.load(values_at(v_ref, at, column, cut))
        before = S.to(q.dtype)
        since, until, all_of_it = decays(c)
        if with_starts:
            store(state_at(starts_ref, sequence * cut.chunks + n, column, cut), before)
        t, s = places(CHUNK)
        p = (tl.dot(q, tl.trans(k)) * decays_between(c, t >= s)).to(q.dtype)
        store(values_at(o_ref, at, column, cut), scale * (tl.dot(p, v) + since * tl.dot(q, before)))
        S = all_of_it * S + tl.dot(tl.trans(k), times(until, v))
    store(state_at(last_ref, sequence, column, cut), S)


def reverse(q, k, c, do, dlast, *, scale: float) -> list[jax.Array]:
    """Return dv, the gradients of the states after every chunk, and of that before the first; the first is like do."""
    cut = Cut.of(k, do)
    results = [like(do), cut.states(do.dtype), like(dlast)]
    return cut.by_strip(one_decay_reverse, [q, k, c], [do], [dlast], results, warps=4, scale=scale)


@triton.jit
def one_decay_reverse(
    q_ref, k_ref, c_ref, do_ref, dlast_ref, dv_ref, ends_ref, dstate_ref, cut: tl.constexpr, scale: tl.constexpr
):
    """Walk back over the chunks with a strip of the gradient of a state."""
    sequence, column = program_of_strip(cut)
    dS = tl.load(state_at(dlast_ref, sequence, column, cut))
    for n in range(cut.chunks - 1, -1, -1):
        at = at_chunk(sequence, n, cut)
        q, k = tl.load(keys_at(q_ref, at, cut)), tl.load(keys_at(k_ref, at, cut))
        c, do = tl.load(numbers_at(c_ref, at, cut)), times(scale, tl.load(values_at(do_ref, at, column, cut)))
        after = dS.to(q.dtype)
        since, until, all_of_it = decays(c)
        store(state_at(ends_ref, sequence * cut.chunks + n, column, cut), after)
        s, t = places(CHUNK)
        p = (tl.dot(k, tl.trans(q)) * decays_between(-c, s <= t)).to(q.dtype)  # transposed
        store(values_at(dv_ref, at, column, cut), tl.dot(p, do) + until * tl.dot(k, after))
        dS = all_of_it * dS + tl.dot(tl.trans(q), times(since, do))
    store(state_at(dstate_ref, sequence, column, cut), dS)


def gradients(q, k, v, c, starts, do, ends, *, scale: float) -> list[jax.Array]:
    """Return dq, dk, and dc in fp32, given the states before every chunk and the gradients of those after it."""
    cut = Cut.of(k, v)
    results = [like(q), like(k), cut.sums_of_pieces()]
    arguments = [c, v, do, q, k, starts, ends]
    dq, dk, dc = cut.by_chunk(one_decay_gradients, arguments, results, parts=cut.pieces, scale=scale)
    return [dq, dk, dc.sum(3)]


@triton.jit
def one_decay_gradients(
    c_ref,
    v_ref,
    do_ref,
    q_ref,
    k_ref,
    starts_ref,
    ends_ref,
    dq_ref,
    dk_ref,
    dc_ref,
    cut: tl.constexpr,
    scale: tl.constexpr,
):
    """Sum over strips of values for a chunk's piece of channels of keys."""
    number, at, piece = program_of_chunk(cut, cut.pieces)
    dp, kept = zeros(CHUNK, CHUNK), 0.0
    dq, dk = zeros(CHUNK, cut.piece), zeros(CHUNK, cut.piece)
    for strip in range(cut.strips):
        column = strip * STRIP
        v, do = tl.load(values_at(v_ref, at, column, cut)), tl.load(values_at(do_ref, at, column, cut))
        S = tl.load(state_piece_at(starts_ref, number, piece, column, cut))
        dS = tl.load(state_piece_at(ends_ref, number, piece, column, cut))
        dp += tl.dot(do, tl.trans(v))
        dq += tl.dot(do, tl.trans(S))
        dk += tl.dot(v, tl.trans(dS))
        kept += both(S, dS)
    q, k = tl.load(key_piece_at(q_ref, at, piece, cut)), tl.load(key_piece_at(k_ref, at, piece, cut))
    c = tl.load(numbers_at(c_ref, at, cut))  # loaded only here, for the registers
    since, until, all_of_it = decays(c)
    t, s = places(CHUNK)
    dp = (scale * dp * decays_between(c, t >= s)).to(q.dtype)
    dq, dk = scale * since * dq + tl.dot(dp, k), until * dk
    whole = tl.sum(along(dk, k)) + all_of_it * kept
    dk += tl.dot(tl.trans(dp), q)
    store(key_piece_at(dq_ref, at, piece, cut), dq)
    store(key_piece_at(dk_ref, at, piece, cut), dk)
    store(piece_sums_at(dc_ref, at, piece, cut), along(dq, q) - along(dk, k) + at_last(whole))


@triton.jit
def times(factor, x):
    """Return the product in x's dtype."""
    return (factor * x.to(tl.float32)).to(x.dtype)


@triton.jit
def decays_between(c, seen):
    """Return exp(c_t - c_s) of the pairs of tokens that are seen, 0 of the others."""
    return tl.exp(tl.where(seen, c[:, None] - c[None, :], HIDDEN_EXPONENT))


@triton.jit
def decays(c):
    """Return what each token sees of the state before the chunk, what is left of each at its end, and of that state."""
    whole = tl.sum(at_last(c))
    return tl.exp(c)[:, None], tl.exp(whole - c)[:, None], tl.exp(whole)


@triton.jit
def both(x, y):
    """Return the sum of their elements' products."""
    return tl.sum(x.to(tl.float32) * y.to(tl.float32))


@triton.jit
def along(x, channels):
    """Return each token's product of a gradient with what it is of."""
    return tl.sum(x * channels.to(tl.float32), axis=1)


@triton.jit
def at_last(x):
    """Return x at the last token of a chunk, 0 at the others."""
    return tl.where(tl.arange(0, CHUNK) == CHUNK - 1, x, 0.0)
