"""The gradients of `channel_decays.py`, in its notation.

`reverse` walks back over the chunks with the gradient of S in registers:

    dU = Pb^T dO + B dS'     Y = T^T dU     dV = Pk^T dO + K dS' + Ak^T Y     dS = exp(c_C) dS' + Q^T dO + A^T Y

The gradients of `Products` come from `pair_gradients` and `state_gradients`, those of q, k, a, b and c from
`token_gradients`, and those of log-decays from `decay_gradients`.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import split
from pallas_kernels.triton.channel_decays import (
    BLOCK_LEVELS,
    Arrays,
    Meeting,
    Products,
    add,
    block_rows,
    block_warps,
    each_pair,
    load,
    meet_at,
    scaled,
    store,
    sum_before,
    sums_seen,
    walk_inputs,
    weigh,
)
from pallas_kernels.triton.pallas_chunks import (
    BLOCK_TOKENS,
    BLOCKS_PER_CHUNK,
    CHUNK_TOKENS,
    STRIP_WIDTH,
    Cut,
    Type,
    dot,
    pairs,
    part,
)


def reverse(made: Products, do, dlast, t=None) -> list[jax.Array]:
    """Return dV, with T also Y like it, the gradients of the states after every chunk, and of that before the first."""
    cut, given = Cut.of(made.keys[0], do), walk_inputs(made, t)
    count = len(made.keys)

    def body(kept_ref, *refs):
        *walked, [do_ref, dlast_ref], result_refs, [ends_ref, dstate_ref] = split(refs, *map(len, given), 2, count)

        def step(back, dS):
            n = cut.chunks - 1 - back
            here = pl.ds(n * CHUNK_TOKENS, CHUNK_TOKENS)
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
            store(result_refs, here, found)
            return dS

        dstate_ref[...] = lax.fori_loop(0, cut.chunks, step, dlast_ref[...])

    whole, wide = [made.kept, *itertools.chain(*given)], [Type(do.shape, do.dtype)] * count
    states = [cut.states(do.dtype), Type(dlast.shape, jnp.float32)]
    return cut.by_strip(body, "channel_decays_reverse", whole, [do], [dlast], wide, states)


def pair_gradients(read: Arrays, written: Arrays) -> list[jax.Array]:
    """Return the gradients of pairs, which are (dO,) or (dO, Y) times (V,) or (V, U); of all, also unseen ones."""
    count = len(read)

    def body(*refs):
        read_refs, written_refs, result_refs = split(refs, count, count)

        def strip(n, sums):
            columns = pl.ds(n * STRIP_WIDTH, STRIP_WIDTH)
            found = each_pair(*([ref[:, columns] for ref in some] for some in (read_refs, written_refs)))
            return add(sums, [dot(x, y, (1, 1)) for x, y in found])

        zeros = [jnp.zeros((CHUNK_TOKENS, CHUNK_TOKENS), jnp.float32)] * count**2
        store(result_refs, ..., lax.fori_loop(0, written_refs[0].shape[1] // STRIP_WIDTH, strip, zeros))

    v = written[0]
    results = [Type((*v.shape[:3], CHUNK_TOKENS), v.dtype)] * count**2
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
            columns = pl.ds(n * STRIP_WIDTH, STRIP_WIDTH)
            S, dS = starts_ref[:, columns], ends_ref[:, columns]
            found = [dot(ref[:, columns], S, (1, 1)) for ref in read_refs]
            found += [dot(ref[:, columns], dS, (1, 1)) for ref in written_refs]
            return add(sums, found), kept + jnp.sum(S.astype(jnp.float32) * dS.astype(jnp.float32), axis=1)

        zeros = [jnp.zeros((CHUNK_TOKENS, cut.keys), jnp.float32)] * (2 * count)
        sums, kept = lax.fori_loop(0, cut.values // STRIP_WIDTH, strip, (zeros, jnp.zeros(cut.keys, jnp.float32)))
        store(result_refs, ..., sums)
        whole = kept_ref[...] * kept
        for K, dK in zip(load(K_refs, ...), sums[count:], strict=True):
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
        i = part(BLOCKS_PER_CHUNK)
        own, seen, whole = block_rows(i), sums_seen(c_ref, i, count), c_ref[CHUNK_TOKENS - 1]
        qs, ks = scaled(scale, load(q_refs, own)), load(k_refs, own)

        def to_queries(found, weights: Meeting, near_qs, near_ks, squares):
            """Add what the keys give the own queries, through pairs' gradients.

            dc is made of the factors as they were rounded, as in `to_keys`: what a pair adds at its query it takes away
            at its key, so that it cancels in a sum over both.
            """
            dqs, dks, dcs = found
            given = _by_query(squares, near_ks)
            dqs = add(dqs, map(jnp.multiply, weights.queries, given))
            return dqs, dks, add(dcs, [q.astype(jnp.float32) * x for q, x in zip(near_qs, given, strict=True)])

        def to_keys(found, weights: Meeting, near_qs, near_ks, squares):
            """Add what the queries give the own keys."""
            dqs, dks, (dc, *dbefore) = found
            given = _by_key(squares, near_qs)
            lost = [k.astype(jnp.float32) * x for k, x in zip(near_ks, given, strict=True)]
            dks = add(dks, [weights.keys * x for x in given])
            return dqs, dks, [functools.reduce(jnp.subtract, lost, dc), *dbefore]

        def level(n, found):
            weights = Meeting.of_level(n, c_ref, i, seen)
            near = weigh(qs, weights.queries, dtype), weigh(ks, [weights.keys] * count, dtype)
            squares = [jnp.where(meet_at(n), ref[own, own], 0) for ref in pair_refs]
            return to_keys(to_queries(found, weights, *near, squares), weights, *near, squares)

        def earlier(j, found):
            weights = Meeting.at(sum_before(c_ref, i * BLOCK_TOKENS), seen, c_ref[block_rows(j)])
            theirs = weigh(load(k_refs, block_rows(j)), [weights.keys] * count, dtype)
            squares = [ref[own, block_rows(j)] for ref in pair_refs]
            return to_queries(found, weights, weigh(qs, weights.queries, dtype), theirs, squares)

        def later(m, found):
            weights = Meeting.at(sum_before(c_ref, m * BLOCK_TOKENS), sums_seen(c_ref, m, count), seen[0])
            theirs = weigh(scaled(scale, load(q_refs, block_rows(m))), weights.queries, dtype)
            squares = [ref[block_rows(m), own] for ref in pair_refs]
            return to_keys(found, weights, theirs, weigh(ks, [weights.keys] * count, dtype), squares)

        zeros = [jnp.zeros_like(seen[0])] * count
        found = lax.fori_loop(0, BLOCK_LEVELS, level, (zeros, zeros, zeros))
        found = lax.fori_loop(0, i, earlier, found)
        dqs, dks, dcs = lax.fori_loop(i + 1, BLOCKS_PER_CHUNK, later, found)

        dQs, dKs = load(dQ_refs, own), load(dK_refs, own)
        dc, *dbefore = add(dcs, map(jnp.multiply, load(Q_refs, own), dQs))
        dc = functools.reduce(jnp.subtract, map(jnp.multiply, load(K_refs, own), dKs), dc)
        store(dc_refs, own, [dc, *dbefore])

        diagonal = pairs(BLOCK_TOKENS, lax.eq)
        same = [jnp.sum(jnp.where(diagonal, x, 0.0), axis=1)[:, None] for x in load(pair_refs[:count], (own, own))]
        dqs = add(dqs, map(jnp.multiply, map(jnp.exp, seen), dQs))
        dks = add(dks, [jnp.exp(whole[None] - seen[0]) * x for x in dKs])
        dqs = [functools.reduce(jnp.add, map(jnp.multiply, same, ks), dqs[0]), *dqs[1:]]
        store(token_refs, own, [*scaled(scale, dqs), *add(dks, [x * qs[0] for x in same])])

    results = [Type(x.shape, x.dtype) for x in (*queries, *keys, *[c] * count)]
    arguments = [c, *queries, *keys, *made.queries, *made.keys, *dqueries, *dkeys, *dpairs]
    return cut.by_chunk(
        body, "channel_decays_token_gradients", block_warps(cut, 4 * count), arguments, results, BLOCKS_PER_CHUNK
    )


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
