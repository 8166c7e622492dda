"""Matrix states whose key channels decay each by itself, by chunks on tensor cores, in Pallas' Triton kernels.

    S_t = diag(w_t) S_{t-1} + b_t u_t^T + k_t v_t^T        u_t = S_{t-1}^T a_t        o_t = scale S_t^T q_t

With the state S before a chunk and c_t the sums of its log-decays up to token t, for each channel (arXiv 2312.06635,
section 4; 2510.26692, section 3), and without a, b and U for gated linear attention:

    U = T (Ak V + A S)              Ak_ts = sum_i a_ti k_si exp(c_(t-1)i - c_si), s < t        A_t = a_t exp(c_(t-1))
    O = Pk V + Pb U + Q S           Pk_ts = scale sum_i q_ti k_si exp(c_ti - c_si), s <= t     Q_t = scale q_t exp(c_t)
    S' = exp(c_C) S + K^T V + B^T U         K_t = k_t exp(c_C - c_t)

Ab, Pb and B are Ak, Pk and K of b, and T = (I - Ab)^-1. `products` makes all that has no state in it, `inverses` T;
`forward` walks over the chunks with S in registers, `reverse` back with its gradient. The gradients of products come
from `pair_gradients` and `state_gradients`, those of q, k, a, b and c from `token_gradients`:

    dU = Pb^T dO + B dS'     Y = T^T dU     dV = Pk^T dO + K dS' + Ak^T Y     dS = exp(c_C) dS' + Q^T dO + A^T Y

No exponent is above 0 (but for rounding): in a block of 16 tokens the halves of every 2, 4, 8 and 16 meet through the
decays up to the border between them, and two blocks through those up to the beginning of the later one. So the pairs of
a level, or of two blocks, are one product of weighed queries and keys (`_Meeting`).
What arrays may be is said in `chunks_triton.py`; log-decays are fp32.
"""

import functools
import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import split
from pallas_kernels.chunks_triton import BLOCK, BLOCKS, CHUNK, NEVER, WIDTH, Cut, Type, dot, invert, pairs, part, places

Arrays = Sequence[jax.Array]

LEVELS = BLOCK.bit_length() - 1
"""At which the tokens of a block meet: level n joins halves of 2^n tokens."""


class Products(NamedTuple):
    """What a call's keys make of the tokens: of (k,), or of (k, b) with the queries (q, a).

    Attributes:
      pairs: Pk, or Pk, Pb, Ak, Ab; (B, T, H, CHUNK).
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
    square = Type((*keys[0].shape[:3], CHUNK), keys[0].dtype)
    return [square] * (len(queries) * len(keys)) + [Type(x.shape, x.dtype) for x in (*queries, *keys)]


class _Meeting(NamedTuple):
    """Decays of queries and keys that meet at a border between their tokens, (BLOCK, K) each.

    Attributes:
      queries: from the border to the tokens of q, and to those before them for a.
      keys: from their tokens to the border.
    """

    queries: list[jax.Array]
    keys: jax.Array

    @classmethod
    def at(cls, border, seen: Arrays, written) -> "_Meeting":
        """Return that of two blocks; the border is the sum of log-decays up to the token before the later one."""
        return cls([jnp.exp(c - border[None]) for c in seen], jnp.exp(border[None] - written))

    @classmethod
    def of_level(cls, n, c_ref, block, seen: Arrays) -> "_Meeting":
        """Return that of level n in a block: of the second and the first halves of every 2^(n+1) tokens."""
        row = block * BLOCK + lax.iota(jnp.int32, BLOCK)
        half = lax.shift_left(jnp.int32(1), n.astype(jnp.int32))
        border, second = c_ref[(row | (2 * half - 1)) - half], (row & half)[:, None] > 0
        near = jnp.exp(jnp.where(second, seen[0] - border, border - seen[0]))
        before = [jnp.exp(jnp.where(second, c - border, NEVER)) for c in seen[1:]]
        return cls([near, *before], near)


def _seen(c_ref, block, count: int) -> list[jax.Array]:
    """Return the sums of log-decays up to a block's tokens, for q and keys, and up to those before them, for a."""
    return [c_ref[_rows(block)], _before(c_ref, block * BLOCK + lax.iota(jnp.int32, BLOCK))][:count]


def _before(c_ref, row) -> jax.Array:
    """Return the sums up to the tokens before those, nothing before the first one of the chunk."""
    return jnp.where(row[..., None] > 0, c_ref[jnp.maximum(row - 1, 0)], 0.0)


