"""Taylor attention on TPUs by chunks of tokens: quadratic inside a chunk, a state of packed features between them.

    o_i = (sum_j p_ij v_j + S^T G(q_i)) / (sum_j p_ij + n.G(q_i))        S' = S + sum_j F(k_j) v_j^T,  n' likewise

where j <= i are tokens of the chunk and p_ij = 1 + (1 + s_ij)^2, twice the score; G and F stand in
`taylor_features.py`. Chunks follow each other, and the state stays in VMEM: values on sublanes, below them n, features
on lanes.
"""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from pallas_kernels.tpu.taylor_chunks import SUM_ROWS, Documents, Links, Plan, dot, like, masked, rest, sum_rows
from pallas_kernels.tpu.taylor_features import expand, number_of_features


@functools.partial(jax.jit, static_argnames=("scale", "tokens", "chunk"))
def forward(q, k, v, state=None, documents: Documents | None = None, *, scale: float, tokens: int, chunk: int):
    """Return o like v, the doubled normaliser (B, H, 1, T) fp32, and the state after the last token.

    Args:
      q, k: (B, H, K, T) bf16 or fp32; T is a multiple of `chunk`, and K of `KEY_MULTIPLE`.
      v: (B, H, V, T), like them.
      state: (B, H, V + SUM_ROWS, E) fp32, None for the empty one.
      documents: None for one a row.
      scale: of scores.
      tokens: of a row, besides those that fill it up.
      chunk: tokens of a program.
    """
    rows, heads, values, time = v.shape
    after = like(v, (rows, heads, values + SUM_ROWS, number_of_features(q.shape[2])))
    plan = Plan.of(v, after, chunk)

    results = [like(v, v.shape, v.dtype), like(v, (rows, heads, 1, time))]
    of_head, given = functools.partial(chunk_of_head, scale=scale), (q, k, v)
    return plan.call(of_head, given, state, documents, results, after, name="taylor_chunks", tokens=tokens)


def chunk_of_head(refs, links: Links, scale: float) -> Iterator[None]:
    """Write o (V, C), the doubled normaliser (1, C) and the state after a chunk; stages end in yields."""
    q, k, v, o, z, state = refs
    q, k, v, (values, chunk), dtype = q[...].astype(jnp.float32) * scale, k[...], v[...], v.shape, v.dtype
    near = 1.0 + dot(k, q.astype(dtype), 0)
    p = jnp.where(links.inside, 1.0 + near * near, 0.0).astype(dtype)
    yield
    v_and_one = jnp.concatenate([v, sum_rows(chunk, dtype, 1.0)], axis=0)
    read = expand(masked(q, links.reads), links.reads, dtype, query=True)
    sums = dot(v_and_one, p) + dot(rounded(state[...], values, dtype), read)
    total = sums[values : values + 1] + sums[values + 1 : values + 2]
    o[...], z[...] = (sums[:values] / jnp.where(total == 0.0, 1.0, total)).astype(dtype), total
    yield
    written = expand(masked(k.astype(jnp.float32), links.writes), links.writes, dtype, query=False)
    state[...] = links.kept(state[...]) + dot(v_and_one, written, 1, 1)
    yield


def rounded(state, values: int, dtype):
    """Return a state in a dtype, and below its normaliser what is left of that."""
    normaliser = state[values : values + 1]
    return jnp.concatenate(
        [state[:values].astype(dtype), sum_rows(state.shape[1], dtype, normaliser, rest(normaliser, dtype))]
    )
