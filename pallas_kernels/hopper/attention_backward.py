"""Softmax attention of packed documents on Hopper: the backward pass, in two kernels that make scores again.

With L of the forward pass, in bits, and delta_t = do_t . o_t:

    p_ts = exp2(s_ts - L_t)      ds_ts = p_ts (do_t . v_s - delta_t)
    dq_t = sum_s ds_ts k_s       dk_s = sum_t ds_ts q_t       dv_s = sum_t p_ts do_t

`query_gradients` lets tiles of queries walk over keys, `key_gradients` tiles of keys over queries: each sum is made by
one block, in one order. The latter's products are transposed, (keys, queries), so that they multiply from registers.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import attention_walk, mosaic
from pallas_kernels.hopper.attention import HIDDEN_SCORE, KEY_STEP
from pallas_kernels.hopper.attention_walk import LOG2E, OWN_TOKENS, SHARED_TOKENS, KeySight, QuerySight
from pallas_kernels.hopper.mosaic import TILE_ROWS

QUERY_STEP = 64
"""Queries that `key_gradients` takes together."""


def own_keys_of(head_dim: int) -> int:
    """Return how many keys a block of `key_gradients` keeps.

    Where sums over both keys and values leave scores no registers, warpgroups share a tile, and each makes one of them.
    """
    return OWN_TOKENS if head_dim <= 128 else SHARED_TOKENS


def query_gradients(q, k, v, do, logarithm, minus_delta, first, keys, walks, *, scale: float):
    """Return [dq].

    Args:
      logarithm: (B, H, T) fp32, L.
      minus_delta: (B, H, T) fp32, -delta: sums start from it, which saves registers.
      first, keys, walks: as of `attention.forward`.
    """
    head_dim, factor = q.shape[3], scale * LOG2E

    def differentiate(walk, tiles, logarithm_ref, delta_ref, first_ref, keys_ref, dq_ref):
        (queries, gradients), sight = tiles, QuerySight(walk, first_ref, keys_ref)
        logarithm, delta = (sight.rows(x.at[walk.row, walk.head]) for x in (logarithm_ref, delta_ref))

        def compare(n):
            """Return the products of queries and of gradients, less delta, with a step's keys and values."""
            s = mosaic.multiply_add(mosaic.zeros(sight.shape), queries, walk.take(0, n)[0].T)
            dp = mosaic.multiply_add(delta, gradients, walk.take(1, n)[0].T)
            walk.free(1, n)
            return s, dp

        def weigh(n, ds, dq):
            """Return dq with a step's keys, which were taken before."""
            dq = mosaic.multiply_add(dq, ds, walk.taken(0, n)[0])
            walk.free(0, n)
            return dq

        def slopes(s, dp):
            """Return the gradients of scores."""
            return (jnp.exp2(s * factor - logarithm) * dp).astype(q.dtype)

        def step(n, dq):
            s, dp = compare(n)
            return weigh(n, slopes(sight.show(n, s, HIDDEN_SCORE), dp), dq)

        def overlapping_step(n, carry):
            s, dp, dq, ds = carry
            s = sight.show(n, s, HIDDEN_SCORE)
            [keys_before] = walk.taken(0, n - 1)
            [next_keys], [next_values] = walk.take(0, n + 1), walk.take(1, n + 1)

            def multiply(sums, ds):
                mosaic.multiply(sums[0], ds, keys_before)
                mosaic.multiply(sums[1], queries, next_keys.T)
                mosaic.multiply(sums[2], gradients, next_values.T)
                return [slopes(s, dp)]

            dq, s, dp, ds = mosaic.accumulate(multiply, (dq, mosaic.zeros(sight.shape), delta), (ds,))
            walk.free(0, n - 1)
            walk.free(1, n + 1)
            return s, dp, dq, ds

        def overlapping_steps(dq):
            """Return dq after the walk, and make the products of the steps before and after beside exponentials."""
            s, dp = compare(0)
            ds, last = slopes(sight.show(0, s, HIDDEN_SCORE), dp), walk.steps - 1
            s, dp, dq, ds = lax.fori_loop(1, last, overlapping_step, (*compare(1), dq, ds))
            dq = weigh(last - 1, ds, dq)
            return weigh(last, slopes(sight.show(last, s, HIDDEN_SCORE), dp), dq)

        dq = mosaic.zeros((TILE_ROWS, head_dim))
        dq = overlapping_steps(dq) if head_dim <= 128 else lax.fori_loop(0, walk.steps, step, dq)
        walk.put((queries, dq * scale, dq_ref))

    arrays = [q, do], [[k], [v]], [logarithm, minus_delta, first, keys], walks, [mosaic.like(q)]
    return attention_walk.run(differentiate, "attention_query_gradients", KEY_STEP, *arrays, last_first=True)


