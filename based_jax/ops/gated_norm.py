"""What stands between a state space and its projection out: a skip and a gate, and in Mamba-2 a norm, in one pass.

    g = (y + skip u) silu(z)                                                         (arXiv 2312.00752, section 3.4)
    x = g / sqrt(mean(g^2) + eps) * scale                                            (arXiv 2405.21060, section 7.1)

The arithmetic is fp32, of arrays in what layers compute in.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from based_jax.errors import UserError
from based_jax.ops.arguments import checked
from based_jax.ops.calls import Channels, GatedNormCall, Rows
from based_jax.ops.dispatch import Implementation, dispatch
from based_jax.ops.hopper import gated_norm as hopper_gated_norm


@checked
def gated_skip(y: Rows, u: Rows, z: Rows, skip: Channels, *, impl: str = "auto") -> Rows:
    """Return (y + skip u) silu(z) in z's dtype, of (..., D) and (D,); `impl` and errors as of `gated_rms_norm`."""
    return dispatch("gated_skip", IMPLEMENTATIONS, impl, GatedNormCall(y, u, z, skip))


@checked
def gated_rms_norm(
    y: Rows, u: Rows, z: Rows, skip: Channels, scale: Channels, *, eps: float = 1e-5, impl: str = "auto"
) -> Rows:
    """Return the RMS norm over the channels of (y + skip u) silu(z), in z's dtype.

    Args:
      y, u, z: (..., D).
      skip, scale: (D,).
      impl: "xla_rows", "hopper_rows" (Mosaic GPU kernels; bf16, 1,024 tokens, D a multiple of 128 up to 4096, on one
        device) or "auto".

    Raises:
      UserError: `impl` is unknown or cannot run this call, or eps is negative.
    """
    if eps < 0:
        raise UserError(f"The norm's eps is {eps}; it is at least 0.")
    return dispatch("gated_rms_norm", IMPLEMENTATIONS, impl, GatedNormCall(y, u, z, skip, scale, eps))


def _xla(call: GatedNormCall) -> Rows:
    y, u, z = (x.astype(jnp.float32) for x in (call.y, call.u, call.z))
    x = (y + _row(call.skip, y) * u) * jax.nn.silu(z)
    if call.scale is not None:
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + call.eps) * _row(call.scale, x)
    return x.astype(call.z.dtype)


def _row(weights: Channels, x: Rows) -> Float[Array, "... D"]:
    return weights.astype(jnp.float32).reshape(*(1,) * (x.ndim - 1), -1)


IMPLEMENTATIONS = {
    "hopper_rows": Implementation(hopper_gated_norm.compute, hopper_gated_norm.supports, platform="cuda"),
    "xla_rows": Implementation(_xla),
}
