"""The features of Taylor attention in Triton kernels: how they are packed, made and differentiated.

With s = c q.k the scores 1 + s + s^2/2 are sum_e w_e F_e(q) F_e(k), where every F_e is a product of two factors: two
channels, a channel and 1, or 1 and 1. Row 16 r + i of the packed features is x_i x_(i+r mod 16), r up to 7 and for
i below 8 also 8, so that each pair is there once; then come the constant, `EMPTY` rows, and the channels themselves.

The factors are products with matrices of 0 and 1 that choose channels: exact, and where the next product wants them.
"""

import numpy as np
import triton
import triton.language as tl

KEY_CHANNELS, PACKED_FEATURES, PIECE_FEATURES = 16, 160, 32
FIRST_CONSTANT, FIRST_EMPTY, FIRST_CHANNEL = 136, 137, 144
PIECES_OF_FEATURES = PACKED_FEATURES // PIECE_FEATURES

CHANNELS, FEATURES, PIECE, PIECES = map(
    tl.constexpr, (KEY_CHANNELS, PACKED_FEATURES, PIECE_FEATURES, PIECES_OF_FEATURES)
)
CONSTANT, CHANNEL = map(tl.constexpr, (FIRST_CONSTANT, FIRST_CHANNEL))


def packed_places(keys: int) -> np.ndarray:
    """Return the rows of the constant, of so many channels, and of their products x_m x_n by rows of n <= m."""
    m, n = np.tril_indices(keys)
    half = KEY_CHANNELS // 2
    products = np.where(m - n <= half, KEY_CHANNELS * (m - n) + n, KEY_CHANNELS * (KEY_CHANNELS - m + n) + m)
    return np.concatenate([[FIRST_CONSTANT], FIRST_CHANNEL + np.arange(keys), products])


@triton.jit
def feature_numbers(piece):
    """Return the numbers of a piece's features."""
    return tl.arange(0, PIECE) + piece * PIECE


@triton.jit
def choices(piece, dtype: tl.constexpr):
    """Return the matrices (CHANNELS, PIECE) that choose the channels of both factors, and what is added: 1 or 0."""
    e, channel = feature_numbers(piece)[None, :], tl.arange(0, CHANNELS)[:, None]
    product, alone = e < CONSTANT, e >= CHANNEL
    first = (channel == e % CHANNELS) & (product | alone)
    second = (channel == (e % CHANNELS + e // CHANNELS) % CHANNELS) & product
    one = e == CONSTANT
    return first.to(dtype), second.to(dtype), one.to(tl.float32), (one | alone).to(tl.float32)


@triton.jit
def factors(x, piece):
    """Return both factors of a piece's features of (CHUNK, CHANNELS) tokens."""
    first, second, one, other_one = choices(piece, x.dtype)
    return tl.dot(x, first) + one, tl.dot(x, second) + other_one


@triton.jit
def features_by_row(x, piece):
    """Return a piece's features (PIECE, CHUNK) of (CHUNK, CHANNELS) tokens."""
    first, second, one, other_one = choices(piece, x.dtype)
    tokens = tl.trans(x)
    a = tl.dot(tl.trans(first), tokens) + tl.trans(one)
    return a * (tl.dot(tl.trans(second), tokens) + tl.trans(other_one))


@triton.jit
def weights(piece, scale: tl.constexpr):
    """Return w_e of a piece's features, (1, PIECE); those of empty ones do not matter."""
    e = feature_numbers(piece)[None, :]
    of_products = tl.where(e < CHANNELS, scale * scale / 2, scale * scale)
    return tl.where(e < CONSTANT, of_products, tl.where(e < CHANNEL, 1.0, scale))


@triton.jit
def pulled_back(x, du, piece):
    """Return the gradient of x (CHUNK, CHANNELS) of that of a piece's features."""
    first, second, _, _ = choices(piece, x.dtype)
    a, b = factors(x, piece)
    dx = tl.dot((du * b).to(x.dtype), tl.trans(first))
    return tl.dot((du * a).to(x.dtype), tl.trans(second), dx)
