"""Mamba-2's state space in Mamba's Hopper kernels, with the head's step and rate in each of its channels."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from based_jax.ops.hopper import selective_scan

BTHP = Float[Array, "B T H P"]
BHNP = Float[Array, "B H N P"]


def supports(x, dt, A, B, C, state, segment_ids) -> str | None:
    """Return why the kernels cannot run this call, or None."""
    if B.shape[2] > 1:
        return f"B and C must be of one group, and are of {B.shape[2]}"
    channels = x.shape[2] * x.shape[3]
    u = jax.ShapeDtypeStruct((*x.shape[:2], channels), x.dtype)
    return selective_scan.supports((u,), jax.ShapeDtypeStruct((channels, B.shape[3]), jnp.float32), state, segment_ids)


def compute(x, dt, A, B, C, state, segment_ids) -> tuple[BTHP, BHNP]:
    """Return y and the state after the last token, each device for its rows and all heads."""
    (batch, time, heads, width), states = x.shape, B.shape[-1]
    dt, A = jnp.repeat(dt, width, axis=-1), jnp.repeat(A, width)
    if state is not None:
        state = jnp.swapaxes(state, 2, 3).reshape(batch, -1, states)
    xs = x.reshape(batch, time, -1), dt, B[:, :, 0], C[:, :, 0]
    y, after = selective_scan.compute(xs, jnp.broadcast_to(A[:, None], (A.size, states)), state, segment_ids)
    return y.reshape(x.shape), jnp.swapaxes(after.reshape(batch, heads, width, states), 2, 3)
