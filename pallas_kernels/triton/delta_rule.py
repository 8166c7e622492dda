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
import triton
import triton.language as tl

from pallas_kernels.triton.chunks import STRIP_WIDTH, Cut, like
from pallas_kernels.triton.inverses import inverses
from pallas_kernels.triton.one_decay import along, at_last, both, decays, decays_between, times
from pallas_kernels.triton.tiles import (
    CHUNK,
    STRIP,
    at_chunk,
    key_piece_at,
    keys_at,
    numbers_at,
    piece_sums_at,
    places,
    program_of_chunk,
    program_of_strip,
    squares_at,
    state_at,
    state_piece_at,
    store,
    values_at,
    zeros,
)


class Pairs(NamedTuple):
    """What the tokens of every chunk are to each other, rows where their tokens are: P and T, (B, T, H, CHUNK_TOKENS).

    In the dtype of keys.
    """

    p: jax.Array
    t: jax.Array

    @classmethod
    def of(cls, q, k, c, beta) -> "Pairs":
        """Return those of queries and keys (B, T, H, K), sums of log-decays and rates (B, T, H) fp32."""
        cut = Cut.of(k, k)
        results = [cut.squares(k.dtype), cut.squares(c.dtype)]
        p, lower = cut.by_chunk(delta_rule_products, [q, k, c, beta], results)
        return cls(p, inverses(lower, k.dtype))


@triton.jit
def delta_rule_products(q_ref, k_ref, c_ref, beta_ref, p_ref, lower_ref, cut: tl.constexpr):
    """Write P in k's dtype and L diag(beta) in fp32."""
    _, at, _ = program_of_chunk(cut, 1)
    q, k = tl.load(keys_at(q_ref, at, cut)), tl.load(keys_at(k_ref, at, cut))
    c, beta = tl.load(numbers_at(c_ref, at, cut)), tl.load(numbers_at(beta_ref, at, cut))
    t, s = places(CHUNK)
    store(squares_at(p_ref, at, cut), tl.dot(q, tl.trans(k)) * decays_between(c, t >= s))
    store(squares_at(lower_ref, at, cut), tl.dot(k, tl.trans(k)) * decays_between(c, t > s) * beta[None, :])


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
    results = [like(v), like(state), cut.states(v.dtype)]
    return cut.by_strip(delta_rule_forward, [k, c, beta, t], [v], [state], results, warps=4)


@triton.jit
def delta_rule_forward(
    k_ref, c_ref, beta_ref, t_ref, v_ref, state_ref, errors_ref, last_ref, starts_ref, cut: tl.constexpr
):
    """Walk over the chunks with a strip of a state."""
    sequence, column = program_of_strip(cut)
    S = tl.load(state_at(state_ref, sequence, column, cut))
    for n in range(cut.chunks):
        at = at_chunk(sequence, n, cut)
        k, v = tl.load(keys_at(k_ref, at, cut)), tl.load(values_at(v_ref, at, column, cut))
        c, beta = tl.load(numbers_at(c_ref, at, cut)), tl.load(numbers_at(beta_ref, at, cut))
        before = S.to(k.dtype)
        since, until, all_of_it = decays(c)
        store(state_at(starts_ref, sequence * cut.chunks + n, column, cut), before)
        right = v.to(tl.float32) - since * tl.dot(k, before)
        errors = tl.dot(tl.load(squares_at(t_ref, at, cut)), right.to(k.dtype))
        store(values_at(errors_ref, at, column, cut), errors)
        left = (until * beta[:, None] * errors).to(k.dtype)
        S = all_of_it * S + tl.dot(tl.trans(k), left)
    store(state_at(last_ref, sequence, column, cut), S)


def outputs(q, c, beta, p, errors, starts, *, scale: float) -> jax.Array:
    """Return o like the errors; these and starts are of `forward`."""
    cut = Cut.of(q, errors)
    arguments = [q, c, beta, p, errors, starts]
    [o] = cut.by_chunk(delta_rule_outputs, arguments, [like(errors)], parts=cut.strips, scale=scale)
    return o


