"""Matrix states whose key channels decay each by itself, by chunks on tensor cores, in Triton kernels.

    S_t = diag(w_t) S_{t-1} + b_t u_t^T + k_t v_t^T        u_t = S_{t-1}^T a_t        o_t = scale S_t^T q_t

With the state S before a chunk and c_t the sums of its log-decays up to token t, for each channel (arXiv 2312.06635,
section 4; 2510.26692, section 3), and without a, b and U for gated linear attention:

    U = T (Ak V + A S)              Ak_ts = sum_i a_ti k_si exp(c_(t-1)i - c_si), s < t        A_t = a_t exp(c_(t-1))
    O = Pk V + Pb U + Q S           Pk_ts = scale sum_i q_ti k_si exp(c_ti - c_si), s <= t     Q_t = scale q_t exp(c_t)
    S' = exp(c_C) S + K^T V + B^T U         K_t = k_t exp(c_C - c_t)

Ab, Pb and B are Ak, Pk and K of b, and T = (I - Ab)^-1. `products` makes all that has no state in it, `inverses.py` T;
`forward` walks over the chunks with S in registers. The gradients are in `channel_decays_backward.py`.

No exponent is above 0 (but for rounding): in a block of 16 tokens the halves of every 2, 4, 8 and 16 meet through the
decays up to the border between them, and two blocks through those up to the beginning of the later one. So the pairs of
a level, or of two blocks, are one product of weighed queries and keys.

What arrays may be is said in `chunks.py`; log-decays are fp32. A kernel gets pointers to the arrays of both kinds of
queries and keys, (q, a) and (k, b), and touches those of the first kind alone where there are no others.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels import split
from pallas_kernels.triton import tuples
from pallas_kernels.triton.chunks import BLOCK_TOKENS, BLOCKS_PER_CHUNK, Cut, like
from pallas_kernels.triton.launch import Type
from pallas_kernels.triton.tiles import (
    BLOCK,
    CHUNK,
    HIDDEN_EXPONENT,
    at_chunk,
    keys_at,
    places,
    program_of_chunk,
    program_of_strip,
    squares_at,
    state_at,
    store,
    values_at,
    zeros,
)

Arrays = Sequence[jax.Array]
BLOCKS, LEVELS = tl.constexpr(BLOCKS_PER_CHUNK), tl.constexpr(BLOCK_TOKENS.bit_length() - 1)
"""Of a chunk, and at which the tokens of a block meet: level n joins halves of 2^n tokens."""


class Products(NamedTuple):
    """What a call's keys make of the tokens: of (k,), or of (k, b) with the queries (q, a).

    Attributes:
      pairs: Pk, or Pk, Pb, Ak, Ab; (B, T, H, CHUNK_TOKENS).
      queries: Q, or Q, A; (B, T, H, K).
      keys: K, or K, B; (B, T, H, K).
      kept: exp(c_C), (B, H, chunks, K) fp32.
    """

    pairs: Arrays
    queries: Arrays
    keys: Arrays
    kept: jax.Array


def decay_sums(g) -> jax.Array:
    """Return the sums of log-decays g, (B, T, H, K) fp32, from the beginning of each chunk to each token."""
    [c] = Cut.of(g, g).by_chunk(channel_decays_sums, [g], [like(g)])
    return c


@triton.jit
def channel_decays_sums(g, c, cut: tl.constexpr):
    """Add up a chunk's log-decays."""
    _, at, _ = program_of_chunk(cut, 1)
    tl.store(keys_at(c, at, cut), tl.cumsum(tl.load(keys_at(g, at, cut)), axis=0))


def products(queries: Arrays, keys: Arrays, c, *, scale: float) -> Products:
    """Return the products of (q,) or (q, a) and (k,) or (k, b), each (B, T, H, K), with `decay_sums` c like them."""
    cut, kinds = Cut.of(keys[0], keys[0]), len(keys)
    squares = [cut.squares(keys[0].dtype)] * kinds**2
    kept = Type((cut.batch, cut.heads, cut.chunks, cut.keys), jnp.float32)
    results = [*filled(squares, 4), *filled(map(like, queries)), *filled(map(like, keys)), kept]
    arguments, warps = [c, *filled(queries), *filled(keys)], block_warps(cut)
    made = cut.by_chunk(
        channel_decays_products, arguments, results, parts=BLOCKS_PER_CHUNK, warps=warps, kinds=kinds, scale=scale
    )
    found_pairs, found_queries, found_keys, [kept] = split(made, kinds**2, kinds, kinds)
    return Products(found_pairs, found_queries, found_keys, kept)


