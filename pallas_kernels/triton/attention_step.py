"""Softmax attention of one token over a cache, in Triton: the keys of a row are split over programs (arXiv 2402.10176).

A program has the queries of one group and a split of the keys that they share, and walks over those that the row has:

    L = log2 sum_s exp2(s_s)      o = sum_s exp2(s_s - L) v_s

Queries are (B, H, K), keys and values (B, S, G, .) in bf16 or fp16, lengths (B,) int32. Tiles of channels are powers of
two, and what they have beyond a head is masked: of 72 channels 64 and 16. A kernel of two tells the scores s_s as well.

Queries may be of T tokens, which come one after the other behind those of the cache: T of each query head beside each
other. The cache is then a ring of S slots, of which the t-th token sees all but the t + 1 oldest, if it is full.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from triton.language import constexpr

from pallas_kernels.triton.attention import (
    HIDDEN_SCORE,
    LOG2E,
    Pieces,
    channels_before,
    empty_sums,
    products,
    with_products,
)
from pallas_kernels.triton.launch import Type, launch
from pallas_kernels.triton.tiles import tile
from pallas_kernels.triton.tuples import times

TILE_MULTIPLE = 16
"""The least size of a product's tiles, of channels and of queries, of which those that are not there are masked."""


class Tiling(NamedTuple):
    """Keys that a program has, those that it takes at each step of its walk, its warps, and the steps in flight."""

    split: int
    step: int
    warps: int
    stages: int


TILINGS = Tiling(512, 64, 2, 3), Tiling(256, 64, 1, 3), Tiling(64, 64, 2, 1)
"""From the most keys of a program to the least."""


def tiling_of(keys: int) -> Tiling:
    """Return the tiling for programs that should have so many keys each, or fewer."""
    return next((tiling for tiling in TILINGS if tiling.split <= keys), TILINGS[-1])


class Cut(NamedTuple):
    """S, G and H / G of a call, how channels and queries are tiled, and what a program has of the keys."""

    slots: int
    groups: int
    queries: int
    query_tile: int
    keys: Pieces
    values: Pieces
    splits: int
    split: int
    step: int
    scale: float
    tokens: int


def forward(q, k, v, length, *, scale: float, tiling: Tiling, tokens: int = 0) -> list[jax.Array]:
    """Return o (B, splits, H, V) and L (B, splits, H) of each split, fp32; of one without keys zero and the lowest.

    Args:
      length: tokens that each row has had, more than S only where the cache is a ring.
      scale: of scores.
      tokens: T of a ring; 0 where each query sees all keys that there are.
    """
    types, options = _call(q, k, v, scale, tiling, tokens)
    return launch(attention_step, arguments=[q, k, v, length], results=types, **options)


def forward_with_scores(q, k, v, length, *, scale: float, tiling: Tiling) -> list[jax.Array]:
    """Return the same, and scores (B, H, S) fp32, those of keys that a row does not have `HIDDEN_SCORE`."""
    types, options = _call(q, k, v, scale, tiling, 0)
    types = *types, Type((q.shape[0], q.shape[1], k.shape[1]), jnp.float32)
    return launch(attention_step_scores, arguments=[q, k, v, length], results=types, **options)


def _call(q, k, v, scale: float, tiling: Tiling, tokens: int) -> tuple[tuple[Type, Type], dict[str, Any]]:
    """Return the types of o and L, and how a kernel is launched."""
    (batch, heads, _), (_, slots, groups, _) = q.shape, k.shape
    queries, splits = heads // groups, -(-slots // tiling.split)
    query_tile = max(TILE_MULTIPLE, triton.next_power_of_2(queries))
    pieces = _pieces(k), _pieces(v)
    cut = Cut(slots, groups, queries, query_tile, *pieces, splits, tiling.split, tiling.step, scale, tokens)
    types = Type((batch, splits, heads, v.shape[3]), jnp.float32), Type((batch, splits, heads), jnp.float32)
    return types, {"programs": splits * groups, "warps": tiling.warps, "stages": tiling.stages, "cut": cut}


