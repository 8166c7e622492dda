"""What mixers with long convolutions share: their time, and their only state, which is every input so far."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from based_jax.dims import BD, BTD, SegmentIds
from based_jax.errors import UserError
from based_jax.nn.cache import TokenCache
from based_jax.ops import segments
from based_jax.ops.long_conv import long_conv

LONGEST_FILTER = 2**24  # a table of time has a row for each lag

Kernel = Float[Array, "_ D"]


def check_length(length: int, l_max: int) -> None:
    """Raise UserError for a sequence that is longer than the filter."""
    if length > l_max:
        raise UserError(f"The sequence has {length} tokens; the filter is l_max = {l_max} long.")


def empty_history(batch: int, max_len: int, channels: int) -> TokenCache:
    """Return the fp32 inputs before the first of up to `max_len` tokens."""
    return TokenCache.empty(jnp.zeros((batch, max_len, channels), jnp.float32))


def convolve_on(
    u: BTD, history: TokenCache, kernel: Kernel, segment_ids: SegmentIds | None, impl: str
) -> tuple[BTD, TokenCache]:
    """Return the convolution at the next tokens of a sequence and the history after them.

    `kernel` has as many rows as the history has slots.
    """
    history.check_room(u.shape[1], segment_ids)
    past, there = history.in_order()
    ids, present = None, jnp.ones(u.shape[:2], bool)
    if segment_ids is not None:
        numbers = segments.numbered(segment_ids)
        ids, present = jnp.concatenate([there.astype(numbers.dtype), numbers], axis=1), numbers != 0
    inputs = jnp.concatenate([jnp.where(there[..., None], past, 0.0), u.astype(jnp.float32)], axis=1)
    taps = jnp.pad(kernel, [(0, u.shape[1]), (0, 0)])  # lags that no pair of cached and new tokens has
    y = long_conv(inputs, taps, segment_ids=ids, impl=impl)[:, history.slots :]
    places, _ = segments.positions(segment_ids, history.length, u.shape[1])
    return history.held(y.astype(u.dtype), places, present), history.extend(u, segment_ids)


def convolve_step(u: BD, history: TokenCache, kernel: Kernel) -> tuple[BD, TokenCache]:
    """Return the convolution at one token, a sum over all inputs so far, and the history after it."""
    place, history = history.length, history.append(u)
    lag = (place[:, None] - jnp.arange(history.slots)[None]) % history.slots
    y = jnp.sum(jnp.where(history.visible()[..., None], history.tokens * kernel[lag], 0.0), axis=1)
    return history.held(y.astype(u.dtype), place), history


def time_embedding(l_max: int) -> Float[Array, "_ 3"]:
    """Return [t, cos wt, -sin wt] for each lag, t from 0 to 1 and one slow frequency (appendix D.3)."""
    angle = 1e-4 * 2 * math.pi * np.arange(l_max) / l_max
    return jnp.asarray(np.stack([np.linspace(0, 1, l_max), np.cos(angle), -np.sin(angle)], axis=1), jnp.float32)
