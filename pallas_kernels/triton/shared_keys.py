"""Gradients of queries and keys that several heads share, as Mamba-2's C and B are (see `one_decay.py`).

Each head h has values, decays and states of its own. With dP_h = dO_h V_h^T w_h for the pairs t >= s of a chunk:

    dQ = sum_h diag(exp c_h) dO_h S_h^T + (sum_h dP_h) K
    dK = sum_h diag(exp(c_hC - c_h)) V_h dS_h'^T + (sum_h dP_h)^T Q

and dc_h is that of one head, where q . (dP_h K) and k . (dP_h^T Q) are the sums of dP_h Q K^T over rows and columns. So
K and Q are multiplied once for all heads of a program.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels.triton.chunks import Cut
from pallas_kernels.triton.launch import Type, launch
from pallas_kernels.triton.one_decay import along, at_last, both, decays, decays_between
from pallas_kernels.triton.tiles import (
    CHUNK,
    STRIP,
    key_piece_at,
    numbers_at,
    piece_sums_at,
    places,
    state_piece_at,
    store,
    tile,
    values_at,
    zeros,
)

MAX_PROGRAM_HEADS, PROGRAM_WARPS, STAGES = 8, 8, 1
"""What a program makes of its heads XLA adds to that of others; in fewer warps its sums do not fit the registers."""


def gradients(q, k, v, c, starts, do, ends, *, scale: float) -> list[jax.Array]:
    """Return dq and dk of G groups of heads, and dc in fp32.

    Args:
      q, k: (B, T, G, K).
      v, do: (B, T, H, V).
      c: (B, T, H) fp32, sums of log-decays since the beginning of the chunk.
      starts, ends: (B, H, chunks, K, V), the states before every chunk and the gradients of those after it.
    """
    cut = Cut.of(k, v)
    heads = math.gcd(cut.heads // cut.groups, MAX_PROGRAM_HEADS)
    parts = cut.heads // heads
    made = Type((cut.batch, cut.time, parts, cut.keys), q.dtype)
    options: dict[str, Any] = {"warps": PROGRAM_WARPS, "stages": STAGES, "cut": cut, "heads": heads, "scale": scale}
    results = [made, made, cut.sums_of_pieces()]
    arguments, programs = [c, v, do, q, k, starts, ends], cut.chunks * parts * cut.pieces
    dq, dk, dc = launch(shared_keys_gradients, programs, arguments, results, **options)
    dq, dk = (_sum_over_programs(x, cut.groups) for x in (dq, dk))
    return [dq, dk, dc.sum(3)]


def _sum_over_programs(x, groups: int) -> jax.Array:
    """Return the sums (B, T, G, K) of what the programs of each group have made."""
    return x.astype(jnp.float32).reshape(*x.shape[:2], groups, -1, x.shape[3]).sum(3).astype(x.dtype)


@triton.jit
def shared_keys_gradients(
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
    heads: tl.constexpr,
    scale: tl.constexpr,
):
    """Sum over heads for a chunk's piece of channels of keys; programs of the same tokens follow each other."""
    i, parts = tl.program_id(0), cut.heads // heads
    piece, part, number = i % cut.pieces, i // cut.pieces % parts, (i // (cut.pieces * parts)).to(tl.int64)
    tokens = number // cut.chunks * cut.time + number % cut.chunks * CHUNK
    first = tokens * cut.heads + part * heads
    q, k = tl.load(key_piece_at(q_ref, first, piece, cut)), tl.load(key_piece_at(k_ref, first, piece, cut))
    products = tl.dot(q, tl.trans(k))
    t, s = places(CHUNK)
    pairs, dq, dk = zeros(CHUNK, CHUNK), zeros(CHUNK, cut.piece), zeros(CHUNK, cut.piece)
    for head in range(heads):
        at = first + head
        state = (number // cut.chunks * cut.heads + part * heads + head) * cut.chunks + number % cut.chunks
        dp, read, written, kept = over_strips(v_ref, do_ref, starts_ref, ends_ref, at, state, piece, cut)
        c = tl.load(numbers_at(c_ref, at, cut))
        since, until, all_of_it = decays(c)
        dp, read, written = scale * dp * decays_between(c, t >= s), scale * since * read, until * written
        weighed, of_end = dp * products, along(written, k)
        of_pairs = tl.sum(weighed, axis=1) - tl.sum(weighed, axis=0)
        dc = along(read, q) + of_pairs - of_end + at_last(tl.sum(of_end) + all_of_it * kept)
        store(piece_sums_at(dc_ref, at, piece, cut), dc)
        pairs += dp
        dq += read
        dk += written
    pairs = pairs.to(q.dtype)
    here = (tokens * parts + part) * cut.keys + piece * cut.piece
    store(tile(dq_ref + here, CHUNK, cut.piece, parts * cut.keys), dq + tl.dot(pairs, k))
    store(tile(dk_ref + here, CHUNK, cut.piece, parts * cut.keys), dk + tl.dot(tl.trans(pairs), q))


@triton.jit
def over_strips(v_ref, do_ref, starts_ref, ends_ref, at, state, piece, cut: tl.constexpr):
    """Return dO V^T, dO S^T, V dS^T and S . dS of a head."""
    dp, kept = zeros(CHUNK, CHUNK), 0.0
    read, written = zeros(CHUNK, cut.piece), zeros(CHUNK, cut.piece)
    for strip in range(cut.strips):
        column = strip * STRIP
        v, do = tl.load(values_at(v_ref, at, column, cut)), tl.load(values_at(do_ref, at, column, cut))
        S = tl.load(state_piece_at(starts_ref, state, piece, column, cut))
        dS = tl.load(state_piece_at(ends_ref, state, piece, column, cut))
        dp += tl.dot(do, tl.trans(v))
        read += tl.dot(do, tl.trans(S))
        written += tl.dot(v, tl.trans(dS))
        kept += both(S, dS)
    return dp, read, written, kept
