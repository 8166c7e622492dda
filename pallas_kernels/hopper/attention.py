"""Softmax attention of packed documents on Hopper: the forward pass (see `ops/softmax.py`; arXiv 2407.08608).

A tile of queries walks over the keys that it sees (`attention_walk.py`), with the largest score and the sum of
exponentials so far:

    s_ts = q_t . k_s      top_t = max_s s_ts      o_t = sum_s exp(s_ts - top_t) v_s / sum_s exp(s_ts - top_t)

While a step's exponentials are made, the tensor cores make the scores of the next step and the sum over the values of
the one before. Masks are made where a document begins, where there is padding, and on the diagonal.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import attention_walk, mosaic
from pallas_kernels.hopper.attention_walk import LOG2E, QuerySight
from pallas_kernels.hopper.mosaic import TILE_ROWS

KEY_STEP = 64
"""Keys that are taken together: two steps, at least, are in each walk."""
HIDDEN_SCORE, LOWEST_TOP = -1e30, -1e20
"""Of a key that a query does not see, and the top before the first one that it does: so much higher that until then
exponentials are zero, and finite, so that nothing becomes NaN."""
PADDING_LOGARITHM = 1e30
"""L of a query that sees no key: the exponential of a score less this is zero."""


def forward(q, k, v, first, keys, walks, *, scale: float):
    """Return o, zero at padding, and L (B, H, T) fp32, the logarithm in bits of each query's sum of exponentials.

    Args:
      first, keys: as of `attention_walk.Sight`.
      walks: of queries over keys; from PLAIN on all are seen up to the diagonal.
      scale: of scores.
    """
    time, factor, o_shape = q.shape[1], scale * LOG2E, (TILE_ROWS, q.shape[3])

    def attend(walk, tiles, first_ref, keys_ref, o_ref, logarithm_ref):
        [tile], sight = tiles, QuerySight(walk, first_ref, keys_ref)
        queries = mosaic.load(tile) if q.shape[3] <= 128 else tile

        def score(n):
            s = mosaic.multiply_add(mosaic.zeros(sight.shape), queries, walk.take(0, n)[0].T)
            walk.free(0, n)
            return s

        def weigh(n, p, o):
            o = mosaic.multiply_add(o, p, walk.take(1, n)[0])
            walk.free(1, n)
            return o

        def soften(s, top, total):
            """Return exp2(s - top), top and the sum so far, and by how much what was before shrinks."""
            higher = jnp.maximum(top, s.max(axis=1) * factor)
            p, shrunk = jnp.exp2(s * factor - mosaic.across(higher, s.shape)), jnp.exp2(top - higher)
            return p.astype(q.dtype), higher, total * shrunk + p.sum(axis=1), shrunk

        def step(n, carry):
            s, o, *state = carry
            s = sight.show(n, s, HIDDEN_SCORE)
            [values], [next_keys] = walk.take(1, n - 1), walk.take(0, n + 1)

            def multiply(sums, p, top, total, _):
                mosaic.multiply(sums[0], p, values)
                mosaic.multiply(sums[1], queries, next_keys.T)
                return soften(s, top, total)

            o, s, *state = mosaic.accumulate(multiply, (o, mosaic.zeros(s.shape)), tuple(state))
            walk.free(1, n - 1)
            walk.free(0, n + 1)
            return s, o * mosaic.across(state[-1], o_shape), *state

        last = walk.steps - 1
        state = soften(sight.show(0, score(0), HIDDEN_SCORE), rows(LOWEST_TOP), rows(0.0))
        s, o, p, top, total, _ = lax.fori_loop(1, last, step, (score(1), mosaic.zeros(o_shape), *state))
        o = weigh(last - 1, p, o)
        p, top, total, shrunk = soften(sight.show(last, s, HIDDEN_SCORE), top, total)
        o = weigh(last, p, o * mosaic.across(shrunk, o_shape))

        exists = mosaic.load_global(first_ref.at[walk.row, walk.mine], mosaic.ROW_LAYOUT) < time
        total = jnp.where(exists, total, 1.0)
        logarithm = jnp.where(exists, top + jnp.log2(total), PADDING_LOGARITHM)
        logarithm_ref.at[walk.row, walk.head, walk.mine][...] = logarithm
        walk.put((tile, o * mosaic.across(jnp.where(exists, 1.0 / total, 0.0), o_shape), o_ref))

    results = [mosaic.like(q), jax.ShapeDtypeStruct((q.shape[0], q.shape[2], time), jnp.float32)]
    arrays = [q], [[k], [v]], [first, keys], walks, results
    return attention_walk.run(attend, "attention_forward", KEY_STEP, *arrays, last_first=True)


def rows(value: float) -> jax.Array:
    """Return a value for each row of a tile."""
    return plgpu.layout_cast(jnp.full((TILE_ROWS,), value, jnp.float32), mosaic.ROW_LAYOUT)
