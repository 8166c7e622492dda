"""Products of few tokens in a Hopper kernel: which calls it takes.

Kernels: `pallas_kernels/hopper/few_tokens_product.py` and `few_tokens_norm.py`. They have no gradient: tokens that are
decoded need none.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from based_jax.ops.decode_calls import FewTokensCall, FewTokensNormCall, FewTokensProductsCall
from based_jax.ops.hopper import limits

MOST_TOKENS, TILE_TOKENS, SIZE_MULTIPLE = 128, 64, 64
LEAST_TOKENS = 64
"""From which on these kernels are faster: of fewer they compute as many. A whole model's token was timed with 128
sequences, where they are, and with 8, where XLA's products are; not between."""
WIDE_PRODUCT = 4096
"""Columns of a matrix whose strips are as many as blocks should be; of fewer its rows are cut as well."""
MOST_NORM_CHANNELS, NORM_CHANNEL_MULTIPLE = 8192, 128


def supports(call: FewTokensCall) -> str | None:
    """Return why the kernels cannot run a call, or None."""
    for name, x in (("x", call.x), ("the kernel", call.kernel)):
        if x.dtype != jnp.bfloat16:
            return f"{name} must be bfloat16, and is {x.dtype}"
    if not 1 <= len(call.x) <= MOST_TOKENS:
        return f"there must be 1 to {MOST_TOKENS} tokens, and are {len(call.x)}"
    if not call.kernel.size or any(size % SIZE_MULTIPLE for size in call.kernel.shape):
        return f"both sizes of the kernel must be multiples of {SIZE_MULTIPLE}, and it is {call.kernel.shape}"
    if jax.sharding.get_abstract_mesh().size > 1:
        return "they run on one device, and there is a mesh"
    return limits.refusal()


def slower(call: FewTokensCall | FewTokensProductsCall | FewTokensNormCall) -> str | None:
    """Return why XLA's form is faster, or None."""
    few = len(call.x) < LEAST_TOKENS
    return f"it is faster from {LEAST_TOKENS} tokens on, and there are {len(call.x)}" if few else None


def supports_gated(call: FewTokensCall) -> str | None:
    """Return why the kernels cannot run a call, or None."""
    if call.kernel.shape[1] % (2 * SIZE_MULTIPLE):
        return f"values and gates must each be a multiple of {SIZE_MULTIPLE}, and are {call.kernel.shape[1]} together"
    return supports(call)


def supports_products(call: FewTokensProductsCall) -> str | None:
    """Return why the kernels cannot run a call, or None."""
    reasons = [supports(FewTokensCall(call.x, kernel)) for kernel in call.kernels]
    return next((reason for reason in reasons if reason is not None), None if reasons else "there is no matrix")


def supports_residual_norm(call: FewTokensNormCall) -> str | None:
    """Return why the kernels cannot run a call, or None."""
    if call.r.dtype != jnp.float32:
        return f"r must be float32, and is {call.r.dtype}"
    channels, multiple = call.r.shape[1], NORM_CHANNEL_MULTIPLE
    if channels % multiple or channels > MOST_NORM_CHANNELS:
        return f"the channels must be a multiple of {multiple} up to {MOST_NORM_CHANNELS}, and are {channels}"
    return supports(FewTokensCall(call.x, call.kernel))


def compute(call: FewTokensCall) -> Float[Array, "M E"]:
    """Return x @ kernel; sums of pieces of its rows, where strips are too few, are added up by what reads them."""
    if call.kernel.shape[1] >= WIDE_PRODUCT:
        [y] = compute_products(FewTokensProductsCall(call.x, (call.kernel,)))
        return y
    return jnp.sum(_sums(call.x, call.kernel), axis=0)[: len(call.x)].astype(call.x.dtype)


def compute_products(call: FewTokensProductsCall) -> list[Float[Array, "M _"]]:
    """Return x @ kernel for each kernel."""
    # Pallas' GPU modules take half a second to import and are needed only here.
    from pallas_kernels.hopper import few_tokens_product as kernels

    products = kernels.products(_whole_tiles(call.x), list(call.kernels), multiprocessors=limits.multiprocessors())
    return [y[: len(call.x)] for y in products]


def compute_gated(call: FewTokensCall) -> Float[Array, "M F"]:
    """Return value * silu(gate) with (value, gate) = x @ kernel."""
    from pallas_kernels.hopper import few_tokens_product as kernels

    return kernels.gated(_whole_tiles(call.x), call.kernel)[: len(call.x)]


def compute_residual_norm(call: FewTokensNormCall) -> tuple[Float[Array, "M E"], Float[Array, "M E"]]:
    """Return r + x @ kernel + bias and its norm, whose kernel adds up the sums of pieces."""
    from pallas_kernels.hopper import few_tokens_norm as kernels

    bias, scale = (None if x is None else x.astype(jnp.float32) for x in (call.bias, call.scale))
    total, x = kernels.residual_norm(call.r, _sums(call.x, call.kernel), bias, scale, eps=call.eps)
    return total, x


def _sums(x: Array, kernel: Array) -> Float[Array, "P N E"]:
    """Return x @ kernel over each piece of the rows, and what stands behind the tokens."""
    from pallas_kernels.hopper import few_tokens_product as kernels

    return kernels.sums(_whole_tiles(x), kernel, multiprocessors=limits.multiprocessors())


def _whole_tiles(x: Array) -> Array:
    """Return tokens with zeros behind them, to one tile, two, four or eight."""
    whole = TILE_TOKENS << (-(-len(x) // TILE_TOKENS) - 1).bit_length()
    return jnp.pad(x, ((0, whole - len(x)), (0, 0)))
