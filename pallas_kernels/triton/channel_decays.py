"""Matrix states whose key channels decay each by itself, by chunks on tensor cores, in Pallas' Triton kernels.

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
a level, or of two blocks, are one product of weighed queries and keys (`Meeting`).
What arrays may be is said in `chunks.py`; log-decays are fp32.
"""

import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import split
from pallas_kernels.triton.pallas_chunks import (
    BLOCK_TOKENS,
    BLOCKS_PER_CHUNK,
    CHUNK_TOKENS,
    HIDDEN_EXPONENT,
    Cut,
    Type,
    dot,
    pairs,
    part,
    places,
)

Arrays = Sequence[jax.Array]
BLOCK_LEVELS = BLOCK_TOKENS.bit_length() - 1
"""At which the tokens of a block meet: level n joins halves of 2^n tokens."""


class Products(NamedTuple):
    """What a call's keys make of the tokens: of (k,), or of (k, b) with the queries (q, a).

    Attributes:
      pairs: Pk, or Pk, Pb, Ak, Ab; (B, T, H, CHUNK_TOKENS).
      queries: Q, or Q, A; (B, T, H, K).
      keys: K, or K, B; (B, T, H, K).
      kept: exp(c_C), (B, chunks, H, K) fp32.
    """

    pairs: Arrays
    queries: Arrays
    keys: Arrays
    kept: jax.Array


def _types(queries: Arrays, keys: Arrays) -> list[Type]:
    """Return the types of (pairs, queries, keys)."""
    square = Type((*keys[0].shape[:3], CHUNK_TOKENS), keys[0].dtype)
    return [square] * (len(queries) * len(keys)) + [Type(x.shape, x.dtype) for x in (*queries, *keys)]


class Meeting(NamedTuple):
    """Decays of queries and keys that meet at a border between their tokens, (BLOCK_TOKENS, K) each.

    Attributes:
      queries: from the border to the tokens of q, and to those before them for a.
      keys: from their tokens to the border.
    """

    queries: list[jax.Array]
    keys: jax.Array

    @classmethod
    def at(cls, border, seen: Arrays, written) -> "Meeting":
        """Return that of two blocks; the border is the sum of log-decays up to the token before the later one."""
        return cls([jnp.exp(c - border[None]) for c in seen], jnp.exp(border[None] - written))

    @classmethod
    def of_level(cls, n, c_ref, block, seen: Arrays) -> "Meeting":
        """Return that of level n in a block: of the second and the first halves of every 2^(n+1) tokens."""
        row = block * BLOCK_TOKENS + lax.iota(jnp.int32, BLOCK_TOKENS)
        half = lax.shift_left(jnp.int32(1), n.astype(jnp.int32))
        border, second = c_ref[(row | (2 * half - 1)) - half], (row & half)[:, None] > 0
        near = jnp.exp(jnp.where(second, seen[0] - border, border - seen[0]))
        before = [jnp.exp(jnp.where(second, c - border, HIDDEN_EXPONENT)) for c in seen[1:]]
        return cls([near, *before], near)


def sums_seen(c_ref, block, count: int) -> list[jax.Array]:
    """Return the sums of log-decays up to a block's tokens, for q and keys, and up to those before them, for a."""
    return [c_ref[block_rows(block)], sum_before(c_ref, block * BLOCK_TOKENS + lax.iota(jnp.int32, BLOCK_TOKENS))][
        :count
    ]


def sum_before(c_ref, row) -> jax.Array:
    """Return the sums up to the tokens before those, nothing before the first one of the chunk."""
    return jnp.where(row[..., None] > 0, c_ref[jnp.maximum(row - 1, 0)], 0.0)


def meet_at(n) -> jax.Array:
    """Return which pairs of a query and a key of a block meet at level n."""
    t, s = places(BLOCK_TOKENS)
    return (lax.shift_right_logical(t ^ s, n.astype(jnp.int32)) == 1) & (t > s)


def decay_sums(g) -> jax.Array:
    """Return the sums of log-decays g, (B, T, H, K) fp32, from the beginning of each chunk to each token."""

    def body(g_ref, c_ref):
        c_ref[...] = jnp.cumsum(g_ref[...], axis=0)

    [c] = Cut.of(g, g).by_chunk(body, "channel_decays_sums", 4, [g], [Type(g.shape, g.dtype)])
    return c


