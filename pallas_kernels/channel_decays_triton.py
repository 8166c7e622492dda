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

No exponent is above 0: blocks of 16 tokens meet through the decays between them, a block meets itself pair by pair.
What arrays may be is said in `chunks_triton.py`; log-decays are fp32.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import split
from pallas_kernels.chunks_triton import BLOCK, BLOCKS, CHUNK, NEVER, WIDTH, Cut, Type, dot, invert, part, places

Arrays = Sequence[jax.Array]


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


class _Block(NamedTuple):
    """A block of tokens: the sums of its log-decays up to each, up to the one before, and from each to its end."""

    since: jax.Array
    before: jax.Array
    until: jax.Array
    total: jax.Array

    @classmethod
    def of(cls, g) -> "_Block":
        since, total = jnp.cumsum(g, axis=0), jnp.sum(g, axis=0)
        return cls(since, since - g, total[None] - since, total)

    def seen(self, count: int) -> list[jax.Array]:
        """Return the exponents of queries: of q, or of q and a."""
        return [self.since, self.before][:count]

    def weights(self, s, c, count: int) -> list[jax.Array]:
        """Return how much each query sees of token s, of which c is `since`; each (BLOCK, K)."""
        row = lax.broadcasted_iota(jnp.int32, self.since.shape, 0)
        visible = zip((row >= s, row > s), self.seen(count), strict=False)
        return [jnp.exp(jnp.where(mask, seen - c[None], NEVER)) for mask, seen in visible]


def products(queries: Arrays, keys: Arrays, g, *, scale: float) -> Products:
    """Return the products of (q,) or (q, a) and (k,) or (k, b), each (B, T, H, K), with log-decays g like them."""
    cut, count, dtype = Cut.of(keys[0], keys[0]), len(queries), keys[0].dtype

    def body(g_ref, *refs):
        q_refs, k_refs, pair_refs, Q_refs, K_refs, [kept_ref] = split(refs, count, count, count**2, count, count)
        i = part(BLOCKS)
        own = _rows(i)
        block, qs, ks = _Block.of(g_ref[own]), _wide(q_refs, own), _wide(k_refs, own)
        qs = _scaled(scale, qs)
        decayed = [q * jnp.exp(c) for q, c in zip(qs, block.seen(count), strict=True)]
        narrow = [x.astype(dtype) for x in decayed]

        def earlier(n, gap):
            j = i - 1 - n
            other = _Block.of(g_ref[_rows(j)])
            theirs = [(k * jnp.exp(other.until + gap[None])).astype(dtype) for k in _wide(k_refs, _rows(j))]
            _store(pair_refs, (own, _rows(j)), [dot(q, k, (1, 1)) for q, k in _each(narrow, theirs)])
            return gap + other.total

        def later(j, gap):
            _store(pair_refs, (own, _rows(j)), squares)
            return gap + jnp.sum(g_ref[_rows(j)], axis=0)

        none, squares = jnp.zeros_like(block.total), [jnp.zeros((BLOCK, BLOCK), jnp.float32)] * count**2
        past = lax.fori_loop(0, i, earlier, none)
        future = lax.fori_loop(i + 1, BLOCKS, later, none)
        _store(Q_refs, own, [q * jnp.exp(past)[None] for q in decayed])
        _store(K_refs, own, [k * jnp.exp(block.until + future[None]) for k in ks])

        @pl.when(i == 0)
        def _():
            kept_ref[...] = jnp.exp(block.total + future)

        def column(s, carry):
            found, c = carry
            c, given = c + g_ref[i * BLOCK + s], _wide(k_refs, i * BLOCK + s)
            seen = [q * w for q, w in zip(qs, block.weights(s, c, count), strict=True)]
            here = places(BLOCK)[1] == s
            sums = (jnp.sum(q * k[None], axis=1) for q, k in _each(seen, given))
            return [jnp.where(here, x[:, None], square) for x, square in zip(sums, found, strict=True)], c

        near, _ = lax.fori_loop(0, BLOCK, column, (squares, none))
        _store(pair_refs, (own, own), near)

    results = [*_types(queries, keys), Type((cut.batch, cut.chunks, cut.heads, cut.keys), jnp.float32)]
    made = cut.by_chunk(body, "channel_decays_products", _warps(cut, count), [g, *queries, *keys], results, BLOCKS)
    found_pairs, found_queries, found_keys, [kept] = split(made, count**2, count, count)
    return Products(found_pairs, found_queries, found_keys, kept)


def inverses(lower) -> jax.Array:
    """Return (I - Ab)^-1 of every chunk, like Ab."""

    def body(lower_ref, t_ref):
        def write(i: int, j: int, block) -> None:
            t_ref[_rows(i), _rows(j)] = block.astype(t_ref.dtype)

        invert(lambda i, j: -lower_ref[_rows(i), _rows(j)].astype(jnp.float32), write)

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
            whole = whole + jnp.sum(K * dK, axis=0)
        whole_ref[...] = whole

    like = [Type(x.shape, x.dtype) for x in (*made.queries, *made.keys, made.kept)]
    arguments = [made.kept, starts, ends, *made.keys, *read, *written]
    return cut.by_chunk(body, "channel_decays_state_gradients", 8, arguments, like)


