"""Softmax attention of one token over a cache in Triton kernels: which calls they take, and how splits are joined."""

import jax.numpy as jnp

from based_jax import devices
from based_jax.dims import BHV
from based_jax.ops import sharded
from based_jax.ops.calls import AttentionStepCall
from based_jax.ops.dispatch import not_run, target_device_kind
from based_jax.ops.triton import limits
from based_jax.ops.triton.attention import DTYPES, MAX_HEAD_DIM

MAX_QUERIES = 64
MAX_ROW_ELEMENTS = 2**31
FULL = 4
"""How often programs of whole rows have to fill a GPU before they get more keys each."""


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


def slower(call: AttentionStepCall) -> str | None:
    """Return why `auto` leaves a call to others, or None."""
    return limits.unknown_gpu() or not_run(call)


def compute(call: AttentionStepCall) -> BHV:
    """Return o of this device's rows and heads."""
    # Triton takes half a second to import and is needed only here.
    from pallas_kernels.triton import attention_step as kernels

    groups_of_rows = call.k.shape[0] * call.k.shape[2]
    many = groups_of_rows >= FULL * devices.cores(target_device_kind())
    tiling = kernels.MANY_ROWS if many else kernels.FEW_ROWS
    arrays = sharded.vary_alike(call.q, call.k, call.v, jnp.minimum(call.length, call.k.shape[1]).astype(jnp.int32))
    o, logarithm = kernels.forward(*arrays, scale=1 / call.root, tiling=tiling)
    weight = jnp.exp2(logarithm - logarithm.max(axis=1, keepdims=True))
    return (jnp.sum(weight[..., None] * o, axis=1) / jnp.sum(weight, axis=1)[..., None]).astype(call.v.dtype)
