"""What mixers with long convolutions share: their time, and their only state, which is every input so far.

The state is a KVCache of inputs without values.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from based_jax.dims import BD, BT, BTD
from based_jax.errors import UserError
from based_jax.nn.cache import KVCache
from based_jax.ops.long_conv import long_conv

Kernel = Float[Array, "_ D"]


def check_length(length: int, l_max: int) -> None:
    """Raise UserError for a sequence that is longer than the filter."""
    if length > l_max:
        raise UserError(f"The sequence has {length} tokens; the filter is l_max = {l_max} long.")


def empty_history(batch: int, max_len: int, channels: int) -> KVCache:
    """Return the fp32 inputs before the first of up to `max_len` tokens."""
    k = jnp.zeros((batch, max_len, 1, channels), jnp.float32)
    return KVCache(k, k[..., :0], jnp.zeros((), jnp.int32), jnp.zeros((batch,), jnp.int32))


def convolve_on(u: BTD, history: KVCache, kernel: Kernel, segment_ids: BT | None, impl: str) -> tuple[BTD, KVCache]:
    """Return the convolution at the next tokens of a sequence and the history after them.

    `kernel` has as many rows as the history has slots.
    """
    ids = jnp.ones(u.shape[:2], jnp.int32) if segment_ids is None else segment_ids
    inputs = jnp.concatenate([history.in_order().k[:, :, 0], u.astype(jnp.float32)], axis=1)
    both_ids = jnp.concatenate([history.past_ids(ids), ids], axis=1)
    taps = jnp.pad(kernel, [(0, u.shape[1]), (0, 0)])  # lags that no pair of cached and new tokens has
    y = long_conv(inputs, taps, segment_ids=both_ids, impl=impl)[:, history.slots :]
    new = u[:, :, None]
    return y.astype(u.dtype), history.extend(new, new[..., :0], ids)


def convolve_step(u: BD, history: KVCache, kernel: Kernel) -> tuple[BD, KVCache]:
    """Return the convolution at one token, a sum over all inputs so far, and the history after it."""
    new = u[:, None]
    history = history.append(new, new[..., :0])
    lag = (history.length - 1 - jnp.arange(history.slots)) % history.slots
    inputs = jnp.where(history.visible()[..., None], history.k[:, :, 0], 0.0)
    y = jnp.einsum("BSD,SD->BD", inputs, kernel[lag], precision=jax.lax.Precision.HIGHEST)
    return y.astype(u.dtype), history


def time_embedding(l_max: int) -> Float[Array, "_ 3"]:
    """Return [t, cos wt, -sin wt] for each lag, t from 0 to 1 and one slow frequency (appendix D.3)."""
    angle = 1e-4 * 2 * math.pi * np.arange(l_max) / l_max
    return jnp.asarray(np.stack([np.linspace(0, 1, l_max), np.cos(angle), -np.sin(angle)], axis=1), jnp.float32)
