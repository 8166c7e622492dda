"""Gradients of Taylor attention on TPUs, in two passes over chunks (see `taylor.py`).

With g_i = do_i / z_i and h_i = -g_i.o_i, the gradients of the doubled scores are dp_ij = g_i.v_j + h_i, so that

    dq_i = c (2 sum_j dp_ij (1 + s_ij) k_j + J_G^T (S g_i + n h_i))     S, n: what the tokens before the chunk have left
    dk_j = 2 sum_i dp_ij (1 + s_ij) c q_i + J_F^T (R v_j + r)           R, r: sums of G(q_i) g_i^T and G(q_i) h_i of
    dv_j = sum_i p_ij g_i + R^T F(k_j)                                        those after it

with J the Jacobians of G and F. The first pass goes from the first chunk to the last, the second one back. States lie
here with features on sublanes and values on lanes, and S's normaliser beside them twice, as h comes in two parts.
"""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from pallas_kernels.tpu.taylor_chunks import SUM_ROWS, Documents, Links, Plan, dot, like, masked, rest, sum_rows
from pallas_kernels.tpu.taylor_features import expand, number_of_features, pulled_back

STATIC = "scale", "tokens", "chunk"


@functools.partial(jax.jit, static_argnames=STATIC)
def query_gradients(
    q, k, v, do, back, state=None, documents: Documents | None = None, *, scale: float, tokens: int, chunk: int
):
    """Return [dq like q].

    Args:
      q, k, v, documents, scale, tokens, chunk: of `taylor.forward`.
      do: (B, H, V, T) like v.
      back: (B, H, 2, T) fp32, the inverse of the doubled normaliser, 0 where that is, and h.
      state: (B, H, E, V + SUM_ROWS) fp32 with its normaliser twice, None for the empty one.
    """
    after = state_type(q, v)
    plan = Plan.of(v, after, chunk)

    results = [like(v, q.shape, q.dtype)]
    of_head, given = functools.partial(query_gradient, scale=scale), (q, k, v, do, back)
    name = "taylor_query_gradients"
    return plan.call(of_head, given, state, documents, results, after, name=name, tokens=tokens)[:1]


def query_gradient(refs, links: Links, scale: float) -> Iterator[None]:
    """Write dq (K, C), and the state after a chunk; stages end in yields."""
    q, k, v, do, back, dq, state = refs
    q, k, v, dtype = q[...].astype(jnp.float32) * scale, k[...], v[...], v.dtype
    near = 1.0 + dot(k, q.astype(dtype), 0)
    g, v = gradients_of_sums(do[...], back[...]), with_ones(v)
    ds = jnp.where(links.inside, near * dot(v, g, 0), 0.0).astype(dtype)
    yield
    read = pulled_back(q, dot(state[...].astype(dtype), g), query=True)
    dq[...] = (scale * (2.0 * dot(k, ds) + masked(read, links.reads))).astype(dtype)
    yield
    written = expand(masked(k.astype(jnp.float32), links.writes), links.writes, dtype, query=False)
    state[...] = links.kept(state[...]) + dot(written, v, 1, 1)
    yield


@functools.partial(jax.jit, static_argnames=STATIC)
def key_gradients(
    q, k, v, do, back, state=None, documents: Documents | None = None, *, scale: float, tokens: int, chunk: int
):
    """Return dk like k, dv like v, and R before the first chunk, of `query_gradients`' arguments.

    Args:
      state: R behind the last chunk (B, H, E, V + SUM_ROWS) fp32, None for zeros. The sum of its first two columns
        behind values is the gradient of the normaliser.
    """
    after = state_type(q, v)
    plan = Plan.of(v, after, chunk, reverse=True)

    results = [like(v, k.shape, k.dtype), like(v, v.shape, v.dtype)]
    of_head, given = functools.partial(key_gradient, scale=scale), (q, k, v, do, back)
    arguments = of_head, given, state, documents, results, after
    return plan.call(*arguments, name="taylor_key_gradients", tokens=tokens, keys_dimension=1)


def key_gradient(refs, links: Links, scale: float) -> Iterator[None]:
    """Write dk (K, C), dv (V, C), and R before a chunk; stages end in yields."""
    q, k, v, do, back, dk, dv, state = refs
    q, k, v, dtype = q[...].astype(jnp.float32) * scale, k[...], v[...], v.dtype
    scaled, keys, values = q.astype(dtype), k.astype(jnp.float32), v.shape[0]
    near = 1.0 + dot(scaled, k, 0)
    p = jnp.where(links.inside, 1.0 + near * near, 0.0).astype(dtype)
    g, v = gradients_of_sums(do[...], back[...]), with_ones(v)
    ds = jnp.where(links.inside, near * dot(g, v, 0), 0.0).astype(dtype)
    yield
    behind = state[...].astype(dtype)
    written = pulled_back(keys, dot(behind, v), query=False)
    dk[...] = (2.0 * dot(scaled, ds) + masked(written, links.writes)).astype(dtype)
    yield
    features = expand(masked(keys, links.writes), links.writes, dtype, query=False)
    dv[...] = (dot(g[:values], p) + dot(behind, features, 0)[:values]).astype(dtype)
    read = expand(masked(q, links.reads), links.reads, dtype, query=True)
    state[...] = links.kept(state[...]) + dot(read, g, 1, 1)
    yield


def state_type(q, v) -> jax.ShapeDtypeStruct:
    """Return the type of the states of both passes."""
    rows, heads, keys, _ = q.shape
    return like(v, (rows, heads, number_of_features(keys), v.shape[2] + SUM_ROWS))


def gradients_of_sums(do, back):
    """Return g (V, C), and below it h: rounded, and what is left of it."""
    g, h = do.astype(jnp.float32) * back[0:1], back[1:2]
    return jnp.concatenate([g.astype(do.dtype), sum_rows(h.shape[1], do.dtype, h, rest(h, do.dtype))], axis=0)


def with_ones(v):
    """Return values (V, C), and below them what both rows of h count."""
    return jnp.concatenate([v, sum_rows(v.shape[1], v.dtype, 1.0, 1.0)], axis=0)
