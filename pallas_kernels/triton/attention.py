"""Softmax attention of packed documents in Triton kernels: scores exist by tiles, on the chip (arXiv 2307.08691).

With L the logarithm of the sum of exponentials, which `forward` keeps of each query:

    p_ts = exp(s_ts - L_t)      o_t = sum_s p_ts v_s      ds_ts = p_ts (do_t . v_s - do_t . o_t)

A program of `forward` and of `query_gradients` has a tile's queries and walks over the keys from the first one that
they see; one of `key_gradients` has keys, and walks over the queries up to the last one that sees them.

Arrays are (B, T, H, .) in bf16 or fp16, T a multiple of `TIME_MULTIPLE`, heads of `HEAD_MULTIPLE`, up to
`MAX_HEAD_DIM`. Heads are taken in pieces whose sizes are powers of two: of 80 channels 64 and 16. Numbers (B, T) of
documents rise along a row; a token numbered 0 is padding, which sees nothing and is seen by nobody.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from triton.language import constexpr

from pallas_kernels.triton.launch import Type, launch
from pallas_kernels.triton.tiles import tile

TIME_MULTIPLE, HEAD_MULTIPLE, MAX_HEAD_DIM = 128, 16, 256
HIDDEN_SCORE = constexpr(-1e30)
"""Of a key that a query does not see: finite, so that nothing becomes NaN before the first one that it does."""
LOG2E = constexpr(math.log2(math.e))


class Tiling(NamedTuple):
    """Tokens that a program has, those that it takes at each step of its walk, its warps, and the steps in flight."""

    own: int
    step: int
    warps: int
    stages: int


FORWARD_TILINGS = {64: Tiling(64, 64, 4, 3), 128: Tiling(64, 64, 4, 3), 256: Tiling(64, 64, 4, 1)}
GRADIENT_TILINGS = {64: Tiling(64, 64, 4, 2), 128: Tiling(64, 64, 4, 2), 256: Tiling(64, 32, 8, 1)}
"""By the most channels of a head."""


def tiling_of(tilings: dict[int, Tiling], *arrays: jax.Array) -> Tiling:
    """Return the tiling for heads as large as those of the arrays."""
    largest = max(x.shape[3] for x in arrays)
    return tilings[next(size for size in tilings if size >= largest)]


def forward(q, k, v, numbers, first, *, scale: float, window: int) -> list[jax.Array]:
    """Return o like v, and L in bits (B, H, T) fp32; neither means anything at padding.

    Args:
      first: (B, T / own), where the first key stands that a tile's queries see.
      scale: of scores.
      window: keys that a query sees, its own included.
    """
    tiling = tiling_of(FORWARD_TILINGS, q, v)
    types = Type(v.shape, v.dtype), Type((q.shape[0], q.shape[2], q.shape[1]), jnp.float32)
    return _run(attention_forward, tiling, [q, k, v, numbers, first], types, scale, window)


def query_gradients(q, k, v, numbers, first, logarithm, delta, do, *, scale: float, window: int) -> list[jax.Array]:
    """Return dq.

    Args:
      first: as in `forward`, for tiles of this kernel's size.
      logarithm: of `forward`.
      delta: (B, H, T) fp32, the products of do and o.
    """
    arrays, tiling = [q, k, v, numbers, first, logarithm, delta, do], tiling_of(GRADIENT_TILINGS, q, v)
    return _run(attention_query_gradients, tiling, arrays, [Type(q.shape, q.dtype)], scale, window)


def key_gradients(q, k, v, numbers, last, logarithm, delta, do, *, scale: float, window: int) -> list[jax.Array]:
    """Return dk and dv.

    Args:
      last: (B, T / own), where the last query stands that sees a tile's keys, -1 where there is none.
      logarithm, delta: as in `query_gradients`.
    """
    arrays, tiling = [q, k, v, numbers, last, logarithm, delta, do], tiling_of(GRADIENT_TILINGS, q, v)
    types = Type(k.shape, k.dtype), Type(v.shape, v.dtype)
    return _run(attention_key_gradients, tiling, arrays, types, scale, window)


def _run(kernel, tiling: Tiling, arrays, results, scale: float, window: int) -> list[jax.Array]:
    """Run a program for each tile of each head; arrays are q, k, v and others."""
    q, _, v, *_ = arrays
    (_, time, heads, keys), values = q.shape, v.shape[3]
    constants = {"T": time, "H": heads, "K": _channels(keys), "V": _channels(values)}
    constants |= {"OWN": tiling.own, "STEP": tiling.step, "SCALE": scale, "WINDOW": window}
    programs = heads * time // tiling.own
    return launch(kernel, programs, arrays, results, warps=tiling.warps, stages=tiling.stages, **constants)


def _channels(size: int) -> tuple[int, ...]:
    """Return the sizes of the pieces of a head's channels: powers of two."""
    return tuple(power for power in (256, 128, 64, 32, 16) if size & power)


