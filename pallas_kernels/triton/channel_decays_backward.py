"""The gradients of `channel_decays.py`, in its notation.

`reverse` walks back over the chunks with the gradient of S in registers:

    dU = Pb^T dO + B dS'     Y = T^T dU     dV = Pk^T dO + K dS' + Ak^T Y     dS = exp(c_C) dS' + Q^T dO + A^T Y

The gradients of `Products` come from `pair_gradients` and `state_gradients`, those of q, k, a, b and c from
`token_gradients`, and those of log-decays from `decay_gradients`.
"""

import jax
import triton
import triton.language as tl

from pallas_kernels.triton import tuples
from pallas_kernels.triton.channel_decays import (
    BLOCKS,
    LEVELS,
    Arrays,
    Products,
    block_rows,
    block_warps,
    channels_of,
    filled,
    floats,
    of_kinds,
    pairs_of,
    row,
    scaled,
    sums_before,
    sums_seen,
    walk_inputs,
    weigh,
    weights_of_level,
    weights_since,
    where_met,
)
from pallas_kernels.triton.chunks import BLOCKS_PER_CHUNK, Cut, like
from pallas_kernels.triton.tiles import (
    BLOCK,
    CHUNK,
    STRIP,
    at_chunk,
    keys_at,
    places,
    program_of_chunk,
    program_of_strip,
    squares_at,
    state_at,
    store,
    tile,
    values_at,
    zeros,
)


def reverse(made: Products, do, dlast, t=None) -> list[jax.Array]:
    """Return dV, with T also Y like it, the gradients of the states after every chunk, and of that before the first."""
    cut, kinds = Cut.of(made.keys[0], do), len(made.keys)
    results = [*filled([like(do)] * kinds), cut.states(do.dtype), like(dlast)]
    return cut.by_strip(channel_decays_reverse, walk_inputs(made, t), [do], [dlast], results, kinds=kinds)


@triton.jit
def channel_decays_reverse(
    kept, Q, A, K, B, Pk, Pb, Ak, T, do, dlast, dv, y, ends, dstate, kinds: tl.constexpr, cut: tl.constexpr
):
    """Walk back over the chunks with a strip of a state's gradient."""
    sequence, column = program_of_strip(cut)
    dS = tl.load(state_at(dlast, sequence, column, cut))
    for back in range(cut.chunks):
        n = cut.chunks - 1 - back
        number, at = sequence * cut.chunks + n, at_chunk(sequence, n, cut)
        dO, after = tl.load(values_at(do, at, column, cut)), dS.to(do.dtype.element_ty)
        store(state_at(ends, number, column, cut), after)
        dV = tl.dot(tl.trans(tl.load(squares_at(Pk, at, cut))), dO)
        dV = tl.dot(tl.load(keys_at(K, at, cut)), after, dV)
        dS *= tl.load(kept + number * cut.keys + tl.arange(0, cut.keys))[:, None]
        dS = tl.dot(tl.trans(tl.load(keys_at(Q, at, cut))), dO, dS)
        if kinds == 2:
            dU = tl.dot(tl.trans(tl.load(squares_at(Pb, at, cut))), dO)
            dU = tl.dot(tl.load(keys_at(B, at, cut)), after, dU)
            Y = tl.dot(tl.trans(tl.load(squares_at(T, at, cut))), dU.to(dO.dtype)).to(dO.dtype)
            dV = tl.dot(tl.trans(tl.load(squares_at(Ak, at, cut))), Y, dV)
            dS = tl.dot(tl.trans(tl.load(keys_at(A, at, cut))), Y, dS)
            store(values_at(y, at, column, cut), Y)
        store(values_at(dv, at, column, cut), dV)
    store(state_at(dstate, sequence, column, cut), dS)


def pair_gradients(read: Arrays, written: Arrays) -> list[jax.Array]:
    """Return the gradients of pairs, which are (dO,) or (dO, Y) times (V,) or (V, U); of all, also unseen ones."""
    v, kinds = written[0], len(written)
    cut = Cut.of(v, v)
    results = filled([cut.squares(v.dtype)] * kinds**2, 4)
    return cut.by_chunk(channel_decays_pair_gradients, [*filled(read), *filled(written)], results, kinds=kinds)


