"""Products of matrices inside TPU kernels: of bf16 with sums in fp32, or exact, with gradients of the same kind.

The gradients are those of a kernel that calls `jax.vjp` on its own mathematics; JAX's of a product would mix dtypes.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

EXACT = lax.Precision.HIGHEST


def dot(a, b, contract: tuple[int, int] = (1, 0)):
    """Return the product of two matrices over a dimension of each, in fp32: of fp32 exactly."""
    precision = EXACT if a.dtype == jnp.float32 else None
    dimensions = ((contract[:1], contract[1:]), ((), ()))
    return lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def product(a, b, contract: tuple[int, int], dtype):
    """Return the product of fp32 matrices over a dimension of each, rounded to a dtype first; so are gradients."""
    return dot(a.astype(dtype), b.astype(dtype), contract)


def _product_forward(a, b, contract, dtype):
    a, b = a.astype(dtype), b.astype(dtype)
    return dot(a, b, contract), (a, b)


def _product_backward(contract, dtype, saved, gradient):
    (a, b), (of_a, of_b), gradient = saved, contract, gradient.astype(dtype)
    da = dot(gradient, b, (1, 1 - of_b)) if of_a == 1 else dot(b, gradient, (1 - of_b, 1))
    db = dot(a, gradient, (1 - of_a, 0)) if of_b == 0 else dot(gradient, a, (0, 1 - of_a))
    return da, db


product.defvjp(_product_forward, _product_backward)


def exact_dot(a, b, dtype):
    """Return the product of fp32 matrices: exact for fp32, and for bf16 of twice its digits."""
    if dtype == jnp.float32:
        return dot(a, b)
    (a, small_a), (b, small_b) = in_two(a), in_two(b)
    return dot(a, b) + (dot(a, small_b) + dot(small_a, b))


def in_two(x):
    """Return the parts in bf16 of which x, fp32, is the sum but for its last digits."""
    large = x.astype(jnp.bfloat16)
    return large, (x - large.astype(jnp.float32)).astype(jnp.bfloat16)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def table_product(table, x, dtype):
    """Return the product of a table of bf16 and x in fp32: exact for fp32, and for bf16 of twice its digits."""
    return _table_dot(table, x, dtype, 1)


def _table_dot(table, x, dtype, of_table: int):
    if dtype == jnp.float32:
        return dot(table.astype(jnp.float32), x, (of_table, 0))
    return sum(dot(table, part, (of_table, 0)) for part in in_two(x))


table_product.defvjp(
    lambda table, x, dtype: (_table_dot(table, x, dtype, 1), table),
    lambda dtype, table, gradient: (jnp.zeros_like(table), _table_dot(table, gradient, dtype, 0)),
)


@jax.custom_vjp
def columns(x):
    """Return the columns of a matrix, as matrices of one."""
    return [x[:, n : n + 1] for n in range(x.shape[1])]


def _columns_backward(_, gradients):
    place = lax.broadcasted_iota(jnp.int32, (gradients[0].shape[0], len(gradients)), 1)
    return (sum(jnp.where(place == n, gradient, 0.0) for n, gradient in enumerate(gradients)),)


columns.defvjp(lambda x: (columns(x), None), _columns_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def parts(x, count: int):
    """Return a matrix' rows in so many equal parts."""
    rows = len(x) // count
    return [x[n * rows : (n + 1) * rows] for n in range(count)]


parts.defvjp(lambda x, count: (parts(x, count), None), lambda count, _, gradients: (jnp.concatenate(gradients),))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def moved_on(x, first: float):
    """Return a matrix' rows each a place on, behind a row of a number; the last row is left out."""
    row = lax.broadcasted_iota(jnp.int32, x.shape, 0)
    return jnp.where(row == 0, first, jnp.concatenate([x[-1:], x[:-1]]))


@jax.custom_vjp
def moved_back(x):
    """Return a matrix' rows each a place back, before a row of zeros; the first row is left out."""
    row = lax.broadcasted_iota(jnp.int32, x.shape, 0)
    return jnp.where(row == len(x) - 1, 0.0, jnp.concatenate([x[1:], x[:1]]))


moved_on.defvjp(lambda x, first: (moved_on(x, first), None), lambda first, _, gradient: (moved_back(gradient),))
moved_back.defvjp(lambda x: (moved_back(x), None), lambda _, gradient: (moved_on(gradient, 0.0),))
