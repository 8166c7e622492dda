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
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import attention_walk, mosaic
from pallas_kernels.hopper.attention_walk import LOG2E, KeySight, QuerySight
from pallas_kernels.hopper.mosaic import TILE_ROWS

MAX_HEAD_DIM = 128
"""Sums over wider heads leave no registers for scores."""
QUERY_STEP = 64
"""Queries that `key_gradients` takes together."""


def key_step(head_dim: int) -> int:
    """Return how many keys `query_gradients` takes together."""
    return 128 if head_dim <= 80 else 64


def query_gradients(q, k, v, do, logarithm, minus_delta, first, keys, walks, *, scale: float):
    """Return [dq].

    Args:
      logarithm: (B, H, T) fp32, L.
      minus_delta: (B, H, T) fp32, -delta: sums start from it, which saves registers.
      first, keys, walks: as of `attention.forward`.
    """
    factor = scale * LOG2E

    def differentiate(walk, tiles, logarithm_ref, delta_ref, first_ref, keys_ref, dq_ref):
        (queries, gradients), sight = tiles, QuerySight(walk, first_ref, keys_ref)
        logarithm, delta = (sight.rows(x.at[walk.row, walk.head]) for x in (logarithm_ref, delta_ref))

        def step(n, dq):
            [keys_tile] = walk.take(0, n)
            s = _scores(queries, keys_tile)
            p = sight.show(n, jnp.exp2(s * factor - logarithm), 0.0)
            [values] = walk.take(1, n)
            [dp] = mosaic.accumulate(lambda sums: mosaic.multiply(sums[0], gradients, values.T), (delta,))
            walk.free(1, n)
            ds = (p * dp).astype(q.dtype)
            [dq] = mosaic.accumulate(lambda sums: mosaic.multiply(sums[0], ds, keys_tile), (dq,))
            walk.free(0, n)
            return dq

        dq = lax.fori_loop(0, walk.steps, step, mosaic.zeros((TILE_ROWS, q.shape[3])))
        walk.put((queries, dq * scale, dq_ref))

    arrays = [q, do], [[k], [v]], [logarithm, minus_delta, first, keys], walks, [mosaic.like(q)]
    return attention_walk.run(
        differentiate, "attention_query_gradients", key_step(q.shape[3]), *arrays, last_first=True
    )


def key_gradients(q, k, v, do, logarithm, minus_delta, first, keys, walks, *, scale: float):
    """Return dk and dv.

    Args:
      logarithm, minus_delta, first, keys: as of `query_gradients`.
      walks: of keys over queries; up to PLAIN these see all keys, but for the diagonal.
    """
    factor = scale * LOG2E

    def differentiate(walk, tiles, first_ref, keys_ref, dk_ref, dv_ref):
        (own_keys, values), sight = tiles, KeySight(walk, first_ref, keys_ref)

        def step(n, carry):
            dk, dv = carry
            queries, logarithm = walk.take(0, n)
            s = _scores(own_keys, queries)
            p = sight.show(n, jnp.exp2(s * factor - _columns(logarithm, s.shape)), 0.0)
            gradients, delta = walk.take(1, n)

            def multiply(sums):
                mosaic.multiply(sums[0], values, gradients.T)
                mosaic.multiply(sums[1], p.astype(q.dtype), gradients)

            dp, dv = mosaic.accumulate(multiply, (_columns(delta, s.shape), dv))
            walk.free(1, n)
            ds = (p * dp).astype(q.dtype)
            [dk] = mosaic.accumulate(lambda sums: mosaic.multiply(sums[0], ds, queries), (dk,))
            walk.free(0, n)
            return dk, dv

        zeros = mosaic.zeros((TILE_ROWS, q.shape[3]))
        dk, dv = lax.fori_loop(0, walk.steps, step, (zeros, zeros))
        walk.put((own_keys, dk * scale, dk_ref), (values, dv, dv_ref))

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