@triton.jit
def channel_decays_pair_gradients(do, y, v, u, dPk, dPb, dAk, dAb, kinds: tl.constexpr, cut: tl.constexpr):
    """Multiply a chunk's values with its gradients, strip by strip."""
    _, at, _ = program_of_chunk(cut, 1)
    read, written = of_kinds(do, y, at * cut.values, kinds), of_kinds(v, u, at * cut.values, kinds)
    nothing = zeros(CHUNK, CHUNK)
    sums = (nothing, nothing, nothing, nothing)[: kinds * kinds]
    for n in range(cut.strips):
        strip = tile(n * STRIP, CHUNK, STRIP, cut.heads * cut.values)
        sums = tuples.add(sums, tuples.each_pair(tuples.load(read, strip), tuples.load(written, strip)))
    squares = tuples.moved((dPk, dPb, dAk, dAb)[: kinds * kinds], at * CHUNK)
    tuples.store(squares, tile(0, CHUNK, CHUNK, cut.heads * CHUNK), sums)


def state_gradients(made: Products, read: Arrays, written: Arrays, starts, ends) -> list[jax.Array]:
    """Return the gradients of `Products.queries` and keys, and what c_C gets from states and keys.

    The last one is like `Products.kept`.
    """
    cut, kinds = Cut.of(made.keys[0], written[0]), len(read)
    results = [*filled(map(like, made.queries)), *filled(map(like, made.keys)), like(made.kept)]
    arguments = [made.kept, starts, ends, *filled(made.keys), *filled(read), *filled(written)]
    return cut.by_chunk(channel_decays_state_gradients, arguments, results, warps=8, kinds=kinds)


@triton.jit
def channel_decays_state_gradients(
    kept, starts, ends, K, B, do, y, v, u, dQ, dA, dK, dB, dwhole, kinds: tl.constexpr, cut: tl.constexpr
):
    """Multiply a chunk's values and gradients with its states and theirs, strip by strip."""
    number, at, _ = program_of_chunk(cut, 1)
    read, written = of_kinds(do, y, at * cut.values, kinds), of_kinds(v, u, at * cut.values, kinds)
    tokens, channels = channels_of(tl.arange(0, CHUNK), cut), number * cut.keys + tl.arange(0, cut.keys)
    dqs = (zeros(CHUNK, cut.keys), zeros(CHUNK, cut.keys))[:kinds]
    dks, left = dqs, tl.load(kept + channels)
    kept_of_states = tl.zeros_like(left)
    for n in range(cut.strips):
        strip = tile(n * STRIP, CHUNK, STRIP, cut.heads * cut.values)
        S, dS = tl.load(state_at(starts, number, n * STRIP, cut)), tl.load(state_at(ends, number, n * STRIP, cut))
        dqs = tuples.add(dqs, tuples.each_pair(tuples.load(read, strip), (S,)))
        dks = tuples.add(dks, tuples.each_pair(tuples.load(written, strip), (dS,)))
        kept_of_states += tl.sum(S.to(tl.float32) * dS.to(tl.float32), axis=1)
    tuples.store(of_kinds(dQ, dA, at * cut.keys, kinds), tokens, dqs)
    tuples.store(of_kinds(dK, dB, at * cut.keys, kinds), tokens, dks)
    Ks, rounded = floats(of_kinds(K, B, at * cut.keys, kinds), tokens), tuples.cast(dks, dK.dtype.element_ty)
    whole = left * kept_of_states
    for i in tl.static_range(kinds):
        whole += tl.sum(Ks[i] * rounded[i].to(tl.float32), axis=0)
    tl.store(dwhole + channels, whole)


