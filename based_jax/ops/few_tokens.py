"""Products of the tokens that are decoded together with a layer's matrix, whose reading is all that they should cost.

y = x W          y = value * silu(gate), (value, gate) = x W          r' = r + x W + b, y = rms_norm(r')
"""

import jax
from jax import lax
from jaxtyping import Array, Float

from based_jax.ops.arguments import checked
from based_jax.ops.decode_calls import FewTokensCall, FewTokensNormCall, FewTokensProductsCall
from based_jax.ops.dispatch import Implementation, dispatch
from based_jax.ops.hopper import few_tokens as hopper_few_tokens
from based_jax.ops.norm import residual_rms_norm

MD = Float[Array, "M D"]
ME = Float[Array, "M E"]
DE = Float[Array, "D E"]
E = Float[Array, "E"]


@checked
def few_tokens_product(x: MD, kernel: DE, *, impl: str = "auto") -> Float[Array, "M E"]:
    """Return x @ kernel in x's dtype.

    Args:
      x: tokens (M, D).
      kernel: (D, E).
      impl: "xla_product", "hopper_strips" (a Mosaic GPU kernel; bf16, at most 128 tokens, D and E multiples of 64, on
        one device; without a gradient) or "auto".

    Raises:
      UserError: `impl` is unknown or cannot run this call.
    """
    return dispatch("few_tokens_product", PRODUCT_IMPLEMENTATIONS, impl, FewTokensCall(x, kernel))


@checked
def few_tokens_products(
    x: MD, kernels: tuple[Float[Array, "D _"], ...], *, impl: str = "auto"
) -> list[Float[Array, "M _"]]:
    """Return x @ kernel for each of several matrices; "xla_products" are `few_tokens_product`, which see for the rest.

    Raises:
      UserError: `impl` is unknown or cannot run this call.
    """
    call = FewTokensProductsCall(x, kernels)
    return dispatch("few_tokens_products", PRODUCTS_IMPLEMENTATIONS, impl, call)


@checked
def few_tokens_gated(x: MD, kernel: DE, *, impl: str = "auto") -> Float[Array, "M F"]:
    """Return value * silu(gate) with (value, gate) = x @ kernel, (D, 2F); otherwise as `few_tokens_product`."""
    return dispatch("few_tokens_gated", GATED_IMPLEMENTATIONS, impl, FewTokensCall(x, kernel))


@checked
def few_tokens_residual_norm(
    r: ME, x: MD, kernel: DE, bias: E | None, scale: E, *, eps: float = 1e-5, impl: str = "auto"
) -> tuple[ME, ME]:
    """Return r + x @ kernel + bias, and its RMS norm over the channels in x's dtype.

    Args:
      r: the residual stream (M, E), fp32.
      x: tokens (M, D).
      kernel: (D, E).
      bias: (E,), if there is one.
      scale: (E,).
      impl: "xla_product" (by the operations of the product and of the norm), "hopper_strips" (Mosaic GPU kernels; as of
        `few_tokens_product`, E a multiple of 128) or "auto".

    Raises:
      UserError: `impl` is unknown or cannot run this call.
    """
    call = FewTokensNormCall(r, x, kernel, bias, scale, eps)
    return dispatch("few_tokens_residual_norm", NORM_IMPLEMENTATIONS, impl, call)


def _product(call: FewTokensCall) -> Float[Array, "M E"]:
    return lax.dot_general(call.x, call.kernel, (((1,), (0,)), ((), ())))


def _products(call: FewTokensProductsCall) -> list[Float[Array, "M _"]]:
    return [few_tokens_product(call.x, kernel) for kernel in call.kernels]


def _gated(call: FewTokensCall) -> Float[Array, "M F"]:
    value, gate = lax.split(_product(call), [call.kernel.shape[1] // 2] * 2, axis=1)
    return value * jax.nn.silu(gate)


def _residual_norm(call: FewTokensNormCall) -> tuple[ME, ME]:
    y = few_tokens_product(call.x, call.kernel)
    y = y if call.bias is None else y + call.bias.astype(y.dtype)[None]
    return residual_rms_norm(call.r, y, call.scale, eps=call.eps, dtype=y.dtype)


PRODUCT_IMPLEMENTATIONS = {
    "hopper_strips": Implementation(
        hopper_few_tokens.compute, hopper_few_tokens.supports, platform="cuda", slower=hopper_few_tokens.slower
    ),
    "xla_product": Implementation(_product),
}
PRODUCTS_IMPLEMENTATIONS = {
    "hopper_strips": Implementation(
        hopper_few_tokens.compute_products,
        hopper_few_tokens.supports_products,
        platform="cuda",
        slower=hopper_few_tokens.slower,
    ),
    "xla_products": Implementation(_products),
}
GATED_IMPLEMENTATIONS = {
    "hopper_strips": Implementation(
        hopper_few_tokens.compute_gated,
        hopper_few_tokens.supports_gated,
        platform="cuda",
        slower=hopper_few_tokens.slower,
    ),
    "xla_product": Implementation(_gated),
}
NORM_IMPLEMENTATIONS = {
    "hopper_strips": Implementation(
        hopper_few_tokens.compute_residual_norm,
        hopper_few_tokens.supports_residual_norm,
        platform="cuda",
        slower=hopper_few_tokens.slower,
    ),
    "xla_product": Implementation(_residual_norm),
}