@triton.jit
def attention_forward(
    q,
    k,
    v,
    numbers,
    first,
    o,
    logarithm,
    T: constexpr,
    H: constexpr,
    K: constexpr,
    V: constexpr,
    OWN: constexpr,
    STEP: constexpr,
    SCALE: constexpr,
    WINDOW: constexpr,
):
    """Walk over the keys that a tile's queries see."""
    row, head, tile = tile_program(T, H, OWN)
    k, v, numbers = head_of(k, row, head, T, H, K), head_of(v, row, head, T, H, V), numbers + row * T
    here = tile * OWN + tl.arange(0, OWN)
    queries, own = load_pieces(head_of(q, row, head, T, H, K), tile * OWN, OWN, H, K), tl.load(numbers + here)
    top, total = tl.full((OWN,), HIDDEN_SCORE, tl.float32), tl.full((OWN,), 0.0, tl.float32)
    sums = zeros(OWN, V)
    for j in range(tl.load(first + row * (T // OWN) + tile) // STEP, (tile + 1) * OWN // STEP):
        there = j * STEP + tl.arange(0, STEP)
        seen = visible(here[:, None], there[None, :], own[:, None], tl.load(numbers + there)[None, :], WINDOW)
        s = products(queries, load_pieces(k, j * STEP, STEP, H, K)) * (SCALE * LOG2E)
        s = tl.where(seen, s, HIDDEN_SCORE)
        higher = tl.maximum(top, tl.max(s, axis=1))
        p, factor = tl.exp2(s - higher[:, None]), tl.exp2(top - higher)
        sums = with_products(times(sums, factor[:, None]), p, load_pieces(v, j * STEP, STEP, H, V))
        top, total = higher, total * factor + tl.sum(p, axis=1)
    total = tl.where(own == 0, 1.0, total)
    store_pieces(head_of(o, row, head, T, H, V), tile * OWN, OWN, H, V, times(sums, 1 / total[:, None]))
    tl.store(logarithm + (row * H + head) * T + here, top + tl.log2(total))


@triton.jit
def attention_query_gradients(
    q,
    k,
    v,
    numbers,
    first,
    logarithm,
    delta,
    do,
    dq,
    T: constexpr,
    H: constexpr,
    K: constexpr,
    V: constexpr,
    OWN: constexpr,
    STEP: constexpr,
    SCALE: constexpr,
    WINDOW: constexpr,
):
    """Walk over the keys that a tile's queries see."""
    row, head, tile = tile_program(T, H, OWN)
    k, v, numbers = head_of(k, row, head, T, H, K), head_of(v, row, head, T, H, V), numbers + row * T
    here = tile * OWN + tl.arange(0, OWN)
    queries = load_pieces(head_of(q, row, head, T, H, K), tile * OWN, OWN, H, K)
    gradients = load_pieces(head_of(do, row, head, T, H, V), tile * OWN, OWN, H, V)
    of_head = (row * H + head) * T + here
    own, logarithm, delta = tl.load(numbers + here), tl.load(logarithm + of_head), tl.load(delta + of_head)
    sums = zeros(OWN, K)
    for j in range(tl.load(first + row * (T // OWN) + tile) // STEP, (tile + 1) * OWN // STEP):
        there = j * STEP + tl.arange(0, STEP)
        seen = visible(here[:, None], there[None, :], own[:, None], tl.load(numbers + there)[None, :], WINDOW)
        keys = load_pieces(k, j * STEP, STEP, H, K)
        s = products(queries, keys) * (SCALE * LOG2E)
        p = tl.where(seen, tl.exp2(s - logarithm[:, None]), 0.0)
        ds = p * (products(gradients, load_pieces(v, j * STEP, STEP, H, V)) - delta[:, None])
        sums = with_products(sums, ds, keys)
    store_pieces(head_of(dq, row, head, T, H, K), tile * OWN, OWN, H, K, times(sums, SCALE))


@triton.jit
def attention_key_gradients(
    q,
    k,
    v,
    numbers,
    last,
    logarithm,
    delta,
    do,
    dk,
    dv,
    T: constexpr,
    H: constexpr,
    K: constexpr,
    V: constexpr,
    OWN: constexpr,
    STEP: constexpr,
    SCALE: constexpr,
    WINDOW: constexpr,
):
    """Walk over the queries that see a tile's keys; products are (keys, queries): none is transposed."""
    row, head, tile = tile_program(T, H, OWN)
    q, do, numbers = head_of(q, row, head, T, H, K), head_of(do, row, head, T, H, V), numbers + row * T
    logarithm, delta = logarithm + (row * H + head) * T, delta + (row * H + head) * T
    here = tile * OWN + tl.arange(0, OWN)
    keys = load_pieces(head_of(k, row, head, T, H, K), tile * OWN, OWN, H, K)
    values = load_pieces(head_of(v, row, head, T, H, V), tile * OWN, OWN, H, V)
    own, key_sums, value_sums = tl.load(numbers + here), zeros(OWN, K), zeros(OWN, V)
    for i in range(tile * OWN // STEP, tl.load(last + row * (T // OWN) + tile) // STEP + 1):
        there = i * STEP + tl.arange(0, STEP)
        seen = visible(there[None, :], here[:, None], tl.load(numbers + there)[None, :], own[:, None], WINDOW)
        queries, gradients = load_pieces(q, i * STEP, STEP, H, K), load_pieces(do, i * STEP, STEP, H, V)
        s = products(keys, queries) * (SCALE * LOG2E)
        p = tl.where(seen, tl.exp2(s - tl.load(logarithm + there)[None, :]), 0.0)
        ds = p * (products(values, gradients) - tl.load(delta + there)[None, :])
        key_sums, value_sums = with_products(key_sums, ds, queries), with_products(value_sums, p, gradients)
    store_pieces(head_of(dk, row, head, T, H, K), tile * OWN, OWN, H, K, times(key_sums, SCALE))
    store_pieces(head_of(dv, row, head, T, H, V), tile * OWN, OWN, H, V, value_sums)


@triton.jit
def tile_program(T: constexpr, H: constexpr, OWN: constexpr):
    """Return which row, head and tile a program has."""
    n = tl.program_id(0)
    head = n // (T // OWN)
    return head // H, head % H, n % (T // OWN)


@triton.jit
def visible(query, key, query_number, key_number, WINDOW: constexpr):
    """Return whether a query sees a key, from their places and their documents' numbers."""
    near = (key <= query) & (key > query - WINDOW)
    return near & (query_number == key_number) & (key_number != 0)


@triton.constexpr_function
def width(pieces, count=None):
    """Return the channels of a head's pieces, or of the first ones."""
    return sum(pieces[:count])


@triton.jit
def head_of(x, row, head, T: constexpr, H: constexpr, PIECES: constexpr):
    """Return where the first token of a head is."""
    return x + (row.to(tl.int64) * (T * H) + head) * width(PIECES)


@triton.jit
def piece(x, start, ROWS: constexpr, H: constexpr, PIECES: constexpr, N: constexpr):
    """Return where a piece is of the tokens from `start` on of a head at x."""
    stride: constexpr = H * width(PIECES)
    return tile(x + start * stride + width(PIECES, N), ROWS, PIECES[N], stride)


@triton.jit
def load_pieces(x, start, ROWS: constexpr, H: constexpr, PIECES: constexpr):
    """Return the pieces of the tokens from `start` on of a head at x."""
    found = ()
    for n in tl.static_range(len(PIECES)):
        found += (tl.load(piece(x, start, ROWS, H, PIECES, n)),)
    return found


@triton.jit
def store_pieces(x, start, ROWS: constexpr, H: constexpr, PIECES: constexpr, pieces):
    """Write them."""
    for n in tl.static_range(len(PIECES)):
        tl.store(piece(x, start, ROWS, H, PIECES, n), pieces[n].to(x.dtype.element_ty))


@triton.jit
def zeros(ROWS: constexpr, PIECES: constexpr):
    """Return sums over pieces."""
    found = ()
    for n in tl.static_range(len(PIECES)):
        found += (tl.full((ROWS, PIECES[n]), 0.0, tl.float32),)
    return found


@triton.jit
def times(pieces, factor):
    """Return each times a factor."""
    found = ()
    for n in tl.static_range(len(pieces)):
        found += (pieces[n] * factor,)
    return found


@triton.jit
def products(a, b):
    """Return the products of each row of a with each of b."""
    total = tl.dot(a[0], tl.trans(b[0]))
    for n in tl.static_range(1, len(a)):
        total = tl.dot(a[n], tl.trans(b[n]), total)
    return total


@triton.jit
def with_products(sums, weights, pieces):
    """Return the sums with the weighted rows of pieces."""
    found = ()
    for n in tl.static_range(len(pieces)):
        found += (tl.dot(weights.to(pieces[n].dtype), pieces[n], sums[n]),)
    return found