@triton.jit
def channel_decays_products(
    c, q, a, k, b, Pk, Pb, Ak, Ab, Q, A, K, B, kept, kinds: tl.constexpr, scale: tl.constexpr, cut: tl.constexpr
):
    """Make all of a block: its pairs with the keys up to it, and its queries and keys."""
    number, at, i = program_of_chunk(cut, BLOCKS)
    c, first = c + at * cut.keys, at * cut.keys
    queries, keys = of_kinds(q, a, first, kinds), of_kinds(k, b, first, kinds)
    Qs, Ks = of_kinds(Q, A, first, kinds), of_kinds(K, B, first, kinds)
    squares = tuples.moved((Pk, Pb, Ak, Ab)[: kinds * kinds], at * CHUNK)
    rows = block_rows(i)
    own = channels_of(rows, cut)
    dtype: tl.constexpr = k.dtype.element_ty
    seen, whole = sums_seen(c, rows, kinds, cut), tl.load(c + channels_of(row(CHUNK - 1), cut))
    qs, ks = scaled(scale, floats(queries, own)), floats(keys, own)
    tuples.store(Qs, own, tuples.multiply(qs, tuples.exponentials(seen)))
    tuples.store(Ks, own, tuples.times(ks, tl.exp(whole - seen[0])))
    if i == 0:
        tl.store(kept + number * cut.keys + channels_of(row(0), cut), tl.exp(whole))

    nothing = zeros(BLOCK, BLOCK)
    found = own_pairs(qs, ks) + (nothing, nothing)[: kinds * kinds - kinds]  # a sees no key of its token
    for n in range(LEVELS):
        to_queries, to_keys = weights_of_level(n, c, rows, seen, cut)
        near = tuples.each_pair(weigh(qs, to_queries, dtype), tuples.cast(tuples.times(ks, to_keys), dtype))
        found = tuples.add(found, where_met(n, near))
    tuples.store(squares, pairs_of(rows, i, cut), found)

    border = sums_before(c, row(i * BLOCK), cut)
    near_qs = weigh(qs, weights_since(border, seen), dtype)
    for j in range(0, i):
        theirs = channels_of(block_rows(j), cut)
        near_ks = tuples.times(floats(keys, theirs), tl.exp(border - tl.load(c + theirs)))
        tuples.store(squares, pairs_of(rows, j, cut), tuples.each_pair(near_qs, tuples.cast(near_ks, dtype)))
    for j in range(i + 1, BLOCKS):
        tuples.store(squares, pairs_of(rows, j, cut), (nothing, nothing, nothing, nothing)[: kinds * kinds])


def forward(made: Products, v, state, t=None, *, with_starts: bool) -> list[jax.Array]:
    """Return o like v, with T also U like it, the state after the last token and, where asked for, those before chunks.

    Args:
      v: (B, T, H, V).
      state: (B, H, K, V) fp32.
      t: T, where there are a and b.
    """
    cut, kinds = Cut.of(made.keys[0], v), len(made.keys)
    results = [*filled([like(v)] * kinds), like(state), cut.states(v.dtype) if with_starts else None]
    whole = walk_inputs(made, t)
    return cut.by_strip(channel_decays_forward, whole, [v], [state], results, kinds=kinds, with_starts=with_starts)


@triton.jit
def channel_decays_forward(
    kept, Q, A, K, B, Pk, Pb, Ak, T, v, state, o, u, last, starts,
    kinds: tl.constexpr, with_starts: tl.constexpr, cut: tl.constexpr,
):  # fmt: skip
    """Walk over the chunks with a strip of a state."""
    sequence, column = program_of_strip(cut)
    S = tl.load(state_at(state, sequence, column, cut))
    for n in range(cut.chunks):
        number, at = sequence * cut.chunks + n, at_chunk(sequence, n, cut)
        V, before = tl.load(values_at(v, at, column, cut)), S.to(v.dtype.element_ty)
        if with_starts:
            store(state_at(starts, number, column, cut), before)
        read = tl.dot(tl.load(squares_at(Pk, at, cut)), V)
        read = tl.dot(tl.load(keys_at(Q, at, cut)), before, read)
        S *= tl.load(kept + number * cut.keys + tl.arange(0, cut.keys))[:, None]
        S = tl.dot(tl.trans(tl.load(keys_at(K, at, cut))), V, S)
        if kinds == 2:
            U = tl.dot(tl.load(keys_at(A, at, cut)), before, tl.dot(tl.load(squares_at(Ak, at, cut)), V))
            U = tl.dot(tl.load(squares_at(T, at, cut)), U.to(V.dtype)).to(V.dtype)
            read = tl.dot(tl.load(squares_at(Pb, at, cut)), U, read)
            S = tl.dot(tl.trans(tl.load(keys_at(B, at, cut))), U, S)
            store(values_at(u, at, column, cut), U)
        store(values_at(o, at, column, cut), read)
    store(state_at(last, sequence, column, cut), S)


