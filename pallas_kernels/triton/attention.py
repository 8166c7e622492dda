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

from pallas_kernels.triton.launch import Type, launch, shared_bytes
from pallas_kernels.triton.tiles import store, tile, zeros
from pallas_kernels.triton.tuples import times

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


class Pieces(NamedTuple):
    """A head's channels: elements from token to token, and the sizes of its pieces."""

    stride: int
    sizes: tuple[int, ...]


class Cut(NamedTuple):
    """T and H of a call, what a program has of it and takes at each step, and what it does with scores."""

    time: int
    heads: int
    keys: Pieces
    values: Pieces
    own: int
    step: int
    scale: float
    window: int


FORWARD_TILINGS = {64: Tiling(64, 64, 4, 3), 128: Tiling(64, 64, 4, 3), 256: Tiling(64, 64, 4, 1)}
GRADIENT_TILINGS = {64: Tiling(64, 64, 4, 2), 128: Tiling(64, 64, 4, 2), 256: Tiling(64, 32, 8, 1)}
"""By the most channels of a head."""
TILING_BYTES = {64: 50 << 10, 128: 90 << 10, 256: 113 << 10}
SMALL_TILING = Tiling(32, 32, 4, 2)
"""What those take at most where a warp multiplies by itself, and what stands for them where there is less to share."""


def tiling_of(tilings: dict[int, Tiling], *arrays: jax.Array) -> Tiling:
    """Return the tiling for heads as large as those of the arrays."""
    largest = max(x.shape[3] for x in arrays)
    size = next(size for size in tilings if size >= largest)
    return tilings[size] if TILING_BYTES[size] <= shared_bytes() else SMALL_TILING


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
    _, time, heads, _ = q.shape
    cut = Cut(time, heads, _pieces(q), _pieces(v), tiling.own, tiling.step, scale, window)
    programs = heads * time // tiling.own
    return launch(kernel, programs, arrays, results, warps=tiling.warps, stages=tiling.stages, cut=cut)


def _pieces(x: jax.Array) -> Pieces:
    _, _, heads, size = x.shape
    return Pieces(heads * size, tuple(power for power in (256, 128, 64, 32, 16) if size & power))


