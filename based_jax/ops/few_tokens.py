"""Products of the tokens that are decoded together with a layer's matrix, whose reading is all that they should cost.

y = x W                    y = value * silu(gate), (value, gate) = x W
"""

import jax
from jax import lax
from jaxtyping import Array, Float

from based_jax.ops.arguments import checked
from based_jax.ops.decode_calls import FewTokensCall
from based_jax.ops.dispatch import Implementation, dispatch, not_run
from based_jax.ops.hopper import few_tokens as hopper_few_tokens

MD = Float[Array, "M D"]
DE = Float[Array, "D E"]


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
def few_tokens_gated(x: MD, kernel: DE, *, impl: str = "auto") -> Float[Array, "M F"]:
    """Return value * silu(gate) with (value, gate) = x @ kernel, (D, 2F); otherwise as `few_tokens_product`."""
    return dispatch("few_tokens_gated", GATED_IMPLEMENTATIONS, impl, FewTokensCall(x, kernel))


def _product(call: FewTokensCall) -> Float[Array, "M E"]:
    return lax.dot_general(call.x, call.kernel, (((1,), (0,)), ((), ())))


def _gated(call: FewTokensCall) -> Float[Array, "M F"]:
    value, gate = lax.split(_product(call), [call.kernel.shape[1] // 2] * 2, axis=1)
    return value * jax.nn.silu(gate)


PRODUCT_IMPLEMENTATIONS = {
    "hopper_strips": Implementation(
        hopper_few_tokens.compute, hopper_few_tokens.supports, platform="cuda", slower=not_run
    ),
    "xla_product": Implementation(_product),
}
GATED_IMPLEMENTATIONS = {
    "hopper_strips": Implementation(
        hopper_few_tokens.compute_gated, hopper_few_tokens.supports, platform="cuda", slower=not_run
    ),
    "xla_product": Implementation(_gated),
}
