"""(I + L) U = R in TPU kernels, for L with nothing on its diagonal and above it, by (I + L)^-1.

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
def solve(lower: list, right: list, dtype) -> list:
    """Return each head's U of its L (C, C) and R (C, V), fp32; (I + L)^-1 is exact, or for bf16 of twice its digits."""
    return _solve_forward(lower, right, dtype)[0]


def _solve_forward(lower, right, dtype):
    ts = [t.astype(dtype) for t in inverses(lower, dtype)]
    us = [dot(t, r.astype(dtype)) for t, r in zip(ts, right, strict=True)]
    return us, (ts, us)


def _solve_backward(dtype, saved, gradients):
    ts, us = saved
    right = [dot(t, gradient.astype(dtype), (0, 0)) for t, gradient in zip(ts, gradients, strict=True)]
    return [-dot(r.astype(dtype), u.astype(dtype), (1, 1)) for r, u in zip(right, us, strict=True)], right


solve.defvjp(_solve_forward, _solve_backward)


def inverses(lower: list, dtype) -> list:
    """Return (I + L)^-1 of each head, all a level at a time: a level waits for the one before it."""
    tokens = len(lower[0])
    row, column = (lax.broadcasted_iota(jnp.int32, lower[0].shape, axis) for axis in range(2))
    found = [jnp.where(row == column, 1.0, 0.0) - jnp.where((row ^ column) == 1, x, 0.0) for x in lower]
    size = 2
    while size < tokens:
        below = [jnp.where(((row ^ column) & -size) == size, x, 0.0) for x in lower]
        rows = [of_second_halves(x, size) for x in found]
        read = [exact_dot(x, y, dtype) for x, y in zip(rows, below, strict=True)]
        rows = [x - exact_dot(y, whole, dtype) for x, y, whole in zip(rows, read, found, strict=True)]
        found, size = [with_second_halves(x, y, size) for x, y in zip(found, rows, strict=True)], 2 * size
    return found


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
