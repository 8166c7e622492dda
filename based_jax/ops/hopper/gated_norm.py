"""The skip, the gate and any norm in a Hopper kernel: which calls it takes, and gradients.

Kernels: `pallas_kernels/hopper/gated_norm.py`.
"""

import functools

import jax
import jax.numpy as jnp

from based_jax import devices
from based_jax.ops import sharded
from based_jax.ops.calls import GatedNormCall, Rows
from based_jax.ops.dispatch import target_device_kind
from based_jax.ops.hopper import limits

CHANNEL_MULTIPLE, MAX_CHANNELS = 128, 4096


def supports(call: GatedNormCall) -> str | None:
    """Return why the kernels cannot run this call, or None."""
    channels = call.skip.size
    for name, x in (("y", call.y), ("u", call.u), ("z", call.z)):
        if x.dtype != jnp.bfloat16:
            return f"{name} must be bfloat16, and is {x.dtype}"
    if channels % CHANNEL_MULTIPLE or not CHANNEL_MULTIPLE <= channels <= MAX_CHANNELS:
        return f"the channels must be a multiple of {CHANNEL_MULTIPLE} up to {MAX_CHANNELS}, and are {channels}"
    if (tokens := call.y.size // channels) < (least := devices.crossovers(target_device_kind()).norm_tokens):
        return f"there must be {least} tokens, and are {tokens}"
    if axes := sharded.axes_of("heads", channels):
        return f"a row's channels must lie on one device, and do over the mesh axes {', '.join(axes)}"
    return limits.refusal()


def compute(call: GatedNormCall) -> Rows:
    """Return the norm, or what there is without one, each device for its rows."""

    def shard(y, u, z, *weights):
        rows = (x.reshape(-1, call.skip.size) for x in (y, u, z))
        wide = (None if x is None else x.astype(jnp.float32) for x in weights)
        return _fused(call.eps, *sharded.vary_alike(*rows, *wide)).reshape(y.shape)

    stream = ("batch", "time")[: call.y.ndim - 1]
    return sharded.per_shard(shard, call[:5], (stream, stream, stream, (), ()), (stream,))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused(eps, y, u, z, skip, scale):
    # Pallas' GPU modules take half a second to import and are needed only here.
    from pallas_kernels.hopper import gated_norm as kernels

    forward = functools.partial(kernels.forward, eps=eps, multiprocessors=limits.multiprocessors())
    [x] = sharded.launch(forward, y, u, z, skip, scale)
    return x


def _fused_fwd(eps, *arguments):
    return _fused(eps, *arguments), arguments


def _fused_bwd(eps, saved, dx):
    from pallas_kernels.hopper import gated_norm as kernels

    skip = saved[3]
    backward = functools.partial(kernels.backward, eps=eps, multiprocessors=limits.multiprocessors())
    dy, dz, *sums = sharded.launch(backward, *saved, dx)
    du = (dy.astype(jnp.float32) * skip[None]).astype(dy.dtype)
    dskip, dscale, *_ = *(x.sum(axis=0) for x in sums), None
    return dy, du, dz, dskip, dscale


_fused.defvjp(_fused_fwd, _fused_bwd)
