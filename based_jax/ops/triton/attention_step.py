"""Softmax attention of one token over a cache in Triton kernels: which calls they take, and how splits are joined."""

import functools
import math
from collections.abc import Callable

import einops
import jax.numpy as jnp
from jaxtyping import Array, Float

from based_jax import devices
from based_jax.dims import BHK, BHV
from based_jax.ops import sharded
from based_jax.ops.decode_calls import AttentionStepCall
from based_jax.ops.dispatch import target_device_kind
from based_jax.ops.triton import limits
from based_jax.ops.triton.attention import DTYPES, MAX_HEAD_DIM

MAX_QUERIES = 64
MAX_ROW_ELEMENTS = 2**31
PROGRAMS_PER_CORE = 8
"""Of a call that is cut into more than fill a GPU."""
JOINED_CHANNELS, JOINED_QUERIES = 144, 16
"""Up to which heads that lie beside each other are read as one."""


def supports(call: AttentionStepCall) -> str | None:
    """Return why the kernels cannot run this call, or None."""
    q, k, v = call.q, call.k, call.v
    if reason := limits.missing_packages():
        return reason
    if len({x.dtype for x in (q, k, v)}) > 1 or q.dtype not in DTYPES:
        return f"q, k and v must all be bfloat16 or float16, and are {q.dtype}, {k.dtype} and {v.dtype}"
    if max(q.shape[2], v.shape[3]) > MAX_HEAD_DIM:
        return f"head dims must be at most {MAX_HEAD_DIM}, and are {q.shape[2]} and {v.shape[3]}"
    if q.shape[1] > MAX_QUERIES * k.shape[2]:
        return f"keys must serve at most {MAX_QUERIES} queries each, and serve {q.shape[1] // k.shape[2]}"
    of_row = max(x.size // max(x.shape[0], 1) for x in (k, v))
    if not 0 < of_row < MAX_ROW_ELEMENTS:
        return f"a row must have 1 to {MAX_ROW_ELEMENTS - 1} elements of keys, and has {of_row}"
    return sharded.mesh_refusal()


def slower(_call: AttentionStepCall) -> str | None:
    """Return why `auto` leaves a call to others, or None."""
    return limits.unknown_gpu()


def compute(call: AttentionStepCall) -> BHV:
    """Return o of this device's rows and heads."""
    # Triton takes half a second to import and is needed only here.
    from pallas_kernels.triton import attention_step as kernels

    return _joined(call, *_read(call, kernels.forward))


def compute_with_weights(call: AttentionStepCall) -> tuple[BHV, Float[Array, "B S G"]]:
    """Return the same, and what each key is given, the mean over the queries that share it."""
    from pallas_kernels.triton import attention_step as kernels

    o, logarithm, s = _read(call, kernels.forward_with_scores)
    total = jnp.max(logarithm, axis=1) + jnp.log2(jnp.sum(_weights(logarithm), axis=1))
    there = jnp.arange(s.shape[2])[None] < call.length[:, None]
    p = jnp.where(there[:, None], jnp.exp2(s - total[..., None]), 0.0)
    return _joined(call, o, logarithm), einops.reduce(p, "B (G R) S -> B S G", "mean", G=call.k.shape[2])


def read_ring(call: AttentionStepCall, tokens: int) -> tuple[Float[Array, "B H V"], Float[Array, "B H"]]:
    """Return fp32 o of the queries of so many tokens over a ring, and the logarithms of their weights' sums.

    Queries are those of AttentionStepCall, `tokens` of each head beside each other; `length` counts all tokens so far.
    """
    from pallas_kernels.triton import attention_step as kernels

    o, logarithm = _read(call, functools.partial(kernels.forward, tokens=tokens))
    weight, top = _weights(logarithm), jnp.max(logarithm, axis=1)
    total = jnp.sum(weight, axis=1)
    return jnp.sum(weight[..., None] * o, axis=1) / total[..., None], math.log(2) * (top + jnp.log2(total))


def _read(call: AttentionStepCall, forward: Callable) -> list[Array]:
    """Return what a kernel does, of heads that lie beside each other as of one."""
    from pallas_kernels.triton import attention_step as kernels

    B, S, G, V = call.v.shape
    n = heads_as_one(G, call.q.shape[1] // G, max(call.k.shape[3], V))
    keys = B * S * G // n // (PROGRAMS_PER_CORE * devices.cores(target_device_kind()))
    q, k, v = _diagonal(call.q, G, n), *(x.reshape(B, S, G // n, -1) for x in (call.k, call.v))
    length = call.length.astype(jnp.int32)
    arrays, tiling = sharded.vary_alike(q, k, v, length), kernels.tiling_of(keys)
    o, *more = forward(*arrays, scale=1 / call.root, tiling=tiling)
    return [_of_diagonal(o, G, n, V), *more]


def _joined(call: AttentionStepCall, o: Float[Array, "B N H V"], logarithm: Float[Array, "B N H"]) -> BHV:
    """Return o of all splits."""
    weight = _weights(logarithm)
    o = jnp.sum(weight[..., None] * o, axis=1) / jnp.sum(weight, axis=1)[..., None]
    return o.astype(call.v.dtype)


def _weights(logarithm: Float[Array, "B N H"]) -> Float[Array, "B N H"]:
    """Return the sums of splits, that of the largest 1."""
    return jnp.exp2(logarithm - logarithm.max(axis=1, keepdims=True))


def heads_as_one(groups: int, queries: int, channels: int) -> int:
    """Return how many heads of keys, that lie beside each other, are read as one with the queries of all.

    Alone a head of 72 channels begins and ends within what is read from memory at once.
    """
    most = max(1, min(JOINED_CHANNELS // channels, JOINED_QUERIES // queries))
    return next(n for n in range(most, 0, -1) if groups % n == 0)


def _diagonal(q: BHK, groups: int, n: int) -> Float[Array, "B H _"]:
    """Return queries as wide as n heads, zero but in the channels of their own."""
    if n == 1:
        return q
    q = einops.rearrange(q, "B (G n R) K -> B G n R 1 K", n=n, G=groups // n)
    own = jnp.eye(n, dtype=q.dtype)[None, None, :, None, :, None]
    return einops.rearrange(q * own, "B G n R m K -> B (G n R) (m K)")


def _of_diagonal(o: Float[Array, "B N H _"], groups: int, n: int, channels: int) -> Float[Array, "B N H V"]:
    """Return of what queries read of n heads what is of their own."""
    o = einops.rearrange(o, "B N (G n R) (m V) -> B N G R V n m", n=n, G=groups // n, V=channels)
    return einops.rearrange(jnp.diagonal(o, axis1=5, axis2=6), "B N G R V n -> B N (G n R) V")
