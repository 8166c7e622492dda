"""The two ends of a mixer for one token in Hopper kernels: which calls they take.

Kernels: `pallas_kernels/hopper/token_products.py`. They have no gradient: a step decodes.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from based_jax.dims import BD
from based_jax.ops.decode_calls import FewTokensCall, TokenProductsCall
from based_jax.ops.hopper import limits

ROW_MULTIPLE, MOST_ROWS, COLUMN_MULTIPLE = 128, 6144, 32


def supports_products(call: TokenProductsCall) -> str | None:
    """Return why the kernel cannot run a call, or None."""
    reasons = [_refusal(call.r, kernel) for kernel in call.kernels]
    return next((reason for reason in reasons if reason is not None), None if reasons else "there is no matrix")


def supports_sums(call: FewTokensCall) -> str | None:
    """Return why the kernel cannot run a call, or None."""
    return _refusal(call.x, call.kernel)


def _refusal(x: BD, kernel: Float[Array, "D E"]) -> str | None:
    rows, columns = kernel.shape
    if len(x) != 1:
        return f"it is for one token, and there are {len(x)}"
    if kernel.dtype != jnp.bfloat16:
        return f"the matrix must be bfloat16, and is {kernel.dtype}"
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        return f"the token must be bfloat16 or float32, and is {x.dtype}"
    if rows % ROW_MULTIPLE or columns % COLUMN_MULTIPLE or not kernel.size or rows > MOST_ROWS:
        return (
            f"D must be a multiple of {ROW_MULTIPLE} up to {MOST_ROWS} and E of {COLUMN_MULTIPLE}, and the matrix is"
            f" {kernel.shape}"
        )
    if jax.sharding.get_abstract_mesh().size > 1:
        return "it runs on one device, and there is a mesh"
    return limits.refusal()


def compute_products(call: TokenProductsCall) -> tuple[BD, list[Float[Array, "B _"]]]:
    """Return r + y, and the products of its norm."""
    # Pallas' GPU modules take half a second to import and are needed only here.
    from pallas_kernels.hopper import token_products as kernels

    y = jnp.zeros(call.r.shape, jnp.bfloat16) if call.y is None else call.y.sums[:, 0]
    given = call.r[0], y, call.scale.astype(jnp.float32), list(call.kernels)
    total, products = kernels.normed_products(*given, eps=call.eps)
    return total[None], [x[None] for x in products]


def compute_sums(call: FewTokensCall) -> Float[Array, "P B E"]:
    """Return x @ kernel over each of some pieces of the rows."""
    from pallas_kernels.hopper import token_products as kernels

    return kernels.sums(call.x[0], call.kernel, multiprocessors=limits.multiprocessors())[:, None]