def _meet_at(n) -> jax.Array:
    """Return which pairs of a query and a key of a block meet at level n."""
    t, s = places(BLOCK)
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
        i = part(BLOCKS)
        own, seen, whole = _rows(i), _seen(c_ref, i, count), c_ref[CHUNK - 1]
        qs, ks = _scaled(scale, _wide(q_refs, own)), _wide(k_refs, own)
        _store(Q_refs, own, map(jnp.multiply, qs, map(jnp.exp, seen)))
        _store(K_refs, own, [k * jnp.exp(whole[None] - seen[0]) for k in ks])

        @pl.when(i == 0)
        def _():
            kept_ref[...] = jnp.exp(whole)

        def level(n, squares):
            weights = _Meeting.of_level(n, c_ref, i, seen)
            weighed = _each(_weighed(qs, weights.queries, dtype), _weighed(ks, [weights.keys] * count, dtype))
            return _plus(squares, [jnp.where(_meet_at(n), dot(q, k, (1, 1)), 0.0) for q, k in weighed])

        nothing = jnp.zeros((BLOCK, BLOCK), jnp.float32)
        own_keys = [jnp.where(pairs(BLOCK, lax.eq), jnp.sum(qs[0] * k, axis=1)[:, None], 0.0) for k in ks]
        squares = [*own_keys, *[nothing] * (count**2 - count)]  # a sees no key of its token
        _store(pair_refs, (own, own), lax.fori_loop(0, LEVELS, level, squares))
        border = _before(c_ref, i * BLOCK)

        @pl.loop(0, i)
        def _(j):
            weights = _Meeting.at(border, seen, c_ref[_rows(j)])
            theirs = _weighed(_wide(k_refs, _rows(j)), [weights.keys] * count, dtype)
            weighed = _each(_weighed(qs, weights.queries, dtype), theirs)
            _store(pair_refs, (own, _rows(j)), [dot(q, k, (1, 1)) for q, k in weighed])

        @pl.loop(i + 1, BLOCKS)
        def _(j):
            _store(pair_refs, (own, _rows(j)), [nothing] * count**2)

    results = [*_types(queries, keys), Type((cut.batch, cut.chunks, cut.heads, cut.keys), jnp.float32)]
    arguments = [c, *queries, *keys]
    made = cut.by_chunk(body, "channel_decays_products", _warps(cut), arguments, results, BLOCKS)
    found_pairs, found_queries, found_keys, [kept] = split(made, count**2, count, count)
    return Products(found_pairs, found_queries, found_keys, kept)


def inverses(lower) -> jax.Array:
    """Return (I - Ab)^-1 of every chunk, like Ab."""

    at = [pl.ds(i * BLOCK, BLOCK) for i in range(BLOCKS)]

    def body(lower_ref, t_ref):
        def write(i: int, j: int, block) -> None:
            t_ref[at[i], at[j]] = block.astype(t_ref.dtype)

        invert(lambda i, j: -lower_ref[at[i], at[j]].astype(jnp.float32), write)

    [t] = Cut.of(lower, lower).by_chunk(body, "channel_decays_inverses", 1, [lower], [Type(lower.shape, lower.dtype)])
    return t


def forward(made: Products, v, state, t=None, *, with_starts: bool) -> list[jax.Array]:
    """Return o like v, with T also U like it, the state after the last token and, where asked for, those before chunks.

    Args:
      v: (B, T, H, V).
      state: (B, H, K, V) fp32.
      t: `inverses`, where there are a and b.
    """
    cut, given = Cut.of(made.keys[0], v), _walked(made, t)
    count = len(made.keys)

    def body(kept_ref, *refs):
        *walked, [v_ref, state_ref], result_refs, [last_ref], starts_refs = split(refs, *map(len, given), 2, count, 1)

        def step(n, S):
            here = pl.ds(n * CHUNK, CHUNK)
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
            _store(result_refs, here, read)
            return S

        last_ref[...] = lax.fori_loop(0, cut.chunks, step, state_ref[...])

    whole, wide = [made.kept, *itertools.chain(*given)], [Type(v.shape, v.dtype)] * count
    states = [Type(state.shape, jnp.float32), *[cut.states(v.dtype)] * with_starts]
    return cut.by_strip(body, "channel_decays_forward", whole, [v], [state], wide, states)


