"""Mamba-2's state space in Mamba's Hopper kernels, with the head's step and rate in each of its channels."""

import einops
import jax
import jax.numpy as jnp

from based_jax.ops.calls import BHNP, BTHP, SSDCall
from based_jax.ops.hopper import selective_scan


def supports(call: SSDCall) -> str | None:
    """Return why the kernels cannot run this call, or None."""
    (batch, time, heads, width), (*_, groups, states) = call.x.shape, call.B.shape
    if groups > 1:
        return f"B and C must be of one group, and are of {groups}"
    u = jax.ShapeDtypeStruct((batch, time, heads * width), call.x.dtype)
    A = jax.ShapeDtypeStruct((heads * width, states), jnp.float32)
    return selective_scan.supports((u,), A, call.state, call.segment_ids)


def compute(call: SSDCall) -> tuple[BTHP, BHNP]:
    """Return y and the state after the last token, each device for its rows and all heads."""
    (*_, heads, width), states = call.x.shape, call.B.shape[-1]
    u = einops.rearrange(call.x, "B T H P -> B T (H P)")
    dt = einops.repeat(call.dt, "B T H -> B T (H P)", P=width)
    A = einops.repeat(call.A, "H -> (H P) N", P=width, N=states)
    state = None if call.state is None else einops.rearrange(call.state, "B H N P -> B (H P) N")
    y, state = selective_scan.compute((u, dt, call.B[:, :, 0], call.C[:, :, 0]), A, state, call.segment_ids)
    y = einops.rearrange(y, "B T (H P) -> B T H P", H=heads)
    return y, einops.rearrange(state, "B (H P) N -> B H N P", H=heads)
