"""What follows a product of few tokens on Hopper: its pieces' sum, the residual stream's, and RMS norm, in one kernel.

A block has a token, whose channels lie over the lanes: all that it reads is under way at once.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import stream
from pallas_kernels.hopper.mosaic import load_global, save

MOST_LANE_CHANNELS = 4
"""That lie beside each other in a lane."""


@functools.partial(jax.jit, static_argnames="eps")
def residual_norm(r, sums, bias, scale, *, eps: float):
    """Return total = r + y (M, D) fp32, where y is the sum of pieces and the bias in bf16, and norm(total) (M, D) bf16.

    Args:
      r: (M, D) fp32; D is a multiple of 128.
      sums: (pieces, N, D) fp32, N at least M.
      bias: (D,) fp32, or None.
      scale: of the norm (D,) fp32.
    """
    (tokens, channels), pieces = r.shape, sums.shape[0]
    vector = math.gcd(channels // stream.WARPGROUP_LANES, MOST_LANE_CHANNELS)
    layout = plgpu.Layout.WG_STRIDED((channels,), vec_size=vector)

    def body(r_ref, sums_ref, scale_ref, *rest):
        *biases, total_ref, x_ref = rest
        token = lax.axis_index("block")
        parts = [sums_ref.at[piece, token] for piece in range(pieces)] + biases
        r, scale, y, *others = (load_global(ref, layout) for ref in (r_ref.at[token], scale_ref, *parts))
        total = r + sum(others, y).astype(jnp.bfloat16).astype(jnp.float32)
        save(total_ref.at[token], total)
        inverse = lax.rsqrt(jnp.sum(total * total) * (1.0 / channels) + eps)
        save(x_ref.at[token], total * inverse * scale)

    out_type = [jax.ShapeDtypeStruct(r.shape, dtype) for dtype in (jnp.float32, jnp.bfloat16)]
    kernel = stream.kernel(body, "few_tokens_norm", tokens, out_type, [])
    return kernel(r, sums, scale, *([] if bias is None else [bias]))