def token_gradients(
    queries: Arrays, keys: Arrays, g, dpairs: Arrays, dqueries: Arrays, dkeys: Arrays, *, scale: float
) -> list[jax.Array]:
    """Return the gradients of queries and keys, like them, and q dq - k dk - b db and any a da in fp32, like g.

    The last ones are the gradients of c_t, but for c_C's share from `state_gradients`, and of c_(t-1).
    """
    cut, count, dtype = Cut.of(keys[0], keys[0]), len(queries), keys[0].dtype

    def body(g_ref, *refs):
        q_refs, k_refs, dQ_refs, dK_refs, pair_refs, token_refs, (dc_ref, *before_refs) = split(
            refs, count, count, count, count, count**2, 2 * count
        )
        i = part(BLOCKS)
        own = _rows(i)
        block, qs, ks = _Block.of(g_ref[own]), _scaled(scale, _wide(q_refs, own)), _wide(k_refs, own)
        none, zeros = jnp.zeros_like(block.total), [jnp.zeros_like(qs[0])] * count

        def earlier(n, carry):
            dqs, gap = carry
            j = i - 1 - n
            other = _Block.of(g_ref[_rows(j)])
            theirs = [(k * jnp.exp(other.until + gap[None])).astype(dtype) for k in _wide(k_refs, _rows(j))]
            squares = [ref[own, _rows(j)] for ref in pair_refs]
            return _plus(dqs, _by_query(dot, squares, theirs)), gap + other.total

        def later(m, carry):
            dks, gap = carry
            other = _Block.of(g_ref[_rows(m)])
            theirs = _scaled(scale, _wide(q_refs, _rows(m)))
            seen = [(q * jnp.exp(c + gap[None])).astype(dtype) for q, c in zip(theirs, other.seen(count), strict=True)]
            squares = [ref[_rows(m), own] for ref in pair_refs]
            return _plus(dks, _by_key(lambda square, q: dot(square, q, (0, 0)), squares, seen)), gap + other.total

        dqs, past = lax.fori_loop(0, i, earlier, (zeros, none))
        dks, future = lax.fori_loop(i + 1, BLOCKS, later, (zeros, none))
        dqs = _plus(dqs, [jnp.exp(past)[None] * x for x in _wide(dQ_refs, own)])
        dks = _plus(dks, [jnp.exp(future)[None] * x for x in _wide(dK_refs, own)])
        dqs = [jnp.exp(c) * x for c, x in zip(block.seen(count), dqs, strict=True)]
        dks = [jnp.exp(block.until) * x for x in dks]
        row = lax.broadcasted_iota(jnp.int32, qs[0].shape, 0)

        def token(s, carry):
            dqs, dks, c = carry
            place = i * BLOCK + s
            c, theirs = c + g_ref[place], [k[None] for k in _wide(k_refs, place)]
            weights = block.weights(s, c, count)
            columns = [ref[own, place].astype(jnp.float32)[:, None] for ref in pair_refs]
            given = _by_query(jnp.multiply, columns, theirs)
            seen = [w * q for w, q in zip(weights, qs, strict=True)]
            taken = _by_key(lambda column, q: jnp.sum(column * q, axis=0)[None], columns, seen)
            dqs = _plus(dqs, [w * x for w, x in zip(weights, given, strict=True)])
            return dqs, _plus(dks, [jnp.where(row == s, x, 0.0) for x in taken]), c

        dqs, dks, _ = lax.fori_loop(0, BLOCK, token, (dqs, dks, none))
        _store(token_refs, own, [*_scaled(scale, dqs), *dks])
        seen, *before = map(jnp.multiply, qs, dqs)
        dc_ref[own] = functools.reduce(jnp.subtract, map(jnp.multiply, ks, dks), seen)
        _store(before_refs, own, before)

    results = [Type(x.shape, x.dtype) for x in (*queries, *keys, *[g] * count)]
    arguments = [g, *queries, *keys, *dqueries, *dkeys, *dpairs]
    return cut.by_chunk(body, "channel_decays_token_gradients", _warps(cut, count), arguments, results, BLOCKS)


def _warps(cut: Cut, count: int) -> int:
    """Return the warps that have the registers for a block's queries and keys."""
    return max(1, min(8, count * cut.keys // 32))


def _rows(i) -> pl.Slice:
    return pl.ds(i * BLOCK, BLOCK)


def _wide(refs: Sequence, rows) -> list[jax.Array]:
    """Return those rows of all in fp32."""
    return [ref[rows].astype(jnp.float32) for ref in refs]


def _store(refs: Sequence, rows, values: Arrays) -> None:
    """Store those rows of all in their dtypes."""
    for ref, x in zip(refs, values, strict=True):
        ref[rows] = x.astype(ref.dtype)


def _scaled(scale: float, queries: Arrays) -> list[jax.Array]:
    """Return (scale q,) or (scale q, a)."""
    return [scale * queries[0], *queries[1:]]


def _plus(xs: Arrays, ys: Arrays) -> list[jax.Array]:
    return [x + y for x, y in zip(xs, ys, strict=True)]


def _each(queries: Arrays, keys: Arrays) -> list[tuple]:
    """Return the pairs of queries and keys, in the order of `Products.pairs`."""
    return [(q, k) for q in queries for k in keys]


def _by_query(product: Callable, pairs: Arrays, keys: Arrays) -> list[jax.Array]:
    """Return for each query the sum over keys of a pair's product with the key."""
    count = len(keys)
    rows = [pairs[n * count : (n + 1) * count] for n in range(count)]
    return [functools.reduce(jnp.add, map(product, row, keys)) for row in rows]


def _by_key(product: Callable, pairs: Arrays, queries: Arrays) -> list[jax.Array]:
    """Return for each key the sum over queries of a pair's product with the query."""
    count = len(queries)
    return [functools.reduce(jnp.add, map(product, pairs[n::count], queries)) for n in range(count)]