def _pieces(x: jax.Array) -> Pieces:
    """Return a head's channels (its `stride`, from head to head) in tiles that cover them."""
    size = -(-x.shape[3] // TILE_MULTIPLE) * TILE_MULTIPLE
    return Pieces(x.shape[3], tuple(power for power in (256, 128, 64, 32, 16) if size & power))


@triton.jit
def attention_step(q, k, v, length, o, logarithm, cut: constexpr):
    """Read a split's keys."""
    read_split(q, k, v, length, o, logarithm, None, cut)


@triton.jit
def attention_step_scores(q, k, v, length, o, logarithm, scores, cut: constexpr):
    """Read a split's keys, and tell their scores."""
    read_split(q, k, v, length, o, logarithm, scores, cut)


@triton.jit
def read_split(q, k, v, length, o, logarithm, scores, cut: constexpr):
    """Walk over a split's keys; programs of the same tokens stand beside each other, as these lie."""
    K: constexpr = cut.keys
    V: constexpr = cut.values
    programs: constexpr = cut.splits * cut.groups
    row, n = tl.program_id(0) // programs, tl.program_id(0) % programs
    split, group = n // cut.groups, n % cut.groups
    start = split * cut.split
    last = tl.minimum(cut.slots, start + cut.split)
    count = tl.load(length + row)
    end = tl.minimum(count, last)
    token = row.to(tl.int64) * cut.slots * cut.groups + group
    k, v = k + token * K.stride, v + token * V.stride
    one = tl.arange(0, cut.query_tile)
    there = one < cut.queries
    first = (row * cut.groups + group) * cut.queries
    queries = load_rows(q + first * K.stride, there, cut.query_tile, K.stride, K)
    top, total = tl.full((cut.query_tile,), HIDDEN_SCORE, tl.float32), tl.full((cut.query_tile,), 0.0, tl.float32)
    sums = empty_sums(cut.query_tile, V)
    if scores is not None:
        scores += first.to(tl.int64) * cut.slots
        for place in range(start + tl.cdiv(tl.maximum(end - start, 0), cut.step) * cut.step, last, cut.step):
            hidden = tl.full((cut.query_tile, cut.step), HIDDEN_SCORE, tl.float32)
            store_scores(scores, place, there, hidden, cut)
    for place in range(start, end, cut.step):
        seen = place + tl.arange(0, cut.step) < end
        keys = load_rows(k + place * (cut.groups * K.stride), seen, cut.step, cut.groups * K.stride, K)
        visible = seen[None, :]
        if cut.tokens > 0:
            age = (count - 1 - place - tl.arange(0, cut.step)) % cut.slots
            visible = visible & (age[None, :] + (one % cut.tokens)[:, None] < cut.slots - 1)
        s = tl.where(visible, products(queries, keys) * (cut.scale * LOG2E), HIDDEN_SCORE)
        if scores is not None:
            store_scores(scores, place, there, s, cut)
        higher = tl.maximum(top, tl.max(s, axis=1))
        p, factor = tl.exp2(s - higher[:, None]), tl.exp2(top - higher)
        if cut.tokens > 0:  # a query may see none of these keys
            p = tl.where(visible, p, 0.0)
        values = load_rows(v + place * (cut.groups * V.stride), seen, cut.step, cut.groups * V.stride, V)
        sums = with_products(times(sums, factor[:, None]), p, values)
        top, total = higher, total * factor + tl.sum(p, axis=1)
    total = tl.where(total == 0, 1.0, total)
    out = ((row * cut.splits + split) * cut.groups + group) * cut.queries
    store_rows(o + out * V.stride, there, cut.query_tile, V, times(sums, 1 / total[:, None]))
    tl.store(logarithm + out + one, top + tl.log2(total), mask=there)


@triton.jit
def store_scores(scores, place, there, s, cut: constexpr):
    """Write the scores of the queries that are there and of the keys from a place on, as many as the cache has."""
    places = place + tl.arange(0, cut.step)
    pointers = scores + tl.arange(0, cut.query_tile)[:, None] * cut.slots + places[None, :]
    tl.store(pointers, s, mask=there[:, None] & (places < cut.slots)[None, :])


@triton.jit
def mask_of_piece(there, pieces: constexpr, n: constexpr):
    """Return which elements of a piece there are, of rows that are there or not."""
    before: constexpr = channels_before(pieces.sizes, n)
    return there[:, None] & (before + tl.arange(0, pieces.sizes[n]) < pieces.stride)[None, :]


@triton.jit
def load_rows(x, there, rows: constexpr, stride: constexpr, pieces: constexpr):
    """Return the pieces of rows, a stride apart from x on, zero where they are not there."""
    found = ()
    for n in tl.static_range(len(pieces.sizes)):
        pointers = tile(x + channels_before(pieces.sizes, n), rows, pieces.sizes[n], stride)
        found += (tl.load(pointers, mask=mask_of_piece(there, pieces, n), other=0.0),)
    return found


@triton.jit
def store_rows(x, there, rows: constexpr, pieces: constexpr, values):
    """Write the rows that are there, one head behind the other."""
    for n in tl.static_range(len(values)):
        pointers = tile(x + channels_before(pieces.sizes, n), rows, pieces.sizes[n], pieces.stride)
        tl.store(pointers, values[n], mask=mask_of_piece(there, pieces, n))
