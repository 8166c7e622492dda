"""A residual addition with the RMS norm that follows it: one pass over the residual stream instead of two.

    r' = r + y          x = r' / sqrt(mean(r'^2) + eps) * scale

The stream r and its sum r' are fp32, and so is the arithmetic; y and x are what layers compute in.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from based_jax.ops import hopper
from based_jax.ops.dispatch import Implementation, dispatch

Stream = Float[Array, "*B D"]
Scale = Float[Array, "D"]

LANES, WIDEST = 128, 4096
"""What the kernels take: a multiple of channels, and at most how many."""
FEWEST_TOKENS = 1024
"""With fewer, as in decoding, most of the chip would idle, and XLA's fusions are as good."""


def residual_rms_norm(
    r: Stream, y: Stream, scale: Scale, *, eps: float = 1e-5, dtype=None, impl: str = "auto"
) -> tuple[Stream, Stream]:
    """Return r + y and its RMS norm over the channels.

    Args:
      r: the residual stream (..., D), fp32.
      y: what a layer adds to it.
      dtype: of the norm; y's by default.
      impl: "xla", "hopper" (Mosaic GPU kernels; bf16 y and norm, D a multiple of 128 up to 4096, 1,024 tokens) or
        "auto".

    Raises:
      UserError: `impl` is unknown or cannot run this call.
    """
    return dispatch("residual_rms_norm", IMPLEMENTATIONS, impl, r, y, scale, eps, jnp.dtype(dtype or y.dtype))


def _xla(r: Stream, y: Stream, scale: Scale, eps: float, dtype) -> tuple[Stream, Stream]:
    total = r + y
    wide = total.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    scale = scale.reshape((1,) * (r.ndim - 1) + scale.shape)
    return total, (wide * (inverse * scale)).astype(dtype)


def _supports(r: Stream, y: Stream, scale: Scale, eps: float, dtype) -> str | None:
    """Return why the kernels cannot run this call, or None."""
    channels, tokens = scale.size, r.size // max(scale.size, 1)
    if (r.dtype, y.dtype, dtype) != (jnp.float32, jnp.bfloat16, jnp.bfloat16):
        return f"r, y and the norm must be float32, bfloat16 and bfloat16, and are {r.dtype}, {y.dtype} and {dtype}"
    if channels % LANES or not LANES <= channels <= WIDEST:
        return f"the channels must be a multiple of {LANES} up to {WIDEST}, and are {channels}"
    if tokens < FEWEST_TOKENS:
        return f"there must be {FEWEST_TOKENS} tokens, and are {tokens}"
    if r.size >= hopper.OFFSETS:
        return f"there must be fewer than {hopper.OFFSETS} elements, and are {r.size}"
    return hopper.refusal()


def _hopper(r: Stream, y: Stream, scale: Scale, eps: float, dtype) -> tuple[Stream, Stream]:
    del dtype  # bf16, as `_supports` demands

    def shard(r, y, scale):
        rows = [x.reshape(-1, scale.size) for x in (r, y)]
        total, x = _fused(*hopper.vary_alike(*rows, scale.astype(jnp.float32)), eps)
        return total.reshape(r.shape), x.reshape(r.shape)

    stream = ("batch",)
    return hopper.per_shard(shard, (r, y, scale), (stream, stream, ()), (stream, stream))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _fused(r, y, scale, eps):
    return _fused_fwd(r, y, scale, eps)[0]


def _fused_fwd(r, y, scale, eps):
    # Pallas' GPU modules take half a second to import and are needed only here.
    from pallas_kernels import rms_norm_hopper as kernels

    total, x = hopper.call(kernels.forward, r, y, scale, eps=eps)
    return (total, x), (total, scale)


def _fused_bwd(eps, saved, cotangents):
    from pallas_kernels import rms_norm_hopper as kernels

    total, scale = saved
    dtotal, dx = cotangents
    dr, dy, dscale = hopper.call(kernels.backward, total, scale, dx, dtotal, eps=eps)
    return dr, dy, dscale.sum(axis=0)


_fused.defvjp(_fused_fwd, _fused_bwd)

IMPLEMENTATIONS = {
    "hopper": Implementation(_hopper, _supports, platform="cuda"),
    "xla": Implementation(_xla),
}
