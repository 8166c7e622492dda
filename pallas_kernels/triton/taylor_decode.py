"""What a few tokens read of a Taylor state and of recent tokens, in Triton (see `ops/taylor_decode.py`).

A program has one head of one row, and walks over the features of its state and then over its recent tokens, by tiles of
rows. Each of these has a weight for each query, and outputs are sums of weighted rows: they are added up lane by lane,
and over lanes once, at the end.
"""

from typing import NamedTuple

import jax
import triton
import triton.language as tl
from triton.language import constexpr

from pallas_kernels.triton.launch import Type, launch

TILE_ROWS, WARPS, STAGES = 16, 4, 3
"""Features or recent tokens of a tile, warps of a program, and tiles in flight."""


class Cut(NamedTuple):
    """T, H, K, V, E and W of a call, powers of two from K and V on, whether a state has scales, and rows of a tile."""

    tokens: int
    heads: int
    keys: int
    values: int
    features: int
    room: int
    key_tile: int
    value_tile: int
    scaled: bool
    rows: int


def outputs(q, k, v, values, scales, normaliser, before) -> jax.Array:
    """Return o (B, T, H, V) in v's dtype.

    Args:
      q: (B, T, H, K) bf16 or fp32.
      k, v: of recent tokens, those of q among them, (B, H, W, K) and (B, H, W, V); W is a multiple of 16.
      values: (B, H, E, V), fp32, bf16, int8 or fp8; E = 1 + K + K (K + 1) / 2.
      scales: (B, H, E) fp32, None where values are as they are.
      normaliser: (B, H, E) fp32.
      before: recent tokens of each row that are not of q, (B,) int32.
    """
    (batch, tokens, heads, keys), (*_, features, value_dim) = q.shape, values.shape
    key_tile, value_tile = triton.next_power_of_2(keys), triton.next_power_of_2(value_dim)
    sizes = tokens, heads, keys, value_dim, features, k.shape[2]
    cut = Cut(*sizes, key_tile, value_tile, scales is not None, TILE_ROWS)
    arrays = [q, k, v, values, scales, normaliser, before]
    types = [Type((batch, tokens, heads, value_dim), v.dtype)]
    [o] = launch(taylor_decode, heads, arrays, types, warps=WARPS, stages=STAGES, cut=cut)
    return o


@triton.jit
def taylor_decode(q, k, v, values, scales, normaliser, before, o, cut: constexpr):
    """Read the state, then recent tokens, for all queries of a head."""
    T: constexpr = cut.tokens
    ROWS: constexpr = cut.rows
    number = tl.program_id(0).to(tl.int64)
    row, head = number // cut.heads, number % cut.heads
    state = number * cut.features
    first_query = row * cut.tokens * cut.heads + head
    lane, column = tl.arange(0, ROWS), tl.arange(0, cut.value_tile)
    numerators, denominators = (), ()
    for _t in tl.static_range(T):
        numerators += (tl.full((ROWS, cut.value_tile), 0.0, tl.float32),)
        denominators += (tl.full((ROWS,), 0.0, tl.float32),)
    for first in range(0, cut.features, ROWS):
        e = first + lane
        rows = load_rows(values + state * cut.values, e, e < cut.features, column, cut.values)
        counted = tl.load(normaliser + state + e, mask=e < cut.features, other=0.0)
        more, more_below = (), ()
        for t in tl.static_range(T):
            phi = features(q + (first_query + t * cut.heads) * cut.keys, e, cut)
            more_below += (denominators[t] + phi * counted,)
            if cut.scaled:
                phi *= tl.load(scales + state + e, mask=e < cut.features, other=0.0)
            more += (numerators[t] + phi[:, None] * rows,)
        numerators, denominators = more, more_below
    count = tl.load(before + row)
    channel = tl.arange(0, cut.key_tile)
    for first in range(0, cut.room, ROWS):
        place = first + lane
        seen = place < count + cut.tokens
        keys = load_rows(k + number * cut.room * cut.keys, place, seen, channel, cut.keys)
        rows = load_rows(v + number * cut.room * cut.values, place, seen, column, cut.values)
        more, more_below = (), ()
        for t in tl.static_range(T):
            query = q + (first_query + t * cut.heads) * cut.keys
            x = tl.load(query + channel, mask=channel < cut.keys, other=0.0).to(tl.float32)
            s = tl.sum(keys * x[None, :], axis=1) * root(cut.keys)
            p = tl.where(place <= count + t, 1.0 + s * (1.0 + 0.5 * s), 0.0)
            more_below += (denominators[t] + p,)
            more += (numerators[t] + p[:, None] * rows,)
        numerators, denominators = more, more_below
    for t in tl.static_range(T):
        out = tl.sum(numerators[t], axis=0) / tl.sum(denominators[t], axis=0)
        pointers = o + (first_query + t * cut.heads) * cut.values + column
        tl.store(pointers, out.to(o.dtype.element_ty), mask=column < cut.values)


@triton.constexpr_function
def root(keys):
    """Return K^-1/2, by which scores are multiplied."""
    return keys**-0.5


@triton.jit
def load_rows(start, rows, there, column, columns: constexpr):
    """Return rows of so many columns in fp32, zero where they are not there."""
    mask = there[:, None] & (column < columns)[None, :]
    return tl.load(start + rows[:, None] * columns + column[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def features(x, e, cut: constexpr):
    """Return the features e of a query in fp32, in the order of `ops/taylor.py`: 1, channels, products by n <= m."""
    there, is_product = (e > 0) & (e < cut.features), (e > cut.keys) & (e < cut.features)
    product = tl.where(is_product, e - 1 - cut.keys, 0)
    m = ((tl.sqrt(8.0 * product.to(tl.float32) + 1.5) - 1.0) * 0.5).to(tl.int32)
    n = product - m * (m + 1) // 2
    first = tl.load(x + tl.where(is_product, m, e - 1), mask=there, other=1.0).to(tl.float32)
    second = tl.load(x + n, mask=is_product, other=1.0).to(tl.float32)
    of_product = root(cut.keys) * tl.where(m == n, 0.5**0.5, 1.0)
    return first * second * tl.where(is_product, of_product, tl.where(there, root(cut.keys) ** 0.5, 1.0))
