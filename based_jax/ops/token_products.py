"""The two ends of a mixer for a token that is decoded: its projections of the stream's norm, and that back into it.

    t = r + y        z_i = norm(t) W_i        y' = x W

The norm is the RMS norm. What is to be added comes and goes in pieces, as in `ops/token_layer.py`.
"""

from jaxtyping import Array, Float

from based_jax.dims import BD
from based_jax.ops.arguments import checked
from based_jax.ops.calls import Channels
from based_jax.ops.decode_calls import FewTokensCall, Pieces, TokenProductsCall
from based_jax.ops.dispatch import Implementation, dispatch
from based_jax.ops.hopper import token_products as hopper_token_products
from based_jax.ops.norm import residual_rms_norm
from based_jax.ops.projection import multiply


@checked
def token_products(
    r: BD,
    y: Pieces | None,
    scale: Channels,
    kernels: tuple[Float[Array, "D _"], ...],
    *,
    eps: float = 1e-5,
    impl: str = "auto",
) -> tuple[BD, list[Float[Array, "B _"]]]:
    """Return r + y, and the products of its norm and each of several matrices.

    Args:
      r: the residual stream, fp32.
      y: what is still to be added to it, if anything.
      scale: of the norm.
      kernels: (D, E) each, of one dtype.
      impl: "xla_products", "hopper_token" (one Mosaic GPU kernel; one token, bf16 matrices, D a multiple of 128 up to
        6,144, E of 32; on one device; without a gradient) or "auto".

    Raises:
      UserError: `impl` is unknown or cannot run this call.
    """
    call = TokenProductsCall(r, y, scale, kernels, eps)
    return dispatch("token_products", PRODUCTS_IMPLEMENTATIONS, impl, call)


@checked
def token_sums(x: BD, kernel: Float[Array, "D E"], *, impl: str = "auto") -> Float[Array, "P B E"]:
    """Return x @ kernel in pieces that add up to it.

    `impl` and errors are those of `token_products`; "xla_product" makes one piece.
    """
    return dispatch("token_sums", SUMS_IMPLEMENTATIONS, impl, FewTokensCall(x, kernel))


def _products(call: TokenProductsCall) -> tuple[BD, list[Float[Array, "B _"]]]:
    y = None if call.y is None else call.y.value()
    r, x = residual_rms_norm(call.r, y, call.scale, eps=call.eps, dtype=call.kernels[0].dtype)
    return r, [multiply(x, kernel) for kernel in call.kernels]


def _sums(call: FewTokensCall) -> Float[Array, "P B E"]:
    return multiply(call.x, call.kernel)[None]


PRODUCTS_IMPLEMENTATIONS = {
    "hopper_token": Implementation(
        hopper_token_products.compute_products, hopper_token_products.supports_products, platform="cuda"
    ),
    "xla_products": Implementation(_products),
}
SUMS_IMPLEMENTATIONS = {
    "hopper_token": Implementation(
        hopper_token_products.compute_sums, hopper_token_products.supports_sums, platform="cuda"
    ),
    "xla_product": Implementation(_sums),
}
