"""The features of Taylor attention in TPU kernels: how they are packed, made and differentiated.

Twice the scores 1 + s + s^2/2, s = c q.k, are G(q).F(k). Tokens lie on lanes. Block r of K rows holds the products of
each channel and the one r places after it, x_i x_(i+r mod K), for r up to K/2, so that each pair is there once; of the
last block that takes half of the rows, and the constant stands behind them. The channels themselves follow. F takes
keys as they are, G takes c q and doubles all but the squares.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu

KEY_MULTIPLE = 8
"""Sublanes, which blocks fill."""


def number_of_features(keys: int) -> int:
    """Return how many rows the features of `keys` channels take, a multiple of `KEY_MULTIPLE`."""
    return keys * (keys // 2 + 2)


def packed_places(keys: int, padded: int) -> np.ndarray:
    """Return the rows of the constant, of channels, and of their products x_m x_n by rows of n <= m."""
    m, n = np.tril_indices(keys)
    half = padded // 2
    products = np.where(m - n <= half, padded * (m - n) + n, padded * (padded - m + n) + m)
    constant, channels = padded * half + half, padded * (half + 1)
    return np.concatenate([[constant], channels + np.arange(keys), products])


def expand(x: jax.Array, present: jax.Array | float, dtype, *, query: bool) -> jax.Array:
    """Return F or G (number_of_features, tokens) of x (K, tokens) fp32; `present` is the constant that F has."""
    half, weight = x.shape[0] // 2, 2.0 if query else 1.0
    doubled = weight * x
    blocks = [x * x, *(x * rolled(doubled, -r) for r in range(1, half))]
    row = jax.lax.broadcasted_iota(jnp.int32, x.shape, 0)
    last = jnp.where(row < half, x * rolled(doubled, -half), jnp.where(row == half, weight * present, 0.0))
    return jnp.concatenate([*blocks, last, doubled], axis=0).astype(dtype)


def pulled_back(x: jax.Array, gradient: jax.Array, *, query: bool) -> jax.Array:
    """Return the gradient (K, tokens) fp32 of x, given that of its features (number_of_features, tokens) fp32."""
    keys, half = x.shape[0], x.shape[0] // 2
    blocks = [gradient[keys * r : keys * (r + 1)] for r in range(half + 2)]
    squares, *products, last, total = blocks
    row = jax.lax.broadcasted_iota(jnp.int32, x.shape, 0)
    for r, block in enumerate([*products, jnp.where(row < half, last, 0.0)], start=1):
        total = total + block * rolled(x, -r) + rolled(block * x, r)
    square = x * squares
    return 2.0 * (total + square) if query else total + 2.0 * square


def rolled(x: jax.Array, places: int) -> jax.Array:
    """Return x with each row moved down by so many places, around the end."""
    return pltpu.roll(x, places % x.shape[0], 0)
