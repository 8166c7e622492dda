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
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.triton.pallas_chunks import Type, dot, launch

TIME_MULTIPLE, HEAD_MULTIPLE, MAX_HEAD_DIM = 128, 16, 256
HIDDEN_SCORE = -1e30
"""Of a key that a query does not see: finite, so that nothing becomes NaN before the first one that it does."""
LOG2E = math.log2(math.e)


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

    def body(q_ref, k_ref, v_ref, numbers_ref, first_ref, o_ref, logarithm_ref):
        tile = _tile(q, tiling)
        here = pl.ds(tile * tiling.own, tiling.own)
        queries, own = _pieces(q_ref, slice(None)), numbers_ref[here]

        def step(j, carry):
            top, total, o = carry
            there = pl.ds(j * tiling.step, tiling.step)
            visible = _visible(own, numbers_ref[there], tile * tiling.own, j * tiling.step, window)
            s = jnp.where(visible, _products(queries, _pieces(k_ref, there)) * (scale * LOG2E), HIDDEN_SCORE)
            higher = jnp.maximum(top, jnp.max(s, axis=1))
            p, factor = jnp.exp2(s - higher[:, None]), jnp.exp2(top - higher)
            values = _pieces(v_ref, there)
            o = [x * factor[:, None] + dot(p.astype(y.dtype), y) for x, y in zip(o, values, strict=True)]
            return higher, total * factor + jnp.sum(p, axis=1), o

        zeros = jnp.zeros((tiling.own,), jnp.float32)
        start = zeros + HIDDEN_SCORE, zeros, _sums(v_ref, tiling.own)
        end = lax.div((tile + 1) * tiling.own, tiling.step)
        top, total, o = lax.fori_loop(lax.div(first_ref[tile], tiling.step), end, step, start)
        total = jnp.where(own == 0, 1.0, total)
        _write(o_ref, [x / total[:, None] for x in o])
        logarithm_ref[...] = top + jnp.log2(total)

    types = Type(v.shape, v.dtype), Type((q.shape[0], q.shape[2], q.shape[1]), jnp.float32)
    return _run(body, "attention_forward", tiling, [q], [k, v, numbers, first], types)


def query_gradients(q, k, v, numbers, first, logarithm, delta, do, *, scale: float, window: int) -> list[jax.Array]:
    """Return dq.

    Args:
      first: as in `forward`, for tiles of this kernel's size.
      logarithm: of `forward`.
      delta: (B, H, T) fp32, the products of do and o.
    """
    tiling = tiling_of(GRADIENT_TILINGS, q, v)

    def body(q_ref, do_ref, logarithm_ref, delta_ref, k_ref, v_ref, numbers_ref, first_ref, dq_ref):
        tile = _tile(q, tiling)
        queries, gradients = _pieces(q_ref, slice(None)), _pieces(do_ref, slice(None))
        own, logarithm, delta = numbers_ref[pl.ds(tile * tiling.own, tiling.own)], logarithm_ref[...], delta_ref[...]

        def step(j, dq):
            there = pl.ds(j * tiling.step, tiling.step)
            visible = _visible(own, numbers_ref[there], tile * tiling.own, j * tiling.step, window)
            keys = _pieces(k_ref, there)
            s = _products(queries, keys) * (scale * LOG2E)
            p = jnp.where(visible, jnp.exp2(s - logarithm[:, None]), 0.0)
            ds = p * (_products(gradients, _pieces(v_ref, there)) - delta[:, None])
            return [x + dot(ds.astype(y.dtype), y) for x, y in zip(dq, keys, strict=True)]

        end = lax.div((tile + 1) * tiling.own, tiling.step)
        dq = lax.fori_loop(lax.div(first_ref[tile], tiling.step), end, step, _sums(q_ref, tiling.own))
        _write(dq_ref, [x * scale for x in dq])

    arrays = [q, do, logarithm, delta], [k, v, numbers, first]
    return _run(body, "attention_query_gradients", tiling, *arrays, [Type(q.shape, q.dtype)])


