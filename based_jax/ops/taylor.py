"""Taylor linear attention, the global mixer of Based (arXiv 2402.18668, section 4.1).

With s_ij = q_i.k_j / sqrt(K) the softmax kernel exp(s) is replaced by its second-order Taylor polynomial, which is an
inner product of finite features, so that the past fits into a state of fixed size:

    p_ij = 1 + s_ij + s_ij^2 / 2 = phi(q_i).phi(k_j)
    o_i  = sum_{j<=i} p_ij v_j / sum_{j<=i} p_ij

The state is S = sum_j phi(k_j) [v_j, 1]^T with shape (B, H, E, V+1), E = 1 + K + K(K+1)/2; its last column carries the
normaliser. No epsilon is needed: p = (1 + (1+s)^2)/2 >= 1/2. Scores, features, states and sums are fp32. The sums are
those of `ops/linear_attention.py`; inside a chunk p comes from s, so features are expanded only where a state is met.
"""

import functools
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from based_jax.dims import BHEV, BTHK, BTHV, SegmentIds
from based_jax.ops import linear_attention
from based_jax.ops.arguments import checked
from based_jax.ops.calls import LinearAttentionCall
from based_jax.ops.dispatch import Implementation, dispatch
from based_jax.ops.hopper import taylor as hopper_taylor
from based_jax.ops.precision import einsum
from based_jax.ops.tpu import taylor as tpu_taylor
from based_jax.ops.triton import taylor as triton_taylor


def expanded_dim(feature_dim: int) -> int:
    """Return E, the number of distinct features of `taylor_features`: 45, 153, 325 for K = 8, 16, 24."""
    return 1 + feature_dim + feature_dim * (feature_dim + 1) // 2


@checked
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


@checked
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
    return linear_attention.initial_state(batch, heads, expanded_dim(feature_dim), value_dim)


@checked
def taylor_attention(
    q: BTHK,
    k: BTHK,
    v: BTHV,
    *,
    state: BHEV | None = None,
    segment_ids: SegmentIds | None = None,
    impl: str = "auto",
) -> tuple[BTHV, BHEV]:
    """Causal, normalised Taylor linear attention over (B, T, H, .) arrays, for any T, K and V.

    Args:
      state: state to start from; it belongs to each row's first document.
      segment_ids: ids of packed documents, 0 for padding (see `ops/segments.py`).
      impl: "oracle" (every score in fp32), "xla_steps" (token by token), "xla_chunks" (linear in T), "xla_quadratic"
        (one chunk; auto's for short sequences on a GPU), "hopper_chunks" (Mosaic GPU kernels; bf16, K <= 16),
        "triton_chunks" (Triton kernels, for other GPUs; likewise), "tpu_chunks" (Mosaic TPU kernels; bf16 or fp32,
        V <= 128) or "auto".

    Returns:
      o in v's dtype, and the state after the last token, fp32. XLA drops a state that nobody reads.

    Raises:
      UserError: `impl` is unknown or cannot run this call.
    """
    linear_attention.check_state("taylor_attention", state, expanded_dim(q.shape[-1]), v.shape[-1])
    call = LinearAttentionCall(q, k, v, state, segment_ids)
    return dispatch("taylor_attention", IMPLEMENTATIONS, impl, call, linear_attention.cut(taylor_features))


def polynomial(s: Float[Array, "..."]) -> Float[Array, "..."]:
    """Return p = phi(q).phi(k) of a score s."""
    return 1.0 + s + 0.5 * s * s


def _kernel(q: BTHK, k: BTHK, precision, dtype=jnp.float32) -> Float[Array, "B H T S"]:
    s = einsum("BTHK,BSHK->BHTS", q, k, precision) / math.sqrt(q.shape[-1])
    return polynomial(s).astype(dtype)


_chunked = functools.partial(linear_attention.chunked, features=taylor_features, scores=_kernel)

IMPLEMENTATIONS = {
    "hopper_chunks": Implementation(hopper_taylor.compute, hopper_taylor.supports, platform="cuda"),
    "triton_chunks": Implementation(
        triton_taylor.compute, triton_taylor.supports, platform="cuda", slower=triton_taylor.slower
    ),
    "tpu_chunks": Implementation(tpu_taylor.compute, tpu_taylor.supports, platform="tpu", slower=tpu_taylor.slower),
    "xla_chunks": Implementation(_chunked),
    "xla_quadratic": Implementation(
        functools.partial(_chunked, length=None), preferred="cuda", slower=linear_attention.one_chunk_is_slower
    ),
    "xla_steps": Implementation(functools.partial(linear_attention.recurrent, features=taylor_features)),
    "oracle": Implementation(functools.partial(linear_attention.oracle, features=taylor_features, scores=_kernel)),
}
