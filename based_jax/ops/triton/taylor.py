"""Taylor linear attention by chunks on tensor cores, in Triton kernels.

The kernels and their equations are in `pallas_kernels/triton/taylor*.py`; products are of bf16, sums, states and the
normaliser fp32. The backward pass saves q, k, v, o, z and the states before every chunk.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from based_jax.dims import BHEV, BT, BTHV
from based_jax.ops import segments, sharded
from based_jax.ops.calls import LinearAttentionCall
from based_jax.ops.triton import chunks, limits

MAX_KEY_DIM = 16


def supports(call: LinearAttentionCall) -> str | None:
    """Return why the kernels cannot run this call, or None."""
    q, k, v = call.q, call.k, call.v
    if reason := limits.missing_packages():
        return reason
    if {x.dtype for x in (q, k, v)} != {jnp.dtype(jnp.bfloat16)}:
        return f"q, k and v must be bfloat16, and are {q.dtype}, {k.dtype} and {v.dtype}"
    if q.shape[3] > MAX_KEY_DIM:
        return f"K must be at most {MAX_KEY_DIM}, and is {q.shape[3]}"
    if not q.size * v.size:
        return f"no dimension may be empty, and q is {q.shape}, v {v.shape}"
    return sharded.mesh_refusal()


def slower(call: LinearAttentionCall) -> str | None:
    """Return why `auto` leaves a call to others, or None."""
    return chunks.slower(call.v)


def compute(call: LinearAttentionCall) -> tuple[BTHV, BHEV]:
    """Return o and the state after the last token, each device for its rows and heads."""
    return sharded.per_device(_on_device, call)


def _on_device(call: LinearAttentionCall) -> tuple[BTHV, BHEV]:
    q, k, v = call.q, call.k, call.v
    numbers = jnp.ones(v.shape[:2], jnp.int32) if call.segment_ids is None else call.segment_ids.astype(jnp.int32)
    first = _pack(call.state, q.shape, v.shape[-1])
    arguments = sharded.vary_alike(q, k, v, numbers, _held(numbers), *first)
    o, last, sums = _attention(q.shape[-1] ** -0.5, *arguments)
    return o, _unpack(last, sums, q.shape[-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(scale, q, k, v, numbers, held, state, sums):
    return _attention_fwd(scale, q, k, v, numbers, held, state, sums)[0]


def _attention_fwd(scale, q, k, v, numbers, held, state, sums):
    # Triton takes half a second to import and is needed only here and below.
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


def _held(numbers: BT) -> Int[Array, "B _"]:
    """Return the document of the state before each chunk and after the last; of a row without any, 1."""
    from pallas_kernels.triton.chunks import CHUNK_TOKENS

    by_chunk = sharded.fill(numbers, {1: CHUNK_TOKENS}).reshape(numbers.shape[0], -1, CHUNK_TOKENS).max(2)
    first = jnp.maximum(segments.first_id(numbers), 1)
    return jax.lax.cummax(jnp.concatenate([first[:, None], by_chunk], axis=1), axis=1)


def _pack(state: BHEV | None, keys_shape: tuple[int, ...], values: int) -> tuple[Array, Array]:
    """Return the kernels' sums of F(k) v^T (B, H, F, V) and of F(k) (B, H, F) of a state, zeros for None."""
    from pallas_kernels.triton.taylor_features import PACKED_FEATURES, packed_places

    batch, _, heads, keys = keys_shape
    packed = jnp.zeros((batch, heads, PACKED_FEATURES, values + 1), jnp.float32)
    if state is not None:
        packed = packed.at[:, :, packed_places(keys)].set(state / _factors(keys))
    return packed[..., :-1], packed[..., -1]


def _unpack(state: Float[Array, "B H F V"], sums: Float[Array, "B H F"], keys: int) -> BHEV:
    """Undo `_pack`."""
    from pallas_kernels.triton.taylor_features import packed_places

    return jnp.concatenate([state, sums[..., None]], axis=-1)[:, :, packed_places(keys)] * _factors(keys)


def _factors(keys: int) -> np.ndarray:
    """Return the factors of the features in `ops.taylor.taylor_features`, (1, 1, E, 1), which the kernels' have not."""
    rows, columns = np.tril_indices(keys)
    products = np.where(rows == columns, 0.5, 1.0) ** 0.5 * keys**-0.5
    return np.concatenate([[1.0], np.full(keys, keys**-0.25), products]).astype(np.float32)[None, None, :, None]
