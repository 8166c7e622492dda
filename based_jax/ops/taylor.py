"""Taylor linear attention, the global mixer of Based (arXiv 2402.18668, section 4.1).

With s_ij = q_i.k_j / sqrt(K) the softmax kernel exp(s) is replaced by its second-order Taylor polynomial, which is an
inner product of finite features, so that the past fits into a state of fixed size:

    p_ij = 1 + s_ij + s_ij^2 / 2 = phi(q_i).phi(k_j)
    o_i  = sum_{j<=i} p_ij v_j / sum_{j<=i} p_ij

The state is S = sum_j phi(k_j) [v_j, 1]^T with shape (B, H, E, V+1), E = 1 + K + K(K+1)/2; its last column carries the
normaliser. No epsilon is needed: p = (1 + (1+s)^2)/2 >= 1/2. Scores, features, states and sums are fp32.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from based_jax.dims import BHEV, BHK, BHV, BT, BTHK, BTHV
from based_jax.ops import scan, segments
from based_jax.ops.dispatch import Implementation, dispatch, target_platform

CHUNK = 128
EXACT = jax.lax.Precision.HIGHEST


def expanded_dim(feature_dim: int) -> int:
    """Return E, the number of distinct features of `taylor_features`: 45, 153, 325 for K = 8, 16, 24."""
    return 1 + feature_dim + feature_dim * (feature_dim + 1) // 2


def taylor_features(x: Float[Array, "*B K"]) -> Float[Array, "*B E"]:
    """Return phi(x) in fp32 with each product once: [1, x / K^(1/4), x_m x_n / sqrt(K) for m >= n].

    The products of a component with itself carry another 1/sqrt(2), so that phi(q).phi(k) = 1 + s + s^2/2.
    Source: HazyResearch/zoology:zoology/mixers/feature_maps/taylor.py, `forward_mem_save`.
    """
    x = x.astype(jnp.float32) / x.shape[-1] ** 0.25
    rows, columns = np.tril_indices(x.shape[-1])
    weights = np.where(rows == columns, math.sqrt(0.5), 1.0).astype(np.float32)
    products = x[..., rows] * x[..., columns] * weights.reshape((1,) * (x.ndim - 1) + (-1,))
    return jnp.concatenate([jnp.ones_like(x[..., :1]), x, products], axis=-1)


def full_taylor_features(x: Float[Array, "*B K"]) -> Float[Array, "*B E"]:
    """Return [1, x / K^(1/4), vec(x x^T) / (sqrt(2) sqrt(K))], the published map with its 1 + K + K^2 features.

    Source: HazyResearch/based:based/models/mixers/linear_attention.py, `TaylorExp`. Only for comparison: the same
    inner products as `taylor_features` at 1.8 times the size.
    """
    x = x / x.shape[-1] ** 0.25
    products = (x[..., :, None] * x[..., None, :]).reshape(*x.shape[:-1], -1) / math.sqrt(2)
    return jnp.concatenate([jnp.ones_like(x[..., :1]), x, products], axis=-1)


def initial_state(batch: int, heads: int, feature_dim: int, value_dim: int) -> BHEV:
    """Return the state before the first token."""
    return jnp.zeros((batch, heads, expanded_dim(feature_dim), value_dim + 1), jnp.float32)


def taylor_attention(
    q: BTHK,
    k: BTHK,
    v: BTHV,
    *,
    state: BHEV | None = None,
    segment_ids: BT | None = None,
    return_state: bool = False,
    impl: str = "auto",
) -> Any:
    """Causal, normalised Taylor linear attention over (B, T, H, .) arrays, for any T, K and V.

    Args:
      state: state to start from; it belongs to each row's first document.
      segment_ids: ids of packed documents, 0 for padding (see `ops/segments.py`).
      return_state: return (o, state after the last token) instead of o.
      impl: "oracle" (quadratic), "recurrent" (token by token), "xla" (chunked, linear in T) or "auto".

    Returns:
      o in v's dtype, or (o, state); the state is fp32.

    Raises:
      UserError: `impl` is unknown or cannot run this call.
    """
    o, state = dispatch("taylor_attention", IMPLEMENTATIONS, impl, q, k, v, state, segment_ids)
    return (o, state) if return_state else o


def taylor_attention_step(q: BHK, k: BHK, v: BHV, state: BHEV) -> tuple[BHV, BHEV]:
    """Return one token's output and the state after it."""
    state = state + taylor_features(k)[..., :, None] * _with_ones(v)[..., None, :]
    sums = jnp.einsum("BHE,BHEV->BHV", taylor_features(q), state, precision=EXACT)
    return _normalise(sums).astype(v.dtype), state


