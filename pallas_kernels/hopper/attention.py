"""Softmax attention of packed documents on Hopper: the forward pass (see `ops/softmax.py`; arXiv 2407.08608).

A tile of queries walks over the keys that it sees (`attention_walk.py`). Scores are made on the tensor cores and used
up in registers, with the largest and the sum of exponentials so far; those of the next keys are under way meanwhile:

    s_ts = q_t . k_s      top_t = max_s s_ts      o_t = sum_s exp(s_ts - top_t) v_s / sum_s exp(s_ts - top_t)

Masks are made where a document begins, where there is padding, and on the diagonal.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import attention_walk, mosaic
from pallas_kernels.hopper.attention_walk import LOG2E, QuerySight
from pallas_kernels.hopper.mosaic import TILE_ROWS

HIDDEN_SCORE, LOWEST_TOP = -1e30, -1e20
"""Of a key that a query does not see, and the top before the first one that it does: so much higher that until then
exponentials are zero, and finite, so that nothing becomes NaN."""
KEY_STEP = 128
"""Keys that are taken together."""
PADDING_LOGARITHM = 1e30
"""L of a query that sees no key: the exponential of a score less this is zero."""


def forward(q, k, v, first, keys, walks, *, scale: float):
    """Return o, zero at padding, and L (B, H, T) fp32, the logarithm in bits of each query's sum of exponentials.

    Args:
      first, keys: as of `attention_walk.Sight`.
      walks: of queries over keys; from PLAIN on all are seen up to the diagonal.
      scale: of scores.
    """
    time, head_dim, factor = q.shape[1], q.shape[3], scale * LOG2E

    def attend(walk, tiles, first_ref, keys_ref, o_ref, logarithm_ref):
        [queries], sight = tiles, QuerySight(walk, first_ref, keys_ref)

        def score(n, beside=tuple):
            """Return the scores of a step's keys and what is computed beside."""

            def multiply(s):
                mosaic.multiply(s, queries, walk.take(0, n)[0].T)
                results = beside()
                return s[...], *results

            s, *results = mosaic.products(multiply, sight.shape)
            walk.free(0, n)
            return s, *results

        def soften(s, top, total):
            """Return exp2(s - top), by how much what was before shrinks, and top and the sum so far."""
            higher = jnp.maximum(top, s.max(axis=1) * factor)
            p, shrunk = jnp.exp2(s * factor - mosaic.across(higher, s.shape)), jnp.exp2(top - higher)
            return p.astype(q.dtype), shrunk, higher, total * shrunk + p.sum(axis=1)

        def weigh(n, p, shrunk, o):
            """Return o, shrunk, with a step's values."""
            [values] = walk.take(1, n)
            o = o * mosaic.across(shrunk, o.shape)
            [o] = mosaic.accumulate(lambda sums: mosaic.multiply(sums[0], p, values), (o,))
            walk.free(1, n)
            return o

        def step(n, carry):
            s, top, total, o = carry
            s = sight.show(n, s, HIDDEN_SCORE)
            s, p, shrunk, top, total = score(n + 1, lambda: soften(s, top, total))
            return s, top, total, weigh(n, p, shrunk, o)

        last, o = walk.steps - 1, mosaic.zeros((TILE_ROWS, head_dim))
        start = *score(0), _rows(LOWEST_TOP), _rows(0.0), o
        s, top, total, o = lax.fori_loop(0, last, step, start)
        p, shrunk, top, total = soften(sight.show(last, s, HIDDEN_SCORE), top, total)
        o = weigh(last, p, shrunk, o)

        exists = mosaic.load_global(first_ref.at[walk.row, walk.mine], mosaic.ROW_LAYOUT) < time
        total = jnp.where(exists, total, 1.0)
        logarithm = jnp.where(exists, top + jnp.log2(total), PADDING_LOGARITHM)
        logarithm_ref.at[walk.row, walk.head, walk.mine][...] = logarithm
        walk.put((queries, o * mosaic.across(jnp.where(exists, 1.0 / total, 0.0), o.shape), o_ref))

    results = [mosaic.like(q), jax.ShapeDtypeStruct((q.shape[0], q.shape[2], time), jnp.float32)]
    arrays = [q], [[k], [v]], [first, keys], walks, results
    return attention_walk.run(attend, "attention_forward", KEY_STEP, *arrays, last_first=True)


def _rows(value: float) -> jax.Array:
    """Return a value for each row of a tile."""
    return plgpu.layout_cast(jnp.full((TILE_ROWS,), value, jnp.float32), mosaic.ROW_LAYOUT)