def reverse(made: Products, do, dlast, t=None) -> list[jax.Array]:
    """Return dV, with T also Y like it, the gradients of the states after every chunk, and of that before the first."""
    cut, given = Cut.of(made.keys[0], do), _walked(made, t)
    count = len(made.keys)

    def body(kept_ref, *refs):
        *walked, [do_ref, dlast_ref], result_refs, [ends_ref, dstate_ref] = split(refs, *map(len, given), 2, count)

        def step(back, dS):
            n = cut.chunks - 1 - back
            here = pl.ds(n * CHUNK, CHUNK)
            (Q, *A), (K, *B), (Pk, *corrections) = ([ref[here] for ref in some] for some in walked)
            do, after = do_ref[here], dS.astype(do_ref.dtype)
            ends_ref[n] = after
            found = [dot(Pk, do, (0, 0)) + dot(K, after)]
            dS = kept_ref[n][:, None] * dS + dot(Q, do, (0, 0))
            if corrections:
                Pb, Ak, T = corrections
                du = dot(Pb, do, (0, 0)) + dot(B[0], after)
                y = dot(T, du.astype(do.dtype), (0, 0)).astype(do.dtype)
                found = [found[0] + dot(Ak, y, (0, 0)), y]
                dS = dS + dot(A[0], y, (0, 0))
            _store(result_refs, here, found)
            return dS

        dstate_ref[...] = lax.fori_loop(0, cut.chunks, step, dlast_ref[...])

    whole, wide = [made.kept, *itertools.chain(*given)], [Type(do.shape, do.dtype)] * count
    states = [cut.states(do.dtype), Type(dlast.shape, jnp.float32)]
    return cut.by_strip(body, "channel_decays_reverse", whole, [do], [dlast], wide, states)


def _walked(made: Products, t) -> list[list[jax.Array]]:
    """Return what a walk needs of every chunk: queries, keys, and pairs, T in the place of Ab."""
    return [[*made.queries], [*made.keys], [*made.pairs[:3], *([] if t is None else [t])]]


