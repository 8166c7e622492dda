"""Softmax attention in Triton kernels: which calls they take, how arrays are filled up for them, and gradients.

Tiles of another document are passed over. Kernels: `pallas_kernels/triton/attention.py`.
"""

import functools
import math

import jax
import jax.numpy as jnp

from based_jax.dims import BT, BTHV
from based_jax.ops import sharded, softmax_walks
from based_jax.ops.calls import AttentionCall
from based_jax.ops.triton import limits

MAX_HEAD_DIM = 256
MAX_ELEMENTS = 2**31
LOGARITHM_OF_NONE = float(jnp.finfo(jnp.float32).min)
DTYPES = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16)


def supports(call: AttentionCall) -> str | None:
    """Return why the kernels cannot run this call, or None."""
    q, k, v = call.q, call.k, call.v
    if reason := limits.missing_packages():
        return reason
    if len({x.dtype for x in (q, k, v)}) > 1 or q.dtype not in DTYPES:
        return f"q, k and v must all be bfloat16 or float16, and are {q.dtype}, {k.dtype} and {v.dtype}"
    if max(q.shape[3], v.shape[3]) > MAX_HEAD_DIM:
        return f"head dims must be at most {MAX_HEAD_DIM}, and are {q.shape[3]} and {v.shape[3]}"
    if not 0 < max(q.size, v.size) < MAX_ELEMENTS:
        return f"there must be 1 to {MAX_ELEMENTS - 1} elements, and are {max(q.size, v.size)}"
    return sharded.mesh_refusal()


def slower(_call: AttentionCall) -> str | None:
    """Return why `auto` leaves a call to others, or None."""
    return limits.unknown_gpu()


def compute(call: AttentionCall) -> BTHV:
    """Return o, each device for its rows and heads; zero at padding."""
    return sharded.per_device(_on_device, call)


def _on_device(call: AttentionCall) -> BTHV:
    time = call.q.shape[1]
    numbers, filled = _filled(call)
    o = _attention(*_options(call), *filled)[:, :time, :, : call.v.shape[3]]
    return jnp.where(numbers[..., None, None] == 0, 0, o)


def _filled(call: AttentionCall, *more: BTHV) -> tuple[BT, list[jax.Array]]:
    """Return numbers, and q, k, v, more such arrays and numbers in the sizes of tiles."""
    # Triton takes half a second to import and is needed only here.
    from pallas_kernels.triton import attention as kernels

    numbers = jnp.ones(call.q.shape[:2], jnp.int32) if call.segment_ids is None else call.segment_ids
    sizes = {1: kernels.TIME_MULTIPLE, 3: kernels.HEAD_MULTIPLE}
    arrays = [sharded.fill(x, sizes) for x in (call.q, call.k, call.v, *more)]
    whole = sharded.vary_alike(*arrays, sharded.fill(numbers.astype(jnp.int32), {1: kernels.TIME_MULTIPLE}))
    return numbers, list(whole)


def _options(call: AttentionCall) -> tuple[float, int, int | None]:
    """Return the scale of scores, the window, and how many tokens each row has where they are one document."""
    T = call.q.shape[1]
    return 1 / call.root, min(call.window, T), T if call.segment_ids is None else None


def read_window(call: AttentionCall) -> tuple[BTHV, jax.Array]:
    """Return what a device's queries read of their windows, and L (B, H, T); for `ops/softmax_sinks.py`."""
    T, (numbers, filled) = call.q.shape[1], _filled(call)
    o, (*_, logarithm) = _attention_fwd(*_options(call), *filled)
    real = numbers != 0
    o = jnp.where(real[..., None, None], o[:, :T, :, : call.v.shape[3]], 0)
    return o, jnp.where(real[:, None], math.log(2) * logarithm[:, :, :T], LOGARITHM_OF_NONE)


def window_gradients(call: AttentionCall, o: BTHV, logarithm: jax.Array, do: BTHV) -> tuple[jax.Array, ...]:
    """Return the gradients of q, k and v through the windows' keys, where o and L are of these and others."""
    from pallas_kernels.triton import attention as kernels

    T, (_, (q, k, v, o, do, numbers)) = call.q.shape[1], _filled(call, o, do)
    in_twos = sharded.fill(logarithm / math.log(2), {2: kernels.TIME_MULTIPLE})  # whose powers the kernels take
    dq, dk, dv, _ = _attention_bwd(*_options(call), (q, k, v, numbers, o, in_twos), do)
    return tuple(dx[:, :T, :, : x.shape[3]] for dx, x in zip((dq, dk, dv), call[:3], strict=True))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attention(scale, window, time, q, k, v, numbers):
    return _attention_fwd(scale, window, time, q, k, v, numbers)[0]


def _attention_fwd(scale, window, time, q, k, v, numbers):
    from pallas_kernels.triton import attention as kernels

    tiling = kernels.tiling_of(kernels.FORWARD_TILINGS, q, v)
    first = softmax_walks.documents(numbers, time).first_keys(window, tiling.own)
    o, logarithm = kernels.forward(q, k, v, numbers, first, scale=scale, window=window)
    return o, (q, k, v, numbers, o, logarithm)


def _attention_bwd(scale, window, time, saved, do):
    from pallas_kernels.triton import attention as kernels

    q, k, v, numbers, o, logarithm = saved
    tiling = kernels.tiling_of(kernels.GRADIENT_TILINGS, q, v)
    delta = jnp.einsum("BTHV,BTHV->BHT", do.astype(jnp.float32), o.astype(jnp.float32))
    options = {"scale": scale, "window": window}
    documents = softmax_walks.documents(numbers, time)
    first, last = documents.first_keys(window, tiling.own), documents.last_queries(window, tiling.own)
    [dq] = kernels.query_gradients(q, k, v, numbers, first, logarithm, delta, do, **options)
    dk, dv = kernels.key_gradients(q, k, v, numbers, last, logarithm, delta, do, **options)
    return dq, dk, dv, None


_attention.defvjp(_attention_fwd, _attention_bwd)
