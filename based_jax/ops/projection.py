"""The product of tokens and a small matrix, such that the matrix's gradient fills a GPU.

That gradient is a sum over all tokens into few elements: (D, E) tiles of 128 by 128 are a handful of blocks for the 132
multiprocessors of an H100, each with all tokens to walk. Without a search through algorithms XLA takes such a product
as it is (0.09 ms for D = E = 128 and 65,536 tokens in bf16, 0.58 ms in fp32, on one H100 80GB). In pieces of the batch,
each with the matrix as an operand of its own, it is as many products side by side, and their sum.

The product of one token and a matrix is for XLA a sum over rows, which for few columns it makes of the products of all
elements, written and read once more: three times the matrix's bytes. Cut into pieces of the rows it reads them once,
as does a kernel on Hopper GPUs (`ops/hopper/token_product.py`); those of several have a table (`ops/few_tokens.py`).
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from based_jax import devices
from based_jax.ops.arguments import checked
from based_jax.ops.dispatch import target_device_kind, target_platform
from based_jax.ops.few_tokens import few_tokens_product
from based_jax.ops.hopper import token_product as hopper_token_product

Tokens = Float[Array, "*T D"]
DE = Float[Array, "D E"]
Projected = Float[Array, "*T E"]

BLOCK_ROWS = 128
"""Rows and columns of the matrix that a block takes."""
MIN_TOKENS_PER_PIECE = 256
MIN_PIECE_ROWS = 128
"""Of a matrix with few columns, for tokens that are decoded together."""
MOST_DECODED_TOKENS = 1024
"""Together: more are not decoded, but what a layer makes its filters of."""
SUM_COLUMNS, SUM_BLOCKS_PER_CORE, MIN_SUM_ROWS = 32, 4, 64
"""Of a sum over rows: a block's columns, how many blocks a core should have, and the fewest rows of a piece."""


@jax.named_scope("project")
def project(x: Tokens, kernel: DE, dimensions: Any, precision: Any = None, **options: Any) -> Projected:
    """Return x @ kernel for (..., D) tokens and a (D, E) kernel; a `dot_general` for `flax.nnx.Linear`."""
    if x.size == x.shape[-1] and _is_one_gpu():
        return of_one_token(x.reshape(-1), kernel).reshape(*x.shape[:-1], -1)
    if are_decoded(x.shape) and precision is None:
        return few_tokens_product(x.reshape(-1, x.shape[-1]), kernel).reshape(*x.shape[:-1], -1)
    number = pieces(x.shape, kernel.shape)
    if number == 1:
        return lax.dot_general(x, kernel, dimensions, precision=precision, **options)
    return in_pieces(x, kernel, number, precision=precision, **options).reshape(*x.shape[:-1], kernel.shape[1])


@checked
@jax.named_scope("multiply")
def multiply(x: Tokens, kernel: DE) -> Projected:
    """Return x @ kernel."""
    return project(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))


