"""(I + L) U = R for L with nothing on its diagonal and above it, by (I + L)^-1 and matrix units (see `triton/inverses.py`).

From blocks to blocks of twice their size, which has of both what the lower reads of the upper:

    [[A, 0], [B, C]]^-1 = [[A^-1, 0], [-C^-1 B A^-1, C^-1]]
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.tpu.products import dot, exact_dot

SUBLANES = 8


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def solve(lower, right, dtype):
    """Return U of L (C, C) and R (C, V), both fp32; (I + L)^-1 is exact, or for bf16 of twice its digits."""
    return _solve_forward(lower, right, dtype)[0]


def _solve_forward(lower, right, dtype):
    t = inverse(lower, dtype).astype(dtype)
    u = dot(t, right.astype(dtype))
    return u, (t, u)


def _solve_backward(dtype, saved, gradient):
    t, u = saved
    right = dot(t, gradient.astype(dtype), (0, 0))
    return -dot(right.astype(dtype), u.astype(dtype), (1, 1)), right


solve.defvjp(_solve_forward, _solve_backward)


def inverse(lower, dtype):
    """Return (I + L)^-1."""
    tokens = lower.shape[0]
    row, column = (lax.broadcasted_iota(jnp.int32, lower.shape, axis) for axis in range(2))
    inverse = jnp.where(row == column, 1.0, 0.0) - jnp.where((row ^ column) == 1, lower, 0.0)
    size = 2
    while size < tokens:
        below = jnp.where(((row ^ column) & -size) == size, lower, 0.0)
        rows = of_second_halves(inverse, size)
        rows = rows - exact_dot(exact_dot(rows, below, dtype), inverse, dtype)
        inverse, size = with_second_halves(inverse, rows, size), 2 * size
    return inverse


def of_second_halves(x, size: int):
    """Return the rows that change where blocks of a size are joined by two, or all where they share registers."""
    if size < SUBLANES:
        return x
    return jnp.concatenate([x[start : start + size] for start in range(size, len(x), 2 * size)])


def with_second_halves(x, rows, size: int):
    """Return x with those rows."""
    if size < SUBLANES:
        return rows
    kept = [x[start : start + size] for start in range(0, len(x), 2 * size)]
    changed = [rows[start : start + size] for start in range(0, len(rows), size)]
    return jnp.concatenate([part for pair in zip(kept, changed, strict=True) for part in pair])