def _oracle(q: BTHK, k: BTHK, v: BTHV, state: BHEV | None, segment_ids: BT | None) -> tuple[BTHV, BHEV]:
    """Compute every score of the sequence: equation (1) of the paper with the Taylor kernel, in fp32."""
    ids = _ids(q, segment_ids)
    visible = segments.same_document(ids, ids) & jnp.tri(q.shape[1], dtype=bool)[None]
    p = jnp.where(visible[:, None], _kernel(q, k, EXACT), 0.0)
    sums = jnp.einsum("BHTS,BSHV->BTHV", p, _with_ones(v), precision=EXACT)
    before = _empty(q, v) if state is None else state
    continues = (ids == segments.first_id(ids)[:, None]) & (ids != 0)
    read = jnp.einsum("BTHE,BHEV->BTHV", taylor_features(q), before, precision=EXACT)
    sums = sums + jnp.where(continues[:, :, None, None], read, 0.0)

    last = segments.last_id(ids)
    kept = jnp.where(((last == segments.first_id(ids)) | (last == 0))[:, None, None, None], before, 0.0)
    written = _with_ones(v) * ((ids == last[:, None]) & (ids != 0))[:, :, None, None]
    after = kept + jnp.einsum("BTHE,BTHV->BHEV", taylor_features(k), written, precision=EXACT)
    return _normalise(sums).astype(v.dtype), after


def _recurrent(q: BTHK, k: BTHK, v: BTHV, state: BHEV | None, segment_ids: BT | None) -> tuple[BTHV, BHEV]:
    """Run `taylor_attention_step` over the tokens."""

    def step(qkv, state):
        q, k, v = qkv
        return taylor_attention_step(q, k, v, state)

    return scan.over_tokens(step, (q, k, v), _empty(q, v), state, segment_ids)


def _chunked(q: BTHK, k: BTHK, v: BTHV, state: BHEV | None, segment_ids: BT | None) -> tuple[BTHV, BHEV]:
    """Quadratic inside chunks of `CHUNK` tokens, through the state between them."""
    return scan.over_chunks(_chunk, (q, k, v), _empty(q, v), state, segment_ids, CHUNK)


def _chunk(qkv: tuple[BTHK, BTHK, BTHV], state: BHEV, span: scan.Span) -> tuple[BTHV, BHEV]:
    """Return one chunk's outputs and the state after it."""
    q, k, v = qkv
    dtype, precision = _product_policy(v.dtype)
    p = jnp.where(span.visible[:, None], _kernel(q.astype(dtype), k.astype(dtype), precision), 0.0).astype(dtype)
    v1 = _with_ones(v).astype(dtype)
    sums = _einsum("BHTS,BSHV->BTHV", p, v1, precision)
    if not span.fresh:
        phi_q = taylor_features(q) * span.reads[:, :, None, None]
        sums += _einsum("BTHE,BHEV->BTHV", phi_q.astype(dtype), state.astype(dtype), precision)

    phi_k = taylor_features(k) * span.writes[:, :, None, None]
    kept = jnp.where(span.keeps[:, None, None, None], state, 0.0)
    return _normalise(sums).astype(v.dtype), kept + _einsum("BTHE,BTHV->BHEV", phi_k.astype(dtype), v1, precision)


def _kernel(q: BTHK, k: BTHK, precision) -> Float[Array, "B H T S"]:
    s = _einsum("BTHK,BSHK->BHTS", q, k, precision) / math.sqrt(q.shape[-1])
    return 1.0 + s + 0.5 * s * s


def _with_ones(v: Float[Array, "*B V"]) -> Float[Array, "*B V+1"]:
    """Append the constant channel that carries the normaliser."""
    v = v.astype(jnp.float32)
    return jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1)


def _normalise(sums: Float[Array, "*B _"]) -> Float[Array, "*B V"]:
    z = sums[..., -1:]
    return jnp.where(z > 0, sums[..., :-1] / jnp.where(z > 0, z, 1.0), 0.0)


def _ids(q: BTHK, segment_ids: BT | None) -> BT:
    return jnp.ones(q.shape[:2], jnp.int32) if segment_ids is None else segment_ids


def _empty(q: BTHK, v: BTHV) -> BHEV:
    return initial_state(q.shape[0], q.shape[2], q.shape[3], v.shape[3])


def _einsum(spec: str, a: Array, b: Array, precision) -> Array:
    return jnp.einsum(spec, a, b, precision=precision, preferred_element_type=jnp.float32)


def _product_policy(dtype):
    """Low-precision inputs multiply in their own dtype on tensor cores; fp32 inputs multiply exactly.

    XLA's CPU backend lacks some layouts of bf16 products that sum in fp32, and has no faster unit for the others.
    """
    exact = dtype == jnp.float32 or target_platform() == "cpu"
    return (jnp.float32, EXACT) if exact else (dtype, jax.lax.Precision.DEFAULT)


IMPLEMENTATIONS = {
    "xla": Implementation(_chunked),
    "recurrent": Implementation(_recurrent),
    "oracle": Implementation(_oracle),
}
