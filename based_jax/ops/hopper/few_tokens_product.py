"""The product of few tokens and a matrix in a Hopper kernel (`pallas_kernels/hopper/few_tokens_product.py`).

XLA chooses a form for such a product by timing it on a matrix that lies in the cache already; while a model decodes
each comes from memory.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from based_jax.ops import sharded
from based_jax.ops.dispatch import not_run
from based_jax.ops.hopper import limits

TOKEN_MULTIPLE, MAX_TOKENS = 64, 128
ROW_MULTIPLE = 64
MIN_ELEMENTS = 2**20
"""Of a matrix that is worth it."""

TD = Float[Array, "T D"]
DE = Float[Array, "D E"]


def supports(x: TD, matrix: DE) -> str | None:
    """Return why the kernel cannot multiply these, or None."""
    (tokens, _), (rows, columns) = x.shape, matrix.shape
    for name, y in (("x", x), ("the matrix", matrix)):
        if y.dtype != jnp.bfloat16:
            return f"{name} must be bfloat16, and is {y.dtype}"
    if not 0 < tokens <= MAX_TOKENS:
        return f"there must be 1 to {MAX_TOKENS} tokens, and are {tokens}"
    if refusal := limits.refusal():
        return refusal
    # Pallas' GPU modules take half a second to import and are needed only here.
    from pallas_kernels.hopper.few_tokens_product import Plan

    if rows % ROW_MULTIPLE or Plan.of(rows, columns, limits.multiprocessors()) is None:
        return f"a matrix of {rows} by {columns} cannot be cut for {limits.multiprocessors()} multiprocessors"
    return None


def slower(x: TD, matrix: DE) -> str | None:
    """Return why XLA is left the product, or None."""
    return f"it has {matrix.size} elements" if matrix.size < MIN_ELEMENTS else not_run(x)


@jax.custom_vjp
def sums(x: TD, matrix: DE) -> Float[Array, "P T E"]:
    """Return x @ matrix, fp32, over each of P pieces of the rows, which whoever reads the product adds up."""
    from pallas_kernels.hopper import few_tokens_product as kernels

    filled = sharded.fill(x, {0: TOKEN_MULTIPLE})
    return kernels.sums(filled, matrix, multiprocessors=limits.multiprocessors())[:, : len(x)]


def _sums_fwd(x, matrix):
    return sums(x, matrix), (x, matrix)


def _sums_bwd(saved, gradient):
    """Give each piece of the rows the gradient of its own sum."""
    x, matrix = (y.astype(jnp.float32) for y in saved)
    parts, tokens, columns = gradient.shape
    dx = jnp.einsum("PRE,PTE->TPR", matrix.reshape(parts, -1, columns), gradient).reshape(x.shape)
    dmatrix = jnp.einsum("TPR,PTE->PRE", x.reshape(tokens, parts, -1), gradient).reshape(matrix.shape)
    return dx.astype(saved[0].dtype), dmatrix.astype(saved[1].dtype)


sums.defvjp(_sums_fwd, _sums_bwd)
