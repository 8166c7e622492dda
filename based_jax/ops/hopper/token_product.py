"""The product of one token and a matrix in a Hopper kernel (`pallas_kernels/hopper/token_product.py`)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from based_jax.ops.hopper import limits

ROW_MULTIPLE, COLUMN_MULTIPLE = 64, 128
BLOCKS_PER_MULTIPROCESSOR = 3
"""That the rows are cut into pieces for."""

DE = Float[Array, "D E"]


def supports(x: Float[Array, "D"], matrix: DE) -> str | None:
    """Return why the kernel cannot multiply these, or None."""
    rows, columns = matrix.shape
    if not {x.dtype, matrix.dtype} <= {jnp.dtype("bfloat16"), jnp.dtype("float32")}:
        return f"both must be bfloat16 or float32, and are {x.dtype} and {matrix.dtype}"
    if rows % ROW_MULTIPLE or columns % COLUMN_MULTIPLE or not matrix.size:
        return f"the matrix must have multiples of {ROW_MULTIPLE} by {COLUMN_MULTIPLE}, and has {rows} by {columns}"
    return limits.refusal()


@jax.custom_vjp
def sums(x: Float[Array, "D"], matrix: DE) -> Float[Array, "P E"]:
    """Return x @ matrix, fp32, over each of P pieces of the rows, which whoever reads the product adds up."""
    # Pallas' GPU modules take half a second to import and are needed only here.
    from pallas_kernels.hopper import token_product as kernels

    return kernels.sums(x, matrix, pieces=pieces(*matrix.shape))


def pieces(rows: int, columns: int) -> int:
    """Return the fewest pieces of the rows that make blocks enough."""
    parts, strips = rows // ROW_MULTIPLE, columns // COLUMN_MULTIPLE
    blocks = BLOCKS_PER_MULTIPROCESSOR * limits.multiprocessors()
    return next((n for n in range(1, parts) if parts % n == 0 and n * strips >= blocks), parts)


def _sums_fwd(x, matrix):
    return sums(x, matrix), (x, matrix)


def _sums_bwd(saved, gradient):
    """Give each piece of the rows the gradient of its own sum."""
    x, matrix = (y.astype(jnp.float32) for y in saved)
    parts = len(gradient)
    dx = jnp.einsum("PRE,PE->PR", matrix.reshape(parts, -1, matrix.shape[1]), gradient).reshape(x.shape)
    dmatrix = jnp.einsum("PR,PE->PRE", x.reshape(parts, -1), gradient).reshape(matrix.shape)
    return dx.astype(saved[0].dtype), dmatrix.astype(saved[1].dtype)


sums.defvjp(_sums_fwd, _sums_bwd)