def walk_inputs(made: Products, t) -> list:
    """Return what a walk needs of every chunk: what is kept, queries, keys, and pairs, T in the place of Ab."""
    return [made.kept, *filled(made.queries), *filled(made.keys), *filled(made.pairs[:3], 3), t]


def filled(xs, count: int = 2) -> list:
    """Return so many, None in the place of what is of no use to a kernel."""
    given = [*xs]
    return given + [None] * (count - len(given))


def block_warps(cut: Cut, most: int = 4) -> int:
    """Return the warps that are fastest for a block of tokens."""
    return min(most, cut.keys // BLOCK_TOKENS)


@triton.jit
def of_kinds(x, y, offset, kinds: tl.constexpr):
    """Return pointers so much further on, for both kinds or for the first alone."""
    return tuples.moved((x, y)[:kinds], offset)


@triton.jit
def block_rows(i):
    """Return the tokens of a block of a chunk."""
    return tl.arange(0, BLOCK) + i * BLOCK


@triton.jit
def row(t):
    """Return a single token of a chunk."""
    return tl.arange(0, 1) + t


@triton.jit
def channels_of(rows, cut: tl.constexpr):
    """Return where the channels of some tokens of a chunk are."""
    return rows[:, None] * (cut.heads * cut.keys) + tl.arange(0, cut.keys)[None, :]


@triton.jit
def pairs_of(rows, j, cut: tl.constexpr):
    """Return where the pairs of some tokens of a chunk with the tokens of a block are."""
    return rows[:, None] * (cut.heads * CHUNK) + block_rows(j)[None, :]


@triton.jit
def sums_seen(c, rows, kinds: tl.constexpr, cut: tl.constexpr):
    """Return the sums of log-decays up to some tokens, for q and keys, and up to those before them, for a."""
    seen = (tl.load(c + channels_of(rows, cut)),)
    if kinds == 2:
        seen += (sums_before(c, rows, cut),)
    return seen


@triton.jit
def sums_before(c, rows, cut: tl.constexpr):
    """Return the sums up to the tokens before those, nothing before the first one of the chunk."""
    return tl.load(c + channels_of(rows - 1, cut), mask=rows[:, None] > 0, other=0.0)


@triton.jit
def weights_of_level(n, c, rows, seen, cut: tl.constexpr):
    """Return the decays through which the first and the second halves of every 2^(n+1) tokens of a block meet.

    Of queries, from the border between the halves to the tokens of q, and to those before them for a; and of keys, from
    their tokens to the border.
    """
    half = 1 << n
    border = tl.load(c + channels_of((rows | (2 * half - 1)) - half, cut))
    second = ((rows & half) > 0)[:, None]
    near = tl.exp(tl.where(second, seen[0] - border, border - seen[0]))
    to_queries = (near,)
    for i in tl.static_range(1, len(seen)):
        to_queries += (tl.exp(tl.where(second, seen[i] - border, HIDDEN_EXPONENT)),)
    return to_queries, near


@triton.jit
def weights_since(border, seen):
    """Return the decays of queries from a border before their tokens on."""
    found = ()
    for i in tl.static_range(len(seen)):
        found += (tl.exp(seen[i] - border),)
    return found


@triton.jit
def where_met(n, squares):
    """Return the pairs of a query and a key of a block that meet at level n, 0 in the place of the others."""
    t, s = places(BLOCK)
    found = ()
    for i in tl.static_range(len(squares)):
        found += (tl.where((((t ^ s) >> n) == 1) & (t > s), squares[i], 0.0),)
    return found


@triton.jit
def own_pairs(qs, ks):
    """Return the pairs of q with the keys of its own token."""
    t, s = places(BLOCK)
    found = ()
    for i in tl.static_range(len(ks)):
        found += (tl.where(t == s, tl.sum(qs[0] * ks[i], axis=1)[:, None], 0.0),)
    return found


@triton.jit
def floats(refs, at):
    """Return what is at those places of all, in fp32."""
    return tuples.cast(tuples.load(refs, at), tl.float32)


@triton.jit
def weigh(xs, weights, dtype: tl.constexpr):
    """Return the products in that dtype, for tensor cores."""
    return tuples.cast(tuples.multiply(xs, weights), dtype)


@triton.jit
def scaled(scale: tl.constexpr, queries):
    """Return (scale q,) or (scale q, a)."""
    found = (scale * queries[0],)
    for i in tl.static_range(1, len(queries)):
        found += (queries[i],)
    return found