def products(queries: Arrays, keys: Arrays, c, *, scale: float) -> Products:
    """Return the products of (q,) or (q, a) and (k,) or (k, b), each (B, T, H, K), with `decay_sums` c like them."""
    cut, count, dtype = Cut.of(keys[0], keys[0]), len(queries), keys[0].dtype

    def body(c_ref, *refs):
        q_refs, k_refs, pair_refs, Q_refs, K_refs, [kept_ref] = split(refs, count, count, count**2, count, count)
        i = part(BLOCKS_PER_CHUNK)
        own, seen, whole = block_rows(i), sums_seen(c_ref, i, count), c_ref[CHUNK_TOKENS - 1]
        qs, ks = scaled(scale, load(q_refs, own)), load(k_refs, own)
        store(Q_refs, own, map(jnp.multiply, qs, map(jnp.exp, seen)))
        store(K_refs, own, [k * jnp.exp(whole[None] - seen[0]) for k in ks])

        @pl.when(i == 0)
        def _():
            kept_ref[...] = jnp.exp(whole)

        def level(n, squares):
            weights = Meeting.of_level(n, c_ref, i, seen)
            weighed = each_pair(weigh(qs, weights.queries, dtype), weigh(ks, [weights.keys] * count, dtype))
            return add(squares, [jnp.where(meet_at(n), dot(q, k, (1, 1)), 0.0) for q, k in weighed])

        nothing = jnp.zeros((BLOCK_TOKENS, BLOCK_TOKENS), jnp.float32)
        own_keys = [jnp.where(pairs(BLOCK_TOKENS, lax.eq), jnp.sum(qs[0] * k, axis=1)[:, None], 0.0) for k in ks]
        squares = [*own_keys, *[nothing] * (count**2 - count)]  # a sees no key of its token
        store(pair_refs, (own, own), lax.fori_loop(0, BLOCK_LEVELS, level, squares))
        border = sum_before(c_ref, i * BLOCK_TOKENS)

        @pl.loop(0, i)
        def _(j):
            weights = Meeting.at(border, seen, c_ref[block_rows(j)])
            theirs = weigh(load(k_refs, block_rows(j)), [weights.keys] * count, dtype)
            weighed = each_pair(weigh(qs, weights.queries, dtype), theirs)
            store(pair_refs, (own, block_rows(j)), [dot(q, k, (1, 1)) for q, k in weighed])

        @pl.loop(i + 1, BLOCKS_PER_CHUNK)
        def _(j):
            store(pair_refs, (own, block_rows(j)), [nothing] * count**2)

    results = [*_types(queries, keys), Type((cut.batch, cut.chunks, cut.heads, cut.keys), jnp.float32)]
    arguments = [c, *queries, *keys]
    made = cut.by_chunk(body, "channel_decays_products", block_warps(cut), arguments, results, BLOCKS_PER_CHUNK)
    found_pairs, found_queries, found_keys, [kept] = split(made, count**2, count, count)
    return Products(found_pairs, found_queries, found_keys, kept)


def forward(made: Products, v, state, t=None, *, with_starts: bool) -> list[jax.Array]:
    """Return o like v, with T also U like it, the state after the last token and, where asked for, those before chunks.

    Args:
      v: (B, T, H, V).
      state: (B, H, K, V) fp32.
      t: T, where there are a and b.
    """
    cut, given = Cut.of(made.keys[0], v), walk_inputs(made, t)
    count = len(made.keys)

    def body(kept_ref, *refs):
        *walked, [v_ref, state_ref], result_refs, [last_ref], starts_refs = split(refs, *map(len, given), 2, count, 1)

        def step(n, S):
            here = pl.ds(n * CHUNK_TOKENS, CHUNK_TOKENS)
            (Q, *A), (K, *B), (Pk, *corrections) = ([ref[here] for ref in some] for some in walked)
            v, before = v_ref[here], S.astype(v_ref.dtype)
            for ref in starts_refs:
                ref[n] = before
            read = [dot(Pk, v) + dot(Q, before)]
            S = kept_ref[n][:, None] * S + dot(K, v, (0, 0))
            if corrections:
                Pb, Ak, T = corrections
                u = dot(T, (dot(Ak, v) + dot(A[0], before)).astype(v.dtype)).astype(v.dtype)
                read = [read[0] + dot(Pb, u), u]
                S = S + dot(B[0], u, (0, 0))
            store(result_refs, here, read)
            return S

        last_ref[...] = lax.fori_loop(0, cut.chunks, step, state_ref[...])

    whole, wide = [made.kept, *itertools.chain(*given)], [Type(v.shape, v.dtype)] * count
    states = [Type(state.shape, jnp.float32), *[cut.states(v.dtype)] * with_starts]
    return cut.by_strip(body, "channel_decays_forward", whole, [v], [state], wide, states)


def walk_inputs(made: Products, t) -> list[list[jax.Array]]:
    """Return what a walk needs of every chunk: queries, keys, and pairs, T in the place of Ab."""
    return [[*made.queries], [*made.keys], [*made.pairs[:3], *([] if t is None else [t])]]


def block_warps(cut: Cut, most: int = 4) -> int:
    """Return the warps that are fastest for a block of tokens."""
    return min(most, cut.keys // BLOCK_TOKENS)


def block_rows(i) -> pl.Slice:
    """Return the rows of a block of tokens."""
    return pl.ds(i * BLOCK_TOKENS, BLOCK_TOKENS)


def load(refs: Sequence, here) -> list[jax.Array]:
    """Return those parts of all in fp32."""
    return [ref[here].astype(jnp.float32) for ref in refs]


def store(refs: Sequence, here, values: Iterable[jax.Array]) -> None:
    """Store those parts of all in their dtypes."""
    for ref, x in zip(refs, values, strict=True):
        ref[here] = x.astype(ref.dtype)


def weigh(xs: Arrays, weights: Arrays, dtype) -> list[jax.Array]:
    """Return the products in that dtype, for tensor cores."""
    return [(x * weight).astype(dtype) for x, weight in zip(xs, weights, strict=True)]


def scaled(scale: float, queries: Arrays) -> list[jax.Array]:
    """Return (scale q,) or (scale q, a)."""
    return [scale * queries[0], *queries[1:]]


def add(xs: Iterable[jax.Array], ys: Iterable[jax.Array]) -> list[jax.Array]:
    """Return the sums of both, one by one."""
    return [x + y for x, y in zip(xs, ys, strict=True)]


def each_pair(queries: Arrays, keys: Arrays) -> list[tuple]:
    """Return the pairs of queries and keys, in the order of `Products.pairs`."""
    return [(q, k) for q in queries for k in keys]