@triton.jit
def delta_rule_outputs(
    q_ref, c_ref, beta_ref, p_ref, errors_ref, starts_ref, o_ref, cut: tl.constexpr, scale: tl.constexpr
):
    """Read a strip of the state before a chunk, and what the chunk has written."""
    number, at, strip = program_of_chunk(cut, cut.strips)
    column = strip * STRIP
    since, _, _ = decays(tl.load(numbers_at(c_ref, at, cut)))
    u = times(tl.load(numbers_at(beta_ref, at, cut))[:, None], tl.load(values_at(errors_ref, at, column, cut)))
    own = tl.dot(tl.load(squares_at(p_ref, at, cut)), u)
    read = tl.dot(tl.load(keys_at(q_ref, at, cut)), tl.load(state_at(starts_ref, number, column, cut)))
    store(values_at(o_ref, at, column, cut), scale * (own + since * read))


def reverse(q, k, c, beta, made: Pairs, do, dlast, *, scale: float) -> list[jax.Array]:
    """Return dv, the gradients of the states after every chunk, and of that before the first; the first is like do."""
    cut = Cut.of(k, do)
    results = [like(do), cut.states(do.dtype), like(dlast)]
    most = 1 if cut.keys <= 128 else 2  # measured on one H200
    return cut.by_strip(
        delta_rule_reverse, [q, k, c, beta, *made], [do], [dlast], results, most_stages=most, scale=scale
    )


@triton.jit
def delta_rule_reverse(
    q_ref,
    k_ref,
    c_ref,
    beta_ref,
    p_ref,
    t_ref,
    do_ref,
    dlast_ref,
    dv_ref,
    ends_ref,
    dstate_ref,
    cut: tl.constexpr,
    scale: tl.constexpr,
):
    """Walk back over the chunks with a strip of the gradient of a state."""
    sequence, column = program_of_strip(cut)
    dS = tl.load(state_at(dlast_ref, sequence, column, cut))
    for n in range(cut.chunks - 1, -1, -1):
        at = at_chunk(sequence, n, cut)
        k, after = tl.load(keys_at(k_ref, at, cut)), dS.to(k_ref.dtype.element_ty)
        c, beta = tl.load(numbers_at(c_ref, at, cut)), tl.load(numbers_at(beta_ref, at, cut))
        since, until, all_of_it = decays(c)
        store(state_at(ends_ref, sequence * cut.chunks + n, column, cut), after)
        do = times(scale, tl.load(values_at(do_ref, at, column, cut)))
        du = tl.dot(tl.trans(tl.load(squares_at(p_ref, at, cut))), do) + until * tl.dot(k, after)
        dv = tl.dot(tl.trans(tl.load(squares_at(t_ref, at, cut))), (beta[:, None] * du).to(k.dtype))
        store(values_at(dv_ref, at, column, cut), dv)
        dS = all_of_it * dS + tl.dot(tl.trans(tl.load(keys_at(q_ref, at, cut))), times(since, do))
        dS -= tl.dot(tl.trans(k), (since * dv).to(k.dtype))
    store(state_at(dstate_ref, sequence, column, cut), dS)


def gradients(q, k, errors, c, beta, made: Pairs, starts, do, dv, ends, *, scale: float) -> list[jax.Array]:
    """Return dq, dk, and dc and dbeta in fp32, given what `forward` and `reverse` return."""
    cut = Cut.of(k, errors)
    width = math.gcd(cut.values, 2 * STRIP_WIDTH)  # of two strips fewer loads wait
    arguments = [k, errors, c, beta, made.p, do, dv]
    results = [cut.squares(k.dtype), cut.squares(k.dtype), like(c)]
    dp, dl, pairs_dbeta = cut.by_chunk(delta_rule_pair_gradients, arguments, results, width=width, scale=scale)
    arguments = [c, beta, errors, do, dv, dp, dl, q, k, starts, ends]
    results, parts = [like(q), like(k), *[cut.sums_of_pieces()] * 2], cut.pieces
    dq, dk, dc, dbeta = cut.by_chunk(delta_rule_gradients, arguments, results, parts=parts, width=width, scale=scale)
    return [dq, dk, dc.sum(3), dbeta.sum(3) + pairs_dbeta]