@checked
@jax.named_scope("multiply_parts")
def multiply_parts(x: Tokens, kernel: DE, widths: Sequence[int]) -> list[Float[Array, "*T _"]]:
    """Return the parts, so wide, of x @ kernel, of a matrix with few columns.

    Of tokens that are decoded together each part is a sum of its own over pieces of the matrix's rows, into which XLA
    cuts such a product anyway: out of one sum it would be copied.
    """
    ends = list(itertools.accumulate(widths))
    if not are_decoded(x.shape) or (number := decoded_pieces(math.prod(x.shape[:-1]), kernel.shape)) == 1:
        return list(jnp.split(multiply(x, kernel), ends[:-1], axis=-1))
    rows, matrices = x.reshape(-1, number, x.shape[-1] // number), kernel.reshape(number, -1, kernel.shape[1])
    products = lax.dot_general(rows, matrices, (((2,), (1,)), ((1,), (0,))), preferred_element_type=jnp.float32)
    products = lax.optimization_barrier(products)  # nor are there products for each part
    sums = [jnp.sum(products[..., end - width : end], axis=0) for width, end in zip(widths, ends, strict=True)]
    return [y.astype(x.dtype).reshape(*x.shape[:-1], -1) for y in sums]


def decoded_pieces(tokens: int, kernel: tuple[int, ...]) -> int:
    """Return into how many pieces the rows of a matrix are cut for tokens that are decoded together."""
    rows, columns = kernel
    blocks = -(-tokens // BLOCK_ROWS) * -(-columns // BLOCK_ROWS)
    most = min(devices.cores(target_device_kind()) // blocks, rows // MIN_PIECE_ROWS)
    return math.gcd(rows, _power_of_two(max(1, most)))


def are_decoded(tokens: tuple[int, ...]) -> bool:
    """Return whether these are tokens of several rows, one of each, on a GPU: their products are of a kind."""
    one_of_each = len(tokens) == 2 or tokens[-2] == 1
    return _is_one_gpu() and one_of_each and 1 < math.prod(tokens[:-1]) <= MOST_DECODED_TOKENS


def pieces(tokens: tuple[int, ...], kernel: tuple[int, ...]) -> int:
    """Return into how many pieces a batch is cut: 1 on what is no GPU, on a mesh, and where the kernel is large."""
    if not _is_one_gpu() or len(tokens) != 3:
        return 1
    blocks = math.prod(-(-size // BLOCK_ROWS) for size in kernel)
    cores = _power_of_two(devices.cores(target_device_kind()))
    most = min(cores // blocks, math.prod(tokens[:-1]) // MIN_TOKENS_PER_PIECE)
    return math.gcd(tokens[0], _power_of_two(max(most, 1)))


def _is_one_gpu() -> bool:
    return target_platform() == "cuda" and jax.sharding.get_abstract_mesh().size <= 1


def _power_of_two(most: int) -> int:
    return 1 << most.bit_length() - 1


def in_pieces(x: Tokens, kernel: DE, number: int, **options: Any) -> Float[Array, "P _ E"]:
    """Return (P pieces, tokens, E), each piece times a copy of the kernel; the copies' gradients add up in fp32."""
    copies = jnp.broadcast_to(kernel.astype(jnp.float32), (number, *kernel.shape)).astype(kernel.dtype)
    rows = x.reshape(number, -1, x.shape[-1])
    return lax.dot_general(rows, copies, (((2,), (1,)), ((0,), (0,))), **options)


def of_one_token(x: Float[Array, "D"], kernel: DE) -> Float[Array, "E"]:
    """Return x @ kernel, in fp32 sums over pieces of the rows, by a Hopper kernel where it can."""
    use_kernel = hopper_token_product.supports(x, kernel) is None
    sums = hopper_token_product.sums(x, kernel) if use_kernel else sums_of_pieces(x, kernel, sum_pieces(kernel.shape))
    return jnp.sum(sums, axis=0).astype(x.dtype)


def sum_pieces(kernel: tuple[int, ...]) -> int:
    """Return into how many pieces the rows of a matrix are cut that one token is multiplied with in XLA."""
    rows, columns = kernel
    most = SUM_BLOCKS_PER_CORE * devices.cores(target_device_kind()) * SUM_COLUMNS // columns
    return math.gcd(rows, _power_of_two(max(1, min(most, rows // MIN_SUM_ROWS))))


def sums_of_pieces(x: Float[Array, "D"], kernel: DE, number: int) -> Float[Array, "P E"]:
    """Return the fp32 sums over each of a number of pieces of the rows.

    Behind barriers: what makes x is not made anew for each column, nor are these sums joined with theirs.
    """
    of_pieces = lax.optimization_barrier(x).reshape(number, -1, 1).astype(jnp.float32)
    sums = jnp.sum(of_pieces * kernel.reshape(number, -1, kernel.shape[1]).astype(jnp.float32), axis=1)
    return lax.optimization_barrier(sums)