def token_gradients(
    queries: Arrays, keys: Arrays, c, made: Products, dpairs: Arrays, dqueries: Arrays, dkeys: Arrays, *, scale: float
) -> list[jax.Array]:
    """Return the gradients of queries and keys, like them, and of c_t and c_(t-1), fp32.

    The gradient of c_t lacks c_C's share from `state_gradients`; that of c_(t-1) is what a sees, if there is one.

    Args:
      dpairs: of `pair_gradients`.
      dqueries, dkeys: of `state_gradients`.
    """
    cut, kinds = Cut.of(keys[0], keys[0]), len(queries)
    by_token = queries, keys, made.queries, made.keys, dqueries, dkeys
    arguments = [c, *(x for some in by_token for x in filled(some)), *filled(dpairs, 4)]
    results = [x for some in (queries, keys, [c] * kinds) for x in filled(map(like, some))]
    parts, warps = BLOCKS_PER_CHUNK, block_warps(cut, 4 * kinds)
    return cut.by_chunk(
        channel_decays_token_gradients, arguments, results, parts=parts, warps=warps, kinds=kinds, scale=scale
    )


@triton.jit
def channel_decays_token_gradients(
    c, q, a, k, b, Q, A, K, B, dQ, dA, dK, dB, dPk, dPb, dAk, dAb, dq, da, dk, db, dc, dbefore,
    kinds: tl.constexpr, scale: tl.constexpr, cut: tl.constexpr,
):  # fmt: skip
    """Collect what a block's tokens get from all whom they meet."""
    _, at, i = program_of_chunk(cut, BLOCKS)
    c, first = c + at * cut.keys, at * cut.keys
    queries, keys = of_kinds(q, a, first, kinds), of_kinds(k, b, first, kinds)
    squares = tuples.moved((dPk, dPb, dAk, dAb)[: kinds * kinds], at * CHUNK)
    rows = block_rows(i)
    own = channels_of(rows, cut)
    dtype: tl.constexpr = k.dtype.element_ty
    seen, whole = sums_seen(c, rows, kinds, cut), tl.load(c + channels_of(row(CHUNK - 1), cut))
    qs, ks = scaled(scale, floats(queries, own)), floats(keys, own)

    dqs = (zeros(BLOCK, cut.keys), zeros(BLOCK, cut.keys))[:kinds]
    dks, dcs = dqs, dqs
    for n in range(LEVELS):
        to_queries, to_keys = weights_of_level(n, c, rows, seen, cut)
        near_qs, near_ks = weigh(qs, to_queries, dtype), tuples.cast(tuples.times(ks, to_keys), dtype)
        met = where_met(n, tuples.load(squares, pairs_of(rows, i, cut)))
        dqs, dcs = add_to_queries(dqs, dcs, to_queries, near_qs, near_ks, met)
        dks, dcs = add_to_keys(dks, dcs, to_keys, near_qs, near_ks, met)

    border = sums_before(c, row(i * BLOCK), cut)
    to_queries = weights_since(border, seen)
    near_qs = weigh(qs, to_queries, dtype)
    for j in range(0, i):
        theirs = channels_of(block_rows(j), cut)
        near_ks = tuples.cast(tuples.times(floats(keys, theirs), tl.exp(border - tl.load(c + theirs))), dtype)
        met = tuples.load(squares, pairs_of(rows, j, cut))
        dqs, dcs = add_to_queries(dqs, dcs, to_queries, near_qs, near_ks, met)

    for m in range(i + 1, BLOCKS):
        border, theirs = sums_before(c, row(m * BLOCK), cut), block_rows(m)
        near_qs = scaled(scale, floats(queries, channels_of(theirs, cut)))
        near_qs = weigh(near_qs, weights_since(border, sums_seen(c, theirs, kinds, cut)), dtype)
        to_keys = tl.exp(border - seen[0])
        near_ks = tuples.cast(tuples.times(ks, to_keys), dtype)
        met = tuples.load(squares, pairs_of(theirs, i, cut))
        dks, dcs = add_to_keys(dks, dcs, to_keys, near_qs, near_ks, met)

    Qs, Ks = of_kinds(Q, A, first, kinds), of_kinds(K, B, first, kinds)
    dQs, dKs = floats(of_kinds(dQ, dA, first, kinds), own), floats(of_kinds(dK, dB, first, kinds), own)
    dcs = tuples.add(dcs, tuples.multiply(floats(Qs, own), dQs))
    dcs = add_to_first(dcs, tuples.multiply(floats(Ks, own), dKs), -1.0)
    tuples.store(of_kinds(dc, dbefore, first, kinds), own, dcs)

    same = diagonals(tuples.load(squares[:kinds], pairs_of(rows, i, cut)))
    dqs = tuples.add(dqs, tuples.multiply(tuples.exponentials(seen), dQs))
    dqs = scaled(scale, add_to_first(dqs, tuples.multiply(same, ks), 1.0))
    dks = tuples.add(dks, tuples.times(dKs, tl.exp(whole - seen[0])))
    dks = tuples.add(dks, tuples.times(same, qs[0]))
    tuples.store(of_kinds(dq, da, first, kinds), own, dqs)
    tuples.store(of_kinds(dk, db, first, kinds), own, dks)