@triton.jit
def delta_rule_pair_gradients(
    k_ref,
    errors_ref,
    c_ref,
    beta_ref,
    p_ref,
    do_ref,
    dv_ref,
    dp_ref,
    dl_ref,
    dbeta_ref,
    cut: tl.constexpr,
    width: tl.constexpr,
    scale: tl.constexpr,
):
    """Write dP and dL of every chunk, (B, T, H, CHUNK_TOKENS) like k, and dbeta's share of pairs, fp32."""
    _, at, _ = program_of_chunk(cut, 1)
    dp, dl = zeros(CHUNK, CHUNK), zeros(CHUNK, CHUNK)
    for column in range(0, cut.values, width):
        errors = tl.trans(tl.load(values_at(errors_ref, at, column, cut, width)))
        dp += tl.dot(tl.load(values_at(do_ref, at, column, cut, width)), errors)
        dl -= tl.dot(tl.load(values_at(dv_ref, at, column, cut, width)), errors)
    k, c = tl.load(keys_at(k_ref, at, cut)), tl.load(numbers_at(c_ref, at, cut))
    beta = tl.load(numbers_at(beta_ref, at, cut))[None, :]
    t, s = places(CHUNK)
    dp, dl = scale * dp, dl * decays_between(c, t > s)
    p = tl.load(squares_at(p_ref, at, cut)).to(tl.float32)
    store(numbers_at(dbeta_ref, at, cut), tl.sum(dp * p + dl * tl.dot(k, tl.trans(k)), axis=0))
    store(squares_at(dp_ref, at, cut), dp * decays_between(c, t >= s) * beta)
    store(squares_at(dl_ref, at, cut), dl * beta)


@triton.jit
def delta_rule_gradients(
    c_ref,
    beta_ref,
    errors_ref,
    do_ref,
    dv_ref,
    dp_ref,
    dl_ref,
    q_ref,
    k_ref,
    starts_ref,
    ends_ref,
    dq_ref,
    dk_ref,
    dc_ref,
    dbeta_ref,
    cut: tl.constexpr,
    width: tl.constexpr,
    scale: tl.constexpr,
):
    """Sum over columns of values for a chunk's piece of channels of keys."""
    number, at, piece = program_of_chunk(cut, cut.pieces)
    dq, dk, asked = zeros(CHUNK, cut.piece), zeros(CHUNK, cut.piece), zeros(CHUNK, cut.piece)
    kept = 0.0
    for column in range(0, cut.values, width):
        errors = tl.load(values_at(errors_ref, at, column, cut, width))
        do = tl.load(values_at(do_ref, at, column, cut, width))
        dv = tl.load(values_at(dv_ref, at, column, cut, width))
        S = tl.load(state_piece_at(starts_ref, number, piece, column, cut, width))
        dS = tl.load(state_piece_at(ends_ref, number, piece, column, cut, width))
        dq += tl.dot(do, tl.trans(S))
        asked -= tl.dot(dv, tl.trans(S))
        dk += tl.dot(errors, tl.trans(dS))
        kept += both(S, dS)
    q, k = tl.load(key_piece_at(q_ref, at, piece, cut)), tl.load(key_piece_at(k_ref, at, piece, cut))
    dp, dl = tl.load(squares_at(dp_ref, at, cut)), tl.load(squares_at(dl_ref, at, cut))
    since, until, all_of_it = decays(tl.load(numbers_at(c_ref, at, cut)))
    dq, asked, dk = scale * since * dq + tl.dot(dp, k), since * asked + tl.dot(dl, k), until * dk
    store(piece_sums_at(dbeta_ref, at, piece, cut), along(dk, k))
    dk *= tl.load(numbers_at(beta_ref, at, cut))[:, None]
    whole = tl.sum(along(dk, k)) + all_of_it * kept
    dk += tl.dot(tl.trans(dp), q) + tl.dot(tl.trans(dl), k)
    store(key_piece_at(dq_ref, at, piece, cut), dq)
    store(key_piece_at(dk_ref, at, piece, cut), asked + dk)
    store(piece_sums_at(dc_ref, at, piece, cut), along(dq, q) + along(asked, k) - along(dk, k) + at_last(whole))
