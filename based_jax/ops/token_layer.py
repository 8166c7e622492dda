"""Half a layer of a token that is decoded: from the residual stream to what is to be added to it next.

    t = r + y        [u, g] = norm(t) W_1 + b_1        h = f(u, g)        y' = h W_2 + b_2

    f = u silu(g)                                               the gated MLP, without biases
    f = silu(sum_w kernel_w u_w) g, as of `ops/gated_conv.py`   the gated short convolution

The norm is the RMS norm. What is to be added comes in pieces, which whatever reads it adds up.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from based_jax.dims import BD
from based_jax.ops.arguments import checked
from based_jax.ops.calls import Channels, JointBias
from based_jax.ops.decode_calls import Pieces, TokenConvCall, TokenMLPCall
from based_jax.ops.dispatch import Implementation, dispatch
from based_jax.ops.gated_conv import gated_short_conv_step
from based_jax.ops.hopper import token_layer as hopper_token_layer
from based_jax.ops.norm import residual_rms_norm
from based_jax.ops.projection import multiply

First = Float[Array, "D joint"]
Second = Float[Array, "F D"]
Inputs = Float[Array, "B W F"]


@checked
def token_mlp(
    r: BD, y: Pieces | None, scale: Channels, first: First, second: Second, *, eps: float = 1e-5, impl: str = "auto"
) -> tuple[BD, Pieces]:
    """Return r + y, and what a gated MLP of its norm adds to it.

    Args:
      r: the residual stream, fp32.
      y: what is still to be added to it, if anything.
      scale: of the norm.
      first: (D, 2F), values before gates.
      second: (F, D).
      impl: "xla_products", "hopper_token" (one Mosaic GPU kernel; one token, bf16 matrices, D and F multiples of
        128, F at most 4,096; on one device; without a gradient) or "auto".

    Raises:
      UserError: `impl` is unknown or cannot run this call.
    """
    return dispatch("token_mlp", MLP_IMPLEMENTATIONS, impl, TokenMLPCall(r, y, scale, first, second, eps))


@checked
def token_conv(
    r: BD,
    y: Pieces | None,
    scale: Channels,
    first: First,
    bias: JointBias,
    kernel: Float[Array, "W F"],
    state: Inputs,
    second: Second,
    last_bias: Channels,
    *,
    eps: float = 1e-5,
    impl: str = "auto",
) -> tuple[BD, Pieces, Inputs]:
    """Return r + y, what a gated short convolution of its norm adds to it, and the convolution's last inputs.

    Args:
      bias, last_bias: of the products.
      kernel, state: of the convolution, as of `gated_short_conv_step`.

    The others, and errors, are those of `token_mlp`.
    """
    call = TokenConvCall(r, y, scale, first, bias, kernel, state, second, last_bias, eps)
    return dispatch("token_conv", CONV_IMPLEMENTATIONS, impl, call)


def _normed(call: TokenMLPCall | TokenConvCall) -> tuple[BD, BD]:
    y = None if call.y is None else call.y.value()
    return residual_rms_norm(call.r, y, call.scale, eps=call.eps, dtype=call.first.dtype)


def _mlp(call: TokenMLPCall) -> tuple[BD, Pieces]:
    r, x = _normed(call)
    value, gate = jnp.split(multiply(x, call.first), 2, axis=-1)
    return r, Pieces(multiply(value * jax.nn.silu(gate), call.second)[None])


def _conv(call: TokenConvCall) -> tuple[BD, Pieces, Inputs]:
    r, x = _normed(call)
    h, state = gated_short_conv_step(multiply(x, call.first), call.kernel, call.state, bias=call.bias)
    y = multiply(h, call.second)
    return r, Pieces((y + call.last_bias.astype(y.dtype)[None])[None]), state


MLP_IMPLEMENTATIONS = {
    "hopper_token": Implementation(hopper_token_layer.compute_mlp, hopper_token_layer.supports, platform="cuda"),
    "xla_products": Implementation(_mlp),
}
CONV_IMPLEMENTATIONS = {
    "hopper_token": Implementation(hopper_token_layer.compute_conv, hopper_token_layer.supports, platform="cuda"),
    "xla_products": Implementation(_conv),
}