def key_gradients(q, k, v, numbers, last, logarithm, delta, do, *, scale: float, window: int) -> list[jax.Array]:
    """Return dk and dv.

    Args:
      last: (B, T / own), where the last query stands that sees a tile's keys, -1 where there is none.
      logarithm, delta: as in `query_gradients`.
    """
    tiling = tiling_of(GRADIENT_TILINGS, q, v)

    def body(k_ref, v_ref, q_ref, do_ref, logarithm_ref, delta_ref, numbers_ref, last_ref, dk_ref, dv_ref):
        tile = _tile(q, tiling)
        keys, values = _pieces(k_ref, slice(None)), _pieces(v_ref, slice(None))
        own = numbers_ref[pl.ds(tile * tiling.own, tiling.own)]

        # Products are transposed, (keys, queries), so that none has to be before it is multiplied.
        def step(i, carry):
            dk, dv = carry
            there = pl.ds(i * tiling.step, tiling.step)
            visible = _visible(numbers_ref[there], own, i * tiling.step, tile * tiling.own, window, by_key=True)
            queries, gradients = _pieces(q_ref, there), _pieces(do_ref, there)
            s = _products(keys, queries) * (scale * LOG2E)
            p = jnp.where(visible, jnp.exp2(s - logarithm_ref[there][None]), 0.0)
            ds = p * (_products(values, gradients) - delta_ref[there][None])
            dk = [x + dot(ds.astype(y.dtype), y) for x, y in zip(dk, queries, strict=True)]
            dv = [x + dot(p.astype(y.dtype), y) for x, y in zip(dv, gradients, strict=True)]
            return dk, dv

        start, end = lax.div(tile * tiling.own, tiling.step), lax.div(last_ref[tile], tiling.step) + 1
        dk, dv = lax.fori_loop(start, end, step, (_sums(k_ref, tiling.own), _sums(v_ref, tiling.own)))
        _write(dk_ref, [x * scale for x in dk])
        _write(dv_ref, dv)

    arrays = [k, v], [q, do, logarithm, delta, numbers, last]
    return _run(body, "attention_key_gradients", tiling, *arrays, [Type(k.shape, k.dtype), Type(v.shape, v.dtype)])


def _run(body: Callable, name: str, tiling: Tiling, cut, whole, results) -> list[jax.Array]:
    """Run a program for each tile of each head, given its tile of some arrays and of the results, and all of others.

    Arrays are (B, T, H, .), (B, H, T), and what all heads share, (B, .).
    """
    batch, time, heads, _ = cut[0].shape
    tiles = time // tiling.own

    def spec(x, own: bool) -> pl.BlockSpec:
        def at(b, i):
            head, tile = lax.div(i, jnp.int32(tiles)), lax.rem(i, jnp.int32(tiles)) if own else 0
            return {2: (b, 0), 3: (b, head, tile), 4: (b, tile, head, 0)}[len(x.shape)]

        tokens = tiling.own if own else time
        blocks = {2: (None, x.shape[1]), 3: (None, None, tokens), 4: (None, tokens, None, x.shape[-1])}
        return pl.BlockSpec(blocks[len(x.shape)], at)

    inputs = [*(spec(x, True) for x in cut), *(spec(x, False) for x in whole)]
    outputs = [spec(x, True) for x in results]
    grid = batch, heads * tiles
    return launch(body, name, tiling.warps, tiling.stages, grid, [*cut, *whole], results, inputs, outputs)


def _tile(q, tiling: Tiling) -> jax.Array:
    """Return which tile of its head a program has."""
    return lax.rem(pl.program_id(1), jnp.int32(q.shape[1] // tiling.own))


def _channels(size: int) -> list[pl.Slice]:
    """Return the pieces of a head's channels: powers of two."""
    found, start = [], 0
    for power in (256, 128, 64, 32, 16):
        while size - start >= power:
            found.append(pl.ds(start, power))
            start += power
    return found


def _pieces(ref, tokens) -> list[jax.Array]:
    return [ref[tokens, channels] for channels in _channels(ref.shape[1])]


def _sums(ref, tokens: int) -> list[jax.Array]:
    """Return zeros for sums over pieces like those of an array."""
    return [jnp.zeros((tokens, channels.size), jnp.float32) for channels in _channels(ref.shape[1])]


def _write(ref, pieces: list[jax.Array]) -> None:
    for channels, piece in zip(_channels(ref.shape[1]), pieces, strict=True):
        ref[:, channels] = piece.astype(ref.dtype)


def _products(a: list[jax.Array], b: list[jax.Array]) -> jax.Array:
    """Return the products of each row of a with each of b."""
    first, *others = (dot(x, y, (1, 1)) for x, y in zip(a, b, strict=True))
    return sum(others, first)


def _visible(queries, keys, query_start, key_start, window: int, *, by_key: bool = False) -> jax.Array:
    """Return which of some keys each of some queries sees, from their documents' numbers: (queries, keys) or by key."""

    def of_query(x):
        return x[None] if by_key else x[:, None]

    def of_key(x):
        return x[:, None] if by_key else x[None]

    query, key = query_start + jnp.arange(queries.size), key_start + jnp.arange(keys.size)
    near = (of_key(key) <= of_query(query)) & (of_key(key) > of_query(query) - window)
    return near & (of_query(queries) == of_key(keys)) & (of_key(keys) != 0)
