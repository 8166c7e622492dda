"""Softmax attention by chunks of queries and of keys: memory is linear in time, in both passes (arXiv 2112.05682).

A chunk of queries meets one chunk of keys after the other, with the largest score m and the sums l and o so far:

    m' = max(m, max_s s_ts)        p_ts = exp(s_ts - m'_t)
    l' = exp(m - m') l + sum_s p_ts        o' = exp(m - m') o + sum_s p_ts v_s

The backward pass makes the scores of each pair of chunks anew from L = m + log l (arXiv 2205.14135, algorithm 4):

    p_ts = exp(s_ts - L_t)        ds_ts = p_ts (do_t . v_s - do_t . o_t)

Pairs of chunks in which no query comes after a key, or only after the window, are left out.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Integer

from based_jax.dims import BSHK, BSHV, BTHK, BTHV
from based_jax.ops import segments, sharded
from based_jax.ops.precision import einsum, product_policy

CHUNK_TOKENS = 512
LOWEST = float(jnp.finfo(jnp.float32).min)
SUMS_TIME = 2, 2, 1
"""The axis of time of the largest scores (B, H, T), the totals (B, H, T) and the sums of values (B, T, H, V)."""

QueryNumbers = Integer[Array, "#B T"]
KeyNumbers = Integer[Array, "#B S"]

Read = tuple[BTHV, Float[Array, "B H T"]]
"""What queries read of some keys, zero of none, and the logarithms L of their weights' sums, `LOWEST` of none."""


