"""The gradients of Taylor linear attention by chunks, in Triton kernels, in the letters of `taylor.py`.

With S and h before a chunk, and R and g after it:

    dp_ts = (do_t.v_s - delta_t) / z_t                   ds_ts = dp_ts (1 + s_ts)
    dq_t = c sum_s ds_ts k_s + F'(q_t)^T w (S do_t - h delta_t) / z_t
    dk_s = c sum_t ds_ts q_t + F'(k_s)^T (R v_s + g)
    dv_s = sum_t p_ts do_t / z_t + R^T F(k_s)

`query_gradients` takes the first, `key_gradients` the others: one kernel of all has not the registers.
"""

import jax
import triton
import triton.language as tl

from pallas_kernels.triton.chunks import CHUNK_WARPS, like
from pallas_kernels.triton.launch import launch
from pallas_kernels.triton.taylor import (
    PIECE_STAGES,
    Cut,
    Documents,
    held_about,
    load_documents,
    load_keys,
    load_numbers,
    load_values,
    scores,
    state_at,
    state_is_there,
    store_keys,
    store_values,
    sums_at,
    visible,
)
from pallas_kernels.triton.taylor_features import CHANNELS, PIECES, factors, pulled_back, weights
from pallas_kernels.triton.tiles import CHUNK, program_of_chunk, zeros


def query_gradients(q, k, v, do, documents: Documents, back: tuple, starts: tuple, *, scale: float) -> list[jax.Array]:
    """Return dq.

    Args:
      do: like v.
      back: 1 / z and delta, (B, T, H) fp32.
      starts: S and h before every chunk.
    """
    cut, arguments = Cut.of(k, v), [q, k, v, do, *documents, *back, *starts]
    options = {"cut": cut, "scale": scale}
    programs, results = cut.heads * cut.chunks, [like(q)]
    return launch(
        taylor_query_gradients, programs, arguments, results, warps=CHUNK_WARPS, stages=PIECE_STAGES, **options
    )


@triton.jit
def taylor_query_gradients(
    q_ref,
    k_ref,
    v_ref,
    do_ref,
    numbers_ref,
    held_ref,
    share_ref,
    delta_ref,
    starts_ref,
    start_sums_ref,
    dq_ref,
    cut: tl.constexpr,
    scale: tl.constexpr,
):
    """Sum over strips of values and pieces of features for a chunk of queries."""
    number, at, _ = program_of_chunk(cut, 1)
    sequence, n = number // cut.chunks, number % cut.chunks
    documents = load_documents(numbers_ref, sequence, n, cut)
    before, _ = held_about(held_ref, sequence, n, cut)
    q, k = load_keys(q_ref, at, n, cut), load_keys(k_ref, at, n, cut)
    share, delta = load_numbers(share_ref, at, n, cut), load_numbers(delta_ref, at, n, cut)
    dq, read = zeros(CHUNK, CHANNELS), tl.where(documents == before, share, 0.0)
    for strip in range(cut.strips):
        do = load_values(do_ref, at, n, strip, cut)
        first = tl.where(strip == 0, delta, 0.0)
        for piece in range(PIECES):
            S = tl.load(state_at(starts_ref, number, piece, strip, cut), mask=state_is_there(strip, cut), other=0.0)
            h = tl.load(sums_at(start_sums_ref, number, piece))
            du = weights(piece, scale) * (tl.dot(do, tl.trans(S)) - first[:, None] * h[None, :])
            dq += pulled_back(q, read[:, None] * du, piece)
    dp = share[:, None] * (value_products(do_ref, v_ref, at, n, cut) - delta[:, None])
    ds = score_gradients(q, k, dp, documents, scale, of_keys=False)
    store_keys(dq_ref, at, n, tl.dot(ds, k, dq), cut)


def key_gradients(q, k, v, do, documents: Documents, back: tuple, ends: tuple, *, scale: float) -> list[jax.Array]:
    """Return dk and dv, given R and g after every chunk; the rest is as above."""
    cut, arguments = Cut.of(k, v), [q, k, v, do, *documents, *back, *ends]
    options = {"cut": cut, "scale": scale}
    programs, results = cut.heads * cut.chunks, [like(k), like(v)]
    return launch(taylor_key_gradients, programs, arguments, results, warps=CHUNK_WARPS, stages=PIECE_STAGES, **options)


@triton.jit
def taylor_key_gradients(
    q_ref,
    k_ref,
    v_ref,
    do_ref,
    numbers_ref,
    held_ref,
    share_ref,
    delta_ref,
    ends_ref,
    end_sums_ref,
    dk_ref,
    dv_ref,
    cut: tl.constexpr,
    scale: tl.constexpr,
):
    """Sum over strips of values and pieces of features for a chunk of keys and values."""
    number, at, _ = program_of_chunk(cut, 1)
    sequence, n = number // cut.chunks, number % cut.chunks
    documents = load_documents(numbers_ref, sequence, n, cut)
    _, after = held_about(held_ref, sequence, n, cut)
    written = (documents == after).to(tl.float32)[:, None]
    q, k = load_keys(q_ref, at, n, cut), load_keys(k_ref, at, n, cut)
    share, delta = load_numbers(share_ref, at, n, cut), load_numbers(delta_ref, at, n, cut)
    dk = zeros(CHUNK, CHANNELS)
    for strip in range(cut.strips):
        v, do = load_values(v_ref, at, n, strip, cut), load_values(do_ref, at, n, strip, cut)
        dv = zeros(CHUNK, cut.width)
        for piece in range(PIECES):
            R = tl.load(state_at(ends_ref, number, piece, strip, cut), mask=state_is_there(strip, cut), other=0.0)
            g = tl.load(sums_at(end_sums_ref, number, piece))
            a, b = factors(k, piece)
            dv = tl.dot((written * a * b).to(R.dtype), R, dv)
            du = tl.dot(v, tl.trans(R)) + tl.where(strip == 0, g, 0.0)[None, :]
            dk += pulled_back(k, written * du, piece)
        p = scores(k, q, documents, scale, of_keys=True) * share[None, :]
        store_values(dv_ref, at, n, strip, tl.dot(p.to(do.dtype), do, dv), cut)
    dp = share[None, :] * (value_products(v_ref, do_ref, at, n, cut) - delta[None, :])
    ds = score_gradients(k, q, dp, documents, scale, of_keys=True)
    store_keys(dk_ref, at, n, tl.dot(ds, q, dk), cut)


@triton.jit
def value_products(a_ref, b_ref, at, n, cut: tl.constexpr):
    """Return the products of each of a chunk's rows of (B, T, H, V) with each of another array's."""
    found = zeros(CHUNK, CHUNK)
    for strip in range(cut.strips):
        a, b = load_values(a_ref, at, n, strip, cut), load_values(b_ref, at, n, strip, cut)
        found = tl.dot(a, tl.trans(b), found)
    return found


@triton.jit
def score_gradients(a, b, dp, documents, scale: tl.constexpr, of_keys: tl.constexpr):
    """Return c ds in the dtype of queries a and keys b, or of keys and queries, as `scores`."""
    s = scale * tl.dot(a, tl.trans(b))
    return tl.where(visible(documents, of_keys), scale * dp * (1.0 + s), 0.0).to(a.dtype)
