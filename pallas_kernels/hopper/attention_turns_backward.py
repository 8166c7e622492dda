"""Softmax attention on Hopper for narrow heads: the backward pass of `attention_turns.py`.

Equations are those of `attention_backward.py`. Blocks take tile after tile. Beside a step's exponentials the tensor
cores make its products with values, the next step's scores and, of queries, the sum over the keys of the step before:
queries and their gradients stay in registers.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import attention_turns, mosaic
from pallas_kernels.hopper.attention import HIDDEN_SCORE
from pallas_kernels.hopper.attention_walk import LOG2E, KeySight, QuerySight
from pallas_kernels.hopper.mosaic import TILE_ROWS

STEP = 64
"""Keys or queries that are taken together: of keys a walk has two steps, at least."""


def query_gradients(q, k, v, do, logarithm, minus_delta, first, keys, walks, *, scale: float):
    """Return [dq].

    Args:
      logarithm: (B, H, T) fp32, L.
      minus_delta: (B, H, T) fp32, -delta: sums start from it, which saves registers.
      first, keys, walks: as of `attention_turns.forward`.
    """
    head_dim, factor = q.shape[3], scale * LOG2E

    def differentiate(walk, tiles, logarithm_ref, delta_ref, first_ref, keys_ref, dq_ref):
        sight, nothing = QuerySight(walk, first_ref, keys_ref), mosaic.zeros((TILE_ROWS, STEP))
        queries, gradients = map(mosaic.load, tiles)
        logarithm, delta = (sight.rows(x.at[walk.row, walk.head]) for x in (logarithm_ref, delta_ref))

        def step(n, carry):
            """Make the products of a step with values, of the next with keys and of that before with slopes at once."""
            s, dq, slopes = carry
            s = sight.show(n, s, HIDDEN_SCORE)
            [keys_before], [values], [next_keys] = walk.taken(0, n - 1), walk.take(1, n), walk.take(0, n + 1)

            def multiply(sums, slopes, _):
                mosaic.multiply(sums[0], slopes, keys_before)
                mosaic.multiply(sums[1], gradients, values.T)
                mosaic.multiply(sums[2], queries, next_keys.T)
                return slopes, jnp.exp2(s * factor - logarithm)

            dq, dp, s, _, p = mosaic.accumulate(multiply, (dq, delta, nothing), (slopes, nothing))
            walk.free(0, n - 1)
            walk.free(1, n)
            return s, dq, (p * dp).astype(q.dtype)

        def slopes_of(n, s):
            """Return the gradients of a step's scores."""
            dp = mosaic.multiply_add(delta, gradients, walk.take(1, n)[0].T)
            walk.free(1, n)
            return (jnp.exp2(sight.show(n, s, HIDDEN_SCORE) * factor - logarithm) * dp).astype(q.dtype)

        def add(n, slopes, dq):
            dq = mosaic.multiply_add(dq, slopes, walk.taken(0, n)[0])
            walk.free(0, n)
            return dq

        def compare(n):
            """Return the scores of a step."""
            return mosaic.multiply_add(nothing, queries, walk.take(0, n)[0].T)

        last, slopes = walk.steps - 1, slopes_of(0, compare(0))
        s, dq, slopes = lax.fori_loop(1, last, step, (compare(1), mosaic.zeros((TILE_ROWS, head_dim)), slopes))
        dq = add(last - 1, slopes, dq)
        dq = add(last, slopes_of(last, s), dq)
        walk.put((tiles[0], dq * scale, dq_ref))

    arrays = [q, do], [[k], [v]], [logarithm, minus_delta, first, keys], walks, [mosaic.like(q)]
    return attention_turns.run(differentiate, "attention_turns_query_gradients", STEP, *arrays, last_first=True)


def key_gradients(q, k, v, do, logarithm, minus_delta, first, keys, walks, *, scale: float):
    """Return dk and dv.

    Args:
      logarithm, minus_delta, first, keys: as of `query_gradients`.
      walks: of keys over queries; up to PLAIN these see all keys, but for the diagonal.
    """
    head_dim, factor = q.shape[3], scale * LOG2E

    def differentiate(walk, tiles, first_ref, keys_ref, dk_ref, dv_ref):
        (own_keys, values), sight = tiles, KeySight(walk, first_ref, keys_ref)
        nothing = mosaic.zeros(sight.shape)

        def add_ahead(n, carry):
            """Make a step's products with values, and the next step's scores, beside exponentials."""
            s, dk, dv = carry
            s = sight.show(n, s, HIDDEN_SCORE)
            (_, logarithm), (gradients, delta) = walk.taken(0, n), walk.take(1, n)
            next_queries, _ = walk.take(0, n + 1)
            logarithm, delta = (_columns(x, s.shape) for x in (logarithm, delta))

            def multiply(sums, _):
                mosaic.multiply(sums[0], values, gradients.T)
                mosaic.multiply(sums[1], own_keys, next_queries.T)
                return [jnp.exp2(s * factor - logarithm)]

            dp, s, p = mosaic.accumulate(multiply, (delta, nothing), (nothing,))
            return s, *add(n, p, dp, dk, dv)

        def add(n, p, dp, dk, dv):
            """Return the sums with a step's; its tiles are needed no more."""
            (queries, _), (gradients, _) = walk.taken(0, n), walk.taken(1, n)

            def multiply(sums):
                mosaic.multiply(sums[0], p.astype(q.dtype), gradients)
                mosaic.multiply(sums[1], (p * dp).astype(q.dtype), queries)

            dv, dk = mosaic.accumulate(multiply, (dv, dk))
            walk.free(0, n)
            walk.free(1, n)
            return dk, dv

        last, zeros = walk.steps - 1, mosaic.zeros((TILE_ROWS, head_dim))
        s = mosaic.multiply_add(nothing, own_keys, walk.take(0, 0)[0].T)
        s, dk, dv = lax.fori_loop(0, last, add_ahead, (s, zeros, zeros))
        (_, logarithm), (gradients, delta) = walk.taken(0, last), walk.take(1, last)
        dp = mosaic.multiply_add(_columns(delta, s.shape), values, gradients.T)
        s = sight.show(last, s, HIDDEN_SCORE)
        dk, dv = add(last, jnp.exp2(s * factor - _columns(logarithm, s.shape)), dp, dk, dv)
        walk.put((own_keys, dk * scale, dk_ref), (values, dv, dv_ref))

    streamed, results = [[q, logarithm], [do, minus_delta]], [mosaic.like(k), mosaic.like(v)]
    arrays = [k, v], streamed, [first, keys], walks, results
    return attention_turns.run(differentiate, "attention_turns_key_gradients", STEP, *arrays, last_first=False)


def _columns(values, shape):
    """Load one value per column and repeat it over the rows."""
    return mosaic.down(plgpu.load(values, layout=mosaic.COLUMN_LAYOUT), shape)