@triton.jit
def attention_forward(q, k, v, numbers, first, o, logarithm, cut: constexpr):
    """Walk over the keys that a tile's queries see."""
    K: constexpr = cut.keys
    V: constexpr = cut.values
    row, head, number = tile_program(cut)
    k, v, numbers = head_of(k, row, head, cut, K), head_of(v, row, head, cut, V), numbers + row * cut.time
    start, here = number * cut.own, number * cut.own + tl.arange(0, cut.own)
    queries, own = load_pieces(head_of(q, row, head, cut, K), start, cut.own, K), tl.load(numbers + here)
    top, total = tl.full((cut.own,), HIDDEN_SCORE, tl.float32), tl.full((cut.own,), 0.0, tl.float32)
    sums = empty_sums(cut.own, V)
    for j in range(tl.load(first + row * (cut.time // cut.own) + number) // cut.step, (start + cut.own) // cut.step):
        there = j * cut.step + tl.arange(0, cut.step)
        seen = visible(here[:, None], there[None, :], own[:, None], tl.load(numbers + there)[None, :], cut.window)
        s = products(queries, load_pieces(k, j * cut.step, cut.step, K)) * (cut.scale * LOG2E)
        s = tl.where(seen, s, HIDDEN_SCORE)
        higher = tl.maximum(top, tl.max(s, axis=1))
        p, factor = tl.exp2(s - higher[:, None]), tl.exp2(top - higher)
        sums = with_products(times(sums, factor[:, None]), p, load_pieces(v, j * cut.step, cut.step, V))
        top, total = higher, total * factor + tl.sum(p, axis=1)
    total = tl.where(own == 0, 1.0, total)
    store_pieces(head_of(o, row, head, cut, V), start, cut.own, V, times(sums, 1 / total[:, None]))
    tl.store(logarithm + (row * cut.heads + head) * cut.time + here, top + tl.log2(total))


@triton.jit
def attention_query_gradients(q, k, v, numbers, first, logarithm, delta, do, dq, cut: constexpr):
    """Walk over the keys that a tile's queries see."""
    K: constexpr = cut.keys
    V: constexpr = cut.values
    row, head, number = tile_program(cut)
    k, v, numbers = head_of(k, row, head, cut, K), head_of(v, row, head, cut, V), numbers + row * cut.time
    start, here = number * cut.own, number * cut.own + tl.arange(0, cut.own)
    queries = load_pieces(head_of(q, row, head, cut, K), start, cut.own, K)
    gradients = load_pieces(head_of(do, row, head, cut, V), start, cut.own, V)
    of_head = (row * cut.heads + head) * cut.time + here
    own, logarithm, delta = tl.load(numbers + here), tl.load(logarithm + of_head), tl.load(delta + of_head)
    sums = empty_sums(cut.own, K)
    for j in range(tl.load(first + row * (cut.time // cut.own) + number) // cut.step, (start + cut.own) // cut.step):
        there = j * cut.step + tl.arange(0, cut.step)
        seen = visible(here[:, None], there[None, :], own[:, None], tl.load(numbers + there)[None, :], cut.window)
        keys = load_pieces(k, j * cut.step, cut.step, K)
        s = products(queries, keys) * (cut.scale * LOG2E)
        p = tl.where(seen, tl.exp2(s - logarithm[:, None]), 0.0)
        ds = p * (products(gradients, load_pieces(v, j * cut.step, cut.step, V)) - delta[:, None])
        sums = with_products(sums, ds, keys)
    store_pieces(head_of(dq, row, head, cut, K), start, cut.own, K, times(sums, cut.scale))


@triton.jit
def attention_key_gradients(q, k, v, numbers, last, logarithm, delta, do, dk, dv, cut: constexpr):
    """Walk over the queries that see a tile's keys; products are (keys, queries): none has to be transposed."""
    K: constexpr = cut.keys
    V: constexpr = cut.values
    row, head, number = tile_program(cut)
    q, do, numbers = head_of(q, row, head, cut, K), head_of(do, row, head, cut, V), numbers + row * cut.time
    of_head = (row * cut.heads + head) * cut.time
    start, here = number * cut.own, number * cut.own + tl.arange(0, cut.own)
    keys = load_pieces(head_of(k, row, head, cut, K), start, cut.own, K)
    values = load_pieces(head_of(v, row, head, cut, V), start, cut.own, V)
    own, key_sums, value_sums = tl.load(numbers + here), empty_sums(cut.own, K), empty_sums(cut.own, V)
    for i in range(start // cut.step, tl.load(last + row * (cut.time // cut.own) + number) // cut.step + 1):
        there = i * cut.step + tl.arange(0, cut.step)
        seen = visible(there[None, :], here[:, None], tl.load(numbers + there)[None, :], own[:, None], cut.window)
        queries, gradients = load_pieces(q, i * cut.step, cut.step, K), load_pieces(do, i * cut.step, cut.step, V)
        s = products(keys, queries) * (cut.scale * LOG2E)
        p = tl.where(seen, tl.exp2(s - tl.load(logarithm + of_head + there)[None, :]), 0.0)
        ds = p * (products(values, gradients) - tl.load(delta + of_head + there)[None, :])
        key_sums, value_sums = with_products(key_sums, ds, queries), with_products(value_sums, p, gradients)
    store_pieces(head_of(dk, row, head, cut, K), start, cut.own, K, times(key_sums, cut.scale))
    store_pieces(head_of(dv, row, head, cut, V), start, cut.own, V, value_sums)


@triton.jit
def tile_program(cut: constexpr):
    """Return which row, head and tile a program has."""
    n, tiles = tl.program_id(0), cut.time // cut.own
    head = n // tiles
    return head // cut.heads, head % cut.heads, n % tiles


@triton.jit
def visible(query, key, query_number, key_number, window: constexpr):
    """Return whether a query sees a key, from their places and their documents' numbers."""
    near = (key <= query) & (key > query - window)
    return near & (query_number == key_number) & (key_number != 0)


@triton.jit
def head_of(x, row, head, cut: constexpr, pieces: constexpr):
    """Return where the first token of a head is."""
    return x + row.to(tl.int64) * (cut.time * pieces.stride) + head * (pieces.stride // cut.heads)


@triton.constexpr_function
def channels_before(sizes, n):
    """Return how many channels there are before piece n."""
    return sum(sizes[:n])


@triton.jit
def place_of_piece(x, start, tokens: constexpr, pieces: constexpr, n: constexpr):
    """Return where the elements of a piece are, of tokens of a head at x from `start` on."""
    return tile(x + start * pieces.stride + channels_before(pieces.sizes, n), tokens, pieces.sizes[n], pieces.stride)


@triton.jit
def load_pieces(x, start, tokens: constexpr, pieces: constexpr):
    """Return the pieces of tokens of a head at x from `start` on."""
    found = ()
    for n in tl.static_range(len(pieces.sizes)):
        found += (tl.load(place_of_piece(x, start, tokens, pieces, n)),)
    return found


@triton.jit
def store_pieces(x, start, tokens: constexpr, pieces: constexpr, values):
    """Write them."""
    for n in tl.static_range(len(values)):
        store(place_of_piece(x, start, tokens, pieces, n), values[n])


@triton.jit
def empty_sums(tokens: constexpr, pieces: constexpr):
    """Return sums over pieces."""
    found = ()
    for n in tl.static_range(len(pieces.sizes)):
        found += (zeros(tokens, tl.constexpr(pieces.sizes[n])),)
    return found


@triton.jit
def products(a, b):
    """Return the products of each row of a with each of b, of all pieces together."""
    total = tl.dot(a[0], tl.trans(b[0]))
    for n in tl.static_range(1, len(a)):
        total = tl.dot(a[n], tl.trans(b[n]), total)
    return total


@triton.jit
def with_products(sums, weights, values):
    """Return sums with the weighted rows of all pieces added."""
    found = ()
    for n in tl.static_range(len(values)):
        found += (tl.dot(weights.to(values[n].dtype), values[n], sums[n]),)
    return found