class Cut(NamedTuple):
    """How time is cut: keys before the first query, keys that a query sees, and the tokens of either's chunks.

    `root` is what scores are divided by.
    """

    past: int
    window: int
    queries: int
    keys: int
    root: float = 1.0

    @classmethod
    def of(cls, T: int, S: int, past: int, window: int, root: float) -> "Cut":
        """Return that of T queries and S keys."""
        return cls(past, window, min(CHUNK_TOKENS, T), min(CHUNK_TOKENS, S), root)

    def pairs(self, T: int, S: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the numbers of the chunks of queries and of keys in which one sees another, queries in order."""
        query, key = np.arange(0, T, self.queries)[:, None] + self.past, np.arange(0, S, self.keys)[None]
        met = (key < query + self.queries) & (key + self.keys > query + 1 - self.window)
        query_chunks, key_chunks = np.nonzero(met)
        return query_chunks.astype(np.int32), key_chunks.astype(np.int32)

    def of_queries(self, x: Array, i: Array, axis: int = 1) -> Array:
        """Return what chunk i of the queries has of an array."""
        return lax.dynamic_slice_in_dim(x, i * self.queries, self.queries, axis)

    def of_keys(self, x: Array, j: Array, axis: int = 1) -> Array:
        """Return what chunk j of the keys has of an array."""
        return lax.dynamic_slice_in_dim(x, j * self.keys, self.keys, axis)

    def visible(self, i: Array, j: Array, query_numbers: QueryNumbers, key_numbers: KeyNumbers) -> Bool[Array, "..."]:
        """Return which keys of chunk j each query of chunk i sees, (B, 1, queries, keys)."""
        query = self.past + i * self.queries + jnp.arange(self.queries)[:, None]
        key = j * self.keys + jnp.arange(self.keys)[None]
        near = (key <= query) & (key > query - self.window)
        same = segments.same_document(self.of_queries(query_numbers, i), self.of_keys(key_numbers, j))
        return (near[None] & same)[:, None]


def attention(
    q: BTHK,
    k: BSHK,
    v: BSHV,
    query_numbers: QueryNumbers,
    key_numbers: KeyNumbers,
    window: int | None = None,
    root: float | None = None,
) -> BTHV:
    """Return attention of T queries, the last of S tokens, to the keys of their documents up to their own place.

    Args:
      query_numbers, key_numbers: of documents (`ops/segments.py`), 0 for what nobody sees.
      window: keys that a query sees, its own included; all where None.
      root: what scores are divided by; sqrt(K) where None.
    """
    T, S = q.shape[1], k.shape[1]
    cut = Cut.of(T, S, S - T, S if window is None else min(window, S), root or math.sqrt(q.shape[-1]))
    queries = (sharded.fill(x, {1: cut.queries}) for x in (q, query_numbers))
    keys = (sharded.fill(x, {1: cut.keys}) for x in (k, v, key_numbers))
    (q, query_numbers), (k, v, key_numbers) = queries, keys
    return _attention(cut, *sharded.vary_alike(q, k, v, query_numbers, key_numbers))[:, :T]


def read(
    q: BTHK,
    k: BSHK,
    v: BSHV,
    query_numbers: QueryNumbers,
    key_numbers: KeyNumbers,
    *,
    past: int,
    window: int,
    root: float,
) -> Read:
    """Return what T queries read of S keys, of which `past` stand before the first query."""
    T, S = q.shape[1], k.shape[1]
    cut = Cut.of(T, S, past, window, root)
    queries = (sharded.fill(x, {1: cut.queries}) for x in (q, query_numbers))
    keys = (sharded.fill(x, {1: cut.keys}) for x in (k, v, key_numbers))
    (q, query_numbers), (k, v, key_numbers) = queries, keys
    o, saved = forward(cut, *sharded.vary_alike(q, k, v, query_numbers, key_numbers))
    return o[:, :T], saved[-1][:, :, :T]


def read_gradients(saved, do: BTHV, *, past: int, window: int, root: float) -> tuple[Array, Array, Array]:
    """Return the gradients of q, k and v through the keys that `read` meets, where there may be others as well.

    Args:
      saved: q, k, v, the numbers of queries and keys, and o and the logarithm L of all keys that are seen.
      do: the gradient of o.
    """
    q, k, v, query_numbers, key_numbers, o, logarithm = saved
    T, S = q.shape[1], k.shape[1]
    cut = Cut.of(T, S, past, window, root)
    q, query_numbers, o, do = (sharded.fill(x, {1: cut.queries}) for x in (q, query_numbers, o, do))
    k, v, key_numbers = (sharded.fill(x, {1: cut.keys}) for x in (k, v, key_numbers))
    filled = q, k, v, query_numbers, key_numbers, o, sharded.fill(logarithm, {2: cut.queries})
    dq, dk, dv, *_ = backward(cut, sharded.vary_alike(*filled), do)
    return dq[:, :T], dk[:, :S], dv[:, :S]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(cut: Cut, q, k, v, query_numbers, key_numbers):
    return forward(cut, q, k, v, query_numbers, key_numbers)[0]


def forward(cut: Cut, q, k, v, query_numbers, key_numbers):
    """Return o, and what `backward` takes: the arguments, o and L, `LOWEST` of a query that sees no key."""
    arguments = q, k, v, query_numbers, key_numbers

    def meet(sums, pair):
        i, j = pair
        top, total, o = (cut.of_queries(x, i, axis) for x, axis in zip(sums, SUMS_TIME, strict=True))
        s = jnp.where(cut.visible(i, j, query_numbers, key_numbers), _scores(cut, q, k, i, j), LOWEST)
        higher = jnp.maximum(top, s.max(axis=-1))
        p = jnp.where(s > LOWEST, jnp.exp(s - higher[..., None]), 0.0)
        factor = jnp.exp(top - higher)
        o = _by_token(factor) * o + product("BHTS,BSHV->BTHV", p, cut.of_keys(v, j))
        new, starts = (higher, factor * total + p.sum(axis=-1), o), (i * cut.queries,) * 3
        return tuple(map(lax.dynamic_update_slice_in_dim, sums, new, starts, SUMS_TIME)), None

    B, T, H, _ = q.shape
    q, query_numbers, key_numbers, *pairs = _made_anew(q, query_numbers, key_numbers, *cut.pairs(T, k.shape[1]))
    zeros = jnp.zeros((B, H, T), jnp.float32)
    start = zeros + LOWEST, zeros, jnp.zeros((B, T, H, v.shape[-1]), jnp.float32)
    start = tuple(sharded.vary_alike(*start, like=(q, k, v, query_numbers, key_numbers)))
    (top, total, o), _ = lax.scan(meet, start, pairs)
    seen = total > 0
    o = (o / _by_token(jnp.where(seen, total, 1.0))).astype(v.dtype)
    logarithm = jnp.where(seen, top + jnp.log(jnp.where(seen, total, 1.0)), LOWEST)
    return o, (*arguments, o, logarithm)


def backward(cut: Cut, saved, do):
    """Return the gradients of q, k and v, and None of both numbers."""
    q, k, v, query_numbers, key_numbers, o, logarithm = saved
    met = cut.pairs(q.shape[1], k.shape[1])
    do, query_numbers, key_numbers, *pairs = _made_anew(do, query_numbers, key_numbers, *met)
    delta = jnp.einsum("BTHV,BTHV->BHT", do.astype(jnp.float32), o.astype(jnp.float32))

    def meet(gradients, pair):
        i, j = pair
        visible = cut.visible(i, j, query_numbers, key_numbers)
        total, own = (cut.of_queries(x, i, 2)[..., None] for x in (logarithm, delta))
        p = jnp.where(visible, jnp.exp(_scores(cut, q, k, i, j) - total), 0.0)
        do_i, v_j = cut.of_queries(do, i), cut.of_keys(v, j)
        ds = p * (product("BTHV,BSHV->BHTS", do_i, v_j) - own) / cut.root
        more = (
            product("BHTS,BSHK->BTHK", ds, cut.of_keys(k, j)),
            product("BHTS,BTHK->BSHK", ds, cut.of_queries(q, i)),
            product("BHTS,BTHV->BSHV", p, do_i),
        )
        starts = i * cut.queries, j * cut.keys, j * cut.keys
        return tuple(map(_added, gradients, more, starts)), None

    start = tuple(sharded.vary_alike(*(jnp.zeros(x.shape, jnp.float32) for x in (q, k, v)), like=(*saved, do)))
    gradients, _ = lax.scan(meet, start, pairs)
    return *(x.astype(like.dtype) for x, like in zip(gradients, (q, k, v), strict=True)), None, None


_attention.defvjp(forward, backward)


def _made_anew(x: Array, *places: Array | np.ndarray) -> tuple[Array, ...]:
    """Return the same; who sees whom, which follows from the places, then waits for x.

    It is the same in all layers, and JAX would make it once before their scan, of all pairs of tokens.
    """
    return lax.optimization_barrier((x, *places))


def _scores(cut: Cut, q: Array, k: Array, i: Array, j: Array) -> Float[Array, "B H _ _"]:
    return product("BTHK,BSHK->BHTS", cut.of_queries(q, i), cut.of_keys(k, j)) / cut.root


def product(spec: str, a: Array, b: Array) -> Array:
    """Return a product in b's dtype with fp32 sums."""
    dtype, precision = product_policy(b.dtype)
    return einsum(spec, a.astype(dtype), b.astype(dtype), precision)


def joined(some: Read, others: Read) -> Read:
    """Return what queries read of keys that they met in two parts, in fp32."""
    (o1, L1), (o2, L2) = some, others
    top = jnp.maximum(L1, L2)
    w1, w2 = jnp.exp(L1 - top), jnp.exp(L2 - top)
    s1, s2 = (_by_token(w / (w1 + w2)) for w in (w1, w2))
    return s1 * o1 + s2 * o2, top + jnp.log(w1 + w2)


def _by_token(x: Float[Array, "B H T"]) -> Float[Array, "B T H 1"]:
    return jnp.swapaxes(x, 1, 2)[..., None]


def _added(x: Array, more: Array, start: Array) -> Array:
    """Return x with more added to its tokens from `start` on."""
    there = lax.dynamic_slice_in_dim(x, start, more.shape[1], axis=1)
    return lax.dynamic_update_slice_in_dim(x, there + more, start, axis=1)
