"""Taylor linear attention by chunks on tensor cores, in Triton kernels.

The kernels and their equations are in `pallas_kernels/triton/taylor*.py`; products are of bf16, sums, states and the
normaliser fp32. The backward pass saves q, k, v, o, z and the states before every chunk.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from based_jax.dims import BHEV, BTHV
from based_jax.ops import sharded, taylor_state
from based_jax.ops.calls import LinearAttentionCall
from based_jax.ops.triton import chunks, limits

DTYPES = (jnp.dtype(jnp.bfloat16),)
MAX_KEY_DIM = 16


def supports(call: LinearAttentionCall) -> str | None:
    """Return why the kernels cannot run this call, or None."""
    return limits.missing_packages() or taylor_state.refusal(call, DTYPES, {"K": MAX_KEY_DIM})


def slower(call: LinearAttentionCall) -> str | None:
    """Return why `auto` leaves a call to others, or None."""
    return chunks.slower(call.v)


def compute(call: LinearAttentionCall) -> tuple[BTHV, BHEV]:
    """Return o and the state after the last token, each device for its rows and heads."""
    return sharded.per_device(_on_device, call)


def _on_device(call: LinearAttentionCall) -> tuple[BTHV, BHEV]:
    # Triton takes half a second to import and is needed only here and below.
    from pallas_kernels.triton.chunks import CHUNK_TOKENS

    q, k, v = call.q, call.k, call.v
    numbers = jnp.ones(v.shape[:2], jnp.int32) if call.segment_ids is None else call.segment_ids.astype(jnp.int32)
    first = _pack(call.state, q.shape, v.shape[-1])
    arguments = sharded.vary_alike(q, k, v, numbers, taylor_state.held(numbers, CHUNK_TOKENS), *first)
    o, last, sums = _attention(q.shape[-1] ** -0.5, *arguments)
    return o, _unpack(last, sums, q.shape[-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(scale, q, k, v, numbers, held, state, sums):
    return _attention_fwd(scale, q, k, v, numbers, held, state, sums)[0]


def _attention_fwd(scale, q, k, v, numbers, held, state, sums):
    from pallas_kernels.triton import taylor as kernels

    documents = kernels.Documents(numbers, held)
    *starts, last, last_sums = kernels.states(k, v, documents, (state, sums), scale=scale)
    o, z = kernels.outputs(q, k, v, documents, *starts, scale=scale)
    return (o, last, last_sums), (q, k, v, o, z, documents, tuple(starts))


def _attention_bwd(scale, saved, gradients):
    from pallas_kernels.triton import taylor as kernels
    from pallas_kernels.triton import taylor_backward as backward

    q, k, v, o, z, documents, starts = saved
    do, *dlast = gradients
    delta = jnp.einsum("BTHV,BTHV->BTH", do, o, preferred_element_type=jnp.float32)
    back = 1 / z, delta
    *ends, dstate, dsums = kernels.states(q, do, documents, tuple(dlast), back, scale=scale)
    [dq] = backward.query_gradients(q, k, v, do, documents, back, starts, scale=scale)
    dk, dv = backward.key_gradients(q, k, v, do, documents, back, tuple(ends), scale=scale)
    return dq, dk, dv, None, None, dstate, dsums


_attention.defvjp(_attention_fwd, _attention_bwd)


def _pack(state: BHEV | None, keys_shape: tuple[int, ...], values: int) -> tuple[Array, Array]:
    """Return the kernels' sums of F(k) v^T (B, H, F, V) and of F(k) (B, H, F) of a state, zeros for None."""
    from pallas_kernels.triton.taylor_features import PACKED_FEATURES, packed_places

    batch, _, heads, keys = keys_shape
    packed = jnp.zeros((batch, heads, PACKED_FEATURES, values + 1), jnp.float32)
    if state is not None:
        packed = packed.at[:, :, packed_places(keys)].set(state / taylor_state.factors(keys))
    return packed[..., :-1], packed[..., -1]


def _unpack(state: Float[Array, "B H F V"], sums: Float[Array, "B H F"], keys: int) -> BHEV:
    """Undo `_pack`."""
    from pallas_kernels.triton.taylor_features import packed_places

    return jnp.concatenate([state, sums[..., None]], axis=-1)[:, :, packed_places(keys)] * taylor_state.factors(keys)
