"""Residual additions with their norm in TPU kernels: which calls they take, and gradients.

Kernels: `pallas_kernels/tpu/norm.py`. The backward pass saves the sum, and makes the norm anew.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from based_jax import devices
from based_jax.ops import sharded
from based_jax.ops.calls import NormCall, Rows
from based_jax.ops.dispatch import target_device_kind

DTYPES = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)
MAX_CHANNELS = 8192
MIN_TOKENS = 1024
"""Of a device: with fewer the arrays stay in VMEM, where XLA fuses the norm with what is around it."""
RMS_KINDS = "TPU v5", "TPU7x"
LAYER_NORM_KINDS = *RMS_KINDS, "TPU v5 lite", "TPU v5e"
"""Devices, by `devices.find`, on which XLA's form takes more than 1.3 times as long as its bytes (experiments/tpu)."""


def supports(call: NormCall) -> str | None:
    """Return why the kernels cannot run this call, or None."""
    if call.r.dtype != jnp.float32:
        return f"r must be float32, and is {call.r.dtype}"
    for name, dtype in {"y": DTYPES[0] if call.y is None else call.y.dtype, "the norm": call.dtype}.items():
        if dtype not in DTYPES:
            return f"{name} must be bfloat16 or float32, and is {dtype}"
    if call.scale.size > MAX_CHANNELS:
        return f"the channels must be at most {MAX_CHANNELS}, and are {call.scale.size}"
    if not call.r.size:
        return f"no dimension may be empty, and r is {call.r.shape}"
    return sharded.mesh_refusal()


def slower(call: NormCall) -> str | None:
    """Return why `auto` leaves a call to XLA, or None."""
    known = devices.find(kind := target_device_kind())
    if known is None or known.name not in (RMS_KINDS if call.bias is None else LAYER_NORM_KINDS):
        return f"XLA's form takes little longer than its bytes on a {kind}"
    if (tokens := _tokens_of_device(call)) < MIN_TOKENS:
        return f"for {tokens} tokens XLA fuses it with what is around it"
    return None


def _tokens_of_device(call: NormCall) -> int:
    rows, *time = call.r.shape[:-1]
    return sharded.part_of_device("batch", rows) * (sharded.part_of_device("time", time[0]) if time else 1)


class Norm(NamedTuple):
    """What the kernels are told: eps, dtypes of the norm and of y, None without one, and whether it is a layer norm."""

    eps: float
    dtype: jnp.dtype
    y_dtype: jnp.dtype | None
    centered: bool


def compute(call: NormCall) -> tuple[Rows, Rows]:
    """Return the sum and its norm, each device for its rows."""
    norm = Norm(call.eps, jnp.dtype(call.dtype), None if call.y is None else call.y.dtype, call.bias is not None)

    def shard(r, y, *weights):
        tokens = [None if x is None else x.reshape(-1, *r.shape[-2:]) for x in (r, y)]
        wide = [None if x is None else x.astype(jnp.float32)[None] for x in weights]
        total, x = _fused(norm, *sharded.vary_alike(*tokens, *wide))
        return total.reshape(r.shape), x.reshape(r.shape)

    stream, arguments = ("batch", "time")[: call.r.ndim - 1], (call.r, call.y, call.scale, call.bias)
    return sharded.per_shard(shard, arguments, (stream, stream, (), ()), (stream, stream))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused(norm: Norm, r, y, scale, bias):
    return _forward(norm, r, y, scale, bias)[0]


def _forward(norm: Norm, r, y, scale, bias):
    # Pallas' TPU modules take half a second to import and are needed only here and below.
    from pallas_kernels.tpu import norm as kernels

    *summed, x = sharded.launch(kernels.forward, r, y, scale, bias, eps=norm.eps, dtype=norm.dtype)
    [total] = summed or [r]
    return (total, x), (total, scale)


def _backward(norm: Norm, saved, cotangents):
    from pallas_kernels.tpu import norm as kernels

    (total, scale), (dtotal, dx) = saved, cotangents
    options = {"eps": norm.eps, "y_dtype": norm.y_dtype, "centered": norm.centered}
    dr, *dy, sums = sharded.launch(kernels.gradients, total, scale, dx, dtotal, **options)
    rounded = dy[0] if dy else dr
    dscale, *dbias = jnp.split(jnp.sum(sums, axis=0), sums.shape[1])
    return dr, None if norm.y_dtype is None else rounded, dscale, dbias[0] if norm.centered else None


_fused.defvjp(_forward, _backward)