def decay_gradients(dc: Arrays, dwhole) -> jax.Array:
    """Return the gradients of log-decays, of those of c_t, c_(t-1) (`token_gradients`) and c_C (`state_gradients`).

    A token's is the sum of all of them from it to the end, but for its own c_(t-1): a reads the state before it decays.
    """
    cut = Cut.of(dc[0], dc[0])
    [dg] = cut.by_chunk(channel_decays_gradients, [dwhole, *filled(dc)], [like(dc[0])], kinds=len(dc))
    return dg


@triton.jit
def channel_decays_gradients(dwhole, dc, dbefore, dg, kinds: tl.constexpr, cut: tl.constexpr):
    """Add up a chunk's gradients of sums."""
    number, at, _ = program_of_chunk(cut, 1)
    total = tl.load(keys_at(dc, at, cut))
    if kinds == 2:
        before = tl.load(keys_at(dbefore, at, cut))
        total += before
    left = tl.cumsum(total, axis=0, reverse=True)
    left += tl.load(dwhole + number * cut.keys + tl.arange(0, cut.keys))[None, :]
    if kinds == 2:
        left -= before
    store(keys_at(dg, at, cut), left)


@triton.jit
def add_to_queries(dqs, dcs, to_queries, near_qs, near_ks, squares):
    """Add what keys give queries through the gradients of their pairs.

    dc is made of the factors as they were rounded, as in `add_to_keys`: what a pair adds at its query it takes away at
    its key, so that it cancels in a sum over both.
    """
    given = by_query(squares, near_ks)
    dcs = tuples.add(dcs, tuples.multiply(tuples.cast(near_qs, tl.float32), given))
    return tuples.add(dqs, tuples.multiply(to_queries, given)), dcs


@triton.jit
def add_to_keys(dks, dcs, to_keys, near_qs, near_ks, squares):
    """Add what queries give keys."""
    given = by_key(squares, near_qs)
    dcs = add_to_first(dcs, tuples.multiply(tuples.cast(near_ks, tl.float32), given), -1.0)
    return tuples.add(dks, tuples.times(given, to_keys)), dcs


@triton.jit
def by_query(squares, keys):
    """Return for each query the sum over keys of their squares' products with them."""
    count: tl.constexpr = len(keys)
    found = ()
    for n in tl.static_range(count):
        total = tl.dot(squares[n * count], keys[0])
        for m in tl.static_range(1, count):
            total = tl.dot(squares[n * count + m], keys[m], total)
        found += (total,)
    return found


@triton.jit
def by_key(squares, queries):
    """Return for each key the sum over queries of their transposed squares' products with them."""
    count: tl.constexpr = len(queries)
    found = ()
    for m in tl.static_range(count):
        total = tl.dot(tl.trans(squares[m]), queries[0])
        for n in tl.static_range(1, count):
            total = tl.dot(tl.trans(squares[n * count + m]), queries[n], total)
        found += (total,)
    return found


@triton.jit
def add_to_first(xs, ys, sign: tl.constexpr):
    """Return xs with all of ys added to the first of them, or taken from it."""
    first = xs[0]
    for i in tl.static_range(len(ys)):
        first += sign * ys[i]
    found = (first,)
    for i in tl.static_range(1, len(xs)):
        found += (xs[i],)
    return found


@triton.jit
def diagonals(squares):
    """Return what is on the diagonal of all, in fp32."""
    t, s = places(BLOCK)
    found = ()
    for i in tl.static_range(len(squares)):
        found += (tl.sum(tl.where(t == s, squares[i].to(tl.float32), 0.0), axis=1)[:, None],)
    return found
