"""Residual additions with their norm in a Hopper kernel: which calls it takes, and gradients.

Kernels: `pallas_kernels/hopper/norm.py`.
"""

import functools

import jax
import jax.numpy as jnp

from based_jax import devices
from based_jax.ops import sharded
from based_jax.ops.calls import NormCall, Rows
from based_jax.ops.dispatch import target_device_kind
from based_jax.ops.hopper import limits

WHOLE_CHANNELS = range(128, 4097, 128)
FILLED_CHANNELS = range(512, 4097, 8)
"""Channels that are taken as well: a tile's rows are longer than theirs."""
NARROW_CHANNELS = range(64, 513, 32)
"""Channels that are taken as well where tokens come in `TOKEN_MULTIPLE`: each warp has a row then."""
TOKEN_MULTIPLE = 4


def supports(call: NormCall) -> str | None:
    """Return why the kernels cannot run this call, or None."""
    r, y, channels = call.r, call.y, call.scale.size
    tokens = r.size // max(channels, 1)
    given = {"r": r.dtype} | ({} if y is None else {"y": y.dtype}) | {"the norm": call.dtype}
    for name, got in given.items():
        if got != (wanted := jnp.dtype("float32" if name == "r" else "bfloat16")):
            return f"{name} must be {wanted}, and is {got}"
    # A mesh may split the batch, whatever its size, and time.
    together = tokens // max(r.shape[0], 1) if jax.sharding.get_abstract_mesh().size > 1 else tokens
    together //= sharded.pieces_of_time(r.shape[1]) if r.ndim > 2 else 1
    is_narrow = channels in NARROW_CHANNELS and together % TOKEN_MULTIPLE == 0
    if not is_narrow and channels not in FILLED_CHANNELS and channels not in WHOLE_CHANNELS:
        narrow, filled = NARROW_CHANNELS, FILLED_CHANNELS
        return (
            f"the channels must be a multiple of {filled.step} from {filled[0]} to {filled[-1]}, or of"
            f" {WHOLE_CHANNELS.step}, or of {narrow.step} from {narrow[0]} for a multiple of {TOKEN_MULTIPLE} tokens,"
            f" and are {channels} for {together} tokens"
        )
    if tokens < (least := devices.crossovers(target_device_kind()).norm_tokens):
        return f"there must be {least} tokens, and are {tokens}"
    if r.size >= limits.MAX_ELEMENTS:
        return f"there must be fewer than {limits.MAX_ELEMENTS} elements, and are {r.size}"
    return limits.refusal()


def compute(call: NormCall) -> tuple[Rows, Rows]:
    """Return the sum and its norm, in bf16 as `supports` demands, each device for its rows."""

    def shard(r, y, *weights):
        rows = [None if x is None else x.reshape(-1, call.scale.size) for x in (r, y)]
        wide = [None if x is None else x.astype(jnp.float32) for x in weights]
        total, x = _fused(*sharded.vary_alike(*rows, *wide), call.eps)
        return total.reshape(r.shape), x.reshape(r.shape)

    stream, arguments = ("batch", "time")[: call.r.ndim - 1], (call.r, call.y, call.scale, call.bias)
    return sharded.per_shard(shard, arguments, (stream, stream, (), ()), (stream, stream))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _fused(r, y, scale, bias, eps):
    return _fused_fwd(r, y, scale, bias, eps)[0]


def _fused_fwd(r, y, scale, bias, eps):
    # Pallas' GPU modules take half a second to import and are needed only here.
    from pallas_kernels.hopper import norm as kernels

    *summed, x = sharded.launch(kernels.forward, r, y, scale, bias, eps=eps, multiprocessors=limits.multiprocessors())
    [total] = summed or [r]
    return (total, x), (total, y is not None, scale, bias is not None)


def _fused_bwd(eps, saved, cotangents):
    from pallas_kernels.hopper import norm as kernels

    total, adds, scale, centered = saved
    dtotal, dx = cotangents
    options = {"eps": eps, "adds": adds, "centered": centered, "multiprocessors": limits.multiprocessors()}
    found = iter(sharded.launch(kernels.backward, total, scale, dx, dtotal, **options))
    dr, dy = next(found), next(found) if adds else None
    return dr, dy, next(found).sum(axis=0), next(found).sum(axis=0) if centered else None


_fused.defvjp(_fused_fwd, _fused_bwd)
