"""Products of few tokens in a Hopper kernel: which calls it takes.

Kernels: `pallas_kernels/hopper/few_tokens_product.py`. They have no gradient: tokens that are decoded need none.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from based_jax.ops.decode_calls import FewTokensCall
from based_jax.ops.hopper import limits

MOST_TOKENS, TILE_TOKENS, SIZE_MULTIPLE = 128, 64, 64


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


def compute(call: FewTokensCall) -> Float[Array, "M E"]:
    """Return x @ kernel, the sums of pieces of whose rows whatever reads it adds up."""
    # Pallas' GPU modules take half a second to import and are needed only here.
    from pallas_kernels.hopper import few_tokens_product as kernels

    rows, columns = call.kernel.shape
    pieces = kernels.sum_pieces(rows, columns, limits.multiprocessors())
    sums = kernels.sums(_whole_tiles(call.x), call.kernel, pieces=pieces)
    return jnp.sum(sums, axis=0)[: len(call.x)].astype(call.x.dtype)


def compute_gated(call: FewTokensCall) -> Float[Array, "M F"]:
    """Return value * silu(gate) with (value, gate) = x @ kernel."""
    from pallas_kernels.hopper import few_tokens_product as kernels

    return kernels.gated(_whole_tiles(call.x), call.kernel)[: len(call.x)]


def _whole_tiles(x: Array) -> Array:
    """Return tokens with zeros behind them, to the end of a tile."""
    return jnp.pad(x, ((0, -len(x) % TILE_TOKENS), (0, 0)))
