"""A residual addition with the norm that follows it: one pass over the residual stream instead of two or more.

    r' = r + y          x = r' / sqrt(mean(r'^2) + eps) * scale                              RMS norm
                        x = c / sqrt(mean(c^2) + eps) * scale + bias,  c = r' - mean(r')     layer norm

The stream r and its sum r' are fp32, and so is the arithmetic; y and x are what layers compute in.
"""

import jax
import jax.numpy as jnp

from based_jax.errors import UserError
from based_jax.ops.arguments import checked
from based_jax.ops.calls import Channels, NormCall, Rows
from based_jax.ops.dispatch import Implementation, dispatch
from based_jax.ops.hopper import norm as hopper_norm
from based_jax.ops.tpu import norm as tpu_norm


@checked
def residual_rms_norm(
    r: Rows, y: Rows | None, scale: Channels, *, eps: float = 1e-5, dtype=None, impl: str = "auto"
) -> tuple[Rows, Rows]:
    """Return r + y and its RMS norm over the channels.

    Args:
      r: the residual stream (..., D), fp32.
      y: what a layer adds to it, if anything.
      scale: (D,).
      dtype: of the norm; y's, or r's without y, by default.
      impl: "xla_rows", "hopper_rows" (Mosaic GPU kernels; bf16 y and norm, 1,024 tokens, D a multiple of 8 from 512
        to 4,096, or of 128, or for a multiple of 4 tokens of 32 from 64), "tpu_rows" (Mosaic TPU kernels; y and norm in
        bf16 or fp32, D at most 8,192) or "auto".

    Raises:
      UserError: `impl` is unknown or cannot run this call.
    """
    return dispatch("residual_rms_norm", IMPLEMENTATIONS, impl, _call(r, y, scale, None, eps, dtype))


@checked
def residual_layer_norm(
    r: Rows, y: Rows | None, scale: Channels, bias: Channels, *, eps: float = 1e-5, dtype=None, impl: str = "auto"
) -> tuple[Rows, Rows]:
    """Return r + y and its layer norm over the channels; arguments and errors are those of `residual_rms_norm`."""
    return dispatch("residual_layer_norm", IMPLEMENTATIONS, impl, _call(r, y, scale, bias, eps, dtype))


def _call(r: Rows, y: Rows | None, scale: Channels, bias: Channels | None, eps: float, dtype) -> NormCall:
    if eps < 0:
        raise UserError(f"The norm's eps is {eps}; it is at least 0.")
    return NormCall(r, y, scale, bias, eps, _dtype(r, y, dtype))


def _dtype(r: Rows, y: Rows | None, dtype) -> jnp.dtype:
    if dtype is None:
        return (r if y is None else y).dtype
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = jnp.dtype(bool)
    if not jnp.issubdtype(found, jnp.floating):
        raise UserError(f"The norm's dtype is {dtype!r:.40}; it is one of floats, as jnp.bfloat16 is.")
    return found


def _xla(call: NormCall) -> tuple[Rows, Rows]:
    total = call.r if call.y is None else call.r + call.y
    wide, ones = total.astype(jnp.float32), (1,) * (total.ndim - 1)
    if call.bias is not None:
        wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + call.eps)
    x = wide * (inverse * call.scale.reshape(*ones, -1))
    return total, (x if call.bias is None else x + call.bias.reshape(*ones, -1)).astype(call.dtype)


IMPLEMENTATIONS = {
    "hopper_rows": Implementation(hopper_norm.compute, hopper_norm.supports, platform="cuda"),
    "tpu_rows": Implementation(tpu_norm.compute, tpu_norm.supports, platform="tpu", slower=tpu_norm.slower),
    "xla_rows": Implementation(_xla),
}