def pair_gradients(read: Arrays, written: Arrays) -> list[jax.Array]:
    """Return the gradients of pairs, which are (dO,) or (dO, Y) times (V,) or (V, U); of all, also unseen ones."""
    count = len(read)

    def body(*refs):
        read_refs, written_refs, result_refs = split(refs, count, count)

        def strip(n, sums):
            columns = pl.ds(n * WIDTH, WIDTH)
            found = _each(*([ref[:, columns] for ref in some] for some in (read_refs, written_refs)))
            return _plus(sums, [dot(x, y, (1, 1)) for x, y in found])

        zeros = [jnp.zeros((CHUNK, CHUNK), jnp.float32)] * count**2
        _store(result_refs, ..., lax.fori_loop(0, written_refs[0].shape[1] // WIDTH, strip, zeros))

    v = written[0]
    results = [Type((*v.shape[:3], CHUNK), v.dtype)] * count**2
    return Cut.of(v, v).by_chunk(body, "channel_decays_pair_gradients", 4, [*read, *written], results)


def state_gradients(made: Products, read: Arrays, written: Arrays, starts, ends) -> list[jax.Array]:
    """Return the gradients of `Products.queries` and keys, and what c_C gets from states and keys.

    The last one is (B, chunks, H, K) fp32.
    """
    cut, count = Cut.of(made.keys[0], written[0]), len(read)

    def body(kept_ref, starts_ref, ends_ref, *refs):
        K_refs, read_refs, written_refs, result_refs, [whole_ref] = split(refs, count, count, count, 2 * count)

        def strip(n, carry):
            sums, kept = carry
            columns = pl.ds(n * WIDTH, WIDTH)
            S, dS = starts_ref[:, columns], ends_ref[:, columns]
            found = [dot(ref[:, columns], S, (1, 1)) for ref in read_refs]
            found += [dot(ref[:, columns], dS, (1, 1)) for ref in written_refs]
            return _plus(sums, found), kept + jnp.sum(S.astype(jnp.float32) * dS.astype(jnp.float32), axis=1)

        zeros = [jnp.zeros((CHUNK, cut.keys), jnp.float32)] * (2 * count)
        sums, kept = lax.fori_loop(0, cut.values // WIDTH, strip, (zeros, jnp.zeros(cut.keys, jnp.float32)))
        _store(result_refs, ..., sums)
        whole = kept_ref[...] * kept
        for K, dK in zip(_wide(K_refs, ...), sums[count:], strict=True):
            whole = whole + jnp.sum(K * dK.astype(made.keys[0].dtype).astype(jnp.float32), axis=0)
        whole_ref[...] = whole

    like = [Type(x.shape, x.dtype) for x in (*made.queries, *made.keys, made.kept)]
    arguments = [made.kept, starts, ends, *made.keys, *read, *written]
    return cut.by_chunk(body, "channel_decays_state_gradients", 8, arguments, like)


def token_gradients(
    queries: Arrays, keys: Arrays, c, made: Products, dpairs: Arrays, dqueries: Arrays, dkeys: Arrays, *, scale: float
) -> list[jax.Array]:
    """Return the gradients of queries and keys, like them, and of c_t and c_(t-1), fp32.

    The gradient of c_t lacks c_C's share from `state_gradients`; that of c_(t-1) is what a sees, if there is one.

    Args:
      dpairs: of `pair_gradients`.
      dqueries, dkeys: of `state_gradients`.
    """
    cut, count, dtype = Cut.of(keys[0], keys[0]), len(queries), keys[0].dtype

    def body(c_ref, *refs):
        q_refs, k_refs, Q_refs, K_refs, dQ_refs, dK_refs, pair_refs, token_refs, dc_refs = split(
            refs, *[count] * 6, count**2, 2 * count
        )
        i = part(BLOCKS)
        own, seen, whole = _rows(i), _seen(c_ref, i, count), c_ref[CHUNK - 1]
        qs, ks = _scaled(scale, _wide(q_refs, own)), _wide(k_refs, own)

        def to_queries(found, weights: _Meeting, near_qs, near_ks, squares):
            """Add what the keys give the own queries, through pairs' gradients.

            dc is made of the factors as they were rounded, as in `to_keys`: what a pair adds at its query it takes away
            at its key, so that it cancels in a sum over both.
            """
            dqs, dks, dcs = found
            given = _by_query(squares, near_ks)
            dqs = _plus(dqs, map(jnp.multiply, weights.queries, given))
            return dqs, dks, _plus(dcs, [q.astype(jnp.float32) * x for q, x in zip(near_qs, given, strict=True)])

        def to_keys(found, weights: _Meeting, near_qs, near_ks, squares):
            """Add what the queries give the own keys."""
            dqs, dks, (dc, *dbefore) = found
            given = _by_key(squares, near_qs)
            lost = [k.astype(jnp.float32) * x for k, x in zip(near_ks, given, strict=True)]
            dks = _plus(dks, [weights.keys * x for x in given])
            return dqs, dks, [functools.reduce(jnp.subtract, lost, dc), *dbefore]

        def level(n, found):
            weights = _Meeting.of_level(n, c_ref, i, seen)
            near = _weighed(qs, weights.queries, dtype), _weighed(ks, [weights.keys] * count, dtype)
            squares = [jnp.where(_meet_at(n), ref[own, own], 0) for ref in pair_refs]
            return to_keys(to_queries(found, weights, *near, squares), weights, *near, squares)

        def earlier(j, found):
            weights = _Meeting.at(_before(c_ref, i * BLOCK), seen, c_ref[_rows(j)])
            theirs = _weighed(_wide(k_refs, _rows(j)), [weights.keys] * count, dtype)
            squares = [ref[own, _rows(j)] for ref in pair_refs]
            return to_queries(found, weights, _weighed(qs, weights.queries, dtype), theirs, squares)

        def later(m, found):
            weights = _Meeting.at(_before(c_ref, m * BLOCK), _seen(c_ref, m, count), seen[0])
            theirs = _weighed(_scaled(scale, _wide(q_refs, _rows(m))), weights.queries, dtype)
            squares = [ref[_rows(m), own] for ref in pair_refs]
            return to_keys(found, weights, theirs, _weighed(ks, [weights.keys] * count, dtype), squares)

        zeros = [jnp.zeros_like(seen[0])] * count
        found = lax.fori_loop(0, LEVELS, level, (zeros, zeros, zeros))
        found = lax.fori_loop(0, i, earlier, found)
        dqs, dks, dcs = lax.fori_loop(i + 1, BLOCKS, later, found)

        dQs, dKs = _wide(dQ_refs, own), _wide(dK_refs, own)
        dc, *dbefore = _plus(dcs, map(jnp.multiply, _wide(Q_refs, own), dQs))
        dc = functools.reduce(jnp.subtract, map(jnp.multiply, _wide(K_refs, own), dKs), dc)
        _store(dc_refs, own, [dc, *dbefore])

        diagonal = pairs(BLOCK, lax.eq)
        same = [jnp.sum(jnp.where(diagonal, x, 0.0), axis=1)[:, None] for x in _wide(pair_refs[:count], (own, own))]
        dqs = _plus(dqs, map(jnp.multiply, map(jnp.exp, seen), dQs))
        dks = _plus(dks, [jnp.exp(whole[None] - seen[0]) * x for x in dKs])
        dqs = [functools.reduce(jnp.add, map(jnp.multiply, same, ks), dqs[0]), *dqs[1:]]
        _store(token_refs, own, [*_scaled(scale, dqs), *_plus(dks, [x * qs[0] for x in same])])

    results = [Type(x.shape, x.dtype) for x in (*queries, *keys, *[c] * count)]
    arguments = [c, *queries, *keys, *made.queries, *made.keys, *dqueries, *dkeys, *dpairs]
    return cut.by_chunk(body, "channel_decays_token_gradients", _warps(cut, 4 * count), arguments, results, BLOCKS)


def decay_gradients(dc: Arrays, dwhole) -> jax.Array:
    """Return the gradients of log-decays, of those of c_t, c_(t-1) (`token_gradients`) and c_C (`state_gradients`).

    A token's is the sum of all of them from it to the end, but for its own c_(t-1): a reads the state before it decays.
    """

    def body(whole_ref, *refs):
        *dc_refs, dg_ref = refs
        dc, *dbefore = (ref[...] for ref in dc_refs)
        total = functools.reduce(jnp.add, dbefore, dc)
        left = jnp.sum(total, axis=0)[None] - jnp.cumsum(total, axis=0) + total  # Triton has no reversed cumsum
        dg_ref[...] = functools.reduce(jnp.subtract, dbefore, whole_ref[...][None] + left)

    like = Type(dc[0].shape, dc[0].dtype)
    [dg] = Cut.of(dc[0], dc[0]).by_chunk(body, "channel_decays_gradients", 4, [dwhole, *dc], [like])
    return dg


def _warps(cut: Cut, most: int = 4) -> int:
    """Return the warps that are fastest for a block of tokens."""
    return min(most, cut.keys // BLOCK)


def _rows(i) -> pl.Slice:
    return pl.ds(i * BLOCK, BLOCK)


def _wide(refs: Sequence, here) -> list[jax.Array]:
    """Return those parts of all in fp32."""
    return [ref[here].astype(jnp.float32) for ref in refs]


def _store(refs: Sequence, here, values: Iterable[jax.Array]) -> None:
    """Store those parts of all in their dtypes."""
    for ref, x in zip(refs, values, strict=True):
        ref[here] = x.astype(ref.dtype)


def _weighed(xs: Arrays, weights: Arrays, dtype) -> list[jax.Array]:
    """Return the products in that dtype, for tensor cores."""
    return [(x * weight).astype(dtype) for x, weight in zip(xs, weights, strict=True)]


def _scaled(scale: float, queries: Arrays) -> list[jax.Array]:
    """Return (scale q,) or (scale q, a)."""
    return [scale * queries[0], *queries[1:]]


def _plus(xs: Iterable[jax.Array], ys: Iterable[jax.Array]) -> list[jax.Array]:
    return [x + y for x, y in zip(xs, ys, strict=True)]


def _each(queries: Arrays, keys: Arrays) -> list[tuple]:
    """Return the pairs of queries and keys, in the order of `Products.pairs`."""
    return [(q, k) for q in queries for k in keys]


def _by_query(squares: Arrays, keys: Arrays) -> list[jax.Array]:
    """Return for each query the sum over keys of their squares' products with them."""
    count = len(keys)
    rows = [squares[n * count : (n + 1) * count] for n in range(count)]
    return [functools.reduce(jnp.add, map(dot, row, keys)) for row in rows]


def _by_key(squares: Arrays, queries: Arrays) -> list[jax.Array]:
    """Return for each key the sum over queries of their transposed squares' products with them."""
    count = len(queries)
    columns = [squares[n::count] for n in range(count)]
    return [functools.reduce(jnp.add, [dot(x, q, (0, 0)) for x, q in zip(c, queries, strict=True)]) for c in columns]