def key_gradients(q, k, v, do, logarithm, minus_delta, first, keys, walks, *, scale: float):
    """Return dk and dv.

    Args:
      logarithm, minus_delta, first, keys: as of `query_gradients`.
      walks: of tiles of `own_keys_of` keys over queries; up to PLAIN these see all keys, but for the diagonal.
    """
    head_dim, factor = q.shape[3], scale * LOG2E

    def differentiate(walk, tiles, first_ref, keys_ref, dk_ref, dv_ref):
        (own_keys, values), sight = tiles, KeySight(walk, first_ref, keys_ref)

        def weigh(n):
            """Return a step's weights and tiles."""
            queries, logarithm = walk.take(0, n)
            s = _scores(own_keys, queries)
            p = sight.show(n, jnp.exp2(s * factor - _columns(logarithm, s.shape)), 0.0)
            return p, queries, *walk.take(1, n)

        def add_to_both(n, sums):
            p, queries, gradients, delta = weigh(n)

            def multiply(sums):
                mosaic.multiply(sums[0], values, gradients.T)
                mosaic.multiply(sums[1], p.astype(q.dtype), gradients)

            dp, dv = mosaic.accumulate(multiply, (_columns(delta, p.shape), sums[1]))
            walk.free(1, n)
            dk = mosaic.multiply_add(sums[0], (p * dp).astype(q.dtype), queries)
            walk.free(0, n)
            return dk, dv

        def add_to_keys(n, dk):
            p, queries, gradients, delta = weigh(n)
            dp = mosaic.multiply_add(_columns(delta, p.shape), values, gradients.T)
            walk.free(1, n)
            dk = mosaic.multiply_add(dk, (p * dp).astype(q.dtype), queries)
            walk.free(0, n)
            return dk

        def add_to_values(n, dv):
            p, _, gradients, _ = weigh(n)
            dv = mosaic.multiply_add(dv, p.astype(q.dtype), gradients)
            walk.free(0, n)
            walk.free(1, n)
            return dv

        zeros = mosaic.zeros((TILE_ROWS, head_dim))
        if own_keys_of(head_dim) == OWN_TOKENS:
            dk, dv = lax.fori_loop(0, walk.steps, add_to_both, (zeros, zeros))
            walk.put((own_keys, dk * scale, dk_ref), (values, dv, dv_ref))
            return

        def make(group: int, add, tile, ref, scale: float):
            @pl.when(walk.group == group)
            def run():
                total = lax.fori_loop(0, walk.steps, add, zeros)
                walk.meet()  # Both read both tiles.
                walk.put((tile, total * scale, ref))

        make(0, add_to_keys, own_keys, dk_ref, scale)
        make(1, add_to_values, values, dv_ref, 1.0)

    streamed, results = [[q, logarithm], [do, minus_delta]], [mosaic.like(k), mosaic.like(v)]
    arrays = [k, v], streamed, [first, keys], walks, results
    return attention_walk.run(differentiate, "attention_key_gradients", QUERY_STEP, *arrays, last_first=False)


def _scores(a, b) -> jax.Array:
    """Return the products of the rows of two shared tiles."""

    def multiply(s):
        mosaic.multiply(s, a, b.T)
        return s[...]

    return mosaic.products(multiply, (a.shape[0], b.shape[0]))


def _columns(values, shape) -> jax.Array:
    """Load one value per column and repeat it over the rows."""
    return mosaic.down(plgpu.load(values, layout=mosaic.COLUMN_LAYOUT), shape)
